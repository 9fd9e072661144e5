"""The ledger of every accuracy that a page shows, and the pages' tables from it. Writes results/ledger.json from the
files under results/, then the tables of the pages from the ledger; --check writes nothing and fails where the three
differ."""

import glob
import json
import operator
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
from analysis import ablation, reliability, table3
from analysis.table1 import (PAPER, RULES, above_original, difference, load_runs, load_variants, markdown,
                             measured_rules, summaries, summary, table1_columns)
from utils.checkpoint import load_json, save_json, write_atomically
from utils.cli import make_parser, run
from utils.errors import UserError

LEDGER = "results/ledger.json"
PAGES = ("README.md", "results/README.md", "results/settings.md", "results/withdrawal.md", "results/reliability.md")
JPEG = "CIFAR-10 (JPEG)"


class Goal(NamedTuple):
    """What a figure is to reach: `sign` `bound`, counted from the mean in the same row of the column `of`, if any."""

    sign: str
    bound: float
    of: str | None = None

    def __str__(self):
        return f"{self.sign} {self.of} {self.bound:+g}" if self.of else f"{self.sign} {self.bound:g}"

    def met(self, figure, columns, row):
        start = columns.get(self.of, {}).get(row) if self.of else {"mean": 0}
        if start is None:
            raise UserError(f"the goal of '{row}' is counted from '{self.of}', of which there are no runs")
        return {">=": operator.ge, "<=": operator.le, "<": operator.lt}[self.sign](
            figure["mean"], start["mean"] + self.bound)


def study_columns(paths):
    """{column: {variant: summary}} of a study. Of a withdrawal it shows by how much Avg Acc differs from that run's
    own original."""
    # the originals' own folder, which scripts/6_withdrawal.sh puts beside the variants, is none of them
    variants = load_variants([path for path in paths if path.split(os.sep)[-3] != "original"])
    figures = {"T: Pre - Original": lambda m: m["target"]["pre_acc"] - m["original"]["pre_acc"],
               "T: Dep": lambda m: m["target"]["dep_acc"]}
    for rule in measured_rules([metrics for runs in variants.values() for metrics in runs]):
        figures[f"{RULES[rule]}: Avg - Original"] = partial(above_original, rule=rule)
    return summaries(variants, figures)


def optimisation_columns(paths):
    """{figure: {variant: summary}} of scripts/9_optimisations.sh, whose plain variant has a T0 alone. By how much a
    figure differs from that of the fp32 variant is taken seed by seed, over the seeds that both have."""
    figures = {"T0: Avg": lambda m: m["original"]["avg_acc"],
               "T: Pre": lambda m: m["target"]["pre_acc"] if "target" in m else None,
               "T: Dep": lambda m: m["target"]["dep_acc"] if "target" in m else None,
               "T~: Avg": lambda m: m["recover"][m["merge"]]["avg_acc"] if "recover" in m else None}
    variants = {}
    for path in paths:
        variant, seed = path.split(os.sep)[-3:-1]
        variants.setdefault(variant, {})[seed] = load_runs([path], networks=("original",))[0]
    columns = summaries({name: list(seeds.values()) for name, seeds in variants.items()}, figures)
    exact = variants.get("fp32", {})
    for figure, of in figures.items():
        columns[f"{figure} - fp32"] = {
            name: summary([difference(of(seeds[seed]), of(exact[seed])) for seed in exact.keys() & seeds.keys()])
            for name, seeds in variants.items()}
    return columns


def speed_columns(paths):
    """{figure: {step: summary}} of analysis/benchmark.py's files."""
    figures = {"reference, images/s": lambda step: step["reference"]["images_per_s"],
               "ours, images/s": lambda step: step["ours"]["images_per_s"],
               "ours / reference": lambda step: step["speedup"],
               "% of the matrix peak": lambda step: 100 * step["share_of_peak"]}
    reports = [load_json(path) for path in paths]
    return summaries({step: [report[step] for report in reports] for step in ("original", "deposit")}, figures)


