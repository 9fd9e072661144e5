"""Stage 1: divide the classes of a data set into deposit set D_r and preservation set, and write the manifest."""

import os

from datasets import DATASETS, make_partition
from datasets.partition import read_partition, save_partition
from utils.cli import bounded, make_parser, path, run
from utils.errors import UserError


def get_args_parser():
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=list(DATASETS), default="cifar10",
                      help="digits: embedded in scikit-learn; cifar10, cifar100: torchvision's download or an image "
                           "folder; cub200: CUB-200-2011 or a part of it, in the layout of its archive; folder: any "
                           "train/<class>/, test/<class>/ (or val/<class>/, where there is no test/), with images at "
                           "any depth")
    data.add_argument("--data_dir", type=path, default="data",
                      help="folder that holds the data set, or gets the download")
    data.add_argument("--image_size", type=bounded(int, 8, 1024), default=None,
                      help="side of the square images; 32, for cub200 224, for folder the median of the short sides of "
                           "the training images, at most 224")
    data.add_argument("--download", action="store_true",
                      help="fetch CUB-200-2011 (1.1 GB) when it is absent; CIFAR is fetched unasked")
    data.add_argument("--val_fraction", type=bounded(float, 0, 0.9), default=0.0,
                      help="share of each class's training images held out as the split val, for choosing settings")
    for figure, low in (("mean", False), ("std", True)):
        data.add_argument(f"--{figure}", type=bounded(float, 0, 1, above=low), nargs=3, metavar=("R", "G", "B"),
                          help=f"{figure} of red, green and blue, in [0, 1], with which images are normalised; unset: "
                               f"that of the training pixels")
    choice = parser.add_argument_group("deposit set D_r")
    choice = choice.add_mutually_exclusive_group()
    choice.add_argument("--deposit_fraction", type=bounded(float, 0, 1), default=0.3,
                        help="share of the classes that are deposited (30 %% in the paper)")
    choice.add_argument("--deposit_classes", default=None,
                        help="names, or else ids (places in the list of classes, counted from 0), of the deposit "
                             "classes, separated by commas, instead of a draw")
    parser.add_argument("--draw", choices=["random", "first"], default="random",
                        help="which classes are deposited, unless listed: drawn at random (paper) or the first "
                             "(authors' code)")
    parser.add_argument("--seed", type=bounded(int, 0, 2**31 - 1), default=0,
                        help="seed of the draw")
    parser.add_argument("--out", type=path, default=os.path.join("checkpoints", "lirf", "partition.json"),
                        help="manifest to write, NAME.json, or the folder to write partition.json into")
    return parser


def main(args):
    out = args.out
    if not out.endswith(".json") or os.path.isdir(out):
        out = os.path.join(out, "partition.json")
    partition = make_partition(args.dataset, args.data_dir, fraction=args.deposit_fraction,
                               listed=args.deposit_classes, draw=args.draw, seed=args.seed,
                               val_fraction=args.val_fraction, image_size=args.image_size, download=args.download,
                               mean=args.mean, std=args.std)
    if os.path.exists(out) and read_partition(out) != partition:
        raise UserError(f"{out} holds another partition: name another --out, or remove that one")
    save_partition(out, partition)
    for subset in ("deposit", "preservation"):
        names = ", ".join(partition.class_names[c] for c in partition.classes(subset))
        counts = ", ".join(f"{partition.count(split, subset)} {split}" for split in ("train", "val", "test"))
        print(f"{subset} set: {names} ({counts} images)")
    print(f"wrote {out}: images of {partition.image_size}x{partition.image_size} pixels")


if __name__ == "__main__":
    run(main, get_args_parser())
