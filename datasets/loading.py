"""The images that a partition names, checked against it."""

import torch

from datasets.batches import ImageSet
from datasets.folder import FolderSource
from datasets.sources import DATASETS
from utils.errors import UserError


def load_images(partition, data_dir, split, class_ids, *, download=False):
    """Read the images of some classes: an ImageSet, labels being class ids.

    split: "train", "val" or "test". Of a folder, images of other classes are not opened. Raises
    UserError when the samples are not those that were partitioned.
    """
    stored = "test" if split == "test" else "train"
    if partition.layout == "folder":
        source = FolderSource(data_dir, partition.class_names, partition.image_size)
    else:
        dataset = DATASETS[partition.dataset]
        source = dataset.open(data_dir, download and dataset.fetched, partition.image_size)
    for class_id in class_ids:
        expected = partition.samples[stored][class_id]
        if source.samples(stored, class_id) != (expected["count"], expected["sha256"]):
            raise UserError(f"the {stored} images of class '{partition.class_names[class_id]}' in {data_dir} are not "
                            f"those that were partitioned: use the same data, or partition again")
    if split == "val" and partition.val_fraction == 0:
        raise UserError("the partition holds out no validation images: write one with "
                        "partition_data.py --val_fraction")
    offset, rows, labels = 0, [], []
    for class_id in class_ids:
        rows.append(offset + partition.rows(split, class_id))
        labels.append(torch.full_like(rows[-1], class_id))
        offset += partition.samples[stored][class_id]["count"]
    images = source.load(stored, class_ids)[torch.cat(rows)]
    return ImageSet(images, torch.cat(labels), partition.mean, partition.std, DATASETS[partition.dataset].flip)


def load_if_there(partition, data_dir, split, consequence):
    """All images of a split, where a stage can do without; else None, after printing `consequence` and the reason."""
    try:
        return load_images(partition, data_dir, split, partition.classes("all"))
    except (UserError, OSError) as reason:
        print(f"{consequence}: {reason}", flush=True)
        return None


def evaluation_sets(partition, data_dir, classes, device):
    """{split: ImageSet on the device} of the test set and, if the partition holds some out, of the held-out images."""
    splits = ["test", "val"] if partition.val_fraction else ["test"]
    return {split: load_images(partition, data_dir, split, classes).to(device) for split in splits}
