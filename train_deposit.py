"""Stage 3, deposit: from T0 and the deposit set D_r alone, train the target network T, which forgets the deposit
classes, and put aside what it forgets: as the paper's deposit module T_r, and as the difference of the weights. No
image of the preservation set is trained on."""

import copy
import dataclasses
import os

import torch

from datasets import batches, evaluation_batches, first_images, load_if_there, load_images, partition_of_run
from datasets.batches import steps_per_epoch
from models import synthesis
from models.architectures import join_network, take_rows
from models.bank import classes_of, open_original
from models.checkpoints import describe
from models.difference import BITS, decode, encode, shifted
from models.lirf import LIRF, TERMS
from models.pruning import cost
from utils import distributed
from utils.checkpoint import checksum, save_checkpoint
from utils.cli import add_optimiser_args, add_running_args, bounded, make_parser, path, run
from utils.errors import UserError
from utils.metrics import count_correct, logged_target, record_network, refuse_other_figures, table1
from utils.optim import LossMeter, learning_rate, make_optimizer, take_step
from utils.run import TrainingRun, already_done, settings_of
from utils.runtime import Runtime

# paper: the defaults, its terms at weights that are ours. authors: what the released code does, its cut included. ours:
# T_r learns all logits and the features. deep: T keeps little of D_r in its features, for `withdraw.py --merge
# difference`. bank: deposits whose differences add up.
PRESETS = {
    "paper": {},
    "authors": {"split_at": 2, "prune_ratio": 0.0, "random_label": "any", "re_target": "attached", "lambda_at": 0.0},
    "ours": {"pt_classes": "all", "lambda_pt": 5.0, "lambda_re": 0.0, "lambda_ft": 50.0},
    "deep": {"lambda_kr": 0.0, "lambda_at": 0.0, "lambda_kp": 0.0, "lambda_mt": 2.0, "lambda_ur": 20.0, "lr": 0.05,
             "last_layer": "cleared"},
    "bank": {"lambda_kr": 0.0, "lambda_at": 0.0, "lambda_ll": 0.1, "trained_blocks": 1, "bn_stats": "frozen"},
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.presets = PRESETS
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", type=path, default=os.path.join("checkpoints", "lirf"),
                       help="folder of the run: gets target.pt, deposit.pt, difference.pt, the logs and the resumable "
                            "state")
    files.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    files.add_argument("--original", type=path, default=None,
                       help="T0, of train_scratch.py, or target.pt or recover.pt of earlier deposits: then T0 is "
                            "rebuilt from it and the difference.pt files in the folders beside its own, and the new "
                            "deposit is added; unset: original.pt in --save_path")
    files.add_argument("--partition", type=path, default=None,
                       help="manifest with the deposit classes, over the data that T0 was trained on; unset: "
                            "partition.json in --save_path or, where there is none, the one in T0's file")
    files.add_argument("--images_per_class", type=bounded(int, 1), default=None,
                       help="images of each deposit class that make up D_r: the first of a draw by --seed; unset: all")
    method = parser.add_argument_group("method")
    method.add_argument("--preset", choices=list(PRESETS), default="paper",
                        help="values of the flags below. paper: the paper's terms; authors: the released code's "
                             "choices (cut after block 2, full copy, any random label, L_re through T, no L_at); "
                             "ours: T_r learns all logits and features; deep: T forgets more, held to T0 on "
                             "synthetic images; bank: several deposits of one T0 add up")
    method.add_argument("--split_at", type=bounded(int), default=None,
                        help="n: the block after which T0 is cut into lower part T0^(-n) and upper part T0^(n-); "
                             "unset: the last one, so that the upper part is the head")
    method.add_argument("--trained_blocks", type=bounded(int, 1), default=None,
                        help="train so many blocks of lower_T, the last ones; the differences of a bank then disturb "
                             "each other less; unset: all")
    method.add_argument("--last_layer", choices=["shared", "cleared"], default="shared",
                        help="T's last layer. shared: T0's (paper). cleared: without the rows of the deposit classes, "
                             "whose probability is 0; deposit.pt and difference.pt hold them")
    # just above one half: at 0.5 T_r of a ResNet-20, whose stem stays, keeps 50.6 % of the lower part's parameters
    method.add_argument("--prune_ratio", type=bounded(float, 0, 0.95), default=0.51,
                        help="share of channels removed from T_r; 0: a full copy of the lower part (authors' code)")
    method.add_argument("--difference_bits", type=int, choices=BITS, default=4,
                        help="bits an entry of difference.pt, which holds lower_0 - lower_T; those of batch norm take "
                             "16. T is rounded to match")
    for name, term in TERMS.items():
        method.add_argument(f"--lambda_{name}", type=bounded(float, 0), default=term.weight,
                            help=f"weight of {term.help}")
    method.add_argument("--temperature", type=bounded(float, 0, above=True), default=4.0,
                        help="tau of the distillations L_kp and L_pt")
    method.add_argument("--pt_classes", choices=["deposit", "all"], default="deposit",
                        help="columns of the logits that L_pt moves into T_r: the deposit classes' (paper), or all")
    # Labels of deposit classes keep T naming these classes, and the true one teaches what is to be forgotten.
    method.add_argument("--random_label", choices=["wrong", "any", "preserved"], default="preserved",
                        help="y_r of L_kr: drawn among the wrong classes, among all (authors' code), or among the "
                             "preserved ones, which teaches T to name no deposit class")
    # L_re asks for the true class; through z_T it would undo what L_kr does to T.
    method.add_argument("--re_target", choices=["detached", "attached"], default="detached",
                        help="whether L_re's gradient also reaches T through z_T (attached: authors' code)")
    method.add_argument("--bn_stats", choices=["frozen", "updated", "deposit"], default="updated",
                        help="batch norm of lower_T and T_r: T0's statistics, or the batch's, and updated on D_r; "
                             "deposit: updated in T_r alone")
    # On D_r alone, far from T0's data, single steps can explode in bfloat16: hence a limit.
    add_optimiser_args(parser, epochs=2, lr=0.01, clip_norm=5.0)
    add_running_args(parser)
    return parser


