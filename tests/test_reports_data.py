"""What people report of such programs, of their data: images of all kinds, folders as they are found, parallel runs."""

import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, fail, snapshot, succeed
from fixtures import make_cub, make_cub_archive, make_folder
from PIL import Image

from datasets import evaluation_sets, load_images, make_partition, read_partition
from datasets.cache import FOLDER, cached
from datasets.cub import ARCHIVE, NAME, open_cub
from datasets.decode import read_square
from datasets.files import workspace
from datasets.folder import IMAGE_EXTENSIONS, FolderSource
from utils.errors import UserError
from utils.files import write_atomically


def partition_flags(folder, *more):
    return ["partition_data.py", "--dataset", "folder", "--data_dir", folder, "--out", folder / "p.json", *more]


def partition(folder, *more):
    """What partition_data.py prints of an image folder."""
    return succeed(*partition_flags(folder, *more))


def first_image(folder, class_id=0, size=16):
    """Its first training image as it is trained on, uint8 (size, size, 3)."""
    images, _ = FolderSource(str(folder), ["ant", "bee", "cow", "dog"], size).load("train", [class_id])
    return images[0].permute(1, 2, 0).numpy()


# parallel runs

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


def test_processes_that_share_a_folder_without_cache_all_read_it(folder):
    expected, _ = FolderSource(str(folder)).load("train", range(4))

    def work(barrier, number):
        for _ in range(20):
            if barrier.wait() == 0:
                shutil.rmtree(folder / FOLDER, ignore_errors=True)
            barrier.wait()
            images, _ = FolderSource(str(folder)).load("train", range(4))
            assert torch.equal(images, expected)

    assert at_once(4, work) == [0] * 4
    assert len(list((folder / FOLDER).iterdir())) == 4  # and nothing temporary


def test_processes_with_other_bytes_do_not_take_each_others_cache(tmp_path):
    """As when a data set is replaced while one run still reads it."""

    def work(barrier, number):
        made = np.full(100_000, number, np.uint8)
        for _ in range(50):
            barrier.wait()
            assert (cached(str(tmp_path / "c"), str(number % 2), lambda: [made % 2]) == number % 2).all()

    assert at_once(4, work) == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_only_one_of_two_partitions_takes_a_place(folder, tmp_path):
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
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    for content in (b"one", b"two"):
        write_atomically(str(tmp_path / "file"), lambda file, content=content: file.write(content))
        assert snapshot(tmp_path) == {tmp_path / "file": content}
    with workspace(str(tmp_path / "w")) as place:
        assert os.listdir(place) == []
    assert not os.path.exists(place)


def test_an_archive_is_unpacked_once_for_all_that_want_it(tmp_path):
    data = tmp_path / "data"
    make_cub_archive(data, [1, 2])
    (data / f"{NAME}.part" / "left by a kill").mkdir(parents=True)

    def work(barrier, number):
        for _ in range(20):
            if barrier.wait() == 0:
                shutil.rmtree(data / NAME, ignore_errors=True)
            barrier.wait()
            assert len(open_cub(str(data), False, 16).load("train", [0, 1])[0]) == 4

    assert at_once(4, work) == [0] * 4
    assert sorted(path.name for path in data.iterdir()) == [NAME, ARCHIVE]


# what images hold

def deep_tiff(values):
    return lambda path: Image.fromarray(values).save(path, format="TIFF")


ramp = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize("save", [
    lambda path: Image.fromarray((ramp * 65535).astype(np.uint16)).save(path, format="PNG"),
    lambda path: Image.fromarray((ramp * 65535).astype(np.uint16)).save(path, format="PPM"),
    deep_tiff((ramp * 65535).astype(np.uint16)), deep_tiff((ramp * 65535).astype(">u2")),
    deep_tiff((ramp * 255).round().astype(np.int32)), deep_tiff((ramp * 65535).astype(np.int32)),
    deep_tiff((ramp * (2**31 - 1)).astype(np.int32)), deep_tiff(ramp.astype(np.float32)),
    deep_tiff((ramp * 255).astype(np.float32)), deep_tiff((ramp * 65535).astype(np.float32)),
])
def test_deep_images_are_scaled_by_their_range(folder, save):
    save(folder / "train" / "ant" / "000.png")
    found = first_image(folder).astype(int)
    assert abs(found - (255 * ramp).round()[..., None]).max() <= 1 and "8 bits" in partition(folder)


@pytest.mark.parametrize("values", [ramp * 9 - 3, ramp * 1e9, np.full((16, 16), np.nan), np.full((16, 16), np.inf),
                                    (ramp * 90_000).astype(np.int32), (-9 * ramp).astype(np.int32)])
