"""Where samples come from. A source lists the samples of each class and reads those it is asked for.

Every source offers
    class_names                 list of str; a class's id is its place in the list
    image_size                  height and width of the images it gives
    samples(split, class_id)    (number of samples, SHA-256 of their list), split "train" or "test"
    load(split, class_ids)      uint8 images (n, 3, s, s), or RaggedImages, and int64 labels (n,), class after class

Of a folder both open the files of the classes named and no other.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from datasets.cache import FOLDER, cached, list_hash, source_key
from datasets.cub import open_cub
from datasets.decode import decode, open_image, read_square
from utils.errors import UserError

SPLITS = ("train", "test")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ArraySource:
    """Samples that lie in memory as one array a split: uint8 (n, h, w, 3) and labels (n,)."""

    layout = "array"

    def __init__(self, arrays, class_names, image_size):
        self.class_names, self.image_size = class_names, image_size
        self._arrays = arrays

    def _of_class(self, split, class_id):
        images, labels = self._arrays[split]
        return images[labels == class_id]

    def samples(self, split, class_id):
        images = self._of_class(split, class_id)
        return len(images), hashlib.sha256(np.ascontiguousarray(images)).hexdigest()

    def load(self, split, class_ids):
        images = [self._of_class(split, c) for c in class_ids]
        labels = torch.cat([torch.full((len(i),), c) for c, i in zip(class_ids, images)])
        images = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
        if images.shape[-1] != self.image_size:
            # 8x8 digits to 32x32: bilinear, so that no stroke gains the hard edges of copied pixels
            images = F.interpolate(images.float(), size=(self.image_size,) * 2, mode="bilinear").round().byte()
        return images.contiguous(), labels


class FolderSource:
    """Images in root/train/<class>/ and root/test/<class>/, resized to a square when they are not one."""

    layout = "folder"

    def __init__(self, root, class_names=None, image_size=None):
        self.root = root
        self.class_names = self._class_folders() if class_names is None else class_names
        self.image_size = self._first_image_size() if image_size is None else image_size

    def _class_folders(self):
        names = {}
        for split in SPLITS:
            folder = os.path.join(self.root, split)
            if not os.path.isdir(folder):
                raise UserError(f"{folder} does not exist: an image folder holds train/<class>/ and test/<class>/")
            names[split] = sorted(entry.name for entry in os.scandir(folder)
                                  if entry.is_dir() and not entry.name.startswith("."))
        differing = sorted(set(names["train"]) ^ set(names["test"]))
        if differing:
            raise UserError(f"the class folders of train and test differ in {self.root}: "
                            f"'{differing[0]}' is in one only; give both the same classes")
        return names["train"]

    def _files(self, split, class_id):
        folder = os.path.join(self.root, split, self.class_names[class_id])
        if not os.path.isdir(folder):
            raise UserError(f"{folder} does not exist: --data_dir must be the image folder that was partitioned")
        return sorted(entry.path for entry in os.scandir(folder)
                      if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith("."))

    def _first_image_size(self):
        for class_id in range(len(self.class_names)):
            for path in self._files("train", class_id)[:1]:
                with open_image(path) as image:
                    return min(*image.size, 224)
        raise UserError(f"{self.root}/train holds no image ({', '.join(IMAGE_EXTENSIONS)})")

    def samples(self, split, class_id):
        files = self._files(split, class_id)
        return len(files), list_hash(files)

    def load(self, split, class_ids):
        parts = [self._class_images(split, c) for c in class_ids]
        labels = torch.cat([torch.full((len(part),), c) for c, part in zip(class_ids, parts)])
        # channels second in shape, innermost in memory, as the files hold them
        return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2), labels

    def _class_images(self, split, class_id):
        """uint8 (n, s, s, 3), decoded once and then read from the cache."""
        files, size, name = self._files(split, class_id), self.image_size, self.class_names[class_id]
        values = cached(os.path.join(self.root, FOLDER, f"{split}-{name}-{size}"), source_key(files, size),
                        lambda: decode(files, read_square, size, f"{split}/{name}"))
        return values.reshape(len(files), size, size, 3)


def _digits(data_dir, download, image_size):
    """scikit-learn's 1,797 handwritten digits (8x8, embedded); a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.repeat((bunch.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=bunch.target)
    arrays = {"train": (images[train], bunch.target[train]), "test": (images[test], bunch.target[test])}
    return ArraySource(arrays, [str(name) for name in bunch.target_names], image_size or 32)


def _cifar(factory):
    """CIFAR in torchvision's format, or as an image folder, as the authors keep it."""

    def open_cifar(data_dir, download, image_size):
        if os.path.isdir(os.path.join(data_dir, "train")):
            return FolderSource(data_dir, image_size=image_size)
        name = factory.__name__
        splits = {}
        for split in SPLITS:
            try:
                splits[split] = factory(data_dir, train=split == "train", download=download)
            except Exception as error:  # urllib, tarfile, pickle and torchvision's own, by turns
                cause = "no network, or a damaged archive" if download else "it is absent or damaged"
                raise UserError(
                    f"{name} could not be had in {data_dir} ({cause}: {error}): put {factory.base_folder}/ or "
                    f"train/<class>/ and test/<class>/ there by hand, or name another --data_dir") from None
        arrays = {split: (s.data, np.asarray(s.targets)) for split, s in splits.items()}
        return ArraySource(arrays, list(splits["train"].classes), image_size or 32)

    return open_cifar


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a data set beforehand.

    open: (data_dir, download, image_size) -> source, listing the classes itself.
    flip: whether an image and its mirror image are of one class.
    class_count: number of classes, where it is fixed.
    fetched: whether it is downloaded when absent, unasked.
    """

    open: Callable
    flip: bool
    class_count: int | None = None
    fetched: bool = False


DATASETS = {
    # a mirrored digit is no digit
    "digits": Dataset(_digits, flip=False, class_count=10),
    "cifar10": Dataset(_cifar(torchvision.datasets.CIFAR10), flip=True, class_count=10, fetched=True),
    "cifar100": Dataset(_cifar(torchvision.datasets.CIFAR100), flip=True, class_count=100, fetched=True),
    "cub200": Dataset(open_cub, flip=True),
    "folder": Dataset(lambda data_dir, download, image_size: FolderSource(data_dir, image_size=image_size), flip=True),
}


def open_source(dataset, data_dir, *, download=False, image_size=None):
    """Open a data set and list its classes. Raises UserError when it cannot be had or makes no sense."""
    source = DATASETS[dataset].open(data_dir, download, image_size)
    expected = DATASETS[dataset].class_count
    if expected is not None and len(source.class_names) != expected:
        raise UserError(f"{data_dir} holds {len(source.class_names)} classes, but {dataset} has {expected}: "
                        f"use --dataset folder for other data")
    if len(source.class_names) < 2:
        raise UserError(f"{data_dir} holds {len(source.class_names)} classes: two are the least to partition")
    return source
