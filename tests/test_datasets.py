"""Sources, partition and batches."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from fixtures import CLASSES, make_cifar, make_folder, served
from PIL import Image

from datasets import ImageSet, Partition, batches, load_images, make_partition, open_source
from datasets.batches import crop_and_flip, evaluation_batch_size, normalise, steps_per_epoch
from datasets.cache import FOLDER
from datasets.ragged import RaggedImages
from datasets.folder import FolderSource
from utils.errors import UserError


@pytest.fixture
def partition(folder):
    return make_partition("folder", str(folder), listed="bee,dog")


# sources

def test_digits_are_a_fixed_stratified_split():
    source = open_source("digits", "nowhere")
    sizes = [[source.samples(split, c)[0] for c in range(10)] for split in ("train", "test")]
    assert sum(sizes[0]) == 1437 and sum(sizes[1]) == 360
    assert all(34 <= n <= 37 for n in sizes[1])
    images, labels = source.load("test", [3])
    assert images.shape == (sizes[1][3], 3, 32, 32) and images.dtype == torch.uint8
    assert labels.unique().tolist() == [3] and images.max() == 255
    assert source.samples("test", 3) == open_source("digits", "nowhere").samples("test", 3)


def test_folder_lists_and_reads_only_the_classes_asked_for(folder, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    source = FolderSource(str(folder), CLASSES, 16)
    source.samples("train", 2)
    assert opened == []
    images, labels = source.load("train", [1, 3])
    assert images.shape == (24, 3, 16, 16) and labels.tolist() == [1] * 12 + [3] * 12
    assert len(opened) == 24 and all("/train/bee/" in p or "/train/dog/" in p for p in opened)
    with Image.open(folder / "train" / "bee" / "000.png") as image:
        assert torch.equal(images[0], torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("size,mode", [((40, 20), "RGB"), ((3, 90), "RGB"), ((20, 20), "L"), ((17, 23), "P"),
                                       ((16, 16), "RGBA"), ((1, 1), "1")])
def test_odd_images_become_square_rgb(folder, size, mode):
    Image.new(mode, size, 1).save(folder / "train" / "ant" / "000.png")
    images, _ = FolderSource(str(folder), CLASSES, 16).load("train", [0])
    assert images.shape == (12, 3, 16, 16)


def test_cifar10_is_downloaded_when_absent(tmp_path, monkeypatch):
    """The real download code, against a stand-in on this machine's loopback."""
    there = tmp_path / "served"
    believed = make_cifar(there)
    with served(there) as address:
        believed["url"] = f"{address}/cifar-10-python.tar.gz"
        for name, value in believed.items():
            monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
        data = str(tmp_path / "data")
        partition = make_partition("cifar10", data, listed="class1,class2,class5")
    assert partition.counts()["train"]["all"] == 100 and partition.layout == "array"
    # later stages read it without any network
    images = load_images(partition, data, "train", partition.deposit_classes)
    assert images.images.shape == (30, 3, 32, 32) and images.labels.unique().tolist() == [1, 2, 5]


def test_a_failing_download_is_told_in_a_clear_word(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserError, match="by hand"):
        make_partition("cifar10", str(tmp_path))


def test_cifar10_is_read_from_an_image_folder(tmp_path):
    folder = make_folder(tmp_path / "cifar", classes=[f"c{i}" for i in range(10)], train=2, test=1, size=32)
    partition = make_partition("cifar10", str(folder))
    assert partition.layout == "folder" and len(partition.deposit_classes) == 3
    make_folder(tmp_path / "nine", classes=[f"c{i}" for i in range(9)], train=1, test=1)
    with pytest.raises(UserError, match="9 classes, but cifar10 has 10"):
        make_partition("cifar10", str(tmp_path / "nine"))


# partition

