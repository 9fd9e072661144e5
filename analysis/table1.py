"""Table 1 as Markdown: mean and standard deviation over runs (a metrics.json each), the paper's values beside them."""

import os
import statistics
import sys
from types import NoneType

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
from models import MERGE_RULES
from utils.checkpoint import load_json, write_atomically
from utils.cli import make_parser, run
from utils.errors import UserError
from utils.metrics import TABLE1_ROWS

# the rules that a table shows where metrics.json has them, by the names that it gives them
RULES = {rule: rule for rule in MERGE_RULES} | {"branch": "z_Tr alone", "released": "released (reads label)"}

# Ye et al., ECCV 2022, Table 1
PAPER = {
    "cifar10": {
        "Independent": {"Pre Acc": 92.92, "Dep Acc": 96.61, "Avg Acc": 94.02},
        "Original": {"Pre Acc": 93.77, "Dep Acc": 94.60, "F": 0.0, "H Mean": 0.0, "Avg Acc": 94.06},
        "Deposit": {"Pre Acc": 93.41, "Dep Acc": 15.00, "F": 79.60, "H Mean": 85.95},
        "Withdrawal": {"Pre Acc": 94.56, "Dep Acc": 97.92, "Avg Acc": 95.57},
    },
    "cub200": {
        "Independent": {"Pre Acc": 48.15, "Dep Acc": 52.73, "Avg Acc": 49.52},
        "Original": {"Pre Acc": 50.33, "Dep Acc": 48.60, "F": 0.0, "H Mean": 0.0, "Avg Acc": 49.81},
        "Deposit": {"Pre Acc": 51.64, "Dep Acc": 1.18, "F": 47.42, "H Mean": 49.44},
        "Withdrawal": {"Pre Acc": 53.21, "Dep Acc": 55.89, "Avg Acc": 54.01},
    },
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--metrics", nargs="+", required=True, help="metrics.json of one or more runs, a seed each")
    parser.add_argument("--paper", choices=[*PAPER, "none"], default="cifar10",
                        help="the paper's columns to set beside")
    parser.add_argument("--out", default=None, help="Markdown file to write as well")
    return parser


def load_runs(paths, networks=("original", "target", "recover")):
    """The contents of metrics files. Raises UserError when one lacks the figures of one of the networks."""
    runs = [load_json(path) for path in paths]
    for path, metrics in zip(paths, runs):
        missing = [name for name in networks if name not in metrics]
        if missing:
            raise UserError(f"{path} lacks a column of the table ({missing[0]}): run every stage, where there are "
                            f"images to measure on")
        for name in (*networks, *({"independent"} & metrics.keys())):
            rows = [key for key in TABLE1_ROWS if name != "student" or key.endswith("_acc")]
            try:
                columns = metrics[name].values() if name == "recover" else [metrics[name]]
                if not all(isinstance(column[key], (int, float, NoneType)) for column in columns for key in rows):
                    raise TypeError
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"{path} is damaged (a figure of {name} is missing or no number): "
                                f"run the stages again") from None
    return runs


def load_variants(paths, networks=("original", "target", "recover")):
    """{variant: contents of its runs} of a study's metrics files <variant>/seed<k>/<file>; see load_runs."""
    variants = {}
    for path in paths:
        variants.setdefault(path.split(os.sep)[-3], []).append(path)
    return {name: load_runs(of_variant, networks) for name, of_variant in variants.items()}


def summary(values):
    """{"mean", "deviation", "n"} of one figure over runs (deviation None for one run); None where it is not defined."""
    if not values or any(value is None for value in values):
        return None
    return {"mean": round(statistics.fmean(values), 4), "n": len(values),
            "deviation": round(statistics.stdev(values), 4) if len(values) > 1 else None}


def summaries(variants, figures):
    """{column: {variant: summary}} of {variant: contents of its runs} and {column: contents -> figure}."""
    return {column: {name: summary([figure(metrics) for metrics in runs]) for name, runs in variants.items()}
            for column, figure in figures.items()}


def shown(figure):
    """'mean ± deviation' of a summary; '-' of None."""
    if figure is None:
        return "-"
    return f"{figure['mean']:.2f}" + ("" if figure["deviation"] is None else f" ± {figure['deviation']:.2f}")


def measured_rules(runs):
    """The rules that every run has measured, in the order of RULES."""
    return [rule for rule in RULES if all(rule in metrics["recover"] for metrics in runs)]


def difference(a, b):
    """a - b; None if one is unknown."""
    return None if None in (a, b) else a - b


def above_original(metrics, rule):
    """By how much Avg Acc of a recover network differs from that of the same run's original; None if one is unknown."""
    return difference(metrics["recover"][rule]["avg_acc"], metrics["original"]["avg_acc"])


def table1_columns(paths):
    """{column: {row: summary}} of Table 1, over metrics files, with a row of `above_original`."""
    runs = load_runs(paths)
    columns = {"Independent": [m["independent"] for m in runs]} if all("independent" in m for m in runs) else {}
    columns.update({"Original": [m["original"] for m in runs], "Deposit": [m["target"] for m in runs]})
    for rule in measured_rules(runs):  # F and H Mean speak of forgetting, not of a recover network
        columns[f"Withdrawal, {RULES[rule]}"] = [
            {**m["recover"][rule], "forgetting": None, "h_mean": None,
             "difference": above_original(m, rule)} for m in runs]
    rows = {**TABLE1_ROWS, "difference": "Avg - Original"}
    return {name: {row: summary([figures.get(key) for figures in column]) for key, row in rows.items()}
            for name, column in columns.items()}


def markdown(columns, paper=None, corner=""):
    """A Markdown table of {column: {row: summary}} and of the paper's {column: {row: value}}."""
    paper = paper or {}
    names = [*columns, *(f"paper: {name}" for name in paper)]
    lines = ["| " + " | ".join([corner, *names]).lstrip() + " |", "|---|" + "---|" * len(names)]
    for row in dict.fromkeys(row for column in (columns or paper).values() for row in column):
        cells = [shown(column[row]) for column in columns.values()]
        cells += [f"{column[row]:.2f}" if row in column else "-" for column in paper.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def print_table(text, out):
    """Print Markdown and, unless `out` is None, write it there as well."""
    print(text, end="")
    if out:
        write_atomically(out, lambda file: file.write(text.encode()))


def main(args):
    print_table(markdown(table1_columns(args.metrics), PAPER.get(args.paper)), args.out)


if __name__ == "__main__":
    run(main, get_args_parser())