def test_deep_images_of_an_unknown_range_are_refused(folder, values):
    values = values if values.dtype == np.int32 else values.astype(np.float32)
    deep_tiff(values)(folder / "train" / "ant" / "000.tif")
    assert "ant/000.tif holds values from" in fail(*partition_flags(folder), unchanged=folder / "train")
    assert not (folder / "p.json").exists()


def test_deep_images_that_are_dark_are_learned_from(tmp_path):
    """Values around 10,000 of 65,535, as a microscope gives them, were all white."""
    for split, name, i in ((s, n, i) for s in ("train", "test") for n in "ab" for i in range(3)):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        pixels = 8000 + 4000 * ramp + (2000 if name == "b" else 0)
        Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / split / name / f"{i}.png")
    made = make_partition("folder", str(tmp_path), listed="a")
    assert made.mean == pytest.approx([(11_000 / 65535)] * 3, abs=0.01) and made.std[0] > 0.01


def test_images_without_any_spread_are_refused(tmp_path):
    make_folder(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.new("RGB", (16, 16), (255, 255, 255)).save(path)
    assert "of one colour, (255, 255, 255)" in fail(*partition_flags(tmp_path))
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_images_are_turned_as_their_camera_says(folder, ending):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # white above, and by the orientation on the right
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6
    (folder / "train" / "ant" / "000.png").unlink()
    image.save(folder / "train" / "ant" / f"000{ending}", exif=image.getexif())
    found = first_image(folder)
    assert (found[:, 8:] > 200).all() and (found[:, :8] < 55).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_nonsensical_orientation_spoils_no_image(folder):
    image = Image.open(folder / "train" / "ant" / "001.png")
    image.save(folder / "train" / "ant" / "000.png", exif=b"Exif\0\0II*\0nonsense")
    assert np.array_equal(first_image(folder), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "PA"])
def test_transparent_places_become_white_and_that_is_said(folder, mode):
    """Beneath they are red or grey, which nobody sees."""
    image = Image.new("RGBA", (16, 16), (90, 90, 90, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 8))
    more = {}
    if mode in ("P", "RGB"):
        image = image.convert("RGB").convert(mode, dither=Image.Dither.NONE)
        more["transparency"] = image.getpixel((0, 15))
    elif mode == "PA":
        mode = "RGBA"
    image.convert(mode).save(folder / "train" / "ant" / "000.png", **more)
    found = first_image(folder)
    assert (found[:8] == 0).all() and (found[8:] == 255).all()
    out = partition(folder)
    assert "1 of 68 images may be transparent, and are put on white" in out and out.count("note:") == 1


def test_every_kind_of_image_is_read_and_other_files_are_named(folder):
    image = Image.open(folder / "train" / "ant" / "000.png")
    for ending in IMAGE_EXTENSIONS:
        image.save(folder / "train" / "ant" / f"x{ending.upper()}")
    for name in ("a.heic", "b.txt", "noending", "c.heic"):
        (folder / "train" / "ant" / name).write_text("")
    shutil.copy(folder / "train" / "ant" / "000.png", folder / "test" / "stray.png")
    for name in (".DS_Store", "._000.png", "__MACOSX/ant/._000.png", ".cache/x.png"):
        for above in ("", "train", "test", "train/ant"):
            (folder / above / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / above / name).write_text("")
    out = partition(folder)
    assert "5 files are in no class" in out and "read: train/ant/a.heic, train/ant/b.txt, train/ant/c.heic, ..." in out
    assert out.count("note:") == 1
    assert read_partition(folder / "p.json").samples["train"][0]["count"] == 12 + len(IMAGE_EXTENSIONS)


# folders as they are found

def test_images_in_sub_folders_are_those_of_torchvision(folder, tmp_path):
    deep = folder / "train" / "ant" / "more" / "and more"
    deep.mkdir(parents=True)
    for i in range(6):
        (folder / "train" / "ant" / f"{i:03}.png").rename(deep / f"{i + 5:03}.png")
    elsewhere = make_folder(tmp_path / "elsewhere", classes=["x"], seed=5) / "train" / "x"
    (folder / "train" / "ant" / "linked").symlink_to(elsewhere)
    (folder / "train" / "ant" / "twice").symlink_to(elsewhere)
    theirs = torchvision.datasets.ImageFolder(folder / "train")
    expected = sorted(np.asarray(theirs[i][0]).tobytes() for i, (_, c) in enumerate(theirs.samples) if c == 0)
    made = make_partition("folder", str(folder), listed="bee")
    images = load_images(made, str(folder), "train", [0]).images.permute(0, 2, 3, 1).numpy()
    assert sorted(image.tobytes() for image in images) == expected and len(expected) == 12 + 2 * 12
    # a link that leads back up ends
    (deep / "up").symlink_to(folder / "train" / "ant")
    assert make_partition("folder", str(folder), listed="bee") == made


