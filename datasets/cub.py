"""CUB-200-2011 (Wah et al., 2011) in the layout of its official archive: photographs of birds, all of another size."""

import functools
import glob
import gzip
import lzma
import os
import sys
import tarfile
import zlib

import numpy as np
import torch
from torchvision.datasets.utils import download_url

from datasets.cache import FOLDER, cached
from datasets.decode import decode, read_short_side
from datasets.files import list_hash, printable, workspace
from datasets.ragged import RaggedImages
from utils.errors import UserError

NAME, ARCHIVE = "CUB_200_2011", "CUB_200_2011.tgz"
# CaltechDATA's record 65de6-vp158, and the checksum that it states
URL, MD5 = f"https://data.caltech.edu/records/65de6-vp158/files/{ARCHIVE}", "97eceeb196236b17998738112f37df78"
TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


class CubSource:
    """The images that images.txt lists, in the split of train_test_split.txt.

    Class ids may have gaps: they are numbered anew in their order, the names stay. Images are decoded once, to a
    short side of 8/7 image_size (at most their own), from which every square of image_size is cut.
    """

    layout = "cub"

    def __init__(self, root, image_size):
        self.root, self.image_size, self._caches = root, image_size, True
        self.samples = functools.cache(self.samples)  # a source does not live long: what it has hashed stays so
        missing = [name for name in TABLES if not os.path.isfile(os.path.join(root, name))]
        if missing:
            raise UserError(f"{', '.join(missing)} does not exist in {root}: take it from {ARCHIVE}, or name another "
                            f"--data_dir")
        paths, labels, splits, classes = (_read_table(root, name) for name in TABLES)
        for name, table in zip(TABLES[1:3], (labels, splits)):
            if table.keys() != paths.keys():
                odd = sorted(table.keys() ^ paths.keys())[0]
                raise UserError(f"{os.path.join(root, name)} does not list the images of images.txt (image {odd}): "
                                f"extract {ARCHIVE} again")
        if not set(labels.values()) <= classes.keys() or not set(splits.values()) <= {"0", "1"} or any(
                "/" in name for name in classes.values()):
            raise UserError(f"a class or split of {root} is unknown: extract {ARCHIVE} again")
        ids = sorted(set(labels.values()), key=int)
        self.class_names = [printable(classes[i]) for i in ids]
        self._files = {split: [[] for _ in ids] for split in ("train", "test")}
        for image, path in paths.items():
            if os.path.isabs(path) or ".." in path.split("/"):
                raise UserError(f"{os.path.join(root, 'images.txt')} names a file outside the data set: {path}")
            split = "train" if splits[image] == "1" else "test"
            self._files[split][ids.index(labels[image])].append(os.path.join(root, "images", path))

    def samples(self, split, class_id):
        files = self._present(split, class_id)
        return len(files), list_hash(files, map(os.path.basename, files))

    def load(self, split, class_ids):
        photographs, labels = [], []
        for class_id in class_ids:
            of_class = self._photographs(split, class_id)
            photographs += of_class
            labels += [class_id] * len(of_class)
        return RaggedImages(photographs, self.image_size), torch.tensor(labels, dtype=torch.int64)

    def _present(self, split, class_id):
        files = self._files[split][class_id]
        for path in files:
            if not os.path.isfile(path):
                raise UserError(f"{path} is listed in images.txt but absent: extract {ARCHIVE} again")
        return files

    def _photographs(self, split, class_id):
        """Its images as RaggedImages takes them: decoded once and then mapped, or, where no cache can be written,
        decoded anew whenever they are needed, since all of them might not fit into memory."""
        files, side = self._present(split, class_id), round(self.image_size * 8 / 7)
        anew = [functools.partial(read_short_side, path, side) for path in files]
        if not self._caches:
            return anew
        name = f"{split}-{self.class_names[class_id]}-{self.image_size}"

        def make():
            images = decode(files, read_short_side, side, name)
            return [np.array([image.shape[:2] for image in images], np.int32), *images]

        values = cached(os.path.join(self.root, FOLDER, name), self.samples(split, class_id)[1], make, else_hold=False)
        if values is None:
            self._caches = False
            print(f"note: {os.path.join(self.root, FOLDER)} cannot be written: images are decoded anew for each batch",
                  file=sys.stderr)
            return anew
        sizes = values[:8 * len(files)].view(np.int32).reshape(-1, 2)
        ends = np.cumsum(3 * sizes.prod(1, dtype=np.int64))
        parts = np.split(values[sizes.nbytes:], ends[:-1])
        return [part.reshape(h, w, 3) for part, (h, w) in zip(parts, sizes.tolist())]


