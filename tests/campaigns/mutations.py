"""Damaged and hostile files: each file that a stage reads is mutated at random, thousands of times, and read again. A
case is good when the content read is the one that was written, or a UserError is raised; a forged file, whose checksums
were made right again, may also be accepted for what it says, but must not raise anything else, run code or take memory.
"""

import collections
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import warnings
import zipfile
from contextlib import ExitStack, redirect_stdout
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
import partition_data
import train_deposit
import train_scratch
import withdraw
from analysis.memory import write_tables
from analysis.table1 import table1_columns
from datasets import load_images, make_partition, read_partition
from datasets.cache import FOLDER
from datasets.cub import ARCHIVE, NAME, TABLES
from datasets.sources import IMAGE_EXTENSIONS
from models.files import counts_of, load_network, network_of, read
from utils.checkpoint import checksum, sealed, write_atomically
from utils.cli import bounded, make_parser, run
from utils.errors import UserError
from utils.metrics import read_metrics
from utils.run import TrainingRun, current_commit, make_optimizer, refuse_other_settings
from utils.runtime import Runtime

SIZE = 12  # of the images
MEMORY = 2 << 30  # bytes of address space beyond what is taken at the start
SECONDS = 60  # for one case
# Values that no stage writes where they are put.
ODD = [None, True, 0, -1, 1.5, math.nan, math.inf, 2**70, 10**400, "", "../../x", "x" * 5000, "\ud800", [], [[]], {},
       {"x": 1}, {"1": [None]}, [0, 0]]


class Subject(NamedTuple):
    """A file to mutate. read() gives a string that stands for all that was read of it; kinds: mutations beyond those
    of bytes; vouched: whether something written before tells how its content should be."""

    path: str
    read: collections.abc.Callable
    kinds: tuple = ()
    vouched: bool = True


# mutations of bytes

def _block(data, rng):
    start = rng.randrange(len(data))
    return start, min(len(data), start + 1 + int(len(data) ** rng.random()))


