"""Image folders as people have them: images of all kinds, names of all kinds, folders that lie otherwise."""

import hashlib
import os
import shutil
import zlib

import numpy as np
import pytest
import torchvision
from conftest import TINY, fail, succeed
from fixtures import CLASSES, make_folder
from PIL import Image

from datasets import load_images, make_partition, read_partition
from datasets.folder import IMAGE_EXTENSIONS, FolderSource


def flags(folder, *more):
    return ["partition_data.py", "--dataset", "folder", "--data_dir", folder, "--out", folder / "p.json", *more]


def partition(folder, *more):
    """What partition_data.py prints of an image folder."""
    return succeed(*flags(folder, *more))


def first_image(folder, size=16):
    """Its first training image as it is trained on, uint8 (size, size, 3)."""
    return FolderSource(str(folder), CLASSES, size).load("train", [0])[0].permute(1, 2, 0).numpy()


# what images hold

@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_images_are_turned_as_their_camera_says_unless_that_is_nonsense(folder, ending):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # white above, and by the orientation on the right
    image, path = Image.fromarray(pixels), folder / "train" / "ant" / f"000{ending}"
    image.getexif()[0x0112] = 6
    (folder / "train" / "ant" / "000.png").unlink()
    for exif, turned in ((image.getexif(), np.rot90(pixels, -1)), (b"Exif\0\0II*\0nonsense", pixels)):
        image.save(path, exif=exif)
        assert abs(first_image(folder).astype(int) - turned).max() < 55


def test_every_kind_of_image_is_read_and_other_files_are_not(folder):
    image = Image.open(folder / "train" / "ant" / "000.png")
    for ending in IMAGE_EXTENSIONS:
        image.save(folder / "train" / "ant" / f"x{ending.upper()}")
    image.convert("RGBA").save(folder / "train" / "ant" / "y.png")
    for name in ("a.heic", "b.txt", "noending", ".DS_Store", "._000.png", "__MACOSX/._000.png", ".cache/x.png"):
        (folder / "train" / "ant" / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / "train" / "ant" / name).write_text("")
    partition(folder)
    assert read_partition(folder / "p.json").samples["train"][0]["count"] == 12 + len(IMAGE_EXTENSIONS) + 1


# what cannot be partitioned

def image(change):
    """Spoils one test image."""
    return lambda root: change(root / "test" / "bee" / "002.png")


