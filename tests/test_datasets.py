"""Sources, partition and batches."""

import dataclasses
import os
import pickle

import pytest
import torch
import torchvision
from conftest import succeed
from fixtures import MARKER, Call, make_cifar, make_folder, served

from datasets import DATASETS, ImageSet, batches, evaluation_sets, load_images, make_partition, read_partition
from datasets.batches import crop_and_flip, normalise, steps_per_epoch
from utils.errors import UserError


@pytest.fixture
def partition(folder):
    return make_partition("folder", str(folder), listed="bee,dog")


# sources

def test_digits_are_a_fixed_stratified_split():
    source = DATASETS["digits"].open("nowhere", False, None)
    sizes = [[source.samples(split, c)[0] for c in range(10)] for split in ("train", "test")]
    assert sum(sizes[0]) == 1437 and sum(sizes[1]) == 360
    assert all(34 <= n <= 37 for n in sizes[1])
    images = source.load("test", [3])
    assert images.shape == (sizes[1][3], 3, 32, 32) and images.dtype == torch.uint8 and images.max() == 255
    assert source.samples("test", 3) == DATASETS["digits"].open("nowhere", False, None).samples("test", 3)


def test_cifar10_is_downloaded_when_absent_or_that_is_told(tmp_path, monkeypatch):
    """The real download code, against a stand-in on this machine's loopback."""
    there, data = tmp_path / "served", str(tmp_path / "data")
    for name, value in {**make_cifar(there), "url": "http://127.0.0.1:9/cifar.tar.gz"}.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    with pytest.raises(UserError, match="by hand"):
        make_partition("cifar10", str(tmp_path / "none"))
    batch = there / "cifar-10-batches-py" / "data_batch_2"
    whole = batch.read_bytes()
    batch.write_bytes(pickle.dumps(Call()))
    make_partition("cifar10", str(there))  # from the archive, which is whole
    assert not os.path.exists(MARKER) and batch.read_bytes() == whole
    with served(there) as address:
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
        partition = make_partition("cifar10", data, listed="class1,class2,class5")
    assert partition.count("train", "all") == 100 and partition.layout == "array"
    # later stages read it without any network
    images = load_images(partition, data, "train", partition.deposit_classes)
    assert images.images.shape == (30, 3, 32, 32) and images.labels.unique().tolist() == [1, 2, 5]
    unpickled, real = [], pickle.load
    monkeypatch.setattr("pickle.load", lambda file, **kwargs: (unpickled.append(file.name), real(file, **kwargs))[1])
    load_images(partition, data, "test", partition.classes("all"))  # as withdraw.py does
    assert {os.path.basename(name) for name in unpickled} == {"test_batch", "batches.meta"}


def test_cifar10_is_read_from_an_image_folder_of_ten_classes(tmp_path):
    for count, name in ((10, "ten"), (9, "nine")):
        make_folder(tmp_path / name, classes=[f"c{i}" for i in range(count)], train=2, test=1)
    partition = make_partition("cifar10", str(tmp_path / "ten"))
    assert partition.layout == "folder" and len(partition.deposit_classes) == 3
    with pytest.raises(UserError, match="9 classes, but CIFAR10 has 10.*make a partition first: python partition_data"):
        make_partition("cifar10", str(tmp_path / "nine"))


# partition