def memory_columns(paths):
    """{figure: {pass: summary}} of analysis/memory.py's files."""
    reports = [load_json(path) for path in paths]
    passes = {"decoding, the first time": "decoded", "from the cache": "from_cache"}
    return summaries({name: [report[key] for report in reports] for name, key in passes.items()},
                     {"peak memory, GiB": lambda figures: figures["peak_memory_bytes"] / 2**30,
                      "seconds": lambda figures: figures["seconds"]})


def tsne_columns(paths):
    """{network and subset: {run: summary}} of analysis/tsne.py's files: % of neighbours that are of the class."""
    runs = {os.path.basename(os.path.dirname(path)): [load_json(path)["neighbour_accuracy"]] for path in paths}
    return summaries(runs, {f"{name}: {subset}": lambda near, network=network, key=key: near[network][key]
                            for name, network in (("T0", "original"), ("T", "target"), ("T~", "recover"))
                            for subset, key in (("preserved", "pre"), ("deposit", "dep"))})


class Table(NamedTuple):
    """A table of the pages: <!-- table NAME --> ... <!-- end -->.

    command: what makes it, or what would. runs: patterns of its metrics files under results/; pending while one of
    them finds none. columns: those files -> {column: {row: summary}}. paper: {column: {row: value}} and goals:
    {column: {row: Goal}}, with Table 1's and Table 3's own names, which a column or row may extend. logs: pattern of
    the logs beside a metrics file.
    """

    data: str
    command: str
    runs: tuple
    columns: Callable = table1_columns
    paper: dict = {}
    goals: dict = {}
    corner: str = ""
    logs: str = "*_log.jsonl"


# the project's own, whatever the size of the network; the paper's values stand for themselves
CIFAR10_GOALS = {
    "Deposit": {"Pre Acc": Goal(">=", -0.4, "Original"), "Dep Acc": Goal("<=", 15), "H Mean": Goal(">=", 86)},
    "Withdrawal, calibrated": {"Avg Acc": Goal(">=", -0.3, "Original")},
}
CUB_GOALS = {
    "Deposit": {"Pre Acc": Goal(">=", 0, "Original"), "Dep Acc": Goal("<=", 2)},
    "Withdrawal, calibrated": {"Avg Acc": Goal(">=", -0.5, "Original")},
}
TABLE3_GOALS = {"T with L_at": {"Pre Acc": Goal(">=", -0.5, "T0"), "Dep Acc": Goal("<", 0, "T without L_at")}}
VAL = JPEG + ", held-out images"
CPU = "ARCH=resnet8 EPOCHS=10 DEPOSIT_EPOCHS=3 DATA_DIR=<image folder>"
RESNET20 = "ARCH=resnet20 EPOCHS=10 DEPOSIT_EPOCHS={} DATA_DIR=<image folder>"

TABLE3_CPU = ("{} LAMBDA_AT='0 {}' STUDENTS='{}' VAL_FRACTION=0.1 STUDENT_EPOCHS={} "
              "bash scripts/3_table3_transferability.sh 0 1 2").format
# of other classes than ours, so no figure of the ledger stands for the other
OTHER_BIRDS = {f"{name}, all 200 classes": rows for name, rows in PAPER["cub200"].items()}
CUB127 = ("IMAGE_SIZE=112 EPOCHS=60 VAL_FRACTION=0.1 DATA_DIR=<the part of CUB-200-2011> "
          "bash scripts/2_table1_cub200.sh 0")
CUB50 = "ARCH=resnet8 SPLIT_AT=3 EPOCHS=100 DEPOSIT_EPOCHS=60 IMAGE_SIZE=64 DATA_DIR=<the part of CUB-200-2011>"

