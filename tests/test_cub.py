"""CUB-200-2011: the archive's layout, photographs of differing sizes, the chain on 200 classes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fail, run_shell, snapshot, succeed
from fixtures import make_cub, make_cub_archive, served

from datasets import load_if_there, load_images, make_partition, read_partition
from datasets.batches import RaggedImages
from datasets.cub import ARCHIVE, NAME, CubSource, open_cub
from datasets.files import read_short_side
from utils.errors import UserError


@pytest.fixture
def cub(tmp_path):
    """A part of three classes with gaps in their ids; a fourth is named in classes.txt and has no image."""
    folder = make_cub(tmp_path / "data", [2, 7, 150])
    with open(folder / "classes.txt", "a") as file:
        file.write("151 151.Not_Here\n")
    return folder


def partition_flags(data):
    return ["partition_data.py", "--dataset", "cub200", "--data_dir", data, "--image_size", "16", "--out",
            data / "p.json"]


# what is read

@pytest.mark.parametrize("inside", [True, False])
def test_ids_with_gaps_are_numbered_anew_and_only_the_classes_asked_for_are_opened(cub, opened, inside):
    source = open_cub(str(cub.parent if inside else cub), False, 16)
    images = source.load("train", [0, 2])
    assert source.class_names == ["002.Bird_2", "007.Bird_7", "150.Bird_150"]
    assert [source.samples(split, 2)[0] for split in ("train", "test")] == [2, 1]
    assert images.batch(torch.arange(4)).shape == (4, 3, 16, 16)
    assert sorted(Path(path).parent.name for path in opened) == ["002.Bird_2"] * 2 + ["150.Bird_150"] * 2


def test_the_deposit_can_do_without_the_files_of_other_classes(cub, capsys):
    partition = make_partition("cub200", str(cub), listed="002.Bird_2", image_size=16)
    shutil.rmtree(cub / "images" / "150.Bird_150")
    assert len(load_images(partition, str(cub), "train", partition.deposit_classes)) == 2
    assert load_if_there(partition, str(cub), "test", "not logged") is None
    assert "150.Bird_150" in capsys.readouterr().out


def test_evaluation_cuts_the_centre(cub):
    images = CubSource(str(cub), 16).load("test", [0])
    kept = read_short_side(str(cub / "images" / "002.Bird_2" / "2.png"), round(16 * 8 / 7))
    h, w, _ = kept.shape
    assert min(h, w) == 18 and np.array_equal(images.photographs[0], kept)
    top, left = (h - 16) // 2, (w - 16) // 2
    assert np.array_equal(images.batch(torch.tensor([0]))[0].permute(1, 2, 0).numpy(),
                          kept[top:top + 16, left:left + 16])


def test_batches_repeat_with_their_generator_and_mirror_half():
    row = np.tile(np.arange(16, dtype=np.uint8)[None, :, None] * 16, (16, 1, 3))  # brighter to the right
    images, rows = RaggedImages([row] * 400, 8), torch.arange(400)
    first, again, plain = (images.batch(rows, torch.Generator().manual_seed(3), flip) for flip in (True, True, False))
    assert torch.equal(first, again)
    assert 0.4 < (first[:, 0, 0, 0] > first[:, 0, 0, -1]).float().mean() < 0.6
    assert (plain[:, 0, 0, 0] < plain[:, 0, 0, -1]).all()
    spans = (plain[:, 0, 0].max(1).values - plain[:, 0, 0].min(1).values).float()
    assert spans.unique().numel() > 5 and spans.max() <= 15 * 16  # boxes of many widths, all within the image


def test_a_folder_that_kaggle_nests_and_names_that_are_not_utf8(tmp_path):
    folder = make_cub(tmp_path / "archive", [1, 2, 3])
    for name in ("images.txt", "classes.txt"):
        path = folder / name
        path.write_bytes(path.read_bytes().replace(b"Bird_2", b"\xe9_2"))
    images = os.fsencode(folder / "images")
    os.rename(images + b"/002.Bird_2", images + b"/002.\xe9_2")
    succeed(*partition_flags(tmp_path))
    assert len(load_images(read_partition(tmp_path / "p.json"), str(tmp_path), "train", [0, 1, 2])) == 6


def test_200_classes_from_the_archive_to_the_table(tmp_path):
    data, save = tmp_path / "data", tmp_path / "run"
    make_cub_archive(data, range(1, 201))
    status, text, _ = run_shell("scripts/2_table1_cub200.sh", 0, ARCH="resnet8", EPOCHS=1, IMAGE_SIZE=16,
                                DEPOSIT_FLAGS="--epochs 1", DATA_DIR=data, SAVE=save)
    assert status == 0, text
    table, save = (save / "paper" / "table1.md").read_text(), save / "paper" / "seed0"
    assert "| paper: Deposit (T)" in table and "54.01" in table
    metrics = json.loads((save / "metrics.json").read_text())
    assert sum(metrics["recover"]["concat"]["counts"]["total"]) == 200
    partition = json.loads((save / "partition.json").read_text())
    assert len(partition["deposit_classes"]) == 60 and len(partition["class_names"]) == 200


# what is damaged

@pytest.mark.parametrize("damage,word", [
    (lambda cub: (cub / "images.txt").write_text("1 a b\nnonsense\n"), "damaged"),
    (lambda cub: (cub / "images.txt").write_bytes(b"\xff\xfe\x00"), "damaged"),
    (lambda cub: (cub / "image_class_labels.txt").write_text("1 2\n"), "do not fit together"),
    (lambda cub: (cub / "classes.txt").write_text("2 002.Bird_2\n"), "do not fit together"),
    (lambda cub: (cub / "images" / "002.Bird_2" / "1.png").unlink(), "1.png"),
    (lambda cub: (cub / "images" / "002.Bird_2" / "1.png").write_bytes(b"no image"), "cannot be read"),
    (lambda cub: (cub / "classes.txt").unlink(), "classes.txt"),
    (lambda cub: [path.unlink() for path in cub.glob("*.txt")], "remove that folder"), (shutil.rmtree, "--download"),
])
def test_damaged_data_are_told_in_one_line(cub, damage, word):
    damage(cub)
    assert word in fail(*partition_flags(cub.parent))
    assert not (cub.parent / "p.json").exists()


@pytest.mark.parametrize("damage", [b"", b"no archive", -300, "../outside", f"{NAME}/../../outside"])
def test_a_damaged_archive_or_one_that_leads_outside_leaves_nothing_behind(tmp_path, damage):
    archive = make_cub_archive(tmp_path / "data", [1, 2], damage if isinstance(damage, str) else None)
    if isinstance(damage, int):
        archive.write_bytes(archive.read_bytes()[:damage])
    elif isinstance(damage, bytes):
        archive.write_bytes(damage)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="damaged"):
        open_cub(str(tmp_path / "data"), False, 16)
    assert snapshot(tmp_path) == before and [path.name for path in (tmp_path / "data").iterdir()] == [ARCHIVE]


def test_an_archive_that_is_being_extracted_is_not_taken_for_the_whole(tmp_path, monkeypatch):
    archive, real = make_cub_archive(tmp_path / "data", [1, 2]), os.rename

    def meanwhile(source, target):
        monkeypatch.setattr(os, "rename", real)
        os.rename(archive, tmp_path / "aside")
        with pytest.raises(UserError, match="there is no CUB_200_2011"):
            open_cub(str(tmp_path / "data"), False, 16)
        os.rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    assert open_cub(str(tmp_path / "data"), False, 16).class_names == ["001.Bird_1", "002.Bird_2"]


def test_download_checks_the_sum_and_says_what_to_do(tmp_path, monkeypatch):
    archive, data = make_cub_archive(tmp_path / "served", [1, 2]), tmp_path / "data"
    with served(archive.parent) as address:
        monkeypatch.setattr("datasets.cub.URL", f"{address}/{ARCHIVE}")
        with pytest.raises(UserError, match="by hand"):
            open_cub(str(data), True, 16)  # not the known checksum: what came is removed
        assert not (data / ARCHIVE).exists()
        monkeypatch.setattr("datasets.cub.MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        assert open_cub(str(data), True, 16).class_names == ["001.Bird_1", "002.Bird_2"]
        assert len(snapshot(data / NAME / "images")) == 2 * 3
        monkeypatch.setattr("datasets.cub.URL", f"{address}/nowhere.tgz")
        with pytest.raises(UserError, match="by hand"):
            open_cub(str(tmp_path / "other"), True, 16)
