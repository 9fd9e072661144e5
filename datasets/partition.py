"""The partition of the full set D into the deposit set D_r and the preservation set, class by class."""

import dataclasses
import hashlib
import json
import os

import torch

from datasets.batches import pixels_of
from datasets.files import SPLITS
from datasets.sources import DATASETS
from utils.errors import UserError
from utils.files import load_json, save_json

FORMAT = "lirf-partition/3"


@dataclasses.dataclass(frozen=True)
class Partition:
    """The manifest that partition_data.py writes and every later stage reads.

    samples[split] holds, a class each, the number of samples and the SHA-256 of their list, so that
    a stage can check the classes that it reads without touching the others. mean and std, with which
    images are normalised, are those of the training pixels unless others were asked for, per channel,
    in [0, 1]. val_fraction of each class's training samples are
    held out as the split "val" and never trained on.
    """

    dataset: str
    layout: str
    image_size: int
    class_names: list
    deposit_classes: list
    preserved_classes: list
    draw: str
    seed: int
    val_fraction: float
    mean: list
    std: list
    samples: dict

    @property
    def num_classes(self):
        return len(self.class_names)

    @property
    def data_hash(self):
        """SHA-256 of what the samples are and how they are normalised, whichever classes are deposited."""
        fields = dataclasses.asdict(self)
        return _hash({name: fields[name] for name in ("dataset", "layout", "image_size", "class_names", "val_fraction",
                                                      "mean", "std", "samples")})

    @property
    def hash(self):
        """SHA-256 of the data and of the deposit classes: equal for runs that may be compared."""
        return _hash([self.data_hash, self.deposit_classes])

    def other_draw(self, other, path, network_path):
        """Another partition, read from `path`, of the very data that the network in `network_path` was trained on with
        this one. Raises UserError when they are other data."""
        if other.data_hash != self.data_hash:
            raise UserError(f"{path} partitions other data than {network_path} was trained on, or normalises them "
                            f"otherwise: partition that data likewise, or name another network")
        return other

    def same_draw(self, other):
        """Whether another partition has the same classes, deposits the same and has as many images, normalised alike,
        in whatever files they are stored."""
        def what(partition):
            counts = [[of_class["count"] for of_class in partition.samples[split]] for split in SPLITS]
            return (partition.class_names, partition.deposit_classes, partition.image_size, partition.val_fraction,
                    partition.mean, partition.std, counts)

        return what(self) == what(other)

    def with_deposit(self, deposit_classes):
        """The same data with other deposit classes."""
        if deposit_classes == self.deposit_classes:
            return self
        preserved = [c for c in self.classes("all") if c not in deposit_classes]
        return dataclasses.replace(self, deposit_classes=deposit_classes, preserved_classes=preserved, draw="listed")

    def classes(self, subset):
        """Class ids of the subset "all", "deposit" or "preservation"."""
        return {"all": list(range(self.num_classes)), "deposit": self.deposit_classes,
                "preservation": self.preserved_classes}[subset]

    @property
    def logged_split(self):
        """The split whose accuracies a stage logs at each epoch: "val", whose images are there to choose settings by,
        or "test" when none are held out."""
        return "val" if self.val_fraction else "test"

    def rows(self, split, class_id):
        """Which of a class's samples belong to a split, as an index tensor.

        train and val divide a class's training samples by a draw that is the same for every seed and
        every choice of deposit classes, so that one original network serves them all.
        """
        size = self.samples["test" if split == "test" else "train"][class_id]["count"]
        if split == "test":
            return torch.arange(size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(class_id))
        held_out = round(self.val_fraction * size)
        return (order[:held_out] if split == "val" else order[held_out:]).sort().values

    def count(self, split, subset):
        """Number of a subset's samples in a split; train excludes what is held out as val."""
        return sum(len(self.rows(split, c)) for c in self.classes(subset))

    def as_dict(self):
        """Plain types, for the manifest and for checkpoints."""
        return {"format": FORMAT, **dataclasses.asdict(self), "hash": self.hash}

    @classmethod
    def from_dict(cls, content, where, advice="name a manifest of partition_data.py, or make this one anew"):
        """Check and rebuild; raises UserError, which names `where` and ends with the advice, when the manifest makes no
        sense."""
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            partition = cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
            rest = [c for c in partition.classes("all") if c not in partition.deposit_classes]
            if content != partition.as_dict() or partition.preserved_classes != rest:
                raise ValueError("it was changed after it was written")
            if partition.dataset not in DATASETS:
                raise ValueError(f"its data set '{partition.dataset}' is unknown here")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{where} is not a partition of this project ({reason}): {advice}") from None
        return partition