TABLES = {
    "quickstart": Table("digits", "bash scripts/0_quickstart.sh", ("quickstart/seed*/metrics.json",)),
    "quickstart_val": Table("digits, held-out images", "the quickstart's stages with --val_fraction 0.2 --seed 0, 1",
                            ("quickstart_val/seed*/metrics_val.json",)),
    "cifar10_resnet20": Table(
        JPEG, "ARCH=resnet20 EPOCHS=10 VAL_FRACTION=0.1 DATA_DIR=<image folder> bash scripts/1_table1_cifar10.sh 0 1 2",
        ("cifar10_resnet20/seed*/metrics.json",), paper=PAPER["cifar10"], goals=CIFAR10_GOALS),
    "cifar10_resnet20_val": Table(VAL, "as cifar10_resnet20", ("cifar10_resnet20/seed*/metrics_val.json",)),
    "cifar10_resnet20_paper": Table(
        JPEG, "as cifar10_resnet20, EPOCHS=20, seeds 0 and 1, deposit with --prune_ratio 0.5 --pt_classes deposit "
        "--lambda_pt 1 --lambda_re 0.1 --lambda_ft 0", ("cifar10_resnet20_paper/seed*/metrics.json",),
        paper=PAPER["cifar10"]),
    "withdrawal_study": Table(VAL, "DATA_DIR=<image folder> bash scripts/6_withdrawal.sh 0 1 2",
                              ("withdrawal/*/seed*/metrics_val.json",), study_columns, corner="variant"),
    "withdrawal_resnet8": Table(VAL, f"{CPU} bash scripts/6_withdrawal.sh 0 1 2",
                                ("withdrawal_resnet8/*/seed*/metrics_val.json",), study_columns, corner="variant"),
    "withdrawal_pruning": Table(
        VAL, f"AXES=pruning {CPU} bash scripts/5_ablation.sh 0 1 2",
        ("withdrawal_resnet8/default/seed*/metrics_val.json", "withdrawal_pruning/*/seed*/metrics_val.json"),
        study_columns, corner="pruning ratio"),
    "withdrawal_explored": Table(VAL, "train_deposit.py with the flags in each log",
                                 ("withdrawal_explored/*/seed*/metrics_val.json",), study_columns, corner="variant"),
    "deposit_defaults": Table(VAL, "train_deposit.py with the flags in each log",
                              ("deposit_defaults/*/seed*/metrics_val.json",), study_columns, corner="setting"),
    "optimisations": Table(
        JPEG, "EPOCHS=3 DEPOSIT_EPOCHS=1 DATA_DIR=<image folder> bash scripts/9_optimisations.sh 0 1 2",
        ("optimisations/*/seed*/metrics.json",), optimisation_columns, corner="variant"),
    "speed": Table(
        "images of random pixels", "IMAGES=0 bash scripts/8_benchmark.sh", ("benchmark/speed.json",), speed_columns,
        goals={"ours / reference": {"original": Goal(">=", 2.5), "deposit": Goal(">=", 3)},
               "% of the matrix peak": {"original": Goal(">=", 80)}}, corner="step", logs="speed.json"),
    "memory": Table(
        "11,788 made-up photographs", "bash scripts/8_benchmark.sh", ("benchmark/memory.json",), memory_columns,
        goals={"peak memory, GiB": dict.fromkeys(("decoding, the first time", "from the cache"), Goal("<=", 4))},
        corner="pass", logs="memory.json"),
    "cifar10_resnet18": Table(
        "CIFAR-10", "INDEPENDENT=1 bash scripts/1_table1_cifar10.sh 0 1 2", ("cifar10_resnet18/seed*/metrics.json",),
        paper=PAPER["cifar10"], goals={"Original": {"Avg Acc": Goal(">=", 94)}, **CIFAR10_GOALS}),
    "cub200": Table("CUB-200-2011", "INDEPENDENT=1 bash scripts/2_table1_cub200.sh 0 1 2",
                    ("cub200/seed*/metrics.json",), paper=PAPER["cub200"], goals=CUB_GOALS),
    "cub127_resnet18_prune03": Table(
        "CUB-127 (cropped)", f"{CUB127}, and the deposit again with other classes (--partition)",
        ("cub127_resnet18_prune03/*/metrics.json",), paper=OTHER_BIRDS,
        goals={"Original": {"Avg Acc": Goal(">=", 50)}, **CUB_GOALS}),
    "cub127_deposit_modules": Table(
        "CUB-127 (cropped)", f"{CUB127}, the deposit with the flags in each log",
        ("cub127_resnet18*/seed0/metrics.json",), study_columns, corner="T_r"),
    "cub127_settings": Table(
        "CUB-127 (cropped), held-out images", "train_deposit.py with the flags in each log",
        ("cub127_settings/*/seed*/metrics_val.json", "cub127_resnet18*/seed*/metrics_val.json"), study_columns,
        corner="setting"),
    "cub50_resnet8": Table(
        "CUB-50", f"INDEPENDENT=1 {CUB50} bash scripts/2_table1_cub200.sh 0 1 2", ("cub50_resnet8/seed*/metrics.json",),
        paper=OTHER_BIRDS, goals=CUB_GOALS),
    "cub50_earlier": Table("CUB-50", f"{CUB50} bash scripts/2_table1_cub200.sh, the deposit with the flags in each log",
                           ("cub50_resnet8_*/seed*/metrics.json",), study_columns, corner="run"),
    "cub50_settings": Table("CUB-50, held-out images", "train_deposit.py with the flags in each log",
                            ("cub50_settings/*/seed*/metrics_val.json",), study_columns, corner="setting"),
    "table3": Table("CIFAR-10", "bash scripts/3_table3_transferability.sh 0 1 2", ("table3/*/*/seed*/metrics.json",),
                    table3.table3_columns, table3.PAPER, TABLE3_GOALS, table3.CORNER),
    **{name + ending: Table(data, command, tuple(f"{runs}/seed*/metrics{ending}.json" for runs in folders),
                            table3.table3_columns, goals=TABLE3_GOALS, corner=table3.CORNER)
       for name, command, folders in (
           ("table3_resnet20", TABLE3_CPU(RESNET20.format(3), 300, "cnn resnet20", 3)
            + ", of the CNN the students by logits", ("table3_resnet20/*/*",)),
           ("table3_cpu", TABLE3_CPU(CPU, 300, "resnet8", 3), ("table3_cpu/*/*",)),
           ("table3_8epochs", TABLE3_CPU(CPU, 300, "cnn resnet8", 8) + ", of the CNN the attention students",
            ("table3_8epochs/*/*",)),
           ("table3_cut3", "SPLIT_AT=3 " + TABLE3_CPU(CPU, 100, "resnet8", 8) + ", its attention students",
            ("table3_8epochs/resnet8_attention/original", "table3_cut3/*/*")))
       for data, ending in ((JPEG, ""), (VAL, "_val"))},
    **{name: Table(VAL, command, tuple(f"{runs}/seed0/metrics_val.json" for runs in folders), table3.table3_columns,
                   goals=TABLE3_GOALS, corner=table3.CORNER)
       for name, command, folders in (
           ("table3_cut3_weights", "as table3_cut3, seed 0, LAMBDA_AT='0 100 300'",
            ("table3_8epochs/resnet8_attention/original", "table3_cut3/*/*", "table3_cut3_weights/*/*")),
           ("table3_resnet20_weights", "as table3_resnet20, seed 0, LAMBDA_AT='0 100 150 300', its attention students",
            ("table3_resnet20/resnet20_attention/*", "table3_resnet20_weights/resnet20_attention/*")),
           ("table3_weights", "as table3_cpu, seed 0, LAMBDA_AT='0 300 1000'",
            ("table3_cpu/*/*", "table3_weights/*/*")))},
    "table3_targets": Table(VAL, "as table3_cpu, LAMBDA_AT='300 1000'",
                            ("table3_targets/*/seed*/metrics_val.json",), study_columns, corner="T"),
    "tsne": Table(f"{JPEG}, 3,000 test images", "SAVE=<run> DATA_DIR=<image folder> bash scripts/4_figure_tsne.sh",
                  ("tsne_*/tsne.json",), tsne_columns, corner="run", logs="tsne.json"),
    **{f"{folder}_{axis}": Table(
        VAL, f"AXES={axis} {size} bash scripts/5_ablation.sh 0 1 2",
        tuple(f"{folder}/{pattern}" for pattern in ablation.run_patterns(axis)),
        partial(ablation.ablation_columns, axis), corner=title)
       for folder, size in (("ablation", CPU), ("ablation_resnet20", RESNET20.format(1)))
       for axis, (title, _) in ablation.AXES.items()},
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only compare logs, ledger and pages")
    return parser


def evidence_of(paths, pattern):
    """(logs, hardware, seconds) of the runs whose metrics files are `paths`, from the logs beside these."""
    logs = sorted({log for path in paths for log in glob.glob(os.path.join(os.path.dirname(path), pattern))})
    hardware, seconds = set(), 0.0
    for log in logs:
        for record in _records(log):
            seconds += record.get("seconds", 0)
            if "hardware" in record:
                threads = f", {record['threads']} thread(s)" if record["device"] == "cpu" else ""
                hardware.add(f"{record['hardware']}{threads}, {record['precision']}, torch {record['torch']}")
    if not logs:
        raise UserError(f"no log lies beside {paths[0]}: a figure without a log is not shown")
    return [os.path.relpath(log, ROOT) for log in logs], sorted(hardware), round(seconds, 1) or None


def _records(log):
    """The objects of a log: one a line, or all of a .json file."""
    if log.endswith(".json"):
        return [load_json(log)]
    with open(log, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def named(column, row, values):
    """The entry of {column: {row: entry}} for a column, or that whose name it begins with ("Withdrawal" for
    "Withdrawal, concat"), and a row, or that whose name it ends with ("Pre Acc" for "CNN, logits: Pre Acc"). None if
    there is none."""
    rows = values.get(column) or values.get(re.split(r", | \(", column)[0], {})
    return rows.get(row, rows.get(row.split(": ")[-1]))


def entries_of(name):
    """The ledger's entries of one table: a figure each."""
    table = TABLES[name]
    found = [sorted(glob.glob(os.path.join(ROOT, "results", pattern))) for pattern in table.runs]
    if all(found):
        paths = sum(found, [])
        columns, (logs, hardware, seconds) = table.columns(paths), evidence_of(paths, table.logs)
    else:  # of what is pending, the paper's figures are known
        columns = {column: dict.fromkeys(rows) for column, rows in table.paper.items()}
        logs, hardware, seconds = [], [], None
    entries = []
    for column, rows in columns.items():
        for row, figure in rows.items():
            goal = named(column, row, table.goals)
            missed = figure and goal and not goal.met(figure, columns, row)
            status = "pending" if not logs else "missed" if missed else "measured"
            entries.append({"table": name, "column": column, "row": row, "paper": named(column, row, table.paper),
                            "ours": figure, "goal": goal and str(goal), "command": table.command, "data": table.data,
                            "hardware": hardware, "wall_time_s": seconds, "logs": logs, "status": status})
    return entries


def as_markdown(name, entries):
    """The Markdown table NAME from the ledger's entries."""
    columns = {}
    for entry in entries:
        if entry["table"] == name and entry["status"] != "pending":
            columns.setdefault(entry["column"], {})[entry["row"]] = entry["ours"]
    table = markdown(columns, TABLES[name].paper, TABLES[name].corner) if columns or TABLES[name].paper else ""
    return table if columns else f"Ours is pending.\n\n{table}"


def with_tables(page, entries):
    """A page's text with each of its tables made anew from the ledger's entries."""

    def fill(match):
        if match[1] == "reliability":
            table = reliability.table(os.path.join(ROOT, "results/reliability"))
            return f"<!-- table reliability -->\n{table}<!-- end -->"
        if match[1] not in TABLES:
            raise UserError(f"a page shows the table '{match[1]}', which nothing makes")
        return f"<!-- table {match[1]} -->\n{as_markdown(match[1], entries)}<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main(args):
    entries = [entry for name in TABLES for entry in entries_of(name)]
    ledger = os.path.join(ROOT, LEDGER)
    if args.check:
        if load_json(ledger).get("figures") != entries:
            raise UserError(f"{LEDGER} does not agree with the logs under results/: run analysis/report.py")
        entries = load_json(ledger)["figures"]
    else:
        save_json(ledger, {"figures": entries})
    for page in PAGES:
        path = os.path.join(ROOT, page)
        with open(path, encoding="utf-8") as file:
            before = file.read()
        text = with_tables(before, entries)
        if args.check and text != before:
            raise UserError(f"{page} does not agree with {LEDGER}: run analysis/report.py")
        if not args.check:
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
    count = Counter(entry["status"] for entry in entries)
    print(f"{count['measured'] + count['missed']} figures measured, {count['missed']} of them short of their goal; "
          f"{count['pending']} pending")


if __name__ == "__main__":
    run(main, get_args_parser())
