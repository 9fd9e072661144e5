"""What people report of such programs, beside their data: consoles, launchers, copies in other repositories."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, fail, run_script
from fixtures import make_folder

from analysis import tsne
from datasets import make_partition
from utils import run

NAMES = ["_background_", "$5 and $6", "猫"]


def test_a_console_without_a_character_shows_its_escape(tmp_path):
    folder = make_folder(tmp_path / "images", classes=NAMES, train=2, test=1)
    done = run_script("partition_data.py", "--dataset", "folder", "--data_dir", folder, "--out", tmp_path / "p.json",
                      env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u732b" in done.stdout and not done.stderr


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_tsne_figure_names_every_class_whatever_its_characters(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "images", classes=NAMES, train=2, test=1)
    partition = make_partition("folder", str(folder), listed=NAMES[0])
    shown, text = [], tsne.plt.Axes.text

    def seen(self, x, y, name, **more):
        shown.append(name)
        return text(self, x, y, name, **more)

    monkeypatch.setattr(tsne.plt.Axes, "text", seen)
    points = np.random.default_rng(0).normal(size=(6, 2))
    tsne.draw({"original": points, "target": points}, np.array([0, 0, 1, 1, 2, 2]), partition, str(tmp_path / "figure"))
    assert set(shown) == set(partition.class_names) and (tmp_path / "figure.png").stat().st_size > 1000


def test_a_copy_within_another_repository_has_no_commit(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "copy" / "utils").mkdir(parents=True)
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "copy" / "utils" / "run.py"))
    assert run.current_commit() is None
    monkeypatch.setattr(run, "__file__", str(tmp_path / "utils" / "run.py"))  # at the top it is a repository of its own
    assert run.current_commit() is not None


def test_the_old_launcher_is_told_to_be_torchrun():
    assert "torchrun" in fail("train_scratch.py", "--local-rank=0")


def test_a_reader_that_leaves_is_told_and_the_run_can_go_on(chain, tmp_path):
    save, data = chain
    command = [sys.executable, str(ROOT / "train_scratch.py"), "--save_path", str(tmp_path / "run"), "--data_dir",
               str(data), "--partition", str(save / "partition.json"), "--arch", "resnet8", *TINY, "--epochs", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    line, = process.stderr.read().splitlines()
    assert process.wait() == 1 and "nobody reads the output" in line and "same command again" in line
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "resuming" in done.stdout and (tmp_path / "run" / "original.pt").exists()
