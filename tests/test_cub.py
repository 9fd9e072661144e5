"""CUB-200-2011: the archive's layout, photographs of differing sizes, the chain on 200 classes."""

import errno
import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fail, run_shell
from fixtures import make_cub, make_cub_archive, served
from PIL import Image

from analysis.benchmark.memory import get_args_parser, make_photographs, measure
from datasets.cache import FOLDER
from datasets.cub import ARCHIVE, CubSource, open_cub
from datasets.decode import read_short_side
from datasets.ragged import RATIO, SCALE, RaggedImages, _random_box
from utils.errors import UserError


@pytest.fixture
def cub(tmp_path):
    """A part of three classes with gaps in their ids; a fourth is named in classes.txt and has no image."""
    folder = make_cub(tmp_path / "data", [2, 7, 150])
    with open(folder / "classes.txt", "a") as file:
        file.write("151 151.Not_Here\n")
    return folder


@pytest.mark.parametrize("inside", [True, False])
def test_ids_with_gaps_are_numbered_anew_and_names_kept(cub, inside):
    source = open_cub(str(cub.parent if inside else cub), False, 16)
    assert source.class_names == ["002.Bird_2", "007.Bird_7", "150.Bird_150"]
    assert [source.samples(split, 2)[0] for split in ("train", "test")] == [2, 1]
    images, labels = source.load("train", [0, 2])
    assert labels.tolist() == [0, 0, 2, 2] and len(images) == 4
    assert images.batch(torch.arange(4)).shape == (4, 3, 16, 16)


def test_only_the_classes_asked_for_are_opened_and_once(cub, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open",
                        lambda path, *a, **k: opened.append(Path(path).parent.name) or real(path, *a, **k))
    for _ in range(2):
        CubSource(str(cub), 16).load("train", [1])
    assert opened == ["007.Bird_7"] * 2


def test_evaluation_cuts_the_centre_and_cached_pixels_are_the_files(cub):
    images, _ = CubSource(str(cub), 16).load("test", [0])
    path = cub / "images" / "002.Bird_2" / "2.png"
    kept = read_short_side(str(path), round(16 * 8 / 7))
    h, w, _ = kept.shape
    assert min(h, w) == 18 and np.array_equal(images.photographs[0], kept)
    top, left = (h - 16) // 2, (w - 16) // 2
    assert np.array_equal(images.batch(torch.tensor([0]))[0].permute(1, 2, 0).numpy(),
                          kept[top:top + 16, left:left + 16])


@pytest.mark.parametrize("mode,size", [("L", (30, 20)), ("RGBA", (20, 30)), ("RGB", (1, 300)), ("RGB", (300, 2)),
                                       ("P", (5, 5))])
def test_odd_photographs_become_batches(cub, mode, size):
    path = cub / "images" / "002.Bird_2" / "0.png"
    Image.new(mode, size, 1 if mode in "LP" else (1,) * len(mode)).save(path)
    images, _ = CubSource(str(cub), 16).load("train", [0])
    assert images.photographs[0].size <= 3 * (4 * min(size[0], 18)**2 + 4 * 18)
    for generator in (None, torch.Generator().manual_seed(0)):
        assert images.batch(torch.tensor([0, 1]), generator, True).shape == (2, 3, 16, 16)


def test_random_boxes_are_within_the_image_and_of_the_drawn_shares():
    draws = torch.rand(500, 5, generator=torch.Generator().manual_seed(0)).tolist()
    shares, ratios = [], []
    for draw in draws:
        top, left, h, w = _random_box(240, 240, draw)
        assert 0 <= top <= 240 - h and 0 <= left <= 240 - w
        shares.append(h * w / 240**2)
        ratios.append(w / h)
    assert min(shares) >= SCALE[0] - 0.01 and max(shares) <= SCALE[1] and 0.55 < np.mean(shares) < 0.75
    assert min(ratios) >= RATIO[0] - 0.02 and max(ratios) <= RATIO[1] + 0.02