def optimizer_of(lirf, args):
    """SGD with a group of T's and one of T_r's parameters: where --clip_norm cuts T's gradient short, it does not slow
    T_r down."""
    return make_optimizer([{"params": list(module.parameters())} for module in lirf.trained().values()], args)


def train_one_epoch(lirf, parallel, optimizer, images, runtime, training, args, epoch, moved=None):
    """One pass over D_r; returns the mean of every loss and, with synthetic images, "passes": the images seen, over
    those of D_r, where the first epoch counts the steps that made the synthetic ones. parallel: lirf as
    utils.distributed gives it; moved: what moved_to_preserved made."""
    lirf.train()
    meter, steps, generator = LossMeter(), steps_per_epoch(images, args.batch_size), runtime.generator(epoch)
    y_r = lirf.random_labels(images.labels, generator)  # drawn anew for every epoch
    images = dataclasses.replace(images, labels=torch.stack([images.labels, y_r], 1))
    data = batches(images, args.batch_size, generator=generator)
    for i, (x, labels) in enumerate(training.progress(data, epoch, steps)):
        with runtime.autocast():
            out = parallel(x, synthesis.synthetic(x, moved, generator) if moved is not None else None)
        terms = lirf.losses(out, *labels.unbind(1))
        meter.update(terms, len(x))
        take_step(optimizer, terms["loss"], learning_rate(args, epoch * steps + i, steps), args.clip_norm)
    means = meter.means()
    if moved is not None:
        means["passes"] = 2 + (synthesis.STEPS * len(moved) / len(images) if epoch == 0 else 0)
    return means


def accuracies_of_target(lirf, images, original, partition):
    """T's column of Table 1 on images of the logged split, before the rounding and of this deposit alone, for the log:
    the last epoch is what is kept. {} where `images` is None."""
    if images is None:
        return {}
    upper = copy.deepcopy(lirf.eval().upper)
    if lirf.args.last_layer == "cleared":
        take_rows(upper[-1].fc, partition.deposit_classes)
    counts = count_correct(join_network(lirf.target, upper), evaluation_batches(images), partition.num_classes)
    split = partition.logged_split
    return logged_target(table1(counts, partition, original.counts[split]), split)


def read_original(args):
    """(Original, Partition of the deposit) that the flags name, checked before anything is written.
    Raises UserError where they do not fit each other or the folder."""
    original_path = args.original or os.path.join(args.save_path, "original.pt")
    original, partition = open_original(original_path, args.split_at)
    args.split_at = original.split_at  # the number stands in the settings and in target.pt
    partition = partition_of_run(args, partition, original_path)
    taken = sorted({*classes_of(original.away)} & {*partition.deposit_classes})
    if taken:
        raise UserError(f"class '{partition.class_names[taken[0]]}' is deposited already: name a --partition of other "
                        f"classes")
    fewest = min(len(partition.rows("train", c)) for c in partition.deposit_classes)
    if args.images_per_class is not None and args.images_per_class > fewest:
        raise UserError(f"--images_per_class {args.images_per_class}: a deposit class has {fewest} training images, "
                        f"no more")
    refuse_other_figures(args.save_path, original.counts, original.with_gone(partition))
    return original, partition


