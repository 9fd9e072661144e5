"""CUB-200-2011 (Wah et al., 2011) in the layout of its official archive: photographs of birds, all of another size."""

import glob
import os
import tarfile
import tempfile

from torchvision.datasets.utils import download_url

from datasets.batches import RaggedImages
from datasets.files import decode, list_hash, read_short_side
from utils.errors import UserError

NAME, ARCHIVE = "CUB_200_2011", "CUB_200_2011.tgz"
# CaltechDATA's record 65de6-vp158, and the checksum that it states
URL, MD5 = f"https://data.caltech.edu/records/65de6-vp158/files/{ARCHIVE}", "97eceeb196236b17998738112f37df78"
TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


class CubSource:
    """The images that images.txt lists, in the split of train_test_split.txt.

    Class ids may have gaps: they are numbered anew in their order, the names stay. Images are decoded to a short side
    of 8/7 image_size (at most their own), from which every square of image_size is cut.
    """

    layout = "cub"

    def __init__(self, root, image_size):
        self.root, self.image_size = root, image_size
        try:
            paths, labels, splits, classes = (_read_table(root, name) for name in TABLES)
            ids = sorted(set(labels.values()), key=int)
            self.class_names = [classes[i] for i in ids]
            self._files = {split: [[] for _ in ids] for split in ("train", "test")}
            for image, path in paths.items():
                split = {"1": "train", "0": "test"}[splits[image]]
                self._files[split][ids.index(labels[image])].append(os.path.join(root, "images", path))
        except (KeyError, ValueError) as error:
            raise UserError(f"the tables of {root} are damaged or do not fit together ({error}): extract {ARCHIVE} "
                            f"again") from None

    def samples(self, split, class_id):
        files = self._files[split][class_id]
        return len(files), list_hash(files, map(os.path.basename, files))

    def load(self, split, class_ids):
        files = [path for c in class_ids for path in self._files[split][c]]
        return RaggedImages(decode(files, read_short_side, round(self.image_size * 8 / 7), split), self.image_size)


def _read_table(root, name):
    """{first word: rest} of a text file's lines."""
    with open(os.path.join(root, name), encoding="utf-8", errors="surrogateescape") as file:  # as names of files are
        return dict(line.strip().split(maxsplit=1) for line in file if line.strip())


def open_cub(data_dir, download, image_size):
    """CUB from data_dir, data_dir/CUB_200_2011 or, as Kaggle nests it, data_dir/*/CUB_200_2011; extracted, or
    downloaded if `download`, when absent. Raises UserError when it cannot be had or is not whole."""
    root, archive = os.path.join(data_dir, NAME), os.path.join(data_dir, ARCHIVE)
    for folder in (root, data_dir, *sorted(glob.glob(os.path.join(glob.escape(data_dir), "*", NAME)))):
        if any(os.path.exists(os.path.join(folder, table)) for table in TABLES):
            return CubSource(folder, image_size or 224)
    if os.path.isdir(root) and os.listdir(root):
        raise UserError(f"{root} has none of {', '.join(TABLES)}: remove that folder, or extract {ARCHIVE} into it")
    if not os.path.exists(archive) and not download:
        raise UserError(f"there is no {NAME} in {data_dir}: put {ARCHIVE} or the extracted folder there, "
                        f"or let partition_data.py --download fetch it (1.1 GB)")
    os.makedirs(data_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".") as folder:  # hidden: a part is never taken for the whole
        try:
            if not os.path.exists(archive):
                download_url(URL, folder, ARCHIVE, MD5)
                os.rename(os.path.join(folder, ARCHIVE), archive)
            with tarfile.open(archive) as tar:  # a path that leads outside is refused by every Python that can
                tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
            os.rename(os.path.join(folder, NAME), root)
        except Exception as error:  # urllib's, torchvision's, gzip's, tarfile's and the file system's, by turns
            raise UserError(f"{ARCHIVE} could not be downloaded, or the one in {data_dir} is damaged ({error}): "
                            f"download {URL} by hand and put it there") from None
    return CubSource(root, image_size or 224)