def test_batches_repeat_with_their_generator_and_mirror_half():
    row = np.tile(np.arange(16, dtype=np.uint8)[None, :, None] * 16, (16, 1, 3))  # brighter to the right
    images = RaggedImages([row] * 400, 8)
    rows = torch.arange(400)
    first, again = (images.batch(rows, torch.Generator().manual_seed(3), True) for _ in range(2))
    assert torch.equal(first, again)
    mirrored = (first[:, 0, 0, 0] > first[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6
    plain = images.batch(rows, torch.Generator().manual_seed(3), False)
    assert (plain[:, 0, 0, 0] < plain[:, 0, 0, -1]).all()


def test_200_classes_from_the_archive_to_the_table(tmp_path):
    data, save = tmp_path / "data", tmp_path / "run"
    make_cub_archive(data, range(1, 201))
    status, text, _ = run_shell("scripts/2_table1_cub200.sh", 0, ARCH="resnet8", EPOCHS=1, IMAGE_SIZE=16,
                                DEPOSIT_FLAGS="--split_at 3 --epochs 1", DATA_DIR=data, SAVE=save)
    assert status == 0, text
    table, save = (save / "paper" / "table1.md").read_text(), save / "paper" / "seed0"
    assert "| paper: Deposit (T)" in table and "54.01" in table
    metrics = json.loads((save / "metrics.json").read_text())
    assert sum(metrics["recover"]["concat"]["counts"]["total"]) == 200
    partition = json.loads((save / "partition.json").read_text())
    assert len(partition["deposit_classes"]) == 60 and len(partition["class_names"]) == 200


def partition_flags(cub):
    return ["partition_data.py", "--dataset", "cub200", "--data_dir", cub.parent, "--image_size", "16", "--out",
            cub.parent / "p.json"]


@pytest.mark.parametrize("damage,word", [
    (lambda cub: (cub / "images.txt").write_text("1 a b\nnonsense\n"), "damaged"),
    (lambda cub: (cub / "images.txt").write_bytes(b"\xff\xfe\x00"), "damaged"),
    (lambda cub: (cub / "classes.txt").write_bytes((cub / "classes.txt").read_bytes().replace(b"_2", b"\0")), "damaged"),
    (lambda cub: (cub / "classes.txt").write_bytes((cub / "classes.txt").read_bytes().replace(b"_2", b"/")), "unknown"),
    (lambda cub: (cub / "image_class_labels.txt").write_text("1 2\n"), "does not list the images"),
    (lambda cub: (cub / "classes.txt").write_text("2 002.Bird_2\n"), "unknown"),
    (lambda cub: (cub / "images" / "002.Bird_2" / "1.png").unlink(), "absent"),
    (lambda cub: (cub / "images" / "002.Bird_2" / "1.png").write_bytes(b"no image"), "cannot be read"),
    (lambda cub: (cub / "images" / "002.Bird_2" / "1.png").write_bytes(
        (cub / "images" / "002.Bird_2" / "0.png").read_bytes()[:200]), "damaged image"),
    (lambda cub: (cub / "images.txt").write_text((cub / "images.txt").read_text().replace(
        "002.Bird_2/0", "../../../0")), "outside"),
    (shutil.rmtree, "--download"),
])
def test_damaged_data_are_told_in_one_line(cub, damage, word):
    damage(cub)
    assert word in fail(*partition_flags(cub))
    assert not (cub.parent / "p.json").exists()


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_broken_archive_leaves_nothing_behind(tmp_path, content):
    (tmp_path / ARCHIVE).write_bytes(content)
    assert "damaged" in fail("partition_data.py", "--dataset", "cub200", "--data_dir", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [ARCHIVE]


def test_a_truncated_archive_and_one_that_leads_outside_leave_nothing_behind(tmp_path):
    data = tmp_path / "data"
    archive = make_cub_archive(data, [1, 2])
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(UserError, match="damaged"):
        open_cub(str(data), False, 16)
    make_cub_archive(data, [1, 2], [tarfile.TarInfo("../outside.txt")])
    with pytest.raises(UserError, match="damaged"):
        open_cub(str(data), False, 16)
    assert [p.name for p in data.iterdir()] == [ARCHIVE] and not (tmp_path / "outside.txt").exists()


def test_download_checks_the_sum_and_says_what_to_do(tmp_path, monkeypatch):
    archive, data = make_cub_archive(tmp_path / "served", [1, 2]), tmp_path / "data"
    with served(archive.parent) as address:
        monkeypatch.setattr("datasets.cub.URL", f"{address}/{ARCHIVE}")
        with pytest.raises(UserError, match="download it by hand"):
            open_cub(str(data), True, 16)  # not the known checksum: what came is removed
        assert not (data / ARCHIVE).exists()
        monkeypatch.setattr("datasets.cub.MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        assert open_cub(str(data), True, 16).class_names == ["001.Bird_1", "002.Bird_2"]
        monkeypatch.setattr("datasets.cub.URL", f"{address}/nowhere.tgz")
        with pytest.raises(UserError, match="download it by hand"):
            open_cub(str(tmp_path / "other"), True, 16)


def test_where_no_cache_can_be_written_images_are_decoded_anew(cub, monkeypatch, capsys):
    rows = torch.tensor([3, 0, 2])

    def batches_of(source):
        images = source.load("train", [0, 2])[0]
        return images.batch(rows), images.batch(rows, torch.Generator().manual_seed(0), True)

    whole = batches_of(CubSource(str(cub), 16))
    shutil.rmtree(cub / FOLDER)

    def full(path, write):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path + ".part").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.cache.write_atomically", full)
        anew = CubSource(str(cub), 16)
        assert all(map(torch.equal, batches_of(anew), whole))
        assert all(map(callable, anew.load("train", [0])[0].photographs))  # not held in memory
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert all(map(torch.equal, batches_of(CubSource(str(cub), 16)), whole))


def test_the_memory_measurement_passes_over_every_photograph(tmp_path):
    make_photographs(str(tmp_path), 400)
    args = get_args_parser().parse_args(["--image_size", "16"])
    decoded, opened = (measure(str(tmp_path), args) for _ in range(2))
    assert decoded["images"] == opened["images"] == 400 and decoded["peak_memory_bytes"] > 1e8
    assert decoded["seconds"] > opened["seconds"] >= 0
