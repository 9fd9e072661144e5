"""The tables of the pages: what each shows, what makes it, and which files under results/logs/ are behind it."""

import os
from collections.abc import Callable
from typing import NamedTuple

from analysis.ablation import named, overview
from analysis.table1 import load_runs, paper_rows
from utils.tables import table1_rows


class Table(NamedTuple):
    """data: what was measured on; command: what makes it; runs: pattern of its metrics files below results/logs/;
    rows: those files -> {row: {column: summary}}; corner: heading of the first column; logs: pattern of the logs beside
    a metrics file."""

    data: str
    command: str
    runs: str
    rows: Callable
    corner: str = ""
    logs: str = "*_log.jsonl"


def ablation(split):
    """All axes that were run, a row each value, from metrics files <folder>/<default or axis/value>/seed<k>/<file>."""
    return lambda paths: named(overview(os.path.commonpath(paths), split))


def variants(paths):
    """Table 1 of several variants of the same originals, from metrics files <variant>/seed<k>/<file>."""
    found = {}
    for path in paths:
        found.setdefault(path.split(os.sep)[-3], []).append(path)
    rows = {}
    for variant, own in found.items():
        for network, row in table1_rows(load_runs(own)).items():
            rows[network if network.startswith("Original") else f"{variant}: {network}"] = row
    return rows


def table1(*, paper=None):
    """Table 1 over metrics files, the paper's rows below."""
    return lambda paths: {**table1_rows(load_runs(paths)), **paper_rows(paper)}


CIFAR10 = "CIFAR-10, test set, three draws"
PUBLISHED = ('WEIGHTS={} ARCH={} EPOCHS=0 PARTITION_FLAGS="--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225" '
             'VARIANTS="{}" bash scripts/1_table1_cifar10.sh').format
RESNET20 = PUBLISHED("resnet20-12fca82f.th", "resnet20", "paper split2 authors ours")
RESNET56 = PUBLISHED("resnet56-4bfd9763.th", "resnet56", "paper split2")

TABLES = {
    "cifar10_resnet20": Table(CIFAR10, RESNET20, "table1/cifar10_resnet20/paper/seed*/metrics.json",
                              table1(paper="cifar10")),
    "cifar10_resnet20_variants": Table(CIFAR10, RESNET20, "table1/cifar10_resnet20/*/seed*/metrics.json", variants),
    "cifar10_resnet56": Table(CIFAR10, RESNET56, "table1/cifar10_resnet56/paper/seed*/metrics.json",
                              table1(paper="cifar10")),
    "cifar10_resnet56_variants": Table(CIFAR10, RESNET56, "table1/cifar10_resnet56/*/seed*/metrics.json", variants),
    "settings": Table("CIFAR-10, held-out images of an own ResNet-20, draws 10 to 12",
                      'EPOCHS=45 ORIGINAL_FLAGS="--warmup_epochs 1 --seed 10" VAL_FRACTION=0.1 AXES=... '
                      "bash scripts/5_ablation.sh 10 11 12", "settings/**/metrics_val.json", ablation("val"),
                      "axis: value"),
    "quickstart": Table("digits, test set, one run", "bash scripts/0_quickstart.sh", "quickstart/metrics.json",
                        table1()),
}
