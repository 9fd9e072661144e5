"""Bar chart of a run's accuracies: Original, Deposit and every merge rule of Withdrawal, from metrics.json."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from utils.cli import make_parser, path, run
from utils.errors import UserError
from utils.files import load_json, write_atomically

BARS = {"pre_acc": "Pre Acc (preserved classes)", "dep_acc": "Dep Acc (deposit classes)", "avg_acc": "Avg Acc (all)"}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--metrics", type=path, default=os.path.join("checkpoints", "lirf", "metrics.json"),
                        help="metrics.json of withdraw.py")
    parser.add_argument("--out", type=path, default=os.path.join("checkpoints", "lirf", "accuracies.png"),
                        help="PNG to write")
    return parser


def main(args):
    metrics = load_json(args.metrics)
    try:
        networks = {"original": metrics.get("original"), "target": metrics["target"],
                    **{f"recover\n{'released (reads label)' if rule == 'released' else rule}": figures
                       for rule, figures in metrics["recover"].items()}}
        networks = {name: [figures[key] for key in BARS] for name, figures in networks.items() if figures}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{args.metrics} lacks figures of the target or recover network: run withdraw.py") from None
    figure, axes = plt.subplots(figsize=(1.5 * len(networks) + 1, 4), layout="constrained")
    for i, label in enumerate(BARS.values()):
        places = [n + 0.27 * (i - 1) for n in range(len(networks))]
        heights = [bars[i] or 0 for bars in networks.values()]
        for bar in axes.bar(places, heights, width=0.25, label=label):
            axes.annotate(f"{bar.get_height():.0f}", (bar.get_x() + bar.get_width() / 2, bar.get_height()),
                          ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 118)
    axes.legend(loc="upper center", ncols=3, frameon=False, fontsize=8)
    write_atomically(args.out, lambda file: figure.savefig(file, format="png", dpi=150))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main, get_args_parser())
