"""The bank of deposits: every state of it, measured from the files of the deposits alone.

A state is the set of deposits that are away, and its network T0 less their differences and the rows of the last layer
that they took. For each state it measures the accuracy on each deposit's classes and on the rest; argmax is over all
classes. Beside it, what the paper's deposit modules T_r give back: the state's logits with each absent class's column
from the T_r of its deposit."""

import itertools
import math
import os
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import nn

from datasets import evaluation_batches, load_images
from models.architectures import split_network
from models.bank import read_difference
from models.checkpoints import network_of, read, read_deposit, require_original
from models.difference import shifted
from models.losses import MASKED
from utils.cli import add_running_args, bounded, make_parser, path, prefix, run
from utils.errors import UserError
from utils.files import save_json
from utils.metrics import evaluate, percent
from utils.runtime import Runtime
from utils.tables import markdown, print_table, printable, summary


PLOTTED = 300  # states at most in a picture, a row each: more are no picture that anybody reads


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--original", type=path, required=True, help="T0, from which each deposit was made")
    parser.add_argument("--deposits", type=path, nargs="+", required=True,
                        help="folders of the deposits: target.pt, difference.pt and deposit.pt each")
    parser.add_argument("--away", type=bounded(int, 1), default=None,
                        help="measure states of at most so many deposits away; unset: all of them")
    parser.add_argument("--states", type=bounded(int, 1), default=None,
                        help="measure so many states, drawn by --seed, beside the one of T0; unset: every one")
    parser.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    parser.add_argument("--eval_split", choices=["test", "val"], default="test", help="images to measure on")
    parser.add_argument("--out", type=prefix, default=os.path.join("checkpoints", "bank", "bank"),
                        help=f"files without their ending: gets .json, .md and, of at most {PLOTTED} states, .png")
    add_running_args(parser, seed="seed of the states that --states draws", precision=False)
    return parser


def states_of(sizes, num_classes, most, wanted, seed):
    """The states to measure, as tuples of the deposits that are away, () first. sizes: the number of classes of each
    deposit; a state without a class left is none. Raises UserError where they are too many to draw from."""
    count = len(sizes)
    most = min(most or count, count)
    if sum(math.comb(count, size) for size in range(most + 1)) > 2**20:
        raise UserError(f"{count} deposits have too many states to draw from: lower --away (AWAY of script 8)")
    states = [state for size in range(most + 1) for state in itertools.combinations(range(count), size)
              if sum(sizes[deposit] for deposit in state) < num_classes]
    if wanted is not None and wanted < len(states) - 1:
        order = torch.randperm(len(states) - 1, generator=torch.Generator().manual_seed(seed)) + 1
        states = [(), *(states[i] for i in sorted(order[:wanted].tolist()))]
    return states


class Deposit(NamedTuple):
    """One deposit of the bank."""

    classes: list
    cleared: list  # of its classes, those whose rows of the last layer it took from T
    difference: dict  # {name: Δ} of the lower part
    module: nn.Module  # T_r


def read_deposits(folders, network, original, original_path, runtime):
    """([Deposit], their split_at) of the folders; original: content of T0's file, network: T0. Raises UserError for
    deposits of another T0, of several cuts, or of one class twice."""
    deposits, split_at = [], None
    for folder in folders:
        target_path = os.path.join(folder, "target.pt")
        content, partition = read(target_path, "target")
        require_original(content, target_path, original, original_path)
        if split_at not in (None, content["split_at"]):
            raise UserError(f"{folder} is cut after another block than {folders[0]}: name deposits of one bank")
        split_at = content["split_at"]
        lower, _ = split_network(network, split_at)
        name, difference, rows = read_difference(os.path.join(folder, "difference.pt"), target_path, content,
                                                 content["away"], lower)
        own = content["away"][name]
        if any(not set(own).isdisjoint(other.classes) for other in deposits):
            raise UserError(f"{folder} deposits a class that another folder deposits too: name each class once")
        module = read_deposit(os.path.join(folder, "deposit.pt"), target_path, content, partition)
        deposits.append(Deposit(own, [] if rows is None else own, difference, runtime.place(module)))
    return deposits, split_at


def deposit_columns(deposits, upper, x, num_classes):
    """g-bar(upper(T_r(x))) of every deposit in one tensor (b, num_classes); zeros for classes of none."""
    columns = torch.zeros(len(x), num_classes, device=x.device)
    for deposit in deposits:
        columns[:, deposit.classes] = upper(deposit.module(x))[:, deposit.classes]
    return columns


