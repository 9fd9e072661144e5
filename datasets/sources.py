"""Where samples come from. A source lists the samples of each class and reads those it is asked for.

Every source offers
    layout                      "folder": a folder, which is opened again as one; else any word for the way of listing
    class_names                 list of str; a class's id is its place in the list
    image_size                  height and width of the images it gives
    samples(split, class_id)    (number of samples, SHA-256 of their list), split "train" or "test"
    load(split, class_ids)      uint8 images (n, 3, s, s), or RaggedImages, class after class

Of a folder both open the files of the classes named and no other.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from datasets.cub import open_cub
from datasets.folder import FolderSource
from utils.errors import UserError


class ArraySource:
    """Samples that lie in memory as one array a split. read: split -> (uint8 (n, h, w, 3), labels (n,)), called only
    for the splits that are asked for: who needs the test set reads no training image."""

    layout = "array"

    def __init__(self, read, class_names, image_size):
        self.class_names, self.image_size = class_names, image_size
        self._read = read

    def _of_class(self, split, class_id):
        images, labels = self._read(split)
        return images[labels == class_id]

    def samples(self, split, class_id):
        images = self._of_class(split, class_id)
        return len(images), hashlib.sha256(np.ascontiguousarray(images)).hexdigest()

    def load(self, split, class_ids):
        images = np.concatenate([self._of_class(split, c) for c in class_ids])
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        if images.shape[-1] != self.image_size:
            # 8x8 digits to 32x32: bilinear, so that no stroke gains the hard edges of copied pixels
            images = F.interpolate(images.float(), size=(self.image_size,) * 2, mode="bilinear",
                                   antialias=self.image_size < images.shape[-1]).round().byte()
        return images.contiguous()


def _digits(data_dir, download, image_size):
    """scikit-learn's 1,797 handwritten digits (8x8, embedded); a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.repeat((bunch.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=bunch.target)
    arrays = {"train": (images[train], bunch.target[train]), "test": (images[test], bunch.target[test])}
    return ArraySource(arrays.__getitem__, [str(name) for name in bunch.target_names], image_size or 32)


def _cifar(factory, classes):
    """CIFAR in torchvision's format, or as an image folder, as the authors keep it."""

    name = factory.__name__

    def open_cifar(data_dir, download, image_size):
        if os.path.isdir(os.path.join(data_dir, "train")):
            source = FolderSource(data_dir, image_size=image_size)
            if len(source.class_names) != classes:
                raise UserError(f"{data_dir} holds {len(source.class_names)} classes, but {name} has {classes}: for "
                                f"other data make a partition first: python partition_data.py --dataset folder "
                                f"--data_dir {data_dir} --out <save_path>/partition.json")
            return source

        @functools.cache
        def read(split):
            try:
                of_split = factory(data_dir, train=split == "train", download=download)
                return of_split.data, np.asarray(of_split.targets), list(of_split.classes)
            except Exception as error:  # urllib, tarfile, pickle and torchvision's own, by turns
                cause = "no network, or a damaged archive" if download else "it is absent or damaged"
                raise UserError(
                    f"{name} could not be had in {data_dir} ({cause}: {error}): put {factory.base_folder}/, "
                    f"with all of its files, or train/<class>/ and test/<class>/ there by hand, or name another "
                    f"--data_dir") from None

        return ArraySource(lambda split: read(split)[:2], read("test")[2], image_size or 32)

    return open_cifar


class Dataset(NamedTuple):
    """What is known of a data set beforehand.

    open: (data_dir, download, image_size) -> source, listing the classes itself; raises UserError when the data cannot
    be had. flip: whether an image and its mirror image are of one class. fetched: whether it is downloaded when absent,
    unasked.
    """

    open: Callable
    flip: bool
    fetched: bool = False


DATASETS = {
    # a mirrored digit is no digit
    "digits": Dataset(_digits, flip=False),
    "cifar10": Dataset(_cifar(torchvision.datasets.CIFAR10, 10), flip=True, fetched=True),
    "cifar100": Dataset(_cifar(torchvision.datasets.CIFAR100, 100), flip=True, fetched=True),
    "cub200": Dataset(open_cub, flip=True),
    "folder": Dataset(lambda data_dir, download, image_size: FolderSource(data_dir, image_size=image_size), flip=True),
}
