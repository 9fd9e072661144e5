"""Stand-in data for the tests: an image folder, CIFAR-10's archive, CUB-200-2011's layout."""

import contextlib
import hashlib
import http.server
import os
import pickle
import tarfile
import tempfile
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.cub import ARCHIVE, NAME

CLASSES = ["ant", "bee", "cow", "dog"]
MARKER = os.path.join(tempfile.gettempdir(), "lirf-code-was-run")


class Call:
    """Makes the folder MARKER when its pickle is read by a reader that runs code."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


def make_folder(root, classes=CLASSES, train=12, test=5, size=16, seed=0, endings=(".png",)):
    """An image folder whose classes differ in colour, so that a tiny network can learn them."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        colour = np.array([(c & 1) * 160, (c >> 1 & 1) * 160, c * 30]) + 40
        for split, count in (("train", train), ("test", test)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03}{endings[i % len(endings)]}")
    return root


def make_cifar(root, images=20):
    """cifar-10-batches-py/ and its archive in CIFAR-10's own format, `images` a batch; returns the sums that
    torchvision's CIFAR10 is to believe in, {attribute: value}."""
    rng, sums, folder = np.random.default_rng(0), {}, root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    contents = {name: {"data": rng.integers(0, 256, (images, 3072), dtype=np.uint8),
                       "labels": [i % 10 for i in range(images)]}
                for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")}
    for name, content in {**contents, "batches.meta": {"label_names": [f"class{i}" for i in range(10)]}}.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return {"tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
            "train_list": [[name, sums[name]] for name in contents if name != "test_batch"],
            "test_list": [["test_batch", sums["test_batch"]]],
            "meta": {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}}


def make_cub(root, ids):
    """CUB_200_2011/ below root, in the official layout: two training and one test photograph a class; ids: class ids,
    which may have gaps."""
    rng, folder = np.random.default_rng(0), root / NAME
    tables = {"images": [], "image_class_labels": [], "train_test_split": [], "classes": []}
    for c in ids:
        name = f"{c:03}.Bird_{c}"
        (folder / "images" / name).mkdir(parents=True)
        tables["classes"].append(f"{c} {name}")
        for i in range(3):
            size = (int(rng.integers(20, 40)), int(rng.integers(20, 40)), 3)
            pixels = np.clip(rng.normal(40 + 37 * c % 170, 20, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
            number = len(tables["images"]) + 1
            tables["images"].append(f"{number} {name}/{i}.png")
            tables["image_class_labels"].append(f"{number} {c}")
            tables["train_test_split"].append(f"{number} {int(i < 2)}")
    for table, lines in tables.items():
        (folder / f"{table}.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_cub_archive(folder, ids, outside=None):
    """The archive of what make_cub makes, alone in a folder; outside: name of an empty file put in before."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made, tarfile.open(folder / ARCHIVE, "w:gz") as tar:
        if outside:
            tar.addfile(tarfile.TarInfo(outside))
        tar.add(make_cub(Path(made), ids), NAME)
    return folder / ARCHIVE


@contextlib.contextmanager
def served(folder):
    """Serve a folder over HTTP on this machine's loopback, as a stand-in for a download; gives its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
