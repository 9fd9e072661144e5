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
import tarfile
import tempfile
import warnings
import zipfile
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torchvision
from conftest import TINY, WITHDRAW, call, succeed
from fixtures import make_cifar, make_cub, make_folder

import train_deposit
import withdraw
from analysis.table1 import load_runs
from datasets import Partition, load_images, make_partition, read_partition
from datasets.cache import FOLDER
from datasets.cub import ARCHIVE, NAME, TABLES
from datasets.folder import IMAGE_EXTENSIONS
from models.checkpoints import counts_of, load_network, network_of, read
from utils.checkpoint import checksum
from utils.cli import bounded, make_parser, run
from utils.errors import UserError
from utils.metrics import read_metrics
from utils.optim import make_optimizer
from utils.run import TrainingRun, refuse_other_settings
from utils.tables import table1_rows

SIZE = 12  # of the images
SYNONYMS = (".jpeg", ".jpe", ".jfif", ".tif", ".pnm", ".pbm")  # endings of formats that have another
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


def blank(data, rng):
    start, end = _block(data, rng)
    return data[:start] + bytes([rng.choice((0, 255))]) * (end - start) + data[end:]


BYTES = (flip, truncate, delete, insert, blank)


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


def _as_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _edited_checkpoint(data, rng, forge):
    content = torch.load(io.BytesIO(data), weights_only=True)
    _edit_tree(content, rng)
    if forge:
        with suppress(Exception):  # the checksum of such a thing cannot be had
            content["checksum"] = checksum(content)
    return _as_bytes(content)


def _edited_json(data, rng, forge):
    texts = data.decode().splitlines() if b"\n{" in data else [data.decode()]  # a log, or one object
    lines = [json.loads(text) for text in texts]
    line = rng.randrange(len(lines))
    _edit_tree(lines[line], rng)
    if forge:
        with suppress(Exception):  # nor can such a partition's
            fields = {name: value for name, value in lines[line].items() if name not in ("format", "hash")}
            lines[line]["hash"] = Partition(**fields).hash
    return ("\n".join(map(json.dumps, lines)) + "\n").encode()


def edit(data, rng, forge=False):
    return (_edited_checkpoint if data.startswith(b"PK") else _edited_json)(data, rng, forge)


def forge(data, rng):
    return edit(data, rng, forge=True)


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
    return _as_bytes(content)


CHECKPOINT = (edit, forge, unpickle, bomb, header, code)
JSON = (edit, forge)


# what is read

def _digest(images):
    digest = hashlib.sha256(str(images.labels.tolist()).encode())
    for photograph in getattr(images.images, "photographs", [images.images]):
        digest.update(f"{tuple(photograph.shape)}".encode())
        digest.update(np.ascontiguousarray(photograph))
    return digest.hexdigest()


def _uncached(data):
    for cache in (data / FOLDER, data / NAME / FOLDER):
        shutil.rmtree(cache, ignore_errors=True)


def _images(partition, data, cached=False):
    def load():
        if not cached:
            _uncached(data)
        return "".join(_digest(load_images(partition, str(data), split, partition.classes("all")))
                       for split in ("train", "test"))

    return load