def flip(data, rng):
    data = bytearray(data)
    for _ in range(2 ** rng.randrange(4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(data, rng):
    return data[:rng.randrange(len(data))]


def delete(data, rng):
    start, end = _block(data, rng)
    return data[:start] + data[end:]


def insert(data, rng):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(2 ** rng.randrange(12)) + data[at:]


def repeat(data, rng):
    start, end = _block(data, rng)
    return data[:end] + data[start:]


def swap(data, rng):
    (a, b), (c, d) = sorted((_block(data, rng), _block(data, rng)))
    b = min(b, c)
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def blank(data, rng):
    start, end = _block(data, rng)
    return data[:start] + bytes([rng.choice((0, 255))]) * (end - start) + data[end:]


BYTES = (flip, truncate, delete, insert, repeat, swap, blank)


# mutations of structure

def _edit_tree(tree, rng):
    """Change, remove or add one thing somewhere in dicts and lists of plain types and tensors, in place."""
    places = []

    def walk(node):
        for key in (node if isinstance(node, dict) else range(len(node))):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    what = rng.randrange(5)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node["odd"] = rng.choice(ODD)
    elif isinstance(node[key], torch.Tensor):
        node[key] = _odd_tensor(node[key], rng)
    elif what == 2 and isinstance(node[key], (int, float)):
        node[key] = rng.choice((node[key] + 1, -node[key], node[key] * 1.5, rng.randrange(-9, 99)))
    elif what == 3:
        other, name = rng.choice(places)
        node[key] = other[name]
    else:
        node[key] = rng.choice(ODD)


def _odd_tensor(tensor, rng):
    return rng.choice((
        lambda: torch.full_like(tensor, 3), lambda: tensor.double(), lambda: tensor[None], lambda: tensor.flatten()[:1],
        lambda: torch.zeros(1).expand(2**40),  # four bytes that claim to be four terabytes
        lambda: torch.zeros(1).expand(2**20, 2**20, 2**20), lambda: torch.empty(2**40, device="meta"),
        lambda: torch.zeros(3, 3).to_sparse(), lambda: tensor.to(torch.complex64), lambda: torch.zeros(0),
        lambda: torch.full(tensor.shape, math.nan), lambda: rng.choice(ODD)))()


def _edited_checkpoint(data, rng, forge):
    content = torch.load(io.BytesIO(data), weights_only=True)
    _edit_tree(content, rng)
    if forge:
        try:
            content = sealed(content)
        except Exception:  # the checksum of such a thing cannot be had
            pass
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _edited_json(data, rng, forge):
    texts = data.decode().splitlines() if b"\n{" in data else [data.decode()]  # a log, or one object
    lines = [json.loads(text) for text in texts]
    line = rng.randrange(len(lines))
    _edit_tree(lines[line], rng)
    if forge:
        lines[line] = sealed(lines[line])
    return ("\n".join(map(json.dumps, lines)) + "\n").encode()


def edit(data, rng):
    return (_edited_checkpoint if data.startswith(b"PK") else _edited_json)(data, rng, forge=False)


def forge(data, rng):
    return (_edited_checkpoint if data.startswith(b"PK") else _edited_json)(data, rng, forge=True)


def _rezipped(data, change, compression=zipfile.ZIP_STORED):
    """A checkpoint's archive with its pickle changed, and right sums of its members."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return file.getvalue()


def unpickle(data, rng):
    """The pickle of a checkpoint mutated, within a sound archive."""
    return _rezipped(data, lambda content: rng.choice(BYTES)(content, rng))


def bomb(data, rng):
    """A checkpoint with a compressed member that is much larger than the file."""
    return _rezipped(data, lambda content: content + bytes(2 ** rng.randrange(20, 25)), zipfile.ZIP_DEFLATED)


def header(data, rng):
    """A size in a zip archive's headers made huge."""
    data = bytearray(data)
    signature, offsets = rng.choice(((b"PK\x01\x02", (20, 24)), (b"PK\x03\x04", (18, 22)), (b"PK\x05\x06", (12, 16))))
    places = [i for i in range(len(data)) if data.startswith(signature, i)]
    at = rng.choice(places) + rng.choice(offsets)
    data[at:at + 4] = rng.choice((2**32 - 1, 2**31, rng.randrange(2**32))).to_bytes(4, "little")
    return bytes(data)


class _Call:
    def __reduce__(self):
        return os.mkdir, (MARKER,)


MARKER = os.path.join(tempfile.gettempdir(), "lirf-code-was-run")


def code(data, rng):
    """A pickle that makes a folder when it is read: alone, in a torch archive, or in place of an entry."""
    if not data.startswith(b"PK") or rng.random() < 0.2:
        return pickle.dumps(_Call())
    content = torch.load(io.BytesIO(data), weights_only=True)
    content[rng.choice(list(content))] = _Call()
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


CHECKPOINT = (edit, forge, unpickle, bomb, header, code)
JSON = (edit, forge)


# what is read

def _stage(script, *flags):
    with redirect_stdout(io.StringIO()):
        script.main(script.get_args_parser().parse_args([str(flag) for flag in flags]))


def _digest(images):
    digest = hashlib.sha256(str(images.labels.tolist()).encode())
    for photograph in getattr(images.images, "photographs", [images.images]):
        digest.update(f"{tuple(photograph.shape)}".encode())
        digest.update(np.ascontiguousarray(photograph))
    return digest.hexdigest()


def _uncached(data_dir):
    for cache in (os.path.join(data_dir, FOLDER), os.path.join(data_dir, NAME, FOLDER)):
        shutil.rmtree(cache, ignore_errors=True)


def _images(partition, data_dir, cached=False):
    def load():
        if not cached:
            _uncached(data_dir)
        return "".join(_digest(load_images(partition, data_dir, split, partition.classes("all")))
                       for split in ("train", "test"))

    return load


def make_images(root, rng, endings):
    """An image folder of three classes, with files of all `endings`."""
    for split, name in itertools.product(("train", "test"), ("ant", "bee", "cow")):
        os.makedirs(os.path.join(root, split, name))
        for i, ending in enumerate(endings):
            pixels = rng.integers(0, 256, (SIZE + i % 2, SIZE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(root, split, name, f"{i}{ending}"))
    return root


def checkpoint_subjects(root, data):
    """The files of a finished run of the four stages, and those of a deposit that was stopped after its first epoch."""
    save = os.path.join(root, "run")
    running = ["--save_path", save, "--data_dir", data, "--device", "cpu", "--precision", "fp32"]
    training = [*running, "--epochs", "2", "--batch_size", "16"]
    paths = {name: os.path.join(save, name) for name in ("partition.json", "original.pt", "target.pt", "deposit.pt",
                                                         "recover.pt", "metrics.json", "deposit_log.jsonl",
                                                         "deposit_state.pt")}
    _stage(partition_data, "--dataset", "folder", "--data_dir", data, "--deposit_classes", "bee", "--out",
           paths["partition.json"])
    _stage(train_scratch, *training, "--arch", "resnet8")
    train_one_epoch, reached = train_deposit.train_one_epoch, []

    def stopped(networks, optimizer, images, runtime, run, args, epoch):
        reached[:] = networks, run.settings, runtime, args
        if epoch == 1:
            raise KeyboardInterrupt
        return train_one_epoch(networks, optimizer, images, runtime, run, args, epoch)

    with mock.patch.object(train_deposit, "train_one_epoch", stopped):
        try:
            _stage(train_deposit, *training)
        except KeyboardInterrupt:
            pass
    networks, settings, runtime, args = reached
    unfinished = os.path.join(root, "unfinished")
    shutil.copytree(save, unfinished)
    _stage(train_deposit, *training)
    _stage(withdraw, *running)
    partition = read_partition(paths["partition.json"])

    def original():
        content, of_content = read(paths["original.pt"], "original")
        network_of(content, of_content, paths["original.pt"])
        counts_of(content, paths["original.pt"])
        refuse_other_settings(save, "original", content["settings"], content["settings"])
        return checksum(content)

    def both():
        network, _, content = withdraw.load_recover_network(paths["target.pt"], paths["deposit.pt"], "calibrated")
        return checksum({"tensors": network.state_dict(), "rest": [network.calibration, content["checksum"]]})

    def recover():
        network, of_content = load_network(paths["recover.pt"])
        return checksum({"tensors": network.state_dict(), "rest": [network.calibration, of_content.as_dict()]})

    def figures():
        metrics = read_metrics(paths["metrics.json"], partition)
        return checksum({"metrics": metrics, "columns": table1_columns([paths["metrics.json"]])})

    def resumed():
        """What a deposit goes on with: weights, momentum, epoch, and the log up to there."""
        with redirect_stdout(io.StringIO()), mock.patch("utils.run.SummaryWriter"):
            training = TrainingRun(unfinished, "deposit", settings, runtime, args.epochs)
            optimizer = make_optimizer(networks.parameter_groups(), args)
            training.track(optimizer, **networks.trained())
            epoch = next(training.remaining_epochs())
        with open(os.path.join(unfinished, "deposit_log.jsonl"), "rb+") as file:
            *log, last = file.readlines()
            file.truncate(file.tell() - len(last))  # this start's own line
        momentum = {str(i): s["momentum_buffer"] for i, s in optimizer.state_dict()["state"].items()}
        return checksum({"tensors": {**networks.state_dict(), **momentum}, "epoch": epoch, "log": str(log)})

    return {
        "original.pt": Subject(paths["original.pt"], original, CHECKPOINT),
        "target.pt": Subject(paths["target.pt"], both, CHECKPOINT),
        "deposit.pt": Subject(paths["deposit.pt"], both, CHECKPOINT),
        "recover.pt": Subject(paths["recover.pt"], recover, CHECKPOINT),
        "deposit_state.pt": Subject(os.path.join(unfinished, "deposit_state.pt"), resumed, CHECKPOINT),
        "partition.json": Subject(paths["partition.json"], lambda: checksum(read_partition(
            paths["partition.json"]).as_dict()), JSON),
        "metrics.json": Subject(paths["metrics.json"], figures, JSON),
        "deposit_log.jsonl": Subject(os.path.join(unfinished, "deposit_log.jsonl"), resumed, (edit,)),
    }


def image_subjects(data):
    """Images and caches of an image folder: as a later stage reads them, whom the manifest tells what to expect, and as
    the first reads them, whom nothing tells."""
    partition = make_partition("folder", data, listed="bee")
    first = {ending: os.path.join(data, "train", "ant", name) for name in os.listdir(os.path.join(data, "train", "ant"))
             for ending in [os.path.splitext(name)[1]]}

    def partitioned():
        _uncached(data)
        return checksum(make_partition("folder", data, listed="bee").as_dict())

    caches = os.path.join(data, FOLDER)
    _images(partition, data)()
    return {
        **{f"image{ending}": Subject(path, _images(partition, data)) for ending, path in first.items()},
        **{f"image{ending}, partition": Subject(path, partitioned, (code,), vouched=False)
           for ending, path in first.items()},
        # of a class none of whose images is mutated: their times are part of its name
        "cache": Subject(os.path.join(caches, sorted(os.listdir(caches))[-1]), _images(partition, data, cached=True)),
    }


def cifar_subjects(root, rng, patches):
    """CIFAR-10 as torchvision downloads it, of 20 images, with torchvision told the sums of this stand-in."""
    data, lists = os.path.join(root, "cifar"), {}
    folder = os.path.join(data, "cifar-10-batches-py")
    os.makedirs(folder)

    def write(name, content):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(pickle.dumps(content))
        with open(os.path.join(folder, name), "rb") as file:
            return [name, hashlib.md5(file.read()).hexdigest()]

    for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        lists[f"{split}_list"] = [write(name, {"data": rng.integers(0, 256, (20, 3072)).astype(np.uint8),
                                               "labels": [i % 10 for i in range(20)]}) for name in names]
    _, md5 = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    lists["meta"] = {"filename": "batches.meta", "key": "label_names", "md5": md5}
    archive = os.path.join(data, "cifar-10-python.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    with open(archive, "rb") as file:
        lists["tgz_md5"] = hashlib.md5(file.read()).hexdigest()
    lists["url"] = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # nothing is there
    for name, value in lists.items():
        patches.enter_context(mock.patch.object(torchvision.datasets.CIFAR10, name, value))
    with redirect_stdout(io.StringIO()):
        partition = make_partition("cifar10", data, seed=0)
    load = _images(partition, data)

    def unpacked():
        shutil.rmtree(folder)
        with redirect_stdout(io.StringIO()):
            return _digest(load_images(partition, data, "train", [0], download=True))

    return {"CIFAR batch": Subject(os.path.join(folder, "data_batch_2"), load, (code,)),
            "CIFAR archive": Subject(archive, unpacked, (code,))}


def cub_subjects(root, rng):
    """CUB-200-2011's layout with three classes: archive, tables, image and cache."""
    data, inner = os.path.join(root, "cub"), os.path.join(root, "cub", NAME)
    photographs = []
    for c, i in itertools.product((3, 7, 9), range(3)):
        name = f"{c:03}.Bird_{c}"
        os.makedirs(os.path.join(inner, "images", name), exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE + i, 2 * SIZE, 3)).astype(np.uint8)).save(
            os.path.join(inner, "images", name, f"{i}.jpg"))
        photographs.append((c, name, f"{i}.jpg", i < 2))
    write_tables(inner, photographs)
    archive = os.path.join(data, ARCHIVE)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inner, NAME)
    partition = make_partition("cub200", data, listed="007.Bird_7", image_size=SIZE)
    load = _images(partition, data)

    def unpacked():
        shutil.rmtree(inner)
        return load()

    load()
    cache = os.path.join(inner, FOLDER)
    return {
        "CUB cache": Subject(os.path.join(cache, sorted(os.listdir(cache))[0]), _images(partition, data, cached=True)),
        "CUB image": Subject(os.path.join(inner, "images", "007.Bird_7", "1.jpg"), load),
        **{f"CUB {name}": Subject(os.path.join(inner, name), load) for name in TABLES},
        "CUB archive": Subject(archive, unpacked, (code,)),
    }


# the campaign

def judge(subject, kind, expected):
    """(verdict, detail) of reading a mutated file: same, refused, accepted, or wrong."""
    signal.alarm(SECONDS)
    try:
        found = subject.read()
    except (UserError, OSError) as error:  # both of which the command line tells in one line
        verdict, detail = "refused", str(error)
    except Exception as error:
        verdict, detail = "wrong", f"{type(error).__name__}: {error}"
    else:
        detail = ""
        verdict = "same" if found == expected else "accepted" if kind is forge or not subject.vouched else "wrong"
        if verdict == "wrong":
            detail = "another content was accepted"
    finally:
        signal.alarm(0)
    if os.path.isdir(MARKER):
        os.rmdir(MARKER)
        return "wrong", "code was run"
    return verdict, detail


def campaign(root, cases, seed):
    """Yield (name of the file, mutation, case, verdict, detail) for each of `cases` mutations, spread evenly over the
    files and mutations of small runs that are made below the folder `root`."""
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    endings = [ending for ending in IMAGE_EXTENSIONS if ending not in (".jpeg", ".tif")]
    data = make_images(os.path.join(root, "images"), pixels, endings)

    def too_slow(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    with ExitStack() as patches:
        patches.callback(signal.signal, signal.SIGALRM, before)
        subjects = {**checkpoint_subjects(root, data), **image_subjects(data), **cifar_subjects(root, pixels, patches),
                    **cub_subjects(root, pixels)}
        contents = {}
        for name, subject in subjects.items():
            with open(subject.path, "rb") as file:
                contents[name] = file.read()
        expected = {name: subject.read() for name, subject in subjects.items()}
        choices = [(name, kind) for name, subject in subjects.items() for kind in (*BYTES, *subject.kinds)]
        rng.shuffle(choices)
        for case, (name, kind) in zip(range(cases), itertools.cycle(choices)):
            _write(subjects[name].path, kind(contents[name], rng))
            verdict, detail = judge(subjects[name], kind, expected[name])
            _write(subjects[name].path, contents[name])
            yield name, kind.__name__, case, verdict, detail


def _write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--cases", type=bounded(int, 1), default=10_000, help="mutations, spread evenly")
    parser.add_argument("--seed", type=bounded(int, 0, 2**31 - 1), default=0, help="seed of the mutations")
    parser.add_argument("--out", default=None, help="log to write: a JSON object for each kind of file and mutation")
    return parser


def main(args):
    warnings.filterwarnings("ignore", category=UserWarning)  # of PIL and torch, of what is damaged
    runtime = Runtime(train_scratch.get_args_parser().parse_args(["--device", "cpu", "--precision", "fp32"]))
    with open("/proc/self/statm", encoding="utf-8") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    counts, failures = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as root:
        for name, kind, case, verdict, detail in campaign(root, args.cases, args.seed):
            counts[name, kind][verdict] += 1
            if verdict == "wrong":
                failures.append({"file": name, "mutation": kind, "case": case, "wrong": detail})
                print(failures[-1], flush=True)
            if (case + 1) % 500 == 0:
                print(f"{case + 1} of {args.cases} cases, {len(failures)} wrong", flush=True)
    head = {"command": ["mutations.py", *sys.argv[1:]], "commit": current_commit(), **runtime.describe()}
    lines = [head, *failures, *({"file": name, "mutation": kind, "cases": sum(c.values()), **c}
                                for (name, kind), c in sorted(counts.items()))]
    if args.out:
        write_atomically(args.out, lambda file: file.write("".join(json.dumps(line) + "\n" for line in lines).encode()))
    if failures:
        raise UserError(f"{len(failures)} of {args.cases} mutated files were read wrongly")
    print(f"{args.cases} mutated files, none was read wrongly")


if __name__ == "__main__":
    run(main, get_args_parser())
