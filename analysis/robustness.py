"""What may speak for a deposit module: T goes on being trained on preserved images, as a network in use does, and is
then withdrawn by T_r and by the difference, which gives T0 back from the T that it was made with, and no other."""

import copy
import os

import torch

from analysis.residual import require_settings, tune
from datasets import evaluation_batches, load_images
from models.architectures import join_network, split_network
from models.difference import between, shifted
from utils.cli import add_running_args, bounded, make_parser, path, run
from utils.errors import UserError
from utils.files import load_json, save_json
from utils.metrics import table1
from utils.runtime import Runtime
from utils.tables import COLUMNS, WITHDRAWALS, markdown, print_table, summary
from withdraw import load_parts, measure

LABELS = {"target": "T", **{rule: f"T~, {label}" for rule, label in WITHDRAWALS.items()}}
PAIRS = {"difference": "target", "upper": "target_upper"}  # a part of T~, and T's, to which its difference is added


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=path, nargs="+", required=True,
                        help="folders of finished deposits, a draw each; each gets robustness.json")
    parser.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    parser.add_argument("--steps", type=bounded(int, 0), nargs="+", default=[0, 50, 200, 1000],
                        help="steps of training T, whole, on preserved images, at which it is withdrawn")
    parser.add_argument("--lr", type=bounded(float, 0, above=True), default=0.01, help="their rate, constant")
    parser.add_argument("--out", type=path, default=os.path.join("checkpoints", "robustness.md"), help="table to write")
    add_running_args(parser, seed="draws the images' order and augmentation", precision=False)
    return parser


def withdrawn_after(folder, args, runtime):
    """{steps, as text: {"target" or rule: figures}}: T~ of the T of that step, by the T_r and the difference of step 0.
    They go to robustness.json in the folder, step by step. A step that is there, of the same T, is not measured again.
    Raises UserError where those there are of another rate or seed."""
    content, partition, modules, _ = load_parts(folder)
    file = os.path.join(folder, "robustness.json")
    identity = {"target": content["checksum"], "lr": args.lr, "seed": args.seed}
    before = load_json(file) if os.path.exists(file) else {}
    kept = before["steps"] if before.get("target") == identity["target"] else {}
    if kept:
        require_settings(before, file, identity)
    missing = [step for step in args.steps if str(step) not in kept]
    if not missing:
        return kept
    if "difference" not in modules:
        raise UserError(f"{folder} has no difference.pt: name folders of whole deposits")
    runtime.place(modules)
    preserved, test = (load_images(partition, args.data_dir, split, partition.classes(subset)).to(runtime.device)
                       for split, subset in (("train", "preservation"), ("test", "all")))
    differences = {whole: between(modules[whole].state_dict(), modules[of_t].state_dict())
                   for whole, of_t in PAIRS.items()}
    target = join_network(modules["target"], modules["target_upper"])
    for step, student in tune(target, preserved, max(missing), args.lr, runtime, 0, 128, bn_updated=True):
        if step in missing:
            parts = torch.nn.ModuleDict({"deposit": modules["deposit"]})
            parts["target"], parts["target_upper"] = split_network(student, len(modules["target"]) - 1)
            for whole, of_t in PAIRS.items():
                parts[whole] = copy.deepcopy(parts[of_t])
                parts[whole].load_state_dict(shifted(parts[of_t].state_dict(), differences[whole], 1))
            counts = measure(parts, evaluation_batches(test), partition, runtime.device)
            kept[str(step)] = {name: table1(of_rule, partition) for name, of_rule in counts.items()}
            kept = dict(sorted(kept.items(), key=lambda item: int(item[0])))
            save_json(file, {**runtime.describe(), **identity, "steps": kept})
    return kept


def average_rows(runs):
    """{T or rule: {steps: summary of Avg Acc}} of the contents of robustness.json files, at the steps that all have;
    T's Dep Acc in front."""
    rows = {"T: Dep Acc": ("target", "dep_acc"), **{label: (rule, "avg_acc") for rule, label in LABELS.items()}}
    common = [step for step in runs[0]["steps"] if all(step in run["steps"] for run in runs)]
    return {label: {f"{step} steps": summary([run["steps"][step][rule][key] for run in runs]) for step in common}
            for label, (rule, key) in rows.items()}


def main(args):
    runtime, rows = Runtime.of(args), {}
    runs = [withdrawn_after(folder, args, runtime) for folder in args.runs]
    for rule, label in LABELS.items():
        for step in sorted(set(args.steps)):
            rows[f"{label}, {step} steps"] = {COLUMNS[key]: summary([run[str(step)][rule][key] for run in runs])
                                              for key in ("pre_acc", "dep_acc", "avg_acc")}
    print_table(markdown(rows, "withdrawal"), args.out)


if __name__ == "__main__":
    run(main, get_args_parser())
