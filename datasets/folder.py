"""Image folders: train/<class>/ and test/<class>/, as torchvision's ImageFolder reads them."""

import functools
import glob
import os
import statistics

import numpy as np
import torch

from datasets.files import SPLITS, decode, list_hash, read_square, short_side
from utils.errors import UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
                    ".pbm", ".pnm")
_SMALLEST, _LARGEST = 8, 224  # side of images unless another is asked for


class FolderSource:
    """Images at any depth below root/train/<class>/ and root/test/<class>/, or val/ where there is no test/, resized to
    a square when they are not one.

    class_names: those of a partition; None: the names of the folders. image_size: None: the median of the training
    images' short sides, from 8 to 224.
    """

    layout = "folder"

    def __init__(self, root, class_names=None, image_size=None):
        self.root = root
        self._files = functools.cache(self._files)  # a source does not live long: what it has listed stays so
        self.class_names = class_names or self._shared_class_names()
        self.image_size = image_size or self._median_size()

    def samples(self, split, class_id):
        files, folder = self._files(split, class_id), self._folder(split, class_id)
        return len(files), list_hash(files, [os.path.relpath(path, folder) for path in files])

    def load(self, split, class_ids):
        files = [path for c in class_ids for path in self._files(split, c)]
        pixels = np.stack(decode(files, read_square, self.image_size, split))
        # channels second in shape, innermost in memory, as the files hold them
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _split(self, split):
        """The folder of a split."""
        for name in ("test", "val") if split == "test" else (split,):
            if os.path.isdir(os.path.join(self.root, name)):
                return os.path.join(self.root, name)
        raise UserError(f"{os.path.join(self.root, split)} does not exist: an image folder holds train/<class>/ and "
                        f"test/<class>/")

    def _folder(self, split, class_id):
        return os.path.join(self._split(split), self.class_names[class_id])

    def _files(self, split, class_id):
        """A class's images, sorted by bytes."""
        folder = self._folder(split, class_id)
        if not os.path.isdir(folder):
            raise UserError(f"{folder} does not exist: --data_dir must be the image folder that was partitioned")
        names = glob.glob("**/*", root_dir=folder, recursive=True)  # which leaves out what a dot hides
        paths = [os.path.join(folder, name) for name in names if name.lower().endswith(IMAGE_EXTENSIONS)]
        return sorted((path for path in paths if not os.path.isdir(path)), key=os.fsencode)

    def _shared_class_names(self):
        # __MACOSX: what a Mac puts into an archive of the folder
        train, test = ({name.rstrip(os.sep) for name in glob.glob("*/", root_dir=self._split(split))} - {"__MACOSX"}
                       for split in SPLITS)
        if len(train) < 2:
            raise UserError(f"{self._split('train')} holds {len(train)} class folders, where two are the least: an "
                            f"image folder holds train/<class>/ and test/<class>/")
        if train != test:
            raise UserError(f"the class folders of train and test differ in {self.root}: '{min(train ^ test)}' is in "
                            f"one only; give both the same classes")
        return sorted(train)

    def _median_size(self):
        sides = [short_side(path) for c in range(len(self.class_names)) for path in self._files("train", c)]
        if not sides:
            raise UserError(f"the class folders of {self._split('train')} hold no image "
                            f"({', '.join(IMAGE_EXTENSIONS)})")
        return min(max(statistics.median_low(sides), _SMALLEST), _LARGEST)