def test_the_hash_of_a_flat_class_is_that_of_names_sizes_and_bytes(folder):
    """Of manifests that are in use."""
    import hashlib
    digest = hashlib.sha256()
    for path in sorted((folder / "train" / "bee").iterdir()):
        digest.update(f"{path.name}|{path.stat().st_size}\n".encode() + path.read_bytes())
    assert make_partition("folder", str(folder)).samples["train"][1] == {"count": 12, "sha256": digest.hexdigest()}


def test_the_image_size_is_the_median_and_odd_ones_are_told(folder):
    assert "16x16" in partition(folder) and "note" not in partition(folder)
    Image.new("RGB", (9, 7)).save(folder / "train" / "ant" / "000.png")
    Image.new("RGB", (90, 65)).save(folder / "train" / "bee" / "000.png")
    (folder / "p.json").unlink()
    out = partition(folder)
    assert "16x16 pixels" in out and "of short sides 7 to 65, 1 are less than half and 1 more than four times" in out
    (folder / "p.json").unlink()
    assert "48 are less than half" not in partition(folder, "--image_size", "32")
    (folder / "p.json").unlink()
    assert "47 are less than half" in partition(folder, "--image_size", "64")
    for path in folder.rglob("*.png"):
        Image.new("RGB", (300, 400), (len(path.parent.name), 0, int(path.stem))).save(path)
    assert make_partition("folder", str(folder)).image_size == 224


def test_of_many_files_only_some_tell_the_size(folder, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k))
    monkeypatch.setattr("datasets.folder._SURVEYED", 8)
    assert FolderSource(str(folder)).image_size == 16 and len(opened) == 8 + 7


def test_a_data_set_replaced_under_equal_names_sizes_and_times_is_read_anew(folder):
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    before = make_partition("folder", str(folder), listed="bee")
    for path in folder.rglob("*.bmp"):
        status, content = path.stat(), bytearray(path.read_bytes())
        content[54:] = bytes(255 - byte for byte in content[54:])
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = make_partition("folder", str(folder), listed="bee")
    assert after.mean == pytest.approx([1 - mean for mean in before.mean], abs=2e-4) and after.hash != before.hash
    images = load_images(after, str(folder), "test", [2]).images
    assert torch.equal(images[0], torch.from_numpy(read_square(str(folder / "test" / "cow" / "000.bmp"), 16)).permute(
        2, 0, 1))


def test_names_that_are_not_utf8_go_through_all_stages(tmp_path):
    data, save = make_folder(tmp_path / "data", size=8), tmp_path / "run"
    for split in ("train", "test"):
        folder = os.fsencode(data / split)
        os.rename(folder + b"/bee", folder + b"/abeill\xe9")
        os.rename(folder + b"/abeill\xe9/001.png", folder + b"/abeill\xe9/\xe9t\xe9.png")
    out = succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "abeill\\xe9",
                  "--out", save / "partition.json")
    assert "deposit set: abeill\\xe9 (12 train" in out
    flags = ["--save_path", save, "--data_dir", data]
    succeed("train_scratch.py", *flags, "--arch", "resnet8", *TINY, "--epochs", "1")
    succeed("train_deposit.py", *flags, *TINY, "--epochs", "1")
    succeed("withdraw.py", *flags, "--device", "cpu", "--precision", "fp32")
    (data / "test" / "ant" / "000.png").rename(os.fsdecode(os.fsencode(data / "test" / "ant") + b"/\xff.png"))
    assert "'ant'" in fail("train_scratch.py", *flags[2:], "--save_path", tmp_path / "new", "--partition",
                           save / "partition.json", "--arch", "resnet8", *TINY)


def test_names_in_two_unicode_forms_are_one(folder):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        (folder / split / "bee").rename(folder / split / unicodedata.normalize(form, "café"))
    for form in ("NFC", "NFD"):
        made = make_partition("folder", str(folder), listed=unicodedata.normalize(form, "café"))
        assert [made.class_names[c] for c in made.deposit_classes] == [unicodedata.normalize("NFC", "café")]
        assert len(load_images(made, str(folder), "test", made.deposit_classes)) == 5
    (folder / "train" / unicodedata.normalize("NFD", "café")).mkdir()
    with pytest.raises(UserError, match="two folders.*rename one"):
        make_partition("folder", str(folder))


