"""What may speak for a deposit module: T goes on being trained on preserved images, as a network in use does, and is
then withdrawn by T_r and by the difference, which fits exactly one T. And what each file tells without T."""

import copy
import os
from collections import OrderedDict
from types import SimpleNamespace

import torch

from analysis.residual import image_sets, linear_probe, tune
from analysis.table1 import print_table
from datasets import evaluation_batches
from models.architectures import build_network, split_network
from utils.cli import add_running_args, bounded, make_parser, path, run
from utils.files import save_json
from utils.metrics import table1
from utils.runtime import Runtime
from utils.tables import COLUMNS, WITHDRAWALS, markdown, summary
from withdraw import load_parts, measure


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=path, nargs="+", required=True,
                        help="folders of finished deposits, a draw each: target.pt, deposit.pt, difference.pt; each "
                             "gets robustness.json")
    parser.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    parser.add_argument("--steps", type=bounded(int, 0), nargs="+", default=[0, 50, 200, 1000],
                        help="steps of training T, whole, on preserved images, at which it is withdrawn")
    parser.add_argument("--lr", type=bounded(float, 0, above=True), default=0.01, help="their rate, constant")
    parser.add_argument("--bn_stats", choices=["frozen", "updated"], default="updated", help="of T meanwhile")
    parser.add_argument("--images_per_class", type=bounded(int, 5), default=1000, help="training images of the probe")
    parser.add_argument("--out", type=path, default=os.path.join("checkpoints", "robustness.md"), help="table to write")
    add_running_args(parser)
    return parser


def withdrawn_after(modules, scale, images, partition, args, runtime):
    """{steps: {"target" or rule: figures}}: T~ of the T of that step, by the T_r and the difference of step 0."""
    preserved = torch.tensor(partition.preserved_classes, device=runtime.device)
    kept = images["all"][torch.isin(images["all"].labels, preserved).nonzero()[:, 0]]
    before, original = (modules[name].state_dict() for name in ("target", "difference"))
    layers = OrderedDict((*modules["target"].named_children(), *modules["upper"].named_children()))
    target, found = torch.nn.Sequential(layers), {}
    for step, student in tune(target, kept, max(args.steps), args.lr, runtime, 0, 128, args.bn_stats == "updated"):
        if step in args.steps:
            lower, upper = split_network(student, len(modules["target"]) - 1)
            given_back = copy.deepcopy(lower)
            given_back.load_state_dict({name: tensor + original[name] - before[name] if tensor.is_floating_point()
                                        else tensor for name, tensor in lower.state_dict().items()})
            parts = {"target": lower, "upper": upper, "deposit": modules["deposit"], "difference": given_back}
            data = evaluation_batches(images["test"], runtime.device)
            found[step] = {name: table1(counts, partition)
                           for name, counts in measure(parts, scale, data, partition, runtime.device).items()}
    return found


def by_batch(lower):
    """The lower part with batch norm by the batch's statistics: a difference taken as weights has none of its own."""
    for module in lower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = module.running_var = None
            module.track_running_stats = False
    return lower.eval()


@torch.no_grad()
def told_alone(modules, arch, images, partition, runtime):
    """{file: {"dep", "pre"}}: a linear probe, at the cut, on what each file computes without T: T_r, the difference
    taken as weights, and beside them a new network, which knows nothing."""
    difference, new = copy.deepcopy(modules["target"]), build_network(arch, partition.num_classes, partition.image_size)
    for name, tensor in difference.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(modules["difference"].state_dict()[name] - tensor)
    new = runtime.place(split_network(new, len(modules["target"]) - 1)[0])
    found = {}
    for name, lower in (("T_r", modules["deposit"]), ("difference", by_batch(difference)), ("new", by_batch(new))):
        parts = []
        for split in ("train", "test"):
            # in the sets' order, class after class, a batch's statistics would tell the class
            order = torch.randperm(len(images[split]), generator=torch.Generator().manual_seed(0)).to(runtime.device)
            pooled = [(torch.nn.functional.adaptive_avg_pool2d(lower(x), 2).flatten(1).cpu(), y.cpu())
                      for x, y in evaluation_batches(images[split][order], runtime.device)]
            parts += [torch.cat(part).numpy() for part in zip(*pooled)]
        found[name] = linear_probe(*parts, partition.deposit_classes)
    return found


def rows_of(runs):
    """{withdrawal, steps: {column: summary}}, and the probes of the files alone."""
    columns = {key: COLUMNS[key] for key in ("pre_acc", "dep_acc", "avg_acc")}
    names = {"target": "T", **{rule: f"T~, {label}" for rule, label in WITHDRAWALS.items()}}
    rows = {f"{label}, {step} steps": {column: summary([run["steps"][step][rule][key] for run in runs])
                                       for key, column in columns.items()}
            for rule, label in names.items() for step in runs[0]["steps"]}
    rows.update({f"probe of {file} alone": {columns[f"{key}_acc"]: summary([run["alone"][file][key] for run in runs])
                                            for key in ("pre", "dep")} for file in runs[0]["alone"]})
    return rows


def main(args):
    runtime, runs = Runtime.of(args), []
    for folder in args.runs:
        files = SimpleNamespace(save_path=folder, target=None, deposit=None, difference=None)
        content, partition, modules, scale = load_parts(files)
        images = image_sets(partition, args, runtime.device)
        runtime.place(modules)
        runs.append({"steps": withdrawn_after(modules, scale, images, partition, args, runtime),
                     "alone": told_alone(modules, content["arch"], images, partition, runtime)})
        save_json(os.path.join(folder, "robustness.json"), {**runtime.describe(), "lr": args.lr,
                                                            "bn_stats": args.bn_stats, **runs[-1]})
    print_table(markdown(rows_of(runs), "withdrawal"), args.out)


if __name__ == "__main__":
    run(main, get_args_parser())
