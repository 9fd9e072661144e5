"""The ledger of every figure that a page shows, and the pages' tables from it. Writes results/ledger.json from the files
under results/, then the tables of the pages from the ledger; --check writes nothing and fails where the three differ."""

import glob
import json
import os
import re
import sys
from typing import NamedTuple

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
from analysis.table1 import PAPER, RULES, load_runs, markdown, measured_rules, summary, table1_columns
from utils.checkpoint import load_json, save_json, write_atomically
from utils.cli import make_parser, run
from utils.errors import UserError

LEDGER = "results/ledger.json"
PAGES = ("README.md", "results/README.md", "results/withdrawal.md")
JPEG = "CIFAR-10 (JPEG)"


class Table(NamedTuple):
    """A table of the pages: <!-- table NAME --> ... <!-- end -->.

    runs: pattern of its metrics files under results/, for a study with one * for the variant before the seed's;
    None: pending. command: what makes it, or what would.
    """

    data: str
    command: str
    runs: str | None
    paper: str = "none"
    study: bool = False


TABLES = {
    "quickstart": Table("digits", "bash scripts/0_quickstart.sh", "quickstart/seed*/metrics.json"),
    "quickstart_val": Table("digits, held-out images", "the quickstart's stages with --val_fraction 0.2 --seed 0, 1",
                            "quickstart_val/seed*/metrics_val.json"),
    "cifar10_resnet20": Table(
        JPEG, "ARCH=resnet20 EPOCHS=10 VAL_FRACTION=0.1 DATA_DIR=<image folder> bash scripts/1_table1_cifar10.sh 0 1 2",
        "cifar10_resnet20/seed*/metrics.json", "cifar10"),
    "cifar10_resnet20_val": Table(JPEG + ", held-out images", "as cifar10_resnet20",
                                  "cifar10_resnet20/seed*/metrics_val.json"),
    "cifar10_resnet20_paper": Table(
        JPEG, "as cifar10_resnet20, EPOCHS=20, seeds 0 and 1, deposit with --prune_ratio 0.5 --pt_classes deposit "
        "--lambda_pt 1 --lambda_re 0.1 --lambda_ft 0", "cifar10_resnet20_paper/seed*/metrics.json", "cifar10"),
    "withdrawal_study": Table(JPEG + ", held-out images",
                              "DATA_DIR=<image folder> bash scripts/6_withdrawal.sh 0 1 2",
                              "withdrawal/*/seed*/metrics_val.json", study=True),
    "withdrawal_explored": Table(JPEG + ", held-out images", "train_deposit.py with the flags in each log",
                                 "withdrawal_explored/*/seed*/metrics_val.json", study=True),
    **{trial: Table(JPEG + ", held-out images", "train_deposit.py with the flags in its log",
                    f"deposit_defaults/{trial}/metrics_val.json")
       for trial in ("kp1_frozen", "kp1_updated", "kp5_updated", "kp10_frozen", "kp5_updated_10epochs")},
    "cifar10_resnet18": Table("CIFAR-10", "INDEPENDENT=1 bash scripts/1_table1_cifar10.sh 0 1 2", None, "cifar10"),
    "cub200": Table("CUB-200-2011", "INDEPENDENT=1 bash scripts/2_table1_cub200.sh 0 1 2", None, "cub200"),
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only compare logs, ledger and pages")
    return parser


def study_columns(paths):
    """{column: {variant: summary}} of a study. Of a withdrawal it shows by how much Avg Acc differs from that run's
    own original."""
    variants = {}
    for path in paths:
        variants.setdefault(os.path.basename(os.path.dirname(os.path.dirname(path))), []).append(path)
    variants = {name: load_runs(of_variant) for name, of_variant in variants.items()}

    def column(figure):
        return {name: summary([figure(metrics) for metrics in runs]) for name, runs in variants.items()}

    columns = {"T: Pre - Original": column(lambda m: m["target"]["pre_acc"] - m["original"]["pre_acc"]),
               "T: Dep": column(lambda m: m["target"]["dep_acc"])}
    for rule in measured_rules([metrics for runs in variants.values() for metrics in runs]):
        columns[f"{RULES[rule]}: Avg - Original"] = column(
            lambda m, rule=rule: m["recover"][rule]["avg_acc"] - m["original"]["avg_acc"])
    return columns


def evidence_of(paths):
    """(logs, hardware, seconds) of the runs whose metrics files are `paths`, from the logs beside these."""
    logs = sorted({log for path in paths for log in glob.glob(os.path.join(os.path.dirname(path), "*_log.jsonl"))})
    hardware, seconds = set(), 0.0
    for log in logs:
        with open(log, encoding="utf-8") as file:
            for record in map(json.loads, file):
                seconds += record.get("seconds", 0)
                if "hardware" in record:
                    threads = f", {record['threads']} thread(s)" if record["device"] == "cpu" else ""
                    hardware.add(f"{record['hardware']}{threads}, {record['precision']}, torch {record['torch']}")
    if not logs:
        raise UserError(f"no log lies beside {paths[0]}: a figure without a log is not shown")
    return [os.path.relpath(log, ROOT) for log in logs], sorted(hardware), round(seconds, 1)


def entries_of(name):
    """The ledger's entries of one table: a figure each."""
    table, paper = TABLES[name], PAPER[TABLES[name].paper]
    about = {"command": table.command, "data": table.data}
    if table.runs is None:
        return [{"table": name, "column": column, "row": row, "paper": value, "ours": None, **about, "hardware": [],
                 "wall_time_s": None, "logs": [], "status": "pending"}
                for column, rows in paper.items() for row, value in rows.items()]
    paths = sorted(glob.glob(os.path.join(ROOT, "results", table.runs)))
    if not paths:
        raise UserError(f"table {name} has no metrics file under results/{table.runs}")
    columns = study_columns(paths) if table.study else table1_columns(load_runs(paths))
    logs, hardware, seconds = evidence_of(paths)
    return [{"table": name, "column": column, "row": row,
             "paper": paper.get(column.split(",")[0], {}).get(row), "ours": figure, **about,
             "hardware": hardware, "wall_time_s": seconds, "logs": logs, "status": "measured"}
            for column, rows in columns.items() for row, figure in rows.items()]


def as_markdown(name, entries):
    """The Markdown table NAME from the ledger's entries."""
    columns = {}
    for entry in entries:
        if entry["table"] == name:
            columns.setdefault(entry["column"], {})[entry["row"]] = entry["ours"]
    return markdown(columns, PAPER[TABLES[name].paper], corner="variant" if TABLES[name].study else "")


def with_tables(page, entries):
    """A page's text with each of its tables made anew from the ledger's entries."""

    def fill(match):
        if match[1] not in TABLES or TABLES[match[1]].runs is None:
            raise UserError(f"a page shows the table '{match[1]}', which is not measured")
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
    measured = sum(entry["status"] == "measured" for entry in entries)
    print(f"{measured} figures measured, {len(entries) - measured} pending")


if __name__ == "__main__":
    run(main, get_args_parser())
