"""Ways to run the scripts as a user does, and a finished tiny run of the four stages."""

import importlib
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Tiny networks gain nothing from threads, which wait for each other when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"
import torch

from fixtures import make_folder
from utils.checkpoint import checksum, load_checkpoint
from utils.cli import run
from utils.files import read_log

torch.set_num_threads(1)

PLAIN = ["--device", "cpu", "--precision", "fp32"]
TINY = ["--epochs", "2", "--batch_size", "16", *PLAIN]
MEASURE = ["--device", "cpu"]


def call(script, *flags):
    """Run a script's command line in this process, which spares the imports. script: a path from the repository's
    root; one in a folder is run as a module of its package, as `python -m` does.

    Returns (exit status, text on stdout, text on stderr).
    """
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    words = [str(flag) for flag in flags]
    with mock.patch.object(sys, "argv", [str(ROOT / script), *words]), redirect_stdout(StringIO()) as out, \
            redirect_stderr(StringIO()) as err:
        try:
            run(module.main, module.get_args_parser(), words)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def succeed(script, *flags):
    """`call`, asserting that it succeeded; returns what it printed."""
    status, out, err = call(script, *flags)
    assert status == 0, err
    return out


def snapshot(folder):
    """{path: content} of all files below a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def fail(script, *flags, unchanged=None, statuses=(1, 2)):
    """`call`, asserting one clear line on stderr, one of the exit statuses, and that no file below the folder
    `unchanged` was written, changed or removed; returns the line."""
    before = snapshot(unchanged) if unchanged else None
    status, _, err = call(script, *flags)
    assert status in statuses, (status, err)
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{Path(script).name}: error: "), err
    if unchanged:
        assert snapshot(unchanged) == before
    return lines[0]


def run_shell(script, *arguments, flags=None, **variables):
    """Run a shell script whose python only writes its commands down, then run those by `call`, which spares their
    imports, up to the first that fails.

    flags: {python script: flags to add to its commands}; variables: of the script's environment.
    Returns (exit status, text on stdout and stderr, the commands as lists of words).
    """
    # An environment is active, whose packages the stand-in vouches for; an empty word ends a command.
    stand_in = """python() {
        case $1 in
            -) ;;
            -c) "$PYTHON" "$@" ;;
            *) printf '%s\\n' "$@" "" >&3 ;;
        esac
    }
    export -f python
    exec bash "$@" 3>&2 2>&1"""
    variables = {"VIRTUAL_ENV": "active", "PYTHON": sys.executable, **variables}
    done = subprocess.run(["bash", "-c", stand_in, "bash", str(ROOT / script), *map(str, arguments)],
                          env={**os.environ, **{name: str(value) for name, value in variables.items()}},
                          capture_output=True, text=True, timeout=60, check=False)
    commands = [command.split("\n") for command in done.stderr.split("\n\n")[:-1]]
    text = done.stdout
    for words in commands:
        if words[0] == "-m":
            name, words = words[1].replace(".", "/") + ".py", words[2:]
        else:
            name, words = os.path.relpath(words[0], ROOT), words[1:]
        status, out, err = call(name, *words, *(flags or {}).get(name, []))
        text += out + err
        if status:
            return status, text, commands
    return done.returncode, text, commands


def rewrite(path, change, seal=True):
    """Change what a checkpoint holds; seal: with a right checksum, so that only its own description can tell."""
    content = load_checkpoint(str(path), path.stem)
    change(content)
    if seal:
        content["checksum"] = checksum(content)
    torch.save(content, path)


def tensors_of(path):
    """The tensors of a checkpoint whose file is named by its kind."""
    return load_checkpoint(str(path), path.stem)["tensors"]


def epochs_of(path):
    """The epochs of a log, without their times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(path) if "epoch" in record]


@pytest.fixture
def opened(monkeypatch):
    """The paths of the images that are opened while the test runs."""
    paths, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: paths.append(str(path)) or real(path, *a, **k))
    return paths


@pytest.fixture
def folder(tmp_path):
    """An image folder that the test may change."""
    return make_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A finished tiny run of the four stages: (save_path, data_dir). Tests must not change it."""
    root = tmp_path_factory.mktemp("chain")
    data, save = make_folder(root / "images"), root / "run"
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "bee",
            "--out", save / "partition.json")
    common = ["--save_path", save, "--data_dir", data]
    succeed("train_scratch.py", *common, "--arch", "resnet8", *TINY)
    succeed("train_deposit.py", *common, *TINY, "--split_at", "2")
    succeed("withdraw.py", *common, *MEASURE)
    return save, data


@pytest.fixture
def spoiled(chain, tmp_path):
    """A copy of the finished tiny run, for a test to spoil."""
    return shutil.copytree(chain[0], tmp_path / "run")


def scratch_flags(chain, save, *more):
    """Flags of a small original on the chain's data and partition, in another folder."""
    return ["--save_path", save, "--data_dir", chain[1], "--partition", chain[0] / "partition.json", "--arch",
            "resnet8", *TINY, *more]


def deposit_flags(chain, save, *more):
    """Flags of the chain's own deposit, in another folder."""
    return ["--save_path", save, "--data_dir", chain[1], "--original", chain[0] / "original.pt", "--split_at", "2",
            *TINY, *more]