def checkpoint_subjects(root, data):
    """The files of a finished run of the four stages, and those of a deposit that was stopped after its first epoch."""
    save, unfinished = root / "run", root / "unfinished"
    running = ["--save_path", save, "--data_dir", data]
    deposit = [*running, "--split_at", "2", *TINY]
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "bee", "--out",
            save / "partition.json")
    succeed("train_scratch.py", *running, *TINY, "--arch", "resnet8")
    train_one_epoch, reached = train_deposit.train_one_epoch, []

    def stopped(lirf, parallel, optimizer, images, runtime, training, args, epoch, moved):
        reached[:] = lirf, training.settings, runtime, args
        if epoch == 1:
            raise KeyboardInterrupt(signal.SIGINT)
        return train_one_epoch(lirf, parallel, optimizer, images, runtime, training, args, epoch, moved)

    with mock.patch.object(train_deposit, "train_one_epoch", stopped):
        call("train_deposit.py", *deposit)
    lirf, settings, runtime, args = reached
    shutil.copytree(save, unfinished)
    succeed("train_deposit.py", *deposit)
    succeed("withdraw.py", *running, *WITHDRAW)
    paths = {path.name: str(path) for path in save.iterdir()}
    partition = read_partition(paths["partition.json"])
    withdrawal = withdraw.get_args_parser().parse_args(["--save_path", str(save)])

    def original():
        content, of_content = read(paths["original.pt"], "original")
        network_of(content, of_content, paths["original.pt"])
        counts_of(content, paths["original.pt"])
        refuse_other_settings(save, "original", content["settings"], content["settings"])
        return checksum(content)

    def parts():
        content, _, modules, scale, _ = withdraw.load_parts(withdrawal)
        return checksum({"tensors": modules.state_dict(), "rest": [scale, content["checksum"]]})

    def recover():
        network, of_content = load_network(paths["recover.pt"])
        return checksum({"tensors": network.state_dict(), "rest": [network.scale, of_content.as_dict()]})

    def figures():
        rows = table1_rows(load_runs([paths["metrics.json"]]))
        return json.dumps([read_metrics(paths["metrics.json"], partition), rows])

    def resumed():
        """What a deposit goes on with: weights, momentum, epoch, and the log up to there."""
        with redirect_stdout(io.StringIO()), mock.patch("utils.run.SummaryWriter"):
            training = TrainingRun(str(unfinished), "deposit", settings, runtime, args.epochs)
            optimizer = make_optimizer([{"params": list(part.parameters())} for part in lirf.trained().values()], args)
            training.track(optimizer, **lirf.trained())
            epoch = next(training.remaining_epochs())
        with open(unfinished / "deposit_log.jsonl", "rb+") as file:
            *log, last = file.readlines()
            file.truncate(file.tell() - len(last))  # what this start has added
        momentum = {str(i): s["momentum_buffer"] for i, s in optimizer.state_dict()["state"].items()}
        return checksum({"tensors": {**lirf.state_dict(), **momentum}, "epoch": epoch, "log": str(log)})

    return {
        "original.pt": Subject(paths["original.pt"], original, CHECKPOINT),
        **{name: Subject(paths[name], parts, CHECKPOINT) for name in ("target.pt", "deposit.pt", "difference.pt")},
        "recover.pt": Subject(paths["recover.pt"], recover, CHECKPOINT),
        "deposit_state.pt": Subject(str(unfinished / "deposit_state.pt"), resumed, CHECKPOINT),
        # The hash is what every later stage compares.
        "partition.json": Subject(paths["partition.json"], lambda: read_partition(paths["partition.json"]).hash, JSON),
        "metrics.json": Subject(paths["metrics.json"], figures, (edit,), vouched=False),
        "deposit_log.jsonl": Subject(str(unfinished / "deposit_log.jsonl"), resumed, (edit,), vouched=False),
    }


def image_subjects(data):
    """Images and caches of an image folder: as a later stage reads them, whom the manifest tells what to expect, and as
    the first reads them, whom nothing tells."""
    partition = make_partition("folder", str(data), listed="bee")
    first = {path.suffix: str(path) for path in (data / "train" / "ant").iterdir()}

    def partitioned():
        _uncached(data)
        return checksum({"tensors": {}, **make_partition("folder", str(data), listed="bee").as_dict()})

    _images(partition, data)()
    return {
        **{f"image{ending}": Subject(path, _images(partition, data)) for ending, path in first.items()},
        **{f"image{ending}, partition": Subject(path, partitioned, (code,), vouched=False)
           for ending, path in first.items()},
        # The times of mutated images are part of their caches' names, so this one is of another class.
        "cache": Subject(str(max((data / FOLDER).iterdir())), _images(partition, data, cached=True)),
    }


