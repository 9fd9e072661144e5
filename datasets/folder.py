"""Image folders: train/<class>/ and test/<class>/, as torchvision's ImageFolder reads them."""

import functools
import glob
import os
import statistics
from unicodedata import normalize

import numpy as np
import torch

from datasets.cache import FOLDER, cached
from datasets.decode import BACKGROUND, decode, outline, read_square
from datasets.files import SPLITS, files_below, hidden, list_hash, printable
from utils.errors import UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
                    ".pbm", ".pnm")
WANTED = "an image folder holds train/<class>/ and test/<class>/"
_LARGEST, _SURVEYED = 224, 5000  # side of images unless another is asked for; files of a split that are looked at


class FolderSource:
    """Images at any depth below root/train/<class>/ and root/test/<class>/, or val/ where there is no test/, resized to
    a square when they are not one.

    class_names: those of a partition; None: the names of the folders, and what one may not expect of the files is
    printed. image_size: None: the median of the training images' short sides, at most 224.
    """

    layout = "folder"

    def __init__(self, root, class_names=None, image_size=None):
        self.root = root
        # a source does not live long: what it has listed and hashed stays so
        self._folders, self._listing, self.samples = map(functools.cache, (self._folders, self._listing, self.samples))
        self.class_names = self._shared_class_names() if class_names is None else class_names
        self.image_size = self._survey(image_size) if class_names is None else image_size

    def samples(self, split, class_id):
        folder, files, _ = self._listing(split, class_id)
        return len(files), list_hash(files, [path[len(folder) + 1:] for path in files])

    def load(self, split, class_ids):
        parts = [self._class_images(split, c) for c in class_ids]
        labels = torch.cat([torch.full((len(part),), c) for c, part in zip(class_ids, parts)])
        # channels second in shape, innermost in memory, as the files hold them
        return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2), labels

    def _class_images(self, split, class_id):
        """uint8 (n, s, s, 3), decoded once and then read from the cache."""
        (folder, files, _), size = self._listing(split, class_id), self.image_size
        name = f"{split}-{os.path.basename(folder)}-{size}"
        values = cached(os.path.join(self.root, FOLDER, name), self.samples(split, class_id)[1],
                        lambda: decode(files, read_square, size, printable(name)))
        return values.reshape(len(files), size, size, 3)

    def _split(self, split):
        """The folder of a split."""
        names = ("test", "val") if split == "test" else (split,)
        for folder in (os.path.join(self.root, name) for name in names):
            if os.path.isdir(folder):
                return folder
        nested = sorted(glob.glob(os.path.join(glob.escape(self.root), "*", split)))
        hint = f"; try --data_dir {os.path.dirname(nested[0])}" if nested else ""
        raise UserError(f"{os.path.join(self.root, split)} does not exist: {WANTED}, but {_contents(self.root)}{hint}")

    def _folders(self, split):
        """{class name in Unicode's form NFC: (the name as its folder spells it, the folder)}."""
        found = {}
        for entry in os.scandir(self._split(split)):
            if entry.is_dir() and not hidden(entry.name):
                name = printable(entry.name)
                if found.setdefault(normalize("NFC", name), (name, entry.path))[1] != entry.path:
                    raise UserError(f"two folders in {self._split(split)} are called '{name}', in different bytes: "
                                    f"rename one")
        return found

    def _listing(self, split, class_id):
        """A class's folder, the images at any depth below it, and the other files there; sorted by bytes."""
        name = self.class_names[class_id]
        if normalize("NFC", name) not in self._folders(split):
            raise UserError(f"{os.path.join(self.root, split, name)} does not exist: --data_dir must be the image "
                            f"folder that was partitioned")
        _, folder = self._folders(split)[normalize("NFC", name)]
        images, others = [], []
        for path in sorted(files_below(folder), key=os.fsencode):
            (images if path.lower().endswith(IMAGE_EXTENSIONS) else others).append(path)
        return folder, images, others

    def _shared_class_names(self):
        train, test = (self._folders(split) for split in SPLITS)
        for split, found in zip(SPLITS, (train, test)):
            if len(found) < 2:
                inner = _contents(next((folder for _, folder in found.values()), self._split(split)))
                raise UserError(f"{self._split(split)} holds {len(found)} class folders, where two are the least: "
                                f"{WANTED}, but {inner}")
        differing = sorted(train.keys() ^ test.keys())
        if differing:
            raise UserError(f"the class folders of train and test differ in {self.root}: "
                            f"'{differing[0]}' is in one only; give both the same classes")
        return sorted(name for name, _ in train.values())

    def _survey(self, image_size):
        """The image size. Prints what one may not expect of the files."""
        seen, skipped = {}, []
        for split in SPLITS:
            beside = os.scandir(self._split(split))
            skipped += [entry.path for entry in beside if not entry.is_dir() and not hidden(entry.name)]
            listings = [self._listing(split, c) for c in range(len(self.class_names))]
            skipped += [path for _, _, others in listings for path in others]
            files = [path for _, images, _ in listings for path in images]
            seen[split] = [outline(path) for path in files[::-(-len(files) // _SURVEYED) or 1]]
        sides = [side for side, _, _ in seen["train"]]
        if not sides:
            raise UserError(f"the class folders of {self.root}/train hold no image ({', '.join(IMAGE_EXTENSIONS)}), "
                            f"but {len(skipped)} other files")
        size = image_size or min(statistics.median_low(sides), _LARGEST)
        smaller, larger = sum(2 * side < size for side in sides), sum(side > 4 * size for side in sides)
        of_all = seen["train"] + seen["test"]
        deep, transparent = (sum(of_each) for of_each in list(zip(*of_all))[1:])
        names = ", ".join(printable(os.path.relpath(path, self.root)) for path in skipped[:3])
        for said, text in (
                (not self._split("test").endswith("test"), "there is no test/, so val/ is the test set"),
                (skipped, f"{len(skipped)} files are in no class's folder or have no image's name, and are not read: "
                          f"{names}{', ...' if len(skipped) > 3 else ''}"),
                (smaller or larger, f"images become {size}x{size}; of {len(sides)} training images, of short sides "
                                    f"{min(sides)} to {max(sides)}, {smaller} are less than half and {larger} more "
                                    f"than four times as large (--image_size sets another size)"),
                (deep, f"{deep} of {len(of_all)} images have more than 8 bits a channel, and are scaled to 8 by their "
                       f"range"),
                (transparent, f"{transparent} of {len(of_all)} images may be transparent, and are put on {BACKGROUND}"),
        ):
            if said:
                print(f"note: {text}", flush=True)
        return size


def _contents(folder):
    """What a folder holds, in words."""
    if not os.path.isdir(folder):
        return f"there is no {folder}"
    entries = [entry for entry in os.scandir(folder) if not hidden(entry.name)]
    images = sum(entry.name.lower().endswith(IMAGE_EXTENSIONS) for entry in entries)
    folders = sorted(printable(entry.name) for entry in entries if entry.is_dir())
    names = f"the folders {', '.join(folders[:4])}{', ...' if len(folders) > 4 else ''}" if folders else "no folder"
    return f"{folder} holds {images} images and {names}"