def flat(root):
    for split in ("train", "test"):
        for folder in list((root / split).iterdir()):
            for path in folder.iterdir():
                path.rename(root / split / f"{folder.name}{path.name}")
            folder.rmdir()


def nest(root, split):
    (root / split).rename(root / "moved")
    (root / split).mkdir()
    (root / "moved").rename(root / split / "images")


@pytest.mark.parametrize("change,words", [
    (flat, ["train holds 0 class folders", "holds 48 images and no folder", "train/<class>/"]),
    (lambda root: nest(root, "train"), ["train/images holds 0 images and the folders ant, bee, cow, dog"]),
    (lambda root: shutil.move(root / "train", root / "set" / "train"), ["the folders set, test", "--data_dir", "/set"]),
    (lambda root: shutil.rmtree(root / "test"), ["test does not exist", "holds 0 images and the folders set, train"]),
    (lambda root: [path.rename(path.with_suffix(".heic")) for path in root.rglob("*.png")],
     ["hold no image (.png", "68 other files"]),
])
def test_images_that_are_there_otherwise_than_wanted_are_told(folder, change, words):
    (folder / "set").mkdir()
    change(folder)
    line = fail(*partition_flags(folder), unchanged=folder)
    assert all(word in line for word in words), line


def test_val_is_the_test_set_where_there_is_no_other(folder):
    before = make_partition("folder", str(folder), listed="bee")
    (folder / "test").rename(folder / "val")
    assert make_partition("folder", str(folder), listed="bee") == before
    assert "val/ is the test set" in partition(folder)
    assert len(load_images(before, str(folder), "test", [1])) == 5


def test_other_images_without_a_partition_are_told_how_to_make_one(folder, tmp_path):
    line = fail("train_scratch.py", "--save_path", tmp_path / "run", "--data_dir", folder, *TINY, unchanged=tmp_path)
    assert f"make a partition first: python partition_data.py --dataset folder --data_dir {folder} --out" in line


# deposit classes and the manifest

@pytest.mark.parametrize("listed,expected", [
    ("hot, spicy", ["hot, spicy"]), ("猫,hot, spicy, a#b%c", ["a#b%c", "hot, spicy", "猫"]), ("hot", ["hot"]),
    ("0, $5", ["$10 bill", "$5"]), ("spicy,hot", ["hot", "spicy"]),
])
def test_a_class_name_may_hold_a_comma(tmp_path, listed, expected):
    make_folder(tmp_path, classes=["$10 bill", "$5", "a#b%c", "hot, spicy", "hot", "spicy", "猫"], train=2, test=1)
    made = make_partition("folder", str(tmp_path), listed=listed)
    assert [made.class_names[c] for c in made.deposit_classes] == expected


@pytest.mark.parametrize("listed,expected", [
    ("1,20", ["1", "20"]), ("1,4", ["10", "3"]), ("4,0", ["1", "3"]), ("3", ["3"]), ("20,4", "ids only (0 to 4)"),
    ("10,2,0", "ids only"), ("1,99", "'99' is no class"),
])
def test_where_names_are_numbers_a_list_has_one_meaning(tmp_path, listed, expected):
    make_folder(tmp_path, classes=["1", "10", "2", "20", "3"], train=2, test=1)
    if isinstance(expected, str):
        assert expected in fail(*partition_flags(tmp_path, "--deposit_classes", listed), unchanged=tmp_path)
    else:
        out = partition(tmp_path, "--deposit_classes", listed)
        assert f"deposit set: {', '.join(expected)} (" in out and ("are ids" in out) == (listed == "1,4")


def test_a_folder_as_out_gets_the_manifest(folder, tmp_path):
    (tmp_path / "there").mkdir()
    for out in (f"{tmp_path}/new/", tmp_path / "there"):
        succeed("partition_data.py", "--dataset", "folder", "--data_dir", folder, "--out", out)
        assert [path.name for path in Path(out).iterdir()] == ["partition.json"]