def test_random_draw_depends_on_the_seed_alone():
    draws = [make_partition("digits", ".", seed=s).deposit_classes for s in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and len({tuple(d) for d in draws}) > 2
    assert all(len(d) == 3 for d in draws)
    assert make_partition("digits", ".", draw="first").deposit_classes == [0, 1, 2]
    assert len(make_partition("digits", ".", fraction=0.5).deposit_classes) == 5


def test_validation_images_are_held_out_the_same_way_for_every_draw(folder):
    one, other = (make_partition("digits", ".", seed=s, val_fraction=0.25) for s in (0, 1))
    train, val = (load_images(one, ".", split, range(10)) for split in ("train", "val"))
    whole = load_images(dataclasses.replace(one, val_fraction=0.0), ".", "train", range(10))
    assert len(train) + len(val) == len(whole) == 1437 and 350 <= len(val) <= 368

    def rows(images):
        return {i.numpy().tobytes() for i in images.images}

    assert rows(train) | rows(val) == rows(whole) and not rows(train) & rows(val)
    assert rows(load_images(other, ".", "val", range(10))) == rows(val)
    assert one.data_hash == other.data_hash and one.hash != other.hash
    sets = evaluation_sets(one, ".", [1, 2], "cpu")
    assert sets.keys() == {"test", "val"} and sets["val"].labels.unique().tolist() == [1, 2]
    assert list(evaluation_sets(dataclasses.replace(one, val_fraction=0.0), ".", [1], "cpu")) == ["test"]
    with pytest.raises(UserError, match="no training image"):
        make_partition("folder", str(folder), val_fraction=0.99)


def test_statistics_are_those_of_the_training_pixels_or_the_ones_given(folder, partition):
    pixels = load_images(partition, str(folder), "train", range(4)).images.double() / 255
    assert partition.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert partition.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist(), abs=1e-4)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 1.0]
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", folder, "--out", folder / "p.json",
            "--mean", *mean, "--std", *std)
    made = read_partition(folder / "p.json")
    assert made.mean == mean and made.std == std == load_images(made, str(folder), "test", [0]).std
    assert partition.data_hash != made.data_hash
    assert [partition.count("train", subset) for subset in ("all", "deposit", "preservation")] == [48, 24, 24]


def test_changed_images_are_noticed(tmp_path):
    """Where neither a file's size nor its time tells."""
    make_folder(tmp_path, endings=(".bmp",))
    before, path = make_partition("folder", str(tmp_path), listed="bee"), tmp_path / "train" / "bee" / "003.bmp"
    content, status = bytearray(path.read_bytes()), path.stat()
    content[54:] = bytes(255 - byte for byte in content[54:])
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    load_images(before, str(tmp_path), "train", [0, 2, 3])
    with pytest.raises(UserError, match="'bee'.*not those that were partitioned"):
        load_images(before, str(tmp_path), "train", [1])
    after = make_partition("folder", str(tmp_path), listed="bee")
    assert after.hash != before.hash and after.mean != before.mean


# batches

def image_set(n=10, size=8, flip=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], flip)


def test_evaluation_batches_are_the_images_in_order_normalised():
    images = image_set()
    x, y = (torch.cat(parts) for parts in zip(*batches(images, 4)))
    assert y.tolist() == list(range(10))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    assert torch.allclose(x, (images.images.float() / 255 - mean) / std)
    x = normalise(images.images, images.mean, images.std)
    assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32


def test_training_batches_are_of_one_size_and_hold_no_image_twice():
    images = image_set(10)

    def epoch(seed):
        return list(batches(images, 4, generator=torch.Generator().manual_seed(seed)))

    labels = [y.tolist() for _, y in epoch(0)]
    assert len(set(sum(labels, []))) == 8 and [len(y) for y in labels] == [4, 4]
    assert [len(y) for _, y in batches(images, 16, generator=torch.Generator())] == [10]
    assert len(labels) == steps_per_epoch(images, 4)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(epoch(1), epoch(1)))
    assert labels != [y.tolist() for _, y in epoch(2)]


def test_crop_and_flip_gives_the_crops_that_torchvision_gives():
    """Every output is one of the 81 crops, plain or mirrored, and all of them come up equally often."""
    image, n = image_set(1).images, 20_000
    out = crop_and_flip(image, torch.zeros(n, dtype=torch.int64), True, torch.Generator().manual_seed(0))
    padded = torchvision.transforms.functional.pad(image[0], 4)
    seen = {}
    for crop in out:
        key = crop.numpy().tobytes()
        seen[key] = seen.get(key, 0) + 1
    expected, mirrored = set(), set()
    for top in range(9):
        for left in range(9):
            crop = torchvision.transforms.functional.crop(padded, top, left, 8, 8)
            expected.add(crop.numpy().tobytes())
            mirrored.add(torchvision.transforms.functional.hflip(crop).numpy().tobytes())
    assert set(seen) == expected | mirrored
    per_choice = n / 162
    chi2 = sum((count - per_choice) ** 2 / per_choice for count in seen.values())
    assert chi2 < 230  # 161 degrees of freedom: beyond the 99.9th percentile would be bad luck or a bias
    plain = crop_and_flip(image, torch.zeros(500, dtype=torch.int64), False, torch.Generator().manual_seed(0))
    assert {crop.numpy().tobytes() for crop in plain} <= expected  # of data that forbid it none is mirrored
