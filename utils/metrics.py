"""Accuracy per sample, and the figures of Table 1."""

import os

import torch

from utils import distributed
from utils.errors import UserError
from utils.files import load_json, save_json


@torch.no_grad()
def evaluate(forward, data, num_classes):
    """Count correct answers of several networks in one pass, in float32; argmax is over all classes. An answer with a
    NaN is wrong.

    forward(x, y) -> {name: logits}; y is passed on for the released rule, which reads the label.
    data: (x, y) batches. Returns {name: {"correct": [...], "total": [...]}}, plain lists, an entry a class.
    """
    correct, total = {}, 0
    for x, y in data:
        for name, logits in forward(x, y).items():
            right = (logits.argmax(1) == y) & ~logits.isnan().any(1)  # a NaN counts as the largest
            hits = torch.bincount(y[right], minlength=num_classes)
            correct[name] = correct.get(name, 0) + hits
        total = total + torch.bincount(y, minlength=num_classes)
    return {name: {"correct": hits.tolist(), "total": total.tolist()} for name, hits in correct.items()}


def count_correct(network, data, num_classes):
    """Correct and total per class of one network, in eval mode."""
    network.eval()
    return evaluate(lambda x, y: {"network": network(x)}, data, num_classes)["network"]


def percent(counts, classes=None):
    """Accuracy in per cent over the images of `classes` (all when None); None when there is no image."""
    chosen = range(len(counts["total"])) if classes is None else classes
    total = sum(counts["total"][c] for c in chosen)
    return 100.0 * sum(counts["correct"][c] for c in chosen) / total if total else None


def harmonic_mean(a, b):
    """H of two percentages; 0 when either is not positive, None when either is unknown."""
    if a is None or b is None:
        return None
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


def table1(counts, partition, original=None):
    """One column of Table 1, in per cent.

    counts: of the network; original: of T0 on the same images, for F = Dep(T0) - Dep and
    H = harmonic mean of Pre and F. A figure that cannot be had (no such images, T0 unknown) is None.
    Keys: pre_acc, dep_acc, avg_acc, forgetting, h_mean.
    """
    pre = percent(counts, partition.preserved_classes)
    dep = percent(counts, partition.deposit_classes)
    forgetting = None
    if original is not None and dep is not None:
        forgetting = percent(original, partition.deposit_classes) - dep
    return {"pre_acc": pre, "dep_acc": dep, "avg_acc": percent(counts),
            "forgetting": forgetting, "h_mean": harmonic_mean(pre, forgetting)}


def logged_target(figures, split):
    """T's figures by the names of the log: target_pre_acc, or val_target_pre_acc of held-out images."""
    prefix = "target" if split == "test" else f"{split}_target"
    return {f"{prefix}_{name}": value for name, value in figures.items() if name != "counts"}


def metrics_path(save_path, split="test"):
    """metrics.json holds the test set's figures, metrics_val.json those of the held-out images."""
    return os.path.join(save_path, "metrics.json" if split == "test" else f"metrics_{split}.json")


def read_metrics(path, partition):
    """What a metrics.json holds; {} when there is none. Raises UserError when its figures are of another partition."""
    if not os.path.exists(path):
        return {}
    content = load_json(path)
    if content.get("partition_hash") != partition.hash:
        raise UserError(f"{path} holds the figures of another partition: choose another --save_path")
    return content


def refuse_other_figures(save_path, splits, partition):
    """Raise UserError when a folder's figures of one of the splits are of another partition: before anything is
    computed, as they cannot be added to."""
    for split in splits:
        read_metrics(metrics_path(save_path, split), partition)


def write_metrics(path, partition, **entries):
    """Put entries into metrics.json, beside what is there of the same partition; of several ranks, the first writes."""
    if distributed.rank == 0:
        save_json(path, {**read_metrics(path, partition), "partition_hash": partition.hash, **entries})


def record_network(save_path, partition, name, counts, classes=None):
    """Write a network's column of Table 1: that of T0 ("original") or of R ("retrained"). Both Independent networks
    share a column, which has an Avg Acc once both are there. counts: {split: counts over `classes`, or over all}, as
    the network's checkpoint holds them."""
    for split, of_split in counts.items():
        path = metrics_path(save_path, split)
        whole = read_metrics(path, partition).get(name, {}).get("counts")
        whole = whole or {key: [0] * partition.num_classes for key in of_split}
        for key, values in of_split.items():
            for c, value in zip(classes or partition.classes("all"), values):
                whole[key][c] = value
        column = {**table1(whole, partition, whole if name == "original" else None), "counts": whole}
        if None in (column["pre_acc"], column["dep_acc"]):
            column["avg_acc"] = None
        write_metrics(path, partition, **{name: column})
