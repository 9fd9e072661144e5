"""Stage 4, withdraw: from the target network T and what the deposit put aside alone, build the recover network T~, which
knows all classes again. The network is built without any image and without a gradient step; images, the test set's or
those held out, only measure it."""

import copy
import os
from collections import OrderedDict

import torch

from datasets import evaluation_batches, load_if_there, load_images
from models.checkpoints import cut, describe, read, read_deposit, read_difference
from models.recover import MERGE_RULES, RecoverNetwork, released
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import add_running_args, make_parser, path, run
from utils.errors import UserError
from utils.metrics import evaluate, metrics_path, read_metrics, table1, write_metrics
from utils.runtime import Runtime
from utils.tables import markdown, table1_rows


def get_args_parser():
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", type=path, default=os.path.join("checkpoints", "lirf"),
                       help="folder of the run: gets recover.pt and metrics.json")
    for name, what in (("target", "T"), ("deposit", "T_r"), ("difference", "lower_0 - lower_T")):
        files.add_argument(f"--{name}", type=path, default=None,
                           help=f"{what}, of train_deposit.py; unset: {name}.pt in --save_path")
    files.add_argument("--data_dir", type=path, default=None,
                       help="folder whose test set measures the networks; unset: data, if the test set is there")
    files.add_argument("--eval_split", choices=["test", "val"], default="test",
                       help="val: measure on the training images that the partition holds out, to choose settings; "
                            "goes to metrics_val.json")
    merge = parser.add_argument_group("recover network T~")
    merge.add_argument("--merge", choices=[*MERGE_RULES, "difference"], default="concat",
                       help="how recover.pt is made of T and of deposit.pt. concat: the paper's g(z_T) + g-bar(z_Tr); "
                            "calibrated: T's columns times deposit.pt's s, averaged over both branches; sum: "
                            "z_T + z_Tr; tr_alone: z_Tr, a control. difference: T0's lower part given back by "
                            "difference.pt, a plain network. All are always measured")
    add_running_args(parser, seed="takes part in nothing here, as nothing is drawn")
    return parser


def load_parts(args):
    """The files of one deposit, checked to belong together: (content of target.pt, its Partition, {name: module}) with
    the modules target, upper, deposit and difference (T0's lower part, given back), and s."""
    paths = {name: getattr(args, name) or os.path.join(args.save_path, f"{name}.pt")
             for name in ("target", "deposit", "difference")}
    content, partition = read(paths["target"], "target")
    target, upper = cut(content, partition, paths["target"])
    deposit, scale = read_deposit(paths["deposit"], paths["target"], content, partition)
    original = copy.deepcopy(target)
    original.load_state_dict(read_difference(paths["difference"], paths["target"], content, target))
    modules = torch.nn.ModuleDict({"target": target, "upper": upper, "deposit": deposit, "difference": original})
    for name, tensor in modules.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{paths['target']} or what belongs to it holds weights that are not finite ({name}): "
                            f"train them again")
    return content, partition, modules.requires_grad_(False).eval(), scale


def recover_network(modules, partition, merge, scale):
    """T~ by a rule of --merge: of two branches, or by the difference the plain network upper(lower_T + D)."""
    if merge == "difference":
        return torch.nn.Sequential(OrderedDict([*modules["difference"].named_children(),
                                                *modules["upper"].named_children()]))
    return RecoverNetwork(modules["target"], modules["deposit"], modules["upper"], partition.preserved_classes,
                          partition.deposit_classes, merge, scale)


def measure(modules, scale, data, partition, device):
    """{name: counts} of the target network and of every way to withdraw, in one pass over (x, y) batches."""
    preserved, deposited = (torch.tensor(partition.classes(subset), device=device)
                            for subset in ("preservation", "deposit"))

    def forward(x, y):
        z_t, z_r, z_d = (modules["upper"](modules[name](x)) for name in ("target", "deposit", "difference"))
        outputs = {name: rule(z_t, z_r, preserved, deposited, scale) for name, rule in MERGE_RULES.items()}
        return {"target": z_t, **outputs, "difference": z_d,
                "released": released(z_t, z_r, preserved, deposited, y)}

    return evaluate(forward, data, partition.num_classes)


def main(args):
    runtime = Runtime.of(args)
    content, partition, modules, scale = load_parts(args)
    out = os.path.join(args.save_path, "recover.pt")
    if os.path.exists(out) and load_checkpoint(out, "recover").get("target") != content["checksum"]:
        raise UserError(f"{out} is the recover network of another target: choose another --save_path, or remove it")
    metrics = metrics_path(args.save_path, args.eval_split)
    original = read_metrics(metrics, partition).get("original")
    if args.data_dir is not None or args.eval_split == "val":
        images = load_images(partition, args.data_dir or "data", args.eval_split, partition.classes("all"))
    else:
        images = load_if_there(partition, "data", "test", "not measured")

    network = recover_network(modules, partition, args.merge, scale)
    save_checkpoint(out, "recover", network.state_dict(),
                    **describe(content["arch"], partition.classes("all"), partition), split_at=content["split_at"],
                    merge=args.merge, scale=scale, target=content["checksum"])
    print(f"wrote {out} (merge {args.merge})")
    if images is None:
        return

    data = evaluation_batches(images.to(runtime.device), runtime.device)
    counts = measure(runtime.place(modules), scale, data, partition, runtime.device)
    columns = {name: {**table1(c, partition, original and original["counts"]), "counts": c}
               for name, c in counts.items()}
    target = columns.pop("target")
    columns["released"]["reads_label"] = True
    write_metrics(metrics, partition, target=target, recover=columns, merge=args.merge)
    print(markdown(table1_rows([{"original": original, "target": target, "recover": columns}])), end="")


if __name__ == "__main__":
    run(main, get_args_parser())
