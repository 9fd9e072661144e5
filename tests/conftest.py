"""Tiny data, and a way to run the stage scripts as a user does."""

import http.server
import importlib
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Tiny networks gain nothing from threads, which wait for each other when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"
import torch

from utils.cli import run

torch.set_num_threads(1)

CLASSES = ["ant", "bee", "cow", "dog"]
TINY = ["--epochs", "2", "--batch_size", "16", "--device", "cpu", "--precision", "fp32"]


def run_script(script, *flags):
    """Run a stage script in a process of its own; returns the finished process with its text."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True,
                          timeout=300, check=False)


def call(script, *flags):
    """Run a stage script's command line in this process, which spares the imports.

    Returns (exit status, text on stdout, text on stderr).
    """
    name = Path(script).stem
    folder = str((ROOT / script).parent)
    with mock.patch.object(sys, "argv", [script, *map(str, flags)]), mock.patch.object(
            sys, "path", [folder, *sys.path]), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        module = importlib.import_module(name)
        try:
            run(module.main, module.get_args_parser(), [str(flag) for flag in flags])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def run_shell(script, *arguments, flags=None, **variables):
    """Run a shell script; its python commands run in this process, by `call`, which spares their imports.

    flags: {python script: flags to add to its commands}; variables: of the script's environment.
    Returns (exit status, text on stdout and stderr, the python commands as lists of words).
    """
    commands, status = [], 0
    with tempfile.TemporaryDirectory() as folder:
        asked, answer, printed = (os.path.join(folder, name) for name in ("asked", "answer", "printed"))
        os.mkfifo(asked)
        os.mkfifo(answer)
        stand_in = f"""python() {{
            local status
            printf '%s\\0' "$@" > {asked}
            read -r status < {answer}
            return "$status"
        }}
        export -f python
        exec bash "$@" > {printed} 2>&1"""
        shell = subprocess.Popen(["bash", "-c", stand_in, "bash", str(ROOT / script), *map(str, arguments)],
                                 env={**os.environ, **{name: str(value) for name, value in variables.items()}})

        def end():  # the reader below waits for a writer: the script's python, or this
            shell.wait()
            Path(asked).write_bytes(b"")

        threading.Thread(target=end, daemon=True).start()
        text = ""
        while words := Path(asked).read_bytes():
            commands.append(words.decode().split("\0")[:-1])
            status, out, err = call(*commands[-1], *(flags or {}).get(commands[-1][0], []))
            text += out + err
            Path(answer).write_text(f"{status}\n")
        return shell.returncode, Path(printed).read_text() + text, commands


def succeed(script, *flags):
    """`call`, asserting that it succeeded; returns what it printed."""
    status, out, err = call(script, *flags)
    assert status == 0, err
    return out


def snapshot(folder):
    """{path: content} of all files below a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def fail(script, *flags, unchanged=None):
    """`call`, asserting one clear line on stderr, an exit status, and that no file below the folder
    `unchanged` was written, changed or removed; returns the line."""
    before = snapshot(unchanged) if unchanged else None
    status, _, err = call(script, *flags)
    assert status in (1, 2), (status, err)
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{Path(script).name}: error: "), err
    if unchanged:
        assert snapshot(unchanged) == before
    return lines[0]


def make_folder(root, classes=CLASSES, train=12, test=5, size=16, seed=0):
    """An image folder whose classes differ in colour, so that a tiny network can learn them."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        colour = np.array([(c & 1) * 160, (c >> 1 & 1) * 160, c * 30]) + 40
        for split, count in (("train", train), ("test", test)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


@contextmanager
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
    succeed("train_deposit.py", *common, *TINY)
    succeed("withdraw.py", *common, "--device", "cpu", "--precision", "fp32")
    return save, data