def claim_a_size(path, side=20_000):
    content = bytearray(path.read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def flat(root):
    for folder in list(root.glob("*/*")):
        for path in folder.iterdir():
            path.rename(folder.parent / f"{folder.name}{path.name}")
        folder.rmdir()


def nest(root):
    (root / "train").rename(root / "moved")
    (root / "train").mkdir()
    (root / "moved").rename(root / "train" / "images")


@pytest.mark.parametrize("change,words", [
    (image(lambda path: path.write_bytes(b"not an image")), ["bee/002.png cannot be read"]),
    (image(lambda path: path.write_bytes(b"")), ["bee/002.png cannot be read"]),
    (image(lambda path: path.write_bytes(path.read_bytes()[:200])), ["bee/002.png cannot be read"]),
    (image(lambda path: Image.new("RGB", (16, 16)).save(path, format="EPS")), ["cannot be read"]),  # for Ghostscript
    (image(claim_a_size), ["cannot be read", "decompression bomb"]),
    *((image(lambda path, kind=kind: Image.fromarray(np.ones((16, 16), kind)).save(path, format="TIFF")),
       ["more than 8 bits"]) for kind in (np.uint16, np.int32, np.float32)),
    (lambda root: [Image.new("RGB", (16, 16), (255, 255, 255)).save(path) for path in root.rglob("*.png")],
     ["of one colour, (255, 255, 255)"]),
    (lambda root: [path.unlink() for path in (root / "test" / "bee").iterdir()], ["'bee' has no test image"]),
    (lambda root: shutil.rmtree(root / "test" / "bee"), ["class folders of train and test differ"]),
    (flat, ["train holds 0 class folders", "train/<class>/"]), (nest, ["train holds 1 class folders"]),
    (lambda root: shutil.rmtree(root / "test"), ["test does not exist", "train/<class>/"]),
    (lambda root: [path.rename(path.with_suffix(".heic")) for path in root.rglob("*.png")], ["hold no image (.png"]),
])
def test_a_folder_that_cannot_be_partitioned_is_told_why_before_anything_is_written(folder, change, words):
    change(folder)
    line = fail(*flags(folder))
    assert all(word in line for word in words) and not (folder / "p.json").exists(), line


# folders as they are found

def test_images_in_sub_folders_are_those_of_torchvision(folder, tmp_path):
    below = folder / "train" / "ant" / "more" / "and more"
    below.mkdir(parents=True)
    for i in range(6):
        (folder / "train" / "ant" / f"{i:03}.png").rename(below / f"{i + 5:03}.png")
    elsewhere = make_folder(tmp_path / "elsewhere", classes=["x"], seed=5) / "train" / "x"
    (folder / "train" / "ant" / "linked").symlink_to(elsewhere)
    (folder / "train" / "ant" / "twice").symlink_to(elsewhere)
    theirs = torchvision.datasets.ImageFolder(folder / "train")
    expected = sorted(np.asarray(theirs[i][0]).tobytes() for i, (_, c) in enumerate(theirs.samples) if c == 0)
    made = make_partition("folder", str(folder), listed="bee")
    images = load_images(made, str(folder), "train", [0]).images.permute(0, 2, 3, 1).numpy()
    assert sorted(image.tobytes() for image in images) == expected and len(expected) == 12 + 2 * 12


def test_the_hash_of_a_flat_class_is_that_of_names_sizes_and_bytes(folder):
    """Of manifests that are in use."""
    digest = hashlib.sha256()
    for path in sorted((folder / "train" / "bee").iterdir()):
        digest.update(f"{path.name}|{path.stat().st_size}\n".encode() + path.read_bytes())
    assert make_partition("folder", str(folder)).samples["train"][1] == {"count": 12, "sha256": digest.hexdigest()}


def test_the_image_size_is_the_median_of_the_short_sides(folder):
    Image.new("RGB", (9, 7)).save(folder / "train" / "ant" / "000.png")
    Image.new("RGB", (90, 65)).save(folder / "train" / "bee" / "000.png")
    assert make_partition("folder", str(folder)).image_size == 16
    for path in folder.rglob("*.png"):
        Image.new("RGB", (300, 400), (len(path.parent.name), 0, int(path.stem))).save(path)
    assert make_partition("folder", str(folder)).image_size == 224


def test_names_that_are_not_utf8_go_through_the_stages(tmp_path):
    data, save = make_folder(tmp_path / "data", size=8), tmp_path / "run"
    for split in ("train", "test"):
        folder = os.fsencode(data / split)
        os.rename(folder + b"/bee", folder + b"/abeill\xe9")
        os.rename(folder + b"/abeill\xe9/001.png", folder + b"/abeill\xe9/\xe9t\xe9.png")
    out = succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "0",
                  "--out", save / "partition.json")
    assert "(12 train" in out
    common = ["--data_dir", data, "--arch", "resnet8", *TINY, "--epochs", "1"]
    succeed("train_scratch.py", "--save_path", save, *common)
    (data / "test" / "ant" / "000.png").rename(os.fsdecode(os.fsencode(data / "test" / "ant") + b"/\xff.png"))
    assert "'ant'" in fail("train_scratch.py", *common, "--save_path", tmp_path / "new", "--partition",
                           save / "partition.json")


def test_val_is_the_test_set_where_there_is_no_other_and_a_folder_as_out_gets_the_manifest(folder):
    before = make_partition("folder", str(folder), listed="bee")
    (folder / "test").rename(folder / "val")
    partition(folder, "--deposit_classes", "bee", "--out", folder)
    assert read_partition(folder / "partition.json") == before
    assert len(load_images(before, str(folder), "test", [1])) == 5


ODD, NUMBERS = ["$10 bill", "$5", "a#b%c", "hot", "spicy", "猫"], ["1", "10", "2", "20", "3"]


@pytest.mark.parametrize("names,listed,expected", [
    (CLASSES, "0, 3", ["ant", "dog"]), (ODD, "猫,hot, spicy, a#b%c", ["a#b%c", "hot", "spicy", "猫"]),
    (ODD, "1", ["$5"]), (NUMBERS, "1,20", ["1", "20"]), (NUMBERS, "0,4", ["1", "3"]), (NUMBERS, "3", ["3"]),
    (NUMBERS, "20,4", "no class"), (NUMBERS, "1,4", "'4' is no class"),
    (NUMBERS, "1,99", "no class"), (CLASSES, "0, dog", "'0' is no class"),
])
def test_a_list_of_deposit_classes_is_all_names_or_all_ids(tmp_path, names, listed, expected):
    make_folder(tmp_path, classes=names, train=2, test=1)
    if isinstance(expected, str):
        assert expected in fail(*flags(tmp_path, "--deposit_classes", listed), unchanged=tmp_path)
    else:
        assert f"deposit set: {', '.join(expected)} (" in partition(tmp_path, "--deposit_classes", listed)