def test_partition_round_trip(partition):
    content = json.loads(json.dumps(partition.as_dict()))
    assert Partition.from_dict(content, "file") == partition
    assert partition.deposit_classes == [1, 3] and partition.preserved_classes == [0, 2]
    assert partition.counts()["train"] == {"all": 48, "deposit": 24, "preservation": 24}
    assert partition.counts()["test"] == {"all": 20, "deposit": 10, "preservation": 10}


def test_random_draw_depends_on_the_seed_alone():
    draws = [make_partition("digits", ".", seed=s).deposit_classes for s in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and len({tuple(d) for d in draws}) > 2
    assert all(len(d) == 3 for d in draws)
    assert make_partition("digits", ".", draw="first").deposit_classes == [0, 1, 2]
    assert len(make_partition("digits", ".", fraction=0.5).deposit_classes) == 5


def test_classes_by_name_or_id(folder):
    assert make_partition("folder", str(folder), listed="0, dog").deposit_classes == [0, 3]


def test_validation_images_are_held_out_the_same_way_for_every_draw():
    one, other = (make_partition("digits", ".", seed=s, val_fraction=0.25) for s in (0, 1))
    train, val = (load_images(one, ".", split, range(10)) for split in ("train", "val"))
    whole = load_images(dataclasses.replace(one, val_fraction=0.0), ".", "train", range(10))
    assert len(train) + len(val) == len(whole) == 1437 and 350 <= len(val) <= 368

    def rows(images):
        return {i.numpy().tobytes() for i in images.images}

    assert rows(train) | rows(val) == rows(whole) and not rows(train) & rows(val)
    assert rows(load_images(other, ".", "val", range(10))) == rows(val)
    assert one.data_hash == other.data_hash and one.hash != other.hash


def test_statistics_are_those_of_the_training_pixels(folder, partition):
    pixels = load_images(partition, str(folder), "train", range(4)).images.double() / 255
    assert partition.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert partition.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist(), abs=1e-4)


def test_changed_images_are_noticed(folder, partition):
    """Where neither a file's size nor its time tells, and the cache is whole."""
    path = folder / "train" / "bee" / "003.png"
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    load_images(partition, str(folder), "train", [0, 2, 3])
    with pytest.raises(UserError, match="'bee'.*not those that were partitioned"):
        load_images(partition, str(folder), "train", [1])


@pytest.mark.parametrize("change", [
    {"deposit_classes": [1]}, {"deposit_classes": [], "preserved_classes": [0, 1, 2, 3]}, {"image_size": 0},
    {"image_size": "16"}, {"class_names": ["ant", "bee", "cow", "../dog"]}, {"mean": [0.5]}, {"samples": {}},
    {"dataset": "mnist"}, {"val_fraction": 2}, {"hash": "0"}, {"format": "other/1"}, {"std": None}, {"seed": None},
    {"deposit_classes": ["1", "3"]},
])
def test_a_damaged_manifest_is_refused(partition, change):
    with pytest.raises(UserError, match="file is not a partition"):
        Partition.from_dict({**partition.as_dict(), **change}, "file")


# batches

def image_set(n=10, size=8, flip=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], flip)


def test_evaluation_batches_are_the_images_in_order():
    images = image_set()
    x, y = (torch.cat(parts) for parts in zip(*batches(images, 4, torch.device("cpu"))))
    assert y.tolist() == list(range(10))
    expected = (images.images.float() / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) \
        / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    assert torch.allclose(x, expected)


def test_training_batches_are_of_one_size_and_hold_no_image_twice():
    images = image_set(10)
    device = torch.device("cpu")

    def epoch(seed):
        return list(batches(images, 4, device, generator=torch.Generator().manual_seed(seed)))

    labels = [y.tolist() for _, y in epoch(0)]
    assert len(set(sum(labels, []))) == 8 and [len(y) for y in labels] == [4, 4]
    assert [len(y) for _, y in batches(images, 16, device, generator=torch.Generator())] == [10]
    assert len(labels) == steps_per_epoch(images, 4)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(epoch(1), epoch(1)))
    assert labels != [y.tolist() for _, y in epoch(2)]