def save_deposit(args, lirf, original, partition, settings, costs):
    """Write target.pt, difference.pt and deposit.pt. costs: of T0's lower part and of T_r, as `cost` gives them."""
    def out(name):
        return os.path.join(args.save_path, f"{name}.pt")

    lower_0 = lirf.original_lower.state_dict()
    data = encode(lower_0, lirf.target.state_dict(), args.difference_bits)
    difference = decode(data, lower_0, args.difference_bits)
    # The rounding falls on T, so that adding the difference back is exact.
    t = copy.deepcopy(original.network)
    t.load_state_dict(shifted(original.target or t.state_dict(), difference, -1))
    rows = {"rows": take_rows(t[-1].fc, partition.deposit_classes)} if args.last_layer == "cleared" else {}
    deposit_id = checksum({"tensors": {"difference": data, **rows}})[:16]
    whole = original.with_gone(partition)
    target = save_checkpoint(out("target"), "target", t.state_dict(), split_at=args.split_at,
                             **describe(original.arch, whole.classes("all"), whole), settings=settings,
                             counts=original.counts, original=original.identity,
                             away={**original.away, deposit_id: partition.deposit_classes})
    save_checkpoint(out("difference"), "difference", {"difference": data, **rows}, bits=args.difference_bits,
                    id=deposit_id, original=original.identity, means="in deviations")
    save_checkpoint(out("deposit"), "deposit", {**lirf.deposit.state_dict(), **rows}, target=target, settings=settings,
                    cost=costs)
    record_network(args.save_path, whole, "original", original.counts)
    for name in ("deposit", "difference"):
        size = os.path.getsize(out(name))
        print(f"wrote {out(name)}: {size:,} bytes, {100 * size / costs['lower']['bytes']:.1f} % of the lower part's")
    print(f"wrote {out('target')}")


def main(args):
    if args.lambda_ur and distributed.ranks > 1:
        raise UserError("--lambda_ur, which --preset deep sets, looks at whole batches: run it without torchrun")
    runtime = Runtime.of(args)
    original, partition = read_original(args)
    settings = settings_of(args, leave_out=["preset"], partition=partition.hash, precision=runtime.precision,
                           original=original.identity, away=sorted(original.away))
    beside = [os.path.join(args.save_path, name) for name in ("deposit.pt", "difference.pt")]
    if already_done(os.path.join(args.save_path, "target.pt"), "target", "deposit", settings, beside) is not None:
        record_network(args.save_path, original.with_gone(partition), "original", original.counts)
        return
    training = TrainingRun(args.save_path, "deposit", settings, runtime, args.epochs)
    if len(partition.deposit_classes) == 1 and args.pt_classes == "deposit":
        print("one deposit class: L_pt, a softmax over one logit, teaches T_r nothing. Withdraw with --merge "
              "difference, or deposit with --pt_classes all")

    images = load_images(partition, args.data_dir, "train", partition.deposit_classes)
    shown = load_if_there(partition, args.data_dir, partition.logged_split, "no accuracies will be logged")
    if args.images_per_class is not None:
        images = first_images(images, args.images_per_class, args.seed)
    images = images.to(runtime.device)
    if shown is not None:
        shown = shown.to(runtime.device)

    lirf = runtime.place(LIRF(original.network, partition, args))
    optimizer = optimizer_of(lirf, args)
    training.track(optimizer, **lirf.trained())
    costs = {name: cost(part, partition.image_size)  # before several ranks change batch norm, which is counted
             for name, part in (("lower", lirf.original_lower), ("deposit", lirf.deposit))}
    parallel = distributed.parallel(lirf)
    moved = None
    for epoch in training.remaining_epochs():
        if args.lambda_ur and moved is None:  # within an epoch, so that its seconds count
            moved = synthesis.moved_to_preserved(lirf, images, runtime)
        values = train_one_epoch(lirf, parallel, optimizer, images, runtime, training, args, epoch, moved)
        training.end_epoch(epoch, values, lambda: accuracies_of_target(lirf, shown, original, partition))

    if distributed.rank == 0:
        save_deposit(args, lirf, original, partition, settings, costs)
        training.finish()


if __name__ == "__main__":
    run(main, get_args_parser(), parallel=True)