def _hash(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_partition(dataset, data_dir, *, fraction=0.3, listed=None, draw="random", seed=0, val_fraction=0.0,
                   image_size=None, download=False, mean=None, std=None):
    """Open a data set and draw the deposit classes.

    listed: names or ids (as text) of the deposit classes, instead of a draw of round(fraction * classes);
    draw: "random", or "first" for the authors' choice of the first classes; mean, std: three numbers each
    to normalise with, of [0, 1], instead of those of the training pixels. Raises UserError when a class
    is unknown, when none or all would be deposited, or when the data cannot be read.
    """
    if (mean is None) != (std is None):
        raise UserError("--mean and --std belong together: give both, or neither for those of the training pixels")
    source = DATASETS[dataset].open(data_dir, download or DATASETS[dataset].fetched, image_size)
    names = source.class_names
    if listed is not None:
        deposit, draw, asked = _listed_classes(listed, names), "listed", "--deposit_classes"
    else:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        order = order if draw == "random" else list(range(len(names)))
        deposit, asked = sorted(order[:round(fraction * len(names))]), f"--deposit_fraction {fraction}"
    if not 0 < len(deposit) < len(names):
        raise UserError(f"{asked} deposits {len(deposit)} of {len(names)} classes: at least one class must be "
                        f"deposited and one preserved")
    samples = {split: [dict(zip(("count", "sha256"), source.samples(split, c))) for c in range(len(names))]
               for split in SPLITS}
    for split in SPLITS:
        for name, sample in zip(names, samples[split]):
            if sample["count"] == 0:
                raise UserError(f"class '{name}' has no {split} image in {data_dir}")
    partition = Partition(dataset=dataset, layout=source.layout, image_size=source.image_size, class_names=names,
                          deposit_classes=deposit, preserved_classes=[c for c in range(len(names)) if c not in deposit],
                          draw=draw, seed=seed, val_fraction=val_fraction, mean=mean, std=std, samples=samples)
    for class_id, name in enumerate(names):
        if len(partition.rows("train", class_id)) == 0:
            raise UserError(f"--val_fraction {val_fraction} leaves class '{name}' no training image: lower it")
    if val_fraction and not all(partition.count("val", subset) for subset in ("deposit", "preservation")):
        raise UserError(f"--val_fraction {val_fraction} holds out no image of the deposit or of the preservation set: "
                        f"raise it, or leave it out")
    of_pixels = _pixel_statistics(source)  # which reads every training image, whether its figures are wanted or not
    source.load("test", range(len(names)))  # an unreadable test image shall be named now, not after the training
    return dataclasses.replace(partition, **of_pixels) if mean is None else partition


def _listed_classes(listed, names):
    """Class ids of what text lists: all entries are names, or else all are ids counted from 0 (the digits are
    named "0" to "9")."""
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    if all(entry in names for entry in entries):
        deposit = {names.index(entry) for entry in entries}
    elif all(entry.isdecimal() and int(entry) < len(names) and entry not in names for entry in entries):
        deposit = {int(entry) for entry in entries}
    else:
        odd = next(entry for entry in entries if entry not in names)
        raise UserError(f"--deposit_classes: '{odd}' is no class; name classes, or give ids alone, counted from 0: "
                        f"{', '.join(names)}")
    return sorted(deposit)


def _pixel_statistics(source):
    """{"mean", "std"} per channel of all training pixels, in [0, 1]; a class at a time."""
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for class_id in range(len(source.class_names)):
        images = source.load("train", [class_id])
        for rows in torch.arange(len(images)).split(1000):
            pixels = pixels_of(images, rows).double() / 255
            total += pixels.sum((0, 2, 3))
            squares += pixels.square().sum((0, 2, 3))
            count += pixels[:, 0].numel()
    mean = total / count
    variance = squares / count - mean**2
    if (variance < 1e-6).all():
        colour = tuple((255 * mean).round().int().tolist())
        raise UserError(f"all training images are of one colour, {colour} of 255, so that nothing can be learned from "
                        f"them: look at the files")
    std = variance.clamp_min(1e-6).sqrt()
    return {"mean": [round(m, 4) for m in mean.tolist()], "std": [round(s, 4) for s in std.tolist()]}


def read_partition(path):
    """Read a manifest. Raises UserError when it is damaged, FileNotFoundError when it is missing."""
    return Partition.from_dict(load_json(path), path)


def partition_of_run(args, of_network, network_path):
    """The Partition of a stage that starts from a network: of --partition; unset, of partition.json in --save_path;
    without that, of_network, the network's own. Raises UserError where --partition and the folder's own manifest
    differ, and as other_draw does."""
    own = os.path.join(args.save_path, "partition.json")
    path = args.partition or own
    if args.partition is None and not os.path.exists(own):
        return of_network
    partition = read_partition(path)
    if path != own and os.path.exists(own) and read_partition(own).hash != partition.hash:
        raise UserError(f"{own} is of another partition than {path}: choose another --save_path")
    return of_network.other_draw(partition, path, network_path)


def save_partition(path, partition):
    """Write a manifest, atomically."""
    save_json(path, partition.as_dict())