def _read_table(root, name):
    """{first word: rest} of a text file's lines."""
    path = os.path.join(root, name)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:  # as the system gives names of files
            rows = [line.split(maxsplit=1) for line in file if line.strip()]
        table = {key: value.strip() for key, value in rows}
        if len(table) != len(rows) or not all(key.isdecimal() and "\0" not in table[key] for key in table):
            raise ValueError
    except ValueError:
        raise UserError(f"{path} is damaged: extract {ARCHIVE} again") from None
    return table


def open_cub(data_dir, download, image_size):
    """CUB from data_dir, data_dir/CUB_200_2011 or, as Kaggle nests it, data_dir/*/CUB_200_2011; extracted, or
    downloaded if `download`, when absent."""
    root, archive, size = os.path.join(data_dir, NAME), os.path.join(data_dir, ARCHIVE), image_size or 224
    nested = sorted(glob.glob(os.path.join(glob.escape(data_dir), "*", NAME)))
    folders = (root, data_dir, *(folder for folder in nested if not folder.startswith(f"{root}.part")))
    tables = [sum(os.path.exists(os.path.join(folder, table)) for table in TABLES) for folder in folders]
    if any(tables):
        return CubSource(folders[tables.index(max(tables))], size)
    if os.path.isdir(os.path.join(root, "images")):
        return CubSource(root, size)  # which says what is missing
    if not os.path.exists(archive) and not download:
        raise UserError(f"there is no {NAME} in {data_dir}: put {ARCHIVE} or the extracted folder there, "
                        f"or let partition_data.py --download fetch it (1.1 GB)")
    with workspace(root + ".part") as folder:
        if not os.path.exists(root):  # nor has another process made it meanwhile
            if not os.path.exists(archive):
                _download(folder, archive)
            _extract(archive, folder, root)
    return CubSource(root, size)


def _download(folder, archive):
    try:
        download_url(URL, folder, ARCHIVE, MD5)
    except Exception as error:  # urllib's, the file system's and torchvision's own, by turns
        raise UserError(f"{URL} could not be downloaded ({error}): download it by hand "
                        f"and put it into {os.path.dirname(archive)}") from None
    os.rename(os.path.join(folder, ARCHIVE), archive)


def _extract(archive, folder, root):
    """Unpack into `folder`, refusing any path outside of it, and rename what is there when all is there."""
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(folder, filter="data")
            else:
                tar.extractall(folder, _plain_members(tar))
            while tar.fileobj.read(1 << 20):  # to the end, where the compressed file's own check of its bytes stands
                pass
        os.rename(os.path.join(folder, NAME), root)
    except (tarfile.TarError, EOFError, ValueError, FileNotFoundError, zlib.error, lzma.LZMAError,
            gzip.BadGzipFile) as error:
        raise UserError(f"{archive} is damaged or not the archive of CUB-200-2011 ({error}): "
                        f"remove it and download it again") from None


def _plain_members(tar):
    """Its files and folders, for Pythons before 3.10.12 and 3.11.4, whose tarfile has no filters. Raises TarError for
    anything else, and for a path that leads outside."""
    for member in tar:
        if not (member.isfile() or member.isdir()) or os.path.isabs(member.name) or ".." in member.name.split("/"):
            raise tarfile.TarError(f"{member.name} is no file or folder within it")
        member.mode, member.uid, member.gid = 0o755 if member.isdir() else 0o644, os.getuid(), os.getgid()
        yield member
