"""The paper's figure: t-SNE (van der Maaten and Hinton, 2008) of the last-layer features of T0, T and T~,
with a measure beside the picture: how many of an image's nearest neighbours are of its class."""

import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from datasets import evaluation_batches, load_images
from models.architectures import before_last_layer
from models.checkpoints import load_network, read, require_original
from utils.cli import add_running_args, bounded, make_parser, path, prefix, run
from utils.errors import UserError
from utils.files import save_json
from utils.runtime import Runtime
from utils.tables import printable

NETWORKS = {"original": "original network T0", "target": "target network T", "recover": "recover network T~"}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--save_path", type=path, default=os.path.join("checkpoints", "lirf"),
                        help="folder of a finished run: original.pt, target.pt, recover.pt")
    parser.add_argument("--original", type=path, default=None, help="T0; unset: original.pt in --save_path")
    parser.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    parser.add_argument("--eval_split", choices=["test", "val"], default="test", help="images to show")
    parser.add_argument("--images", type=bounded(int, 10), default=3000, help="images shown, drawn by --seed")
    parser.add_argument("--neighbours", type=bounded(int, 1), default=20, help="k of the measure")
    parser.add_argument("--out", type=prefix, default=None,
                        help="figure without its ending: gets .png and .json; unset: tsne in --save_path")
    add_running_args(parser, seed="draws the images, and starts t-SNE", precision=False)
    return parser


def features_of(network, x):
    """What the last linear layer reads, (b, width); of T~ that of both branches, side by side (b, 2 width)."""
    if isinstance(network, nn.Sequential):
        return before_last_layer(network)(x)
    read = before_last_layer(network.upper)
    return torch.cat([read(network.target(x)), read(network.deposit(x))], 1)


def neighbour_accuracy(features, labels, k):
    """Share, per image, of the k nearest other images (Euclidean) that are of its class: (n,) in [0, 1]."""
    found = NearestNeighbors(n_neighbors=k).fit(features).kneighbors(return_distance=False)
    return (labels[found] == labels[:, None]).mean(1)


def plot(panels, labels, partition, path):
    """A panel a network, a colour a class, whose name stands in its middle; deposit classes are crosses."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 5.4))
    few = partition.num_classes <= 20
    colours = plt.get_cmap("tab10" if partition.num_classes <= 10 else "nipy_spectral")
    for axis, (name, points) in zip(axes, panels.items()):
        for c, class_name in enumerate(partition.class_names):
            own, deposited = points[labels == c], c in partition.deposit_classes
            colour = colours(c if partition.num_classes <= 10 else c / partition.num_classes)
            axis.scatter(*own.T, s=14 if deposited else 6, marker="x" if deposited else "o", color=colour,
                         linewidths=0.7)
            if few and len(own):
                # A name is no formula, whatever characters it has.
                axis.text(*np.median(own, axis=0), printable(class_name), ha="center", va="center", fontsize=8,
                          parse_math=False, bbox={"boxstyle": "round,pad=0.15", "facecolor": "white",
                                                  "edgecolor": colour, "alpha": 0.8})
        axis.set(title=NETWORKS[name], xticks=[], yticks=[])
    gone = ", ".join(printable(partition.class_names[c]) for c in partition.deposit_classes)
    figure.text(0.5, 0.03, f"crosses: deposit classes ({gone})" if few else "crosses: deposit classes", ha="center",
                parse_math=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(f"{path}.png", dpi=110)
    plt.close(figure)


def main(args):
    runtime = Runtime.of(args)
    out = args.out or os.path.join(args.save_path, "tsne")
    paths = {name: os.path.join(args.save_path, f"{name}.pt") for name in NETWORKS}
    if args.original is not None:
        paths["original"] = args.original
    original, _ = read(paths["original"], "original")
    target, recover = (read(paths[name], name)[0] for name in ("target", "recover"))
    for name, content in (("target", target), ("recover", recover)):
        require_original(content, paths[name], original, paths["original"])
    if recover["target"] != target["checksum"]:
        raise UserError(f"{paths['recover']} was not withdrawn from {paths['target']}: run withdraw.py of that deposit")
    networks = {name: load_network(file) for name, file in paths.items()}
    partition = networks["recover"][1]
    for name, (_, other) in networks.items():
        other.other_draw(partition, paths["recover"], paths[name])
    images = load_images(partition, args.data_dir, args.eval_split, partition.classes("all"))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:args.images]
    if len(chosen) <= max(args.neighbours, 4):
        raise UserError(f"--images {len(chosen)} are too few for {args.neighbours} neighbours: show more, or lower "
                        f"--neighbours")
    images = images[chosen].to(runtime.device)
    labels = images.labels.cpu().numpy()
    deposited = np.isin(labels, partition.deposit_classes)
    if not 0 < deposited.sum() < len(labels):
        raise UserError(f"--images {len(labels)} drew preserved or deposit classes alone: show more")

    panels, measures = {}, {}
    writer = SummaryWriter(os.path.join(args.save_path, "tensorboard", "tsne"))
    for name, (network, _) in networks.items():
        network, parts = runtime.place(network), []
        with torch.no_grad():
            for x, _ in evaluation_batches(images):
                parts.append(features_of(network, x).cpu())
        features = torch.cat(parts)
        writer.add_embedding(features, [printable(partition.class_names[c]) for c in labels], tag=name)
        shares = neighbour_accuracy(features.numpy(), labels, args.neighbours)
        measures[name] = {"pre": 100 * shares[~deposited].mean().item(), "dep": 100 * shares[deposited].mean().item()}
        print(f"{NETWORKS[name]}: {measures[name]['pre']:.1f} % of the {args.neighbours} nearest neighbours are of the "
              f"image's class for preserved classes, {measures[name]['dep']:.1f} % for deposit classes", flush=True)
        perplexity = min(30, (len(labels) - 1) / 3)
        panels[name] = TSNE(init="pca", perplexity=perplexity, random_state=args.seed).fit_transform(features.numpy())
    writer.close()
    save_json(f"{out}.json", {"partition_hash": partition.hash, "split": args.eval_split, "images": len(labels),
                              "seed": args.seed, "neighbours": args.neighbours, "neighbour_accuracy": measures,
                              **runtime.describe()})
    plot(panels, labels, partition, out)
    print(f"wrote {out}.png and {out}.json")


if __name__ == "__main__":
    run(main, get_args_parser())
