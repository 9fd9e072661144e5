"""Damaged and hostile files: each file that a stage reads is mutated at random, thousands of times, and read again. A
case is good when the content read is the one that was written, or a UserError is raised; a forged file, whose checksums
were made right again, may also be accepted for what it says, but must not raise anything else, run code or take memory.
"""

import collections
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
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from conftest import TINY, WITHDRAW, call, succeed
from fixtures import make_folder

import train_deposit
import withdraw
from analysis.table1 import load_runs
from datasets import Partition, load_images, make_partition, read_partition
from datasets.cache import FOLDER
from datasets.folder import IMAGE_EXTENSIONS
from models.checkpoints import counts_of, load_network, network_of, read
from utils.checkpoint import checksum
from utils.errors import UserError
from utils.metrics import read_metrics
from utils.run import refuse_other_settings
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

def flip(data, rng):
    data = bytearray(data)
    for _ in range(2 ** rng.randrange(4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(data, rng):
    return data[:rng.randrange(len(data))]


def splice(data, rng):
    """A block taken out, put in, or overwritten."""
    start = rng.randrange(len(data))
    end = min(len(data), start + 1 + int(len(data) ** rng.random()))
    put = rng.choice((b"", rng.randbytes(2 ** rng.randrange(12)), bytes(end - start), b"\xff" * (end - start)))
    return data[:start] + put + data[rng.choice((start, end)) if put else end:]


BYTES = (flip, truncate, splice)


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
    (node, key), (other, name), what = rng.choice(places), rng.choice(places), rng.randrange(5)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node["odd"] = rng.choice(ODD)
    elif isinstance(node[key], torch.Tensor):
        node[key] = _odd_tensor(node[key], rng)
    elif what == 2 and isinstance(node[key], (int, float)):
        node[key] = rng.choice((node[key] + 1, -node[key], node[key] * 1.5, rng.randrange(-9, 99)))
    else:
        node[key] = other[name] if what == 3 else rng.choice(ODD)


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


def edit(data, rng, forge=False):
    """One entry of a checkpoint, of a JSON object or of a log's line changed; forge: and its checksum made right."""
    if data.startswith(b"PK"):
        content = torch.load(io.BytesIO(data), weights_only=True)
        _edit_tree(content, rng)
        if forge:
            with suppress(Exception):  # the checksum of such a thing cannot be had
                content["checksum"] = checksum(content)
        return _as_bytes(content)
    lines = [json.loads(text) for text in (data.splitlines() if b"\n{" in data else [data])]  # a log, or one object
    line = rng.choice(lines)
    _edit_tree(line, rng)
    if forge:
        with suppress(Exception):  # nor can such a partition's
            line["hash"] = Partition(**{name: line[name] for name in line if name not in ("format", "hash")}).hash
    return ("\n".join(map(json.dumps, lines)) + "\n").encode()


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


class Call:
    def __reduce__(self):
        return os.mkdir, (MARKER,)


MARKER = os.path.join(tempfile.gettempdir(), "lirf-code-was-run")


def code(data, rng):
    """A pickle that makes a folder when it is read: alone, in a torch archive, or in place of an entry."""
    if not data.startswith(b"PK") or rng.random() < 0.2:
        return pickle.dumps(Call())
    content = torch.load(io.BytesIO(data), weights_only=True)
    content[rng.choice(list(content))] = Call()
    return _as_bytes(content)


CHECKPOINT = (edit, forge, unpickle, bomb, header, code)
JSON = (edit, forge)


# what is read

def checkpoint_subjects(root, data):
    """The files of a finished run of the four stages, and those of a deposit that was stopped after its first epoch."""
    save, unfinished, seen = root / "run", root / "unfinished", []
    running = ["--data_dir", data, "--save_path"]
    deposit = ["--original", save / "original.pt", "--partition", save / "partition.json", "--split_at", "2", *TINY]
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "bee", "--out",
            save / "partition.json")
    succeed("train_scratch.py", *running, save, *TINY, "--arch", "resnet8")
    succeed("train_deposit.py", *running, save, *deposit)
    succeed("withdraw.py", *running, save, *WITHDRAW)
    paths = {path.name: str(path) for path in save.iterdir()}
    partition = read_partition(paths["partition.json"])
    withdrawal = withdraw.get_args_parser().parse_args(["--save_path", str(save)])
    train_one_epoch = train_deposit.train_one_epoch

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

    def stopped(lirf, parallel, optimizer, images, runtime, training, args, epoch, moved):
        """Train the first epoch; stop at the second, with what it goes on with: weights, momentum, and the log."""
        if epoch == 0:
            return train_one_epoch(lirf, parallel, optimizer, images, runtime, training, args, epoch, moved)
        momentum = {str(i): s["momentum_buffer"] for i, s in optimizer.state_dict()["state"].items()}
        done = Path(training.log_path).read_text().splitlines()[:-1]  # without what this start has added
        seen.append(checksum({"tensors": {**lirf.state_dict(), **momentum}, "epoch": epoch, "log": str(done)}))
        raise KeyboardInterrupt(signal.SIGINT)

    def deposit_in(folder):
        with mock.patch.object(train_deposit, "train_one_epoch", stopped), mock.patch("utils.run.SummaryWriter"):
            return call("train_deposit.py", *running, folder, *deposit)

    def resumed():
        seen.clear()
        with tempfile.TemporaryDirectory() as copy:
            status, _, err = deposit_in(shutil.copytree(unfinished, copy, dirs_exist_ok=True))
        if status in (1, 2):
            raise UserError(err)
        return str(seen)

    deposit_in(unfinished)
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
    """Images of every kind, as the first stage reads them, whom nothing tells what to expect; and a cache."""
    partition = make_partition("folder", str(data), listed="bee")

    def partitioned():
        shutil.rmtree(data / FOLDER, ignore_errors=True)
        return checksum({"tensors": {}, **make_partition("folder", str(data), listed="bee").as_dict()})

    def cached():
        images = load_images(partition, str(data), "test", partition.classes("all"))
        return checksum({"tensors": {"images": images.images}})

    images = {path.suffix: str(path) for path in (data / "train" / "ant").iterdir()}
    return {**{f"image{ending}": Subject(path, partitioned, (code,), vouched=False) for ending, path in images.items()},
            "cache": Subject(str(min((data / FOLDER).glob("test*"))), cached)}


# the campaign

class TooSlow(BaseException):
    """Which no reader takes for a damaged file."""


def too_slow(*_):
    raise TooSlow(f"more than {SECONDS} s")


def judge(subject, kind, expected):
    """(verdict, detail) of reading a mutated file: same, refused, accepted, or wrong."""
    signal.alarm(SECONDS)
    try:
        found = subject.read()
        verdict = "same" if found == expected else "accepted" if kind is forge or not subject.vouched else "wrong"
        detail = "another content was accepted"
    except (UserError, OSError) as error:  # both of which the command line tells in one line
        verdict, detail = "refused", str(error)
    except (Exception, TooSlow) as error:
        verdict, detail = "wrong", f"{type(error).__name__}: {error}"
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

    subjects = {**checkpoint_subjects(root, data), **image_subjects(data)}
    contents = {name: Path(subject.path).read_bytes() for name, subject in subjects.items()}
    expected = {name: subject.read() for name, subject in subjects.items()}
    choices = [(name, kind) for name, subject in subjects.items() for kind in (*BYTES, *subject.kinds)]
    rng.shuffle(choices)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    alarm, (soft, hard) = signal.signal(signal.SIGALRM, too_slow), resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
        for name, kind in itertools.islice(itertools.cycle(choices), cases):
            _write(subjects[name].path, kind(contents[name], rng))
            verdict, detail = judge(subjects[name], kind, expected[name])
            _write(subjects[name].path, contents[name])
            yield name, kind.__name__, verdict, detail
    finally:
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)  # a refused image leaves no folder of caches
    Path(path).write_bytes(content)
