"""Table 1 as Markdown: mean and standard deviation over runs (a metrics.json each), the paper's values beside them.
With --pages, rewrites the tables of README.md and results/README.md from the files under results/."""

import glob
import os
import re
import statistics
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
from utils.checkpoint import load_json, write_atomically
from utils.cli import make_parser, run
from utils.errors import UserError
from utils.metrics import TABLE1_ROWS

# the merge rules that a table shows where metrics.json has them
RULES = {"concat": "concat", "scaled": "scaled", "calibrated": "calibrated", "evidence": "evidence", "sum": "sum",
         "branch": "z_Tr alone", "released": "released (reads label)"}

# Ye et al., ECCV 2022, Table 1: Original, Deposit, Withdrawal
PAPER = {
    "cifar10": {"pre_acc": (93.77, 93.41, 94.56), "dep_acc": (94.60, 15.00, 97.92), "forgetting": (0, 79.60, None),
                "h_mean": (0, 85.95, None), "avg_acc": (94.06, None, 95.57)},
    "cub200": {"pre_acc": (50.33, 51.64, 53.21), "dep_acc": (48.60, 1.18, 55.89), "forgetting": (0, 47.42, None),
               "h_mean": (0, 49.44, None), "avg_acc": (49.81, None, 54.01)},
    "none": {},
}

# Every table that a page shows: <!-- table NAME --> ... <!-- end --> in a page holds the table of these files.
TABLES = {
    "quickstart": ("none", "results/quickstart/seed*/metrics.json"),
    "cifar10_resnet20": ("cifar10", "results/cifar10_resnet20/seed*/metrics.json"),
    "quickstart_val": ("none", "results/quickstart_val/seed*/metrics_val.json"),
    "cifar10_resnet20_val": ("none", "results/cifar10_resnet20/seed*/metrics_val.json"),
    **{trial: ("none", f"results/deposit_defaults/{trial}/metrics_val.json")
       for trial in ("kp1_frozen", "kp1_updated", "kp5_updated", "kp10_frozen", "kp5_updated_10epochs")},
}
STUDIES = {"withdrawal_study": "results/withdrawal", "withdrawal_explored": "results/withdrawal_explored"}
PAGES = ("README.md", "results/README.md", "results/withdrawal.md")


def get_args_parser():
    parser = make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--metrics", nargs="+", help="metrics.json of one or more runs, a seed each")
    source.add_argument("--pages", action="store_true", help="rewrite the pages' tables instead")
    parser.add_argument("--paper", choices=list(PAPER), default="cifar10", help="the paper's column to set beside")
    parser.add_argument("--out", default=None, help="Markdown file to write as well")
    return parser


def cell(values):
    """'mean ± deviation' of one figure over the runs; '-' where it is not defined."""
    if any(value is None for value in values):
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def measured_rules(runs):
    """The rules that every run has measured, in the order of RULES."""
    return [rule for rule in RULES if all(rule in metrics["recover"] for metrics in runs)]


def table(runs, paper):
    """The Markdown table of a list of metrics.json contents."""
    rules = measured_rules(runs)
    ours = ["Original", "Deposit", *(f"Withdrawal, {RULES[rule]}" for rule in rules)]
    theirs = [f"paper: {name}" for name in ("Original", "Deposit", "Withdrawal")] if paper else []
    lines = ["| | " + " | ".join(ours + theirs) + " |", "|---|" + "---|" * len(ours + theirs)]
    for key, row in TABLE1_ROWS.items():
        cells = [cell([metrics["original"][key] for metrics in runs]), cell([m["target"][key] for m in runs])]
        for rule in rules:  # F and H Mean speak of forgetting, not of a recover network
            cells.append("-" if key in ("forgetting", "h_mean") else cell([m["recover"][rule][key] for m in runs]))
        cells += ["-" if value is None else f"{value:.2f}" for value in paper.get(key, ())]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def study_table(folder):
    """The Markdown table of the withdrawal study: a row for each <variant>/ in `folder`, means over its
    seed*/metrics_val.json. Of a withdrawal it shows by how much Avg Acc differs from that run's own original."""
    variants = {name: [load_json(path) for path in sorted(glob.glob(os.path.join(folder, name, "seed*",
                                                                                 "metrics_val.json")))]
                for name in sorted(os.listdir(folder))}
    rules = measured_rules([metrics for runs in variants.values() for metrics in runs])
    head = ["variant", "n", "T: Pre - Original", "T: Dep", *(f"{RULES[rule]}: Avg - Original" for rule in rules)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    for name, runs in variants.items():
        cells = [name, str(len(runs)), cell([m["target"]["pre_acc"] - m["original"]["pre_acc"] for m in runs]),
                 cell([m["target"]["dep_acc"] for m in runs])]
        cells += [cell([m["recover"][rule]["avg_acc"] - m["original"]["avg_acc"] for m in runs]) for rule in rules]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table_of(paths, paper):
    """The Markdown table of metrics files. Raises UserError when one lacks a column."""
    runs = [load_json(path) for path in paths]
    for path, metrics in zip(paths, runs):
        if not {"original", "target", "recover"} <= metrics.keys():
            raise UserError(f"{path} lacks a column of Table 1: run all four stages with a test set")
    return table(runs, PAPER[paper])


def with_tables(page):
    """A page's text with each table made anew from the files that TABLES names."""

    def fill(match):
        if match[1] in STUDIES:
            filled = study_table(os.path.join(ROOT, STUDIES[match[1]]))
        else:
            paper, pattern = TABLES[match[1]]
            filled = table_of(sorted(glob.glob(os.path.join(ROOT, pattern))), paper)
        return f"<!-- table {match[1]} -->\n{filled}<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main(args):
    if args.pages:
        for page in PAGES:
            path = os.path.join(ROOT, page)
            with open(path, encoding="utf-8") as file:
                text = with_tables(file.read())
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
        return
    text = table_of(args.metrics, args.paper)
    print(text, end="")
    if args.out:
        write_atomically(args.out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    run(main, get_args_parser())
