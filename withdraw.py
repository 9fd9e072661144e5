"""Stage 4, withdraw: from the target network T and what the deposit put aside alone, build the recover network T~,
which knows all classes again. The network is built without any image and without a gradient step; images, the test
set's or those held out, only measure it."""

import copy
import os

import torch

from datasets import evaluation_batches, load_if_there, load_images
from models.architectures import before_last_layer, join_network
from models.bank import classes_of, give_back
from models.checkpoints import cut, describe, read, read_deposit
from models.recover import MERGE_RULES, RecoverNetwork, released
from utils.checkpoint import save_checkpoint
from utils.cli import add_running_args, make_parser, path, run
from utils.errors import UserError
from utils.metrics import (evaluate, metrics_path, percent, read_metrics, record_network, refuse_other_figures, table1,
                           write_metrics)
from utils.runtime import Runtime
from utils.tables import markdown, print_table, table1_rows


def get_args_parser():
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", type=path, default=os.path.join("checkpoints", "lirf"),
                       help="folder of the run: gets recover.pt and metrics.json")
    files.add_argument("--target", type=path, default=None,
                       help="T, of train_deposit.py, or a recover.pt from which deposits are still away; unset: "
                            "target.pt in --save_path")
    files.add_argument("--deposit", type=path, nargs="+", default=None,
                       help="folders of the deposits to withdraw, in any order, with the difference.pt or deposit.pt "
                            "of each; several are withdrawn by --merge difference; unset: --save_path")
    files.add_argument("--data_dir", type=path, default=None,
                       help="folder whose test set measures the networks; unset: data, if the test set is there")
    files.add_argument("--eval_split", choices=["test", "val"], default="test",
                       help="val: measure on the training images that the partition holds out, to choose settings; "
                            "goes to metrics_val.json")
    merge = parser.add_argument_group("recover network T~")
    merge.add_argument("--merge", choices=[*MERGE_RULES, "difference"], default="concat",
                       help="how recover.pt is made of T and of deposit.pt. concat: the paper's g(z_T) + g-bar(z_Tr); "
                            "sum: z_T + z_Tr; tr_alone: z_Tr, a control. difference: T0's lower part given back by "
                            "difference.pt, a plain network. Whatever the files that are there allow is measured")
    add_running_args(parser, seed=None, precision=False)
    return parser


def load_parts(save_path, target_path=None, folders=None, merge="concat"):
    """T and the deposits to withdraw, as --target, --deposit and --merge name them: (content of target.pt, its
    Partition, {name: module}, deposits that stay away).

    The modules are target and target_upper (T's parts), upper (that of T~), difference (T's lower part with the
    differences given back) and, of a single deposit, deposit (T_r). Only the file that --merge needs must be there.
    Raises UserError where files do not belong together.
    """
    target_path, folders = target_path or os.path.join(save_path, "target.pt"), folders or [save_path]
    content, partition = read(target_path, ("target", "recover"))
    target, target_upper = cut(content, partition, target_path)
    upper = copy.deepcopy(target_upper)
    away, alone = dict(content["away"]), len(folders) == len(content["away"]) == 1
    if merge != "difference" and not alone:
        raise UserError(f"--merge {merge} withdraws the only deposit that is away from T: use --merge difference "
                        f"where there are several")
    modules = torch.nn.ModuleDict({"target": target, "target_upper": target_upper, "upper": upper})
    differences = [os.path.join(folder, "difference.pt") for folder in folders]
    if merge == "difference" or os.path.exists(differences[0]):
        modules["difference"] = copy.deepcopy(target)
        for difference in differences:
            give_back(difference, target_path, content, away, modules["difference"], upper)
    else:
        away = {}
    deposit_path = os.path.join(folders[0], "deposit.pt")
    # T_r is of this very target: not when others were withdrawn before.
    if merge != "difference" or alone and content["kind"] == "target" and os.path.exists(deposit_path):
        modules["deposit"] = read_deposit(deposit_path, target_path, content, partition, upper)
    return content, partition, modules.requires_grad_(False).eval(), away


def recover_network(modules, partition, merge):
    """T~ by a rule of --merge: of two branches, or by the difference the plain network upper(lower_T + Δ)."""
    if merge == "difference":
        return join_network(modules["difference"], modules["upper"])
    return RecoverNetwork(modules["target"], modules["deposit"], modules["upper"], partition.deposit_classes, merge)


def measure(modules, data, partition, device):
    """{name: counts} of T, of T~ by the difference and of every rule that merges T_r with T, for those of `modules`
    that are there, in one pass over (x, y) batches."""
    deposited, upper = torch.tensor(partition.deposit_classes, device=device), modules["upper"]
    before_last = before_last_layer(modules["target_upper"])  # T~'s upper part differs in the last layer alone

    def forward(x, y):
        h_t = before_last(modules["target"](x))
        outputs = {"target": modules["target_upper"][-1].fc(h_t)}
        if "difference" in modules:
            outputs["difference"] = upper(modules["difference"](x))
        if "deposit" in modules:
            z_t, z_r = upper[-1].fc(h_t), upper(modules["deposit"](x))
            outputs |= {name: rule(z_t, z_r, deposited) for name, rule in MERGE_RULES.items()}
            outputs["released"] = released(z_t, z_r, deposited, y)
        return outputs

    return evaluate(forward, data, partition.num_classes)


def main(args):
    runtime = Runtime.of(args)
    content, partition, modules, away = load_parts(args.save_path, args.target, args.deposit, args.merge)
    out = os.path.join(args.save_path, "recover.pt")
    if os.path.exists(out):
        before, _ = read(out, "recover")
        if (before["target"], before["away"]) != (content["checksum"], away):
            raise UserError(f"{out} is the recover network of another target, or of other deposits: choose another "
                            f"--save_path, or remove it")
    refuse_other_figures(args.save_path, content["counts"], partition)
    if args.data_dir is not None or args.eval_split == "val":
        images = load_images(partition, args.data_dir or "data", args.eval_split, partition.classes("all"))
    else:
        images = load_if_there(partition, "data", "test", "not measured")

    network = recover_network(modules, partition, args.merge)
    left = partition.with_deposit(sorted(classes_of(away)) or partition.deposit_classes)
    save_checkpoint(out, "recover", network.state_dict(),
                    **describe(content["arch"], partition.classes("all"), left), split_at=content["split_at"],
                    merge=args.merge, target=content["checksum"], away=away,
                    original=content["original"], counts=content["counts"])
    print(f"wrote {out} (merge {args.merge})")
    if images is None:
        return

    data = evaluation_batches(images.to(runtime.device))
    counts = measure(runtime.place(modules), data, partition, runtime.device)
    original = content["counts"]
    deposits = {", ".join(partition.class_names[c] for c in classes): classes
                for classes in content["away"].values()}
    columns = {name: {**table1(c, partition, original[args.eval_split]), "counts": c,
                      "deposits": {names: percent(c, classes) for names, classes in deposits.items()}}
               for name, c in counts.items()}
    target = columns.pop("target")
    if "released" in columns:
        columns["released"]["reads_label"] = True
    record_network(args.save_path, partition, "original", original)
    metrics = metrics_path(args.save_path, args.eval_split)
    write_metrics(metrics, partition, target=target, recover=columns, merge=args.merge)
    print_table(markdown(table1_rows([read_metrics(metrics, partition)])))


if __name__ == "__main__":
    run(main, get_args_parser())