def measure(network, deposits, states, data, split_at):
    """[{"away", "counts", "deposits": accuracy of each, "rest", "by_modules": accuracy with what is away withdrawn by
    T_r}] of the states. Leaves the network in the last state."""
    lower, upper = split_network(network, split_at)
    num_classes = network[-1].fc.out_features
    changed = {name.split(".")[0] for deposit in deposits for name, d in deposit.difference.items() if d.any()}
    first = next((i for i, (name, _) in enumerate(lower.named_children()) if name in changed), len(lower))
    with torch.no_grad():  # what is the same in every state
        data = [((lower[:first](x), deposit_columns(deposits, upper, x, num_classes)), y) for x, y in data]
    lower = lower[first:]
    whole = {name: tensor.clone() for name, tensor in lower.state_dict().items()}
    figures = []
    for state in states:
        now, away = whole, [deposits[i] for i in state]
        for deposit in away:
            now = shifted(now, deposit.difference, -1)
        lower.load_state_dict(now)
        gone = [c for deposit in away for c in deposit.classes]
        masked = [c for deposit in away for c in deposit.cleared]

        def forward(x, y):
            z = upper(lower(x[0]))
            z[:, masked] = MASKED
            withdrawn = z.clone()
            withdrawn[:, gone] = x[1][:, gone]
            return {"state": z, "withdrawn": withdrawn}

        found = evaluate(forward, data, num_classes)
        counts = found["state"]
        figures.append({"away": list(state), "counts": counts,
                        "deposits": [percent(counts, deposit.classes) for deposit in deposits],
                        "rest": percent(counts, [c for c in range(num_classes) if c not in gone]),
                        "by_modules": percent(found["withdrawn"])})
    return figures


def bank_rows(runs):
    """{number of deposits away, then "any": {figure: summary or text}} over the states of several banks. The rest, all
    classes that are not away, is compared with the same classes of T0 in the same bank."""
    cells = {}
    for run in runs:
        original = run["states"][0]["counts"]
        for state in run["states"]:
            gone = {c for deposit in state["away"] for c in run["classes"][deposit]}
            rest = [c for c in range(len(original["total"])) if c not in gone]
            away = [state["deposits"][deposit] for deposit in state["away"]]
            if away:
                cells.setdefault(len(away), []).append((away, state["rest"] - percent(original, rest)))
    rows, cells = {}, dict(sorted(cells.items()))
    for size, states in [*cells.items(), ("any", sum(cells.values(), []))]:
        away = [accuracy for of_state, _ in states for accuracy in of_state]
        rest = [change for _, change in states]
        rows[f"{size}"] = {"states": f"{len(states)}", "away: mean": summary(away),
                           "away: worst": f"{max(away):.2f}", "rest - T0: mean": summary(rest),
                           "rest - T0: worst": f"{min(rest):+.2f}"}
    return rows


def module_rows(banks):
    """{number of deposits away: {bank: summary of Avg(T~) - Avg(T0)}} of withdrawals by the deposit modules, for banks
    {name: runs}."""
    rows = {}
    for name, runs in banks.items():
        for run in runs:
            for state in run["states"][1:]:
                change = state["by_modules"] - run["states"][0]["by_modules"]
                rows.setdefault(len(state["away"]), {}).setdefault(name, []).append(change)
    return {f"{size}": {name: summary(rows[size].get(name)) for name in banks} for size in sorted(rows)}


def plot(figures, names, out):
    """Rows: states; columns: accuracy on each deposit's classes and on the rest."""
    values = [[*state["deposits"], state["rest"]] for state in figures]
    height = max(2.5, 0.24 * len(figures) + 1.2)
    figure, axes = plt.subplots(figsize=(1.1 * len(names) + 3, height), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
                      color="black" if value > 60 else "white")
    axes.set_xticks(range(len(names) + 1), [*names, "the rest"], rotation=30, ha="right", parse_math=False)
    labels = [", ".join(names[deposit] for deposit in state["away"]) or "none" for state in figures]
    axes.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    axes.set(ylabel="deposits away", title="accuracy (%)")
    figure.colorbar(image, shrink=0.6)
    figure.savefig(f"{out}.png", dpi=120)
    plt.close(figure)


def main(args):
    runtime = Runtime.of(args)
    original, partition = read(args.original, "original")
    network = runtime.place(network_of(original, partition, args.original))
    deposits, split_at = read_deposits(args.deposits, network, original, args.original, runtime)
    classes = [deposit.classes for deposit in deposits]
    names = ["+".join(printable(partition.class_names[c]) for c in own) for own in classes]
    images = load_images(partition, args.data_dir, args.eval_split, partition.classes("all")).to(runtime.device)
    data = evaluation_batches(images)
    states = states_of([len(own) for own in classes], partition.num_classes, args.away, args.states, args.seed)
    figures = measure(network, deposits, states, data, split_at)
    result = {**runtime.describe(), "split": args.eval_split, "names": names, "classes": classes, "states": figures}
    save_json(f"{args.out}.json", result)
    print_table(markdown(bank_rows([result]), "deposits away"), f"{args.out}.md")
    if len(figures) <= PLOTTED:
        plot(figures, names, args.out)


if __name__ == "__main__":
    run(main, get_args_parser())