def test_mean_and_std_may_be_given(folder):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 1.0]
    partition(folder, "--mean", *mean, "--std", *std)
    made = read_partition(folder / "p.json")
    assert made.mean == mean and made.std == std
    computed = make_partition("folder", str(folder))
    assert computed.mean != mean and computed.data_hash != made.data_hash
    assert load_images(made, str(folder), "test", [0]).std == std
    assert make_partition("folder", str(folder), mean=(0, 0, 1), std=(1, 1, 1)).mean == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("flags,word", [
    (["--mean", 0.5, 0.5, 0.5], "belong together"), (["--std", 0.5, 0.5, 0.5], "belong together"),
    (["--mean", 0.5, 0.5, 1.5, "--std", 1, 1, 1], "out of range"), (["--mean", 0, 0, 0, "--std", 0, 1, 1], "out of"),
    (["--mean", 0.5, "--std", 0.5], "expected 3"), (["--mean", "nan", 0, 0, "--std", 1, 1, 1], "out of range"),
])
def test_a_senseless_mean_or_std_is_refused(folder, flags, word):
    assert word in fail(*partition_flags(folder, *flags), unchanged=folder)


def test_evaluation_sets_are_test_and_what_is_held_out(folder):
    made = make_partition("folder", str(folder), listed="bee", val_fraction=0.25)
    sets = evaluation_sets(made, str(folder), [1, 2])
    assert {split: len(images) for split, images in sets.items()} == {"test": 10, "val": 6}
    assert sets["val"].labels.unique().tolist() == [1, 2]
    made = make_partition("folder", str(folder), listed="bee")
    assert list(evaluation_sets(made, str(folder), [1])) == ["test"]


# CUB-200-2011

def cub_flags(data):
    return ["partition_data.py", "--dataset", "cub200", "--data_dir", data, "--image_size", "16", "--out",
            data / "p.json"]


@pytest.mark.parametrize("above", [NAME, "archive"])
def test_kaggles_nested_cub_is_found(tmp_path, above):
    make_cub(tmp_path / above, [1, 2, 3])
    assert "001.Bird_1" in succeed(*cub_flags(tmp_path))


def test_a_cub_without_its_tables_is_told_which(tmp_path):
    folder = make_cub(tmp_path, [1, 2, 3])
    (folder / "classes.txt").unlink()
    (folder / "train_test_split.txt").unlink()
    assert "error: train_test_split.txt, classes.txt does not exist in" in fail(*cub_flags(tmp_path))
    for path in folder.glob("*.txt"):
        path.unlink()
    line = fail(*cub_flags(tmp_path), unchanged=tmp_path)
    assert "images.txt, image_class_labels.txt, train_test_split.txt, classes.txt does not exist" in line


def test_names_of_cub_that_are_not_utf8(tmp_path):
    folder = make_cub(tmp_path, [1, 2, 3])
    for name in ("images.txt", "classes.txt"):
        path = folder / name
        path.write_bytes(path.read_bytes().replace(b"Bird_2", b"\xe9_2"))
    images = os.fsencode(folder / "images")
    os.rename(images + b"/002.Bird_2", images + b"/002.\xe9_2")
    assert "002.\\xe9_2" in succeed(*cub_flags(tmp_path))
    made = read_partition(tmp_path / "p.json")
    assert len(load_images(made, str(tmp_path), "train", [0, 1, 2])) == 6


@pytest.fixture
def old_python(monkeypatch):
    """tarfile as it was before Python 3.10.12 and 3.11.4."""
    real = tarfile.TarFile.extractall
    monkeypatch.delattr(tarfile, "data_filter")
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda tar, path, members=None: real(tar, path, members))


def test_an_archive_is_unpacked_by_an_older_python(tmp_path, old_python):
    data = tmp_path / "data"
    make_cub_archive(data, [1, 2])
    assert open_cub(str(data), False, 16).class_names == ["001.Bird_1", "002.Bird_2"]
    assert len(snapshot(data / NAME / "images")) == 2 * 3


@pytest.mark.parametrize("name,kind,target", [
    ("../outside", tarfile.REGTYPE, ""), (f"{NAME}/../../outside", tarfile.REGTYPE, ""),
    (f"{NAME}/link", tarfile.SYMTYPE, "/tmp"), (f"{NAME}/link", tarfile.LNKTYPE, "../outside"),
    (f"{NAME}/pipe", tarfile.FIFOTYPE, ""), ("/tmp/lirf-outside", tarfile.REGTYPE, ""),
])
def test_an_older_python_refuses_paths_outside_too(tmp_path, old_python, name, kind, target):
    data, member = tmp_path / "data", tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    make_cub_archive(data, [1, 2], [member])
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="damaged or not the archive"):
        open_cub(str(data), False, 16)
    assert snapshot(tmp_path) == before and [path.name for path in data.iterdir()] == [ARCHIVE]
    assert not os.path.exists("/tmp/lirf-outside")
