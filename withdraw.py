"""Stage 4, withdraw: from the target network T and the deposit module T_r alone, build the recover network T~, which
knows all classes again. The network is built without any image and without a gradient step; images, the test set's or
those held out, only measure it."""

import os

import torch

from datasets import load_if_there, load_images
from models import MERGE_RULES, RecoverNetwork, split_network
from models.files import calibration_of, deposit_module_of, describe, network_of, read, split_of
from models.recover import released
from utils.checkpoint import checksum, load_checkpoint, save_checkpoint
from utils.cli import add_running_args, make_parser, run
from utils.errors import UserError
from utils.metrics import TABLE1_ROWS, evaluate, metrics_path, read_metrics, table1, write_metrics
from utils.runtime import Runtime


def get_args_parser():
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", default=os.path.join("checkpoints", "lirf"),
                       help="folder of the run: gets recover.pt and metrics.json")
    files.add_argument("--target", default=None, help="T, of train_deposit.py; unset: target.pt in --save_path")
    files.add_argument("--deposit", default=None, help="T_r, of train_deposit.py; unset: deposit.pt in --save_path")
    files.add_argument("--data_dir", default=None,
                       help="folder whose test set measures the networks; unset: data, if the test set is there")
    files.add_argument("--eval_split", choices=["test", "val"], default="test",
                       help="val: measure on the training images that the partition holds out, to choose settings; "
                            "goes to metrics_val.json")
    merge = parser.add_argument_group("recover network T~")
    merge.add_argument("--merge", choices=[*MERGE_RULES, "released"], default="calibrated",
                       help="rule by which T~ joins z_T and z_Tr. concat: the paper's g(z_T) + g-bar(z_Tr); "
                            "scaled: T's columns times deposit.pt's s; calibrated: scaled, and averaged over both "
                            "branches; evidence: calibrated, with T's verdict on which block the image is of; "
                            "sum: z_T + z_Tr; branch: z_Tr alone, a control; released: the authors' evaluation, which "
                            "chooses by the true label and so cannot be built. All are always measured")
    add_running_args(parser)
    return parser


def load_recover_network(target_path, deposit_path, merge):
    """T~ from the two files, after checking that they belong together: (network, partition, target content)."""
    content, partition = read(target_path, "target")
    deposit, deposit_partition = read(deposit_path, "deposit")
    for what, ours, theirs in (("data or deposit classes", partition.hash, deposit_partition.hash),
                               ("architecture", content["arch"], deposit["arch"]),
                               ("split point", content.get("split_at"), deposit.get("split_at"))):
        _require_same(what, ours, theirs, target_path, deposit_path)
    target, upper = split_network(network_of(content, partition, target_path), split_of(content, target_path))
    _require_same("upper part", checksum({"tensors": upper.state_dict()}), deposit.get("upper"), target_path,
                  deposit_path)
    _require_same("deposit run", content["checksum"], deposit.get("target"), target_path, deposit_path)
    network = RecoverNetwork(target, deposit_module_of(deposit, partition, deposit_path), upper,
                             partition.preserved_classes, partition.deposit_classes, merge,
                             calibration_of(deposit, deposit_path))
    return network.eval().requires_grad_(False), partition, content


def _require_same(what, ours, theirs, target_path, deposit_path):
    if ours != theirs:
        raise UserError(f"{target_path} and {deposit_path} do not belong together (another {what}): "
                        f"name the two files of one deposit")


def measure(network, images, partition, runtime):
    """{name: counts} of the target network and of every merge rule, in one pass over the images."""

    def forward(x, y):
        z_t, z_r = (z.float() for z in network.branches(x))
        outputs = {rule: network.merged(z_t, z_r, rule) for rule in MERGE_RULES}
        outputs["released"] = released(z_t, z_r, network.preserved, network.deposited, network.calibration, y)
        return {"target": z_t, **outputs}

    return evaluate(forward, images, partition.num_classes, runtime)


def print_table(original, target, recover, merge):
    """The Table 1 block: Original, Deposit and Withdrawal, a column for each merge rule."""
    columns = {"Original": original or {}, "Deposit": target}
    for rule, figures in recover.items():
        mark = "*" if rule == merge else " (reads label)" if rule == "released" else ""
        # F and H Mean speak of forgetting, not of a recover network
        columns[rule + mark] = {**figures, "forgetting": None, "h_mean": None}
    print(f"{'':9}{'':20}{'Withdrawal':>12}")
    print(f"{'':9}" + "".join(f"{name:>{max(10, len(name) + 2)}}" for name in columns))
    for key, row in TABLE1_ROWS.items():
        values = [figures.get(key) for figures in columns.values()]
        print(f"{row:9}" + "".join(f"{'-' if value is None else format(value, '.2f'):>{max(10, len(name) + 2)}}"
                                   for name, value in zip(columns, values)))
    print("* the rule of recover.pt; released chooses its rule by the true label and is no classifier")


def main(args):
    if args.merge == "released":
        raise UserError("--merge released chooses its rule by the true label, so no network can be built of it; it is "
                        f"measured with every other rule: choose one of {', '.join(MERGE_RULES)}")
    runtime = Runtime(args)
    target_path = args.target or os.path.join(args.save_path, "target.pt")
    deposit_path = args.deposit or os.path.join(args.save_path, "deposit.pt")
    out = os.path.join(args.save_path, "recover.pt")
    network, partition, content = load_recover_network(target_path, deposit_path, args.merge)
    if os.path.exists(out) and load_checkpoint(out, "recover").get("target") != content["checksum"]:
        raise UserError(f"{out} is the recover network of another target: choose another --save_path, or remove it")
    path = metrics_path(args.save_path, args.eval_split)
    original = read_metrics(path, partition).get("original")
    if args.data_dir is not None or args.eval_split == "val":
        images = load_images(partition, args.data_dir or "data", args.eval_split, partition.classes("all"))
    else:
        images = load_if_there(partition, "data", "test", "not measured")

    state = network.state_dict()
    if not all(torch.isfinite(t).all() for t in state.values()):
        raise UserError(f"{target_path} or {deposit_path} holds weights that are not finite: train them again")
    save_checkpoint(out, "recover", state, **describe(content["arch"], partition.classes("all"), partition),
                    split_at=content["split_at"], merge=args.merge, calibration=network.calibration._asdict(),
                    target=content["checksum"])
    print(f"wrote {out} (merge {args.merge}, {network.calibration})")
    if images is None:
        return

    counts = measure(runtime.place(network), images.to(runtime.device), partition, runtime)
    columns = {name: {**table1(c, partition, original and original["counts"]), "counts": c}
               for name, c in counts.items()}
    target = columns.pop("target")
    columns["released"]["reads_label"] = True
    write_metrics(path, partition, target=target, recover=columns, merge=args.merge)
    print_table(original, target, columns, args.merge)


if __name__ == "__main__":
    run(main, get_args_parser())
