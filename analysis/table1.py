"""Table 1 as Markdown: mean and standard deviation over runs (a metrics.json each), the paper's values beside them."""

import os

from utils.cli import make_parser, path, run
from utils.errors import UserError
from utils.files import load_json
from utils.metrics import metrics_path
from utils.tables import COLUMNS, markdown, print_table, table1_rows

# Ye et al., ECCV 2022, Table 1. Their Withdrawal is by `released`, the rule of their evaluation.
PAPER = {
    "cifar10": {
        "Independent": {"Pre Acc": 92.92, "Dep Acc": 96.61, "Avg Acc": 94.02},
        "Original (T0)": {"Pre Acc": 93.77, "Dep Acc": 94.60, "Avg Acc": 94.06},
        "Deposit (T)": {"Pre Acc": 93.41, "Dep Acc": 15.00, "H Mean": 85.95},
        "Withdrawal": {"Pre Acc": 94.56, "Dep Acc": 97.92, "Avg Acc": 95.57},
    },
    "cub200": {
        "Independent": {"Pre Acc": 48.15, "Dep Acc": 52.73, "Avg Acc": 49.52},
        "Original (T0)": {"Pre Acc": 50.33, "Dep Acc": 48.60, "Avg Acc": 49.81},
        "Deposit (T)": {"Pre Acc": 51.64, "Dep Acc": 1.18, "H Mean": 49.44},
        "Withdrawal": {"Pre Acc": 53.21, "Dep Acc": 55.89, "Avg Acc": 54.01},
    },
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--metrics", nargs="+", type=path, required=True,
                        help="metrics.json of one or more runs; a withdrawal that one of them lacks is left out")
    parser.add_argument("--paper", choices=[*PAPER, "none"], default="cifar10", help="the paper's rows to set below")
    parser.add_argument("--out", type=path, default=None, help="Markdown file to write as well")
    return parser


def load_runs(paths):
    """The contents of metrics files. Raises UserError when a figure in one is no number, or one is of the test set and
    one of held-out images."""
    if len({os.path.basename(path) == metrics_path("", "val") for path in paths}) > 1:
        raise UserError("the metrics files are of the test set and of held-out images: name those of one alone")
    runs = [load_json(path) for path in paths]
    for path, metrics in zip(paths, runs):
        try:
            columns = [*metrics.get("recover", {}).values(),
                       *(metrics[name] for name in ("independent", "original", "target", "student") if name in metrics)]
            if not columns or not all(isinstance(column.get(key), (int, float, type(None)))
                                      for column in columns for key in COLUMNS):
                raise TypeError
        except (TypeError, AttributeError):
            raise UserError(f"{path} holds no figures, or a damaged one: run the stages again, where there are images "
                            f"to measure on") from None
    return runs


def of_common_draws(variants):
    """{name: metrics files <...>/seed<k>/<file>} over the draws that all names have: means over others would tell of
    the draws. Raises UserError where there is none, or where two files of a name are of one draw."""
    draws = {name: {path.split(os.sep)[-2]: path for path in paths} for name, paths in variants.items()}
    for name, paths in variants.items():
        if len(draws[name]) < len(paths):
            raise UserError(f"{name}: two of {', '.join(paths)} are of one draw: name one of each")
    common = sorted(set.intersection(*map(set, draws.values()))) if draws else []
    if draws and not common:
        raise UserError(f"{', '.join(draws)} have no draw in common: run them on the same seeds")
    return {name: [of_name[draw] for draw in common] for name, of_name in draws.items()}


def paper_rows(name):
    """The rows of the paper's Table 1 for a data set."""
    return {f"paper: {network}": {column: f"{values[column]:.2f}" if column in values else "-"
                                  for column in COLUMNS.values()} for network, values in PAPER.get(name, {}).items()}


def main(args):
    print_table(markdown({**table1_rows(load_runs(args.metrics)), **paper_rows(args.paper)}), args.out)


if __name__ == "__main__":
    run(main, get_args_parser())