def cifar_subjects(root, patches):
    """CIFAR-10 as torchvision downloads it, with torchvision told the sums of this stand-in."""
    for name, value in {**make_cifar(root), "url": "http://127.0.0.1:9/cifar-10-python.tar.gz"}.items():  # not there
        patches.enter_context(mock.patch.object(torchvision.datasets.CIFAR10, name, value))
    with redirect_stdout(io.StringIO()):
        partition = make_partition("cifar10", str(root), seed=0)
    folder = root / "cifar-10-batches-py"

    def unpacked():
        shutil.rmtree(folder, ignore_errors=True)
        with redirect_stdout(io.StringIO()):
            return _digest(load_images(partition, str(root), "train", [0], download=True))

    return {"CIFAR batch": Subject(str(folder / "data_batch_2"), _images(partition, root), (code,)),
            "CIFAR archive": Subject(str(root / "cifar-10-python.tar.gz"), unpacked, (code,))}


def cub_subjects(root):
    """CUB-200-2011's layout with three classes: archive, tables, image and cache."""
    inner = make_cub(root, [3, 7, 9], side=SIZE, ending=".jpg")
    with tarfile.open(root / ARCHIVE, "w:gz") as tar:
        tar.add(inner, NAME)
    partition = make_partition("cub200", str(root), listed="007.Bird_7", image_size=SIZE)
    load = _images(partition, root)

    def unpacked():
        shutil.rmtree(inner, ignore_errors=True)
        return load()

    load()
    return {
        "CUB cache": Subject(str(min((inner / FOLDER).iterdir())), _images(partition, root, cached=True)),
        "CUB image": Subject(str(inner / "images" / "007.Bird_7" / "1.jpg"), load),
        **{f"CUB {name}": Subject(str(inner / name), load) for name in TABLES},
        "CUB archive": Subject(str(root / ARCHIVE), unpacked, (code,)),
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
    """Yield (name of the file, mutation, verdict, detail) for each of `cases` mutations, spread evenly over the
    files and mutations of small runs that are made below the folder `root`."""
    rng = random.Random(seed)
    endings = [ending for ending in IMAGE_EXTENSIONS if ending not in SYNONYMS]
    data = make_folder(root / "images", ["ant", "bee", "cow"], len(endings), len(endings), SIZE, endings=endings)

    def too_slow(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    with ExitStack() as patches:
        patches.callback(signal.signal, signal.SIGALRM, before)
        subjects = {**checkpoint_subjects(root, data), **image_subjects(data),
                    **cifar_subjects(root / "cifar", patches), **cub_subjects(root / "cub")}
        contents = {name: Path(subject.path).read_bytes() for name, subject in subjects.items()}
        expected = {name: subject.read() for name, subject in subjects.items()}
        choices = [(name, kind) for name, subject in subjects.items() for kind in (*BYTES, *subject.kinds)]
        rng.shuffle(choices)
        for name, kind in itertools.islice(itertools.cycle(choices), cases):
            _write(subjects[name].path, kind(contents[name], rng))
            verdict, detail = judge(subjects[name], kind, expected[name])
            _write(subjects[name].path, contents[name])
            if "archive" in name:
                subjects[name].read()  # unpacked again, for the files that lie in it
            yield name, kind.__name__, verdict, detail


def _write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)  # a refused image leaves no folder of caches
    Path(path).write_bytes(content)


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--cases", type=bounded(int, 1), default=10_000, help="mutations, spread evenly")
    parser.add_argument("--seed", type=bounded(int, 0, 2**31 - 1), default=0, help="seed of the mutations")
    return parser


def main(args):
    warnings.filterwarnings("ignore", category=UserWarning)  # of PIL and torch, of what is damaged
    with open("/proc/self/statm", encoding="utf-8") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    verdicts = collections.Counter()
    with tempfile.TemporaryDirectory() as root:
        for name, kind, verdict, detail in campaign(Path(root), args.cases, args.seed):
            verdicts[verdict] += 1
            if verdict == "wrong":
                print(f"{name}, {kind}, case {verdicts.total()}: {detail}", flush=True)
    print(", ".join(f"{verdict}: {count}" for verdict, count in sorted(verdicts.items())))
    if verdicts["wrong"]:
        raise UserError(f"{verdicts['wrong']} of {args.cases} mutated files were read wrongly")


if __name__ == "__main__":
    run(main, get_args_parser())
