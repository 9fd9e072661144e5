"""The tables of the pages: what each shows, what makes it, and which files under results/logs/ are behind it."""

import os
from collections.abc import Callable
from typing import NamedTuple

from analysis.ablation import named, overview
from analysis.bank import bank_rows
from analysis.recovery import recovery_rows
from analysis.table1 import load_runs, paper_rows
from utils.files import load_json
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


def table1(*, paper=None):
    """Table 1 over metrics files, the paper's rows below."""
    return lambda paths: {**table1_rows(load_runs(paths)), **paper_rows(paper)}


def bank(paths):
    """The states of several banks, by the number of deposits away."""
    return bank_rows([load_json(path) for path in paths])


def recovery(paths):
    """What is kept beside T, over draws."""
    return recovery_rows([load_json(path)["points"] for path in paths])


CIFAR10 = "CIFAR-10, test set, three draws"
PUBLISHED = ('WEIGHTS={} ARCH={} EPOCHS=0 PARTITION_FLAGS="--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225" '
             'bash scripts/1_table1_cifar10.sh 0 1 2').format
TABLES = {
    "cifar10_resnet20": Table(CIFAR10, PUBLISHED("resnet20-12fca82f.th", "resnet20"),
                              "table1/cifar10_resnet20/paper/seed*/metrics.json",
                              table1(paper="cifar10")),
    "cifar10_resnet20_split2": Table(CIFAR10, "VARIANTS=split2 " + PUBLISHED("resnet20-12fca82f.th", "resnet20"),
                                     "table1/cifar10_resnet20/split2/seed*/metrics.json", table1()),
    "cifar10_resnet56": Table(CIFAR10, PUBLISHED("resnet56-4bfd9763.th", "resnet56"),
                              "table1/cifar10_resnet56/paper/seed*/metrics.json",
                              table1(paper="cifar10")),
    "bank_resnet20": Table("CIFAR-10, test set, three draws of five deposits of one class",
                           PUBLISHED("resnet20-12fca82f.th", "resnet20").replace("1_table1_cifar10", "8_bank").replace(
                               "bash", 'DEPOSIT_FLAGS="--lambda_kp 2.5" bash', 1),
                           "bank/resnet20/bank?.json", bank, "deposits away", "bank?/*/deposit_log.jsonl"),
    "recovery_resnet20": Table(CIFAR10, PUBLISHED("resnet20-12fca82f.th", "resnet20").replace(
                                   "1_table1_cifar10", "6_recovery_bytes"),
                               "recovery/resnet20/*/seed*/recovery.json", recovery, "kept beside T"),
    "settings": Table("CIFAR-10, held-out images of an own ResNet-20, draw of seed 10",
                      'EPOCHS=45 ORIGINAL_FLAGS="--warmup_epochs 1 --seed 10" VAL_FRACTION=0.1 AXES=... '
                      "bash scripts/5_ablation.sh 10", "settings/**/metrics_val.json", ablation("val"),
                      "axis: value"),
    "settings_published": Table("CIFAR-10, held-out images of the published ResNet-20, draw of seed 10",
                                PUBLISHED("resnet20-12fca82f.th", "resnet20").replace(
                                    "bash scripts/1_table1_cifar10.sh 0 1 2",
                                    'VAL_FRACTION=0.1 AXES="lambda_kp random_label" bash scripts/5_ablation.sh 10'),
                                "settings_published/**/metrics_val.json", ablation("val"), "axis: value"),
    "quickstart": Table("digits, test set, one run", "bash scripts/0_quickstart.sh", "quickstart/metrics.json",
                        table1()),
}
