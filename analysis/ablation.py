"""The ablations of scripts/5_ablation.sh: for each axis a table and a line plot of the figures of T and T~ on held-out
images, mean and standard deviation over seeds."""

import glob
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
from analysis.table1 import above_original, load_variants, markdown, print_table, summaries
from utils.cli import make_parser, run
from utils.errors import UserError

# axis -> (its title, where the default run stands on it, from the settings in that run's log)
AXES = {
    "losses": ("loss terms", lambda settings: "default"),
    "split": ("split after block n", lambda settings: settings["split_at"]),
    "pruning": ("pruning ratio", lambda settings: settings["prune_ratio"]),
    "temperature": ("temperature", lambda settings: settings["temperature"]),
    "classes": ("deposit classes, % of all", lambda settings: 30),  # partition_data.py's default, and the paper's
    "images": ("images a class of D_r", lambda settings: settings["images_per_class"] or "all"),
    "epochs": ("deposit epochs", lambda settings: settings["epochs"]),
}
FIGURES = {
    "T: Pre": lambda m: m["target"]["pre_acc"],
    "T: Dep": lambda m: m["target"]["dep_acc"],
    "T: H Mean": lambda m: m["target"]["h_mean"],
    "T~: Avg - Original": lambda m: above_original(m, m["merge"]),
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", default=os.path.join("checkpoints", "ablation_resnet18"),
                        help="folder of the runs: default/seed<k> and <axis>/<value>/seed<k>, each with "
                             "metrics_val.json and deposit_log.jsonl")
    parser.add_argument("--out", default=os.path.join("checkpoints", "ablation_resnet18"),
                        help="folder that gets ablation.md and, for each axis that was run, <axis>.png and <axis>.pdf")
    return parser


def run_patterns(axis):
    """Where the runs of an axis lie in the folder of the ablations: the default's, and its own."""
    return "default/seed*/metrics_val.json", f"{axis}/*/seed*/metrics_val.json"


def ablation_columns(axis, paths):
    """{figure: {value: summary}} along an axis, from the metrics files of its runs and the default's."""
    variants = load_variants(paths)
    log = next(path for path in paths if path.split(os.sep)[-3] == "default")
    with open(os.path.join(os.path.dirname(log), "deposit_log.jsonl"), encoding="utf-8") as file:
        stands = AXES[axis][1](json.loads(file.readline())["settings"])
    variants[f"{stands:g}" if isinstance(stands, (int, float)) else stands] = variants.pop("default")
    return summaries({value: variants[value] for value in sorted(variants, key=_order)}, FIGURES)


def _order(value):
    """Numbers in their order, then words."""
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def draw(axis, columns, path):
    """A panel a figure, the axis' values evenly spaced; bars are a standard deviation over seeds."""
    figure, panels = plt.subplots(1, len(columns), figsize=(4 * len(columns), 3.4), layout="constrained")
    for panel, (name, values) in zip(panels, columns.items()):
        known = {value: figure for value, figure in values.items() if figure is not None}
        panel.errorbar(list(known), [figure["mean"] for figure in known.values()],
                       [figure["deviation"] or 0 for figure in known.values()], marker="o", capsize=3,
                       linestyle="none" if axis == "losses" else "-")  # between terms there is nothing
        panel.set(title=name, xlabel=AXES[axis][0])
        panel.tick_params(axis="x", rotation=45 if axis == "losses" else 0)
    for ending in ("png", "pdf"):
        figure.savefig(f"{path}.{ending}", dpi=150)
    plt.close(figure)


def main(args):
    parts = []
    for axis, (title, _) in AXES.items():
        default, own = (sorted(glob.glob(os.path.join(args.runs, pattern))) for pattern in run_patterns(axis))
        if default and own:
            columns = ablation_columns(axis, default + own)
            os.makedirs(args.out, exist_ok=True)
            draw(axis, columns, os.path.join(args.out, axis))
            parts.append(markdown(columns, corner=title))
    if not parts:
        raise UserError(f"{args.runs} holds no finished runs of the default and of an axis: run scripts/5_ablation.sh")
    print_table("\n".join(parts), os.path.join(args.out, "ablation.md"))


if __name__ == "__main__":
    run(main, get_args_parser())
