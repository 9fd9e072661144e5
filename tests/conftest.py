"""Tiny data, and a way to run the stage scripts as a user does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CLASSES = ["ant", "bee", "cow", "dog"]
TINY = ["--epochs", "2", "--batch_size", "16", "--device", "cpu", "--precision", "fp32"]


def run_script(script, *flags, cwd=ROOT):
    """Run a stage script in a process of its own; returns the finished process with its text."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd, capture_output=True,
                          text=True, timeout=300, check=False)


def succeed(script, *flags, cwd=ROOT):
    """run_script, asserting that it succeeded."""
    done = run_script(script, *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def fail(script, *flags, cwd=ROOT):
    """run_script, asserting one clear line on stderr and an exit status; returns the line."""
    done = run_script(script, *flags, cwd=cwd)
    assert done.returncode in (1, 2), (done.returncode, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), done.stderr
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
