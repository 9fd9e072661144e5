"""How much host memory a set of photographs of CUB-200-2011's size takes: a made-up one in its layout is decoded into
the cache, then opened from it and passed over once in batches, each in a process of its own."""

import json
import os
import resource
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from analysis.benchmark.speed import own_process
from datasets.cub import CubSource
from utils.cli import bounded, make_parser, run
from utils.files import save_json
from utils.runtime import Runtime

CLASSES, WIDTH, HEIGHT = 200, 500, 375  # CUB-200-2011's classes, and its most frequent size
KINDS = 20  # different pictures; the files beyond are links to these, which decode just so


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=bounded(int, 2 * CLASSES), default=11_788, help="photographs in all")
    parser.add_argument("--image_size", type=bounded(int, 8), default=224, help="side of the squares cut from them")
    parser.add_argument("--batch_size", type=bounded(int, 1), default=64, help="images a batch")
    parser.add_argument("--out", default=None, help="JSON file to write as well")
    return parser


def host_runtime():
    """A stage's Runtime on the CPU, which also sets how the process keeps freed memory."""
    return Runtime(device="cpu")


def write_tables(root, photographs):
    """The text files of CUB-200-2011's archive. photographs: (class id, class, file, whether it trains), one each."""
    numbered = list(enumerate(photographs, 1))
    classes = {c: name for c, name, _, _ in photographs}
    tables = {"images": [f"{i} {name}/{file}" for i, (_, name, file, _) in numbered],
              "image_class_labels": [f"{i} {c}" for i, (c, _, _, _) in numbered],
              "train_test_split": [f"{i} {int(trains)}" for i, (_, _, _, trains) in numbered],
              "classes": [f"{c} {name}" for c, name in sorted(classes.items())]}
    for name, lines in tables.items():
        with open(os.path.join(root, f"{name}.txt"), "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def make_photographs(root, count):
    """A data set in the layout of CUB-200-2011, half of it test images."""
    rng = np.random.default_rng(0)
    first, photographs = [], []
    for c in range(1, CLASSES + 1):
        os.makedirs(os.path.join(root, "images", f"{c:03}"))
    for i in range(1, count + 1):
        c = 1 + i % CLASSES
        path = os.path.join(root, "images", f"{c:03}", f"{i}.jpg")
        if len(first) < KINDS:
            coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8))
            coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=90)
            first.append(path)
        else:
            os.link(first[i % KINDS], path)
        photographs.append((c, f"{c:03}", f"{i}.jpg", i // CLASSES % 2 == 1))
    write_tables(root, photographs)


def measure(root, args):
    """{images, seconds, peak_memory_bytes} of opening both splits and making every batch once."""
    host_runtime()
    started, count = time.perf_counter(), 0
    source, kept = CubSource(root, args.image_size), []
    for split in ("train", "test"):
        images, _ = source.load(split, range(CLASSES))
        for rows in torch.arange(len(images)).split(args.batch_size):
            count += len(images.batch(rows))
        kept.append(images)  # a stage holds both
    return {"images": count, "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def main(args):
    report = {**host_runtime().describe(), "image_size": args.image_size, "photographs": f"{WIDTH}x{HEIGHT}"}
    with tempfile.TemporaryDirectory() as root:
        make_photographs(root, args.images)
        for name in ("decoded", "from_cache"):
            with own_process() as process:
                report[name] = process.submit(measure, root, args).result()
    print(json.dumps(report, indent=2))
    if args.out:
        save_json(args.out, report)


if __name__ == "__main__":
    run(main, get_args_parser())
