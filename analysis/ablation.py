"""The ablations of scripts/5_ablation.sh: one table over all axes, a line plot each axis; mean and standard
deviation over draws of the deposit classes."""

import contextlib
import glob
import os

import matplotlib.pyplot as plt

from analysis.table1 import load_runs, of_common_draws
from utils.cli import make_parser, path, run
from utils.errors import UserError
from utils.files import load_json, read_head
from utils.metrics import metrics_path
from utils.tables import above, markdown, print_table, summary

# axis -> (its title, what says where the default run stands on it: a setting, or what axis_rows adds to these)
AXES = {
    "losses": ("loss terms", "losses"),
    "split": ("cut after block", "split_at"),
    "lr": ("learning rate", "lr"),
    "lambda_kp": ("lambda_kp", "lambda_kp"),
    "lambda_at": ("lambda_at", "lambda_at"),
    "lambda_pt": ("lambda_pt", "lambda_pt"),
    "lambda_re": ("lambda_re", "lambda_re"),
    "random_label": ("random labels", "random_label"),
    "bn_stats": ("batch norm", "bn_stats"),
    "pruning": ("pruning ratio of T_r", "prune_ratio"),
    "bits": ("bits of the difference", "difference_bits"),
    "temperature": ("temperature", "temperature"),
    "classes": ("tenths of the classes deposited", "tenths"),
    "images": ("images a class of D_r", "images_per_class"),
    "epochs": ("epochs over D_r", "epochs"),
}
FIGURES = {
    "T: Pre": lambda m: m["target"]["pre_acc"],
    "T: Dep": lambda m: m["target"]["dep_acc"],
    "T: H Mean": lambda m: m["target"]["h_mean"],
    "Avg - Original, concat": lambda m: above(m, "concat"),
    "Avg - Original, difference": lambda m: above(m, "difference"),
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=path, default=os.path.join("checkpoints", "ablation_resnet20"),
                        help="folder of the runs: default/seed<k> and <axis>/<value>/seed<k>, each with metrics of "
                             "--eval_split and deposit_log.jsonl; gets ablation.md and <axis>.png of each axis")
    parser.add_argument("--eval_split", choices=["test", "val"], default="test", help="images that were measured on")
    return parser


def by_variant(paths):
    """{value: its metrics files} of metrics files <value>/seed<k>/<file>, as of_common_draws gives them."""
    variants = {}
    for path in paths:
        variants.setdefault(path.split(os.sep)[-3], []).append(path)
    return of_common_draws(variants)


def variant_rows(variants, figures=FIGURES):
    """{value: {figure: summary}} of {value: metrics files}."""
    return {value: {name: summary([figure(m) for m in load_runs(paths)]) for name, figure in figures.items()}
            for value, paths in variants.items()}


def axis_rows(axis, variants):
    """{value: {figure: summary}} along an axis, of {value: metrics files <value>/seed<k>/<file>}, the default's too."""
    run = os.path.dirname(variants["default"][0])
    partition = load_json(os.path.join(run, "partition.json"))
    tenths = round(10 * len(partition["deposit_classes"]) / len(partition["class_names"]), 2)
    settings = read_head(os.path.join(run, "deposit_log.jsonl"))["settings"]
    stands = {**settings, "tenths": tenths, "losses": "default"}[AXES[axis][1]]
    if stands is None:  # --images_per_class is not set
        stands = "all"
    default = f"{stands:g}" if isinstance(stands, (int, float)) else stands
    variants = {default if value == "default" else value: paths for value, paths in variants.items()}
    return variant_rows({value: variants[value] for value in sorted(variants, key=_order)})


def _order(value):
    """Numbers in their order, then words."""
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def plot(axis, rows, path):
    """A panel a figure, the axis' values evenly spaced; bars are a standard deviation over draws. The difference gives
    T0 back on every axis: it has no panel."""
    shown = [name for name in FIGURES if name != "Avg - Original, difference"]
    figure, panels = plt.subplots(1, len(shown), figsize=(3 * len(shown), 2.8), layout="constrained")
    for panel, name in zip(panels, shown):
        known = {value: row[name] for value, row in rows.items() if row[name] is not None}
        panel.errorbar(list(known), [f["mean"] for f in known.values()], [f["deviation"] or 0 for f in known.values()],
                       marker="o", capsize=3, linestyle="none" if axis == "losses" else "-")
        panel.set(title=name, xlabel=AXES[axis][0])
        panel.grid(alpha=0.3)
        panel.tick_params(axis="x", rotation=45 if axis == "losses" else 0)
    figure.savefig(f"{path}.png", dpi=120)
    plt.close(figure)


def found_axes(folder, split):
    """{axis: {value: metrics files of finished runs}}, the default's too, of the axes that were run, each over the
    draws that the default and all its values have. Raises UserError when there is none."""
    name, axes = metrics_path("", split), {}
    for axis in AXES:
        paths = [path for value in ("default", os.path.join(axis, "*"))
                 for path in sorted(glob.glob(os.path.join(glob.escape(folder), value, "seed*", name)))
                 if "recover" in load_json(path)]  # else withdraw.py is still to come
        with contextlib.suppress(UserError):  # no draw in common yet
            variants = by_variant(paths)
            if len(variants) > 1 and "default" in variants:
                axes[axis] = variants
    if not axes:
        raise UserError(f"{folder} holds no draw with a finished run of the default and of every value of an axis: run "
                        f"scripts/5_ablation.sh")
    return axes


def overview(folder, split):
    """{axis: {value: row}} of all axes that were run; see found_axes."""
    return {axis: axis_rows(axis, variants) for axis, variants in found_axes(folder, split).items()}


def named(rows_of_axes):
    """One table of all axes: {"axis: value": row}."""
    return {f"{AXES[axis][0]}: {value}": row for axis, rows in rows_of_axes.items() for value, row in rows.items()}


def main(args):
    axes = overview(args.runs, args.eval_split)
    for axis, rows in axes.items():
        plot(axis, rows, os.path.join(args.runs, axis))
    print_table(markdown(named(axes), corner="axis: value"), os.path.join(args.runs, "ablation.md"))


if __name__ == "__main__":
    run(main, get_args_parser())