def test_crop_and_flip_gives_the_crops_that_torchvision_gives():
    """Every output is one of the 81 crops, plain or mirrored, and all of them come up equally often."""
    image = image_set(1).images
    n = 20_000
    out = crop_and_flip(image, torch.zeros(n, dtype=torch.int64), True, torch.Generator().manual_seed(0))
    padded = torchvision.transforms.functional.pad(image[0], 4)
    seen = {}
    for crop in out:
        key = crop.numpy().tobytes()
        seen[key] = seen.get(key, 0) + 1
    expected = set()
    for top in range(9):
        for left in range(9):
            crop = torchvision.transforms.functional.crop(padded, top, left, 8, 8)
            expected |= {crop.numpy().tobytes(), torchvision.transforms.functional.hflip(crop).numpy().tobytes()}
    assert set(seen) == expected
    per_choice = n / 162
    chi2 = sum((count - per_choice) ** 2 / per_choice for count in seen.values())
    assert chi2 < 230  # 161 degrees of freedom: beyond the 99.9th percentile would be bad luck or a bias


def test_no_flip_for_data_that_forbid_it():
    image = image_set(1).images
    out = crop_and_flip(image, torch.zeros(500, dtype=torch.int64), False, torch.Generator().manual_seed(0))
    assert len({crop.numpy().tobytes() for crop in out}) <= 81


def test_normalise_keeps_one_layout():
    x = normalise(image_set().images, [0.5] * 3, [0.25] * 3)
    assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32


def test_images_are_decoded_once_and_again_when_they_change(folder, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: opened.append(Path(path).name) or real(path, *a, **k))
    first, labels = FolderSource(folder).load("train", [1, 2])
    assert len(opened) == 68 + 24  # all are looked at for their size
    again, _ = FolderSource(folder).load("train", [1, 2])
    assert len(opened) == 2 * 68 + 24 and torch.equal(first, again) and labels.tolist() == [1] * 12 + [2] * 12
    path = folder / "train" / "bee" / "000.png"
    with real(path) as image:
        pixels = 255 - np.asarray(image)
    status = path.stat()
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    opened.clear()
    changed, _ = FolderSource(folder).load("train", [1, 2])
    assert len(opened) == 68 + 12 and not torch.equal(changed[0], first[0]) and torch.equal(changed[1:], first[1:])
    assert len(list((folder / FOLDER).iterdir())) == 2  # the stale cache is gone


@pytest.mark.parametrize("damage", [lambda b, other: b[:-40], lambda b, other: bytes([b[0] ^ 1]) + b[1:],
                                    lambda b, other: b"", lambda b, other: other])
def test_a_damaged_cache_is_made_anew(folder, damage):
    first, _ = FolderSource(folder).load("test", [0])
    cache, = (folder / FOLDER).iterdir()
    FolderSource(folder).load("test", [1])
    whole, other = (path.read_bytes() for path in sorted((folder / FOLDER).iterdir()))
    cache.write_bytes(damage(whole, other))
    again, _ = FolderSource(folder).load("test", [0])
    assert torch.equal(first, again) and cache.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_read_all_the_same(folder):
    (folder / FOLDER).write_text("a file where the cache's folder should be")
    images, _ = FolderSource(folder).load("test", [0])
    assert len(images) == 5


@pytest.mark.parametrize("size,count", [(8, 500), (64, 500), (128, 125), (224, 40)])
def test_larger_images_are_evaluated_in_smaller_batches(size, count):
    for images in (torch.empty(2, 3, size, size, dtype=torch.uint8), RaggedImages([None, None], size)):
        assert evaluation_batch_size(ImageSet(images, torch.zeros(2), [0.5] * 3, [0.5] * 3, flip=False)) == count
