"""Processes that work at once: what several want is made once or by each, and what one leaves harms no other."""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import snapshot, succeed
from fixtures import make_cub_archive, make_folder

from datasets.batches import pixels_of
from datasets.cache import FOLDER
from datasets.cub import ARCHIVE, NAME, open_cub
from datasets.files import workspace
from datasets.folder import FolderSource
from utils.files import write_atomically


def at_once(count, work):
    """Exit codes of `count` processes that call work(barrier, number)."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count, timeout=20)
    processes = [context.Process(target=work, args=(barrier, number), daemon=True) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("archive", [False, True])
def test_processes_that_want_the_same_cache_or_archive_all_read_it(tmp_path, archive):
    data = tmp_path / "data"
    if archive:
        make_cub_archive(data, [1, 2])
        (data / f"{NAME}.part" / "left by a kill").mkdir(parents=True)
    else:
        make_folder(data)
    made, expected = data / (NAME if archive else FOLDER), []

    def work(barrier, number):
        for _ in range(12):
            if barrier.wait() == 0:
                shutil.rmtree(made, ignore_errors=True)
            barrier.wait()
            source = open_cub(str(data), False, 16) if archive else FolderSource(str(data))
            images = pixels_of(source.load("train", [0, 1])[0], torch.arange(4))
            expected.append(images)
            assert torch.equal(images, expected[0])

    assert at_once(4, work) == [0] * 4
    assert sorted(path.name for path in data.iterdir()) == ([NAME, ARCHIVE] if archive else [FOLDER, "test", "train"])
    assert not list(data.rglob("*.part"))


def test_only_one_of_several_partitions_takes_a_place(folder, tmp_path):
    def work(barrier, number):
        barrier.wait()
        sys.stderr = open(os.devnull, "w")
        succeed("partition_data.py", "--dataset", "folder", "--data_dir", folder, "--deposit_classes", str(number),
                "--out", tmp_path / "p.json")

    assert sorted(at_once(3, work)) == [0, 1, 1]
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ["p.json"]


def test_what_a_killed_writer_leaves_is_removed_by_a_later_one(tmp_path):
    path = str(tmp_path / "file")

    def killed(barrier, number):
        def write(file):
            file.write(b"half of it, or more")
            file.flush()
            barrier.wait()  # both are writing now
            os.kill(os.getpid(), signal.SIGKILL)

        write_atomically(path, write)

    assert at_once(2, killed) == [-signal.SIGKILL] * 2 and len(list(tmp_path.iterdir())) == 2
    write_atomically(path, lambda file: file.write(b"whole"))
    assert Path(path).read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 3  # it might be writing still
    for left in tmp_path.glob("*.part"):
        os.utime(left, (0, 0))
    write_atomically(path, lambda file: file.write(b"whole"))
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_where_a_disk_has_no_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(38, "Function not implemented")))
    for content in (b"one", b"two"):
        write_atomically(str(tmp_path / "file"), lambda file, content=content: file.write(content))
        assert snapshot(tmp_path) == {tmp_path / "file": content}
    with workspace(str(tmp_path / "w")) as place:
        assert os.listdir(place) == []
    assert not os.path.exists(place)
