"""Table 1 as Markdown: mean and standard deviation over runs (a metrics.json each), the paper's values beside them."""

import os
import statistics
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from utils.checkpoint import load_json, write_atomically
from utils.cli import make_parser, run
from utils.errors import UserError

ROWS = {"pre_acc": "Pre Acc", "dep_acc": "Dep Acc", "forgetting": "F", "h_mean": "H Mean", "avg_acc": "Avg Acc"}
RULES = {"concat": "concat", "calibrated": "calibrated", "sum": "sum", "released": "released (reads label)"}

# Ye et al., ECCV 2022, Table 1: Original, Deposit, Withdrawal
PAPER = {
    "cifar10": {"pre_acc": (93.77, 93.41, 94.56), "dep_acc": (94.60, 15.00, 97.92), "forgetting": (0, 79.60, None),
                "h_mean": (0, 85.95, None), "avg_acc": (94.06, None, 95.57)},
    "none": {},
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--metrics", nargs="+", required=True, help="metrics.json of one or more runs, a seed each")
    parser.add_argument("--paper", choices=list(PAPER), default="cifar10", help="the paper's column to set beside")
    parser.add_argument("--out", default=None, help="Markdown file to write as well")
    return parser


def cell(values):
    """'mean ± deviation' of one figure over the runs; '-' where it is not defined."""
    if any(value is None for value in values):
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def table(runs, paper):
    """The Markdown table of a list of metrics.json contents."""
    ours = ["Original", "Deposit", *(f"Withdrawal, {label}" for label in RULES.values())]
    theirs = [f"paper: {name}" for name in ("Original", "Deposit", "Withdrawal")] if paper else []
    lines = ["| | " + " | ".join(ours + theirs) + " |", "|---|" + "---|" * len(ours + theirs)]
    for key, row in ROWS.items():
        cells = [cell([metrics["original"][key] for metrics in runs]), cell([m["target"][key] for m in runs])]
        for rule in RULES:  # F and H Mean speak of forgetting, not of a recover network
            cells.append("-" if key in ("forgetting", "h_mean") else cell([m["recover"][rule][key] for m in runs]))
        cells += ["-" if value is None else f"{value:.2f}" for value in paper.get(key, ())]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args):
    runs = [load_json(path) for path in args.metrics]
    for path, metrics in zip(args.metrics, runs):
        if not {"original", "target", "recover"} <= metrics.keys():
            raise UserError(f"{path} lacks a column of Table 1: run all four stages with a test set")
    text = table(runs, PAPER[args.paper])
    print(text, end="")
    if args.out:
        write_atomically(args.out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    run(main, get_args_parser())
