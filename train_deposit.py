"""Stage 3, deposit: from T0 and the deposit set D_r alone, train the target network T, which forgets the deposit
classes, and the deposit module T_r, which holds their knowledge. No image of the preservation set is trained on."""

import copy
import itertools
import os

import torch

from datasets import batches, load_if_there, load_images, read_partition
from datasets.batches import UNLIKE, evaluation_batch_size, steps_per_epoch
from models import build_deposit_module, cost, refit, split_network
from models.files import counts_of, describe, network_of, read
from models.recover import Calibration, concat, preserved_margin, spread_ratio
from utils import distributed, losses
from utils.checkpoint import checksum, save_checkpoint
from utils.cli import add_optimiser_args, add_running_args, bounded, make_parser, run
from utils.errors import UserError
from utils.metrics import evaluate, metrics_path, read_metrics, record_original, table1
from utils.run import LossMeter, TrainingRun, already_done, learning_rate, make_optimizer, settings_of, take_step
from utils.runtime import Runtime

# the terms of L, each with its --lambda_<name>; L_at lies within L_kr
WEIGHTED_LOSSES = ("kr", "kp", "pt", "re", "ft")


def get_args_parser():
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", default=os.path.join("checkpoints", "lirf"),
                       help="folder of the run: gets target.pt, deposit.pt, the logs and the resumable state")
    files.add_argument("--data_dir", default="data", help="folder that holds the data set")
    files.add_argument("--original", default=None, help="T0, of train_scratch.py; unset: original.pt in --save_path")
    files.add_argument("--partition", default=None,
                       help="manifest with the deposit classes, over the data that T0 was trained on; "
                            "unset: the one in T0's file")
    files.add_argument("--images_per_class", type=bounded(int, 1), default=None,
                       help="images of each deposit class that make up D_r: the first of a draw by --seed; unset: all")
    network = parser.add_argument_group("networks")
    network.add_argument("--split_at", type=bounded(int), default=2,
                         help="n: the block after which T0 is cut into lower part T0^(-n) and upper part T0^(n-)")
    # just above one half: at 0.5 T_r of a ResNet-20, whose stem stays, keeps 50.6 % of the lower part's parameters
    network.add_argument("--prune_ratio", type=bounded(float, 0, 0.95), default=0.51,
                         help="share of channels removed from T_r; 0: a full copy of the lower part (authors' code)")
    network.add_argument("--refit_images", type=bounded(int, 0), default=0,
                         help="images of D_r, augmented, on which the pruned T_r's convolutions are fitted to T0's by "
                              "least squares before the first epoch; 0: T_r starts with the pruned weights")
    loss = parser.add_argument_group("loss L = lambda_kr L_kr + lambda_kp L_kp + lambda_pt L_pt + lambda_re L_re + "
                                     "lambda_ft L_ft (the paper's weights are not known: these defaults are ours)")
    weight = bounded(float, 0)
    loss.add_argument("--lambda_kr", type=weight, default=1.0,
                      help="weight of L_kr, L_at within it: T forgets the deposit classes (the paper gives it none)")
    # L_at is a mean over h*w positions of maps of norm 1, below 2/256 at this cut: hence the large weight.
    loss.add_argument("--lambda_at", type=weight, default=100.0,
                      help="weight of L_at, maximised within L_kr: T's attention maps leave T0's")
    # Random labels flatten T's preserved logits too; at weight 1, Pre fell by 13 points (results/settings.md).
    loss.add_argument("--lambda_kp", type=weight, default=5.0,
                      help="weight of L_kp: T keeps T0's answers on the preserved classes")
    # The next four were chosen by the study in results/withdrawal.md, where the paper's own terms (--pt_classes
    # deposit --lambda_pt 1 --lambda_re 0.1 --lambda_ft 0) stand beside them. Nothing else trains T_r, and its gradient
    # is limited by --clip_norm on its own, so it is the ratio of its two weights that counts.
    loss.add_argument("--lambda_pt", type=weight, default=5.0,
                      help="weight of L_pt: T_r takes T0's answers")
    loss.add_argument("--lambda_re", type=weight, default=0.0,
                      help="weight of L_re: T_r is easy to withdraw. On D_r every answer is a deposit class, so it "
                           "also pushes the deposit columns up for every image")
    loss.add_argument("--lambda_ft", type=weight, default=50.0,
                      help="weight of L_ft, ours: T_r matches the features of T0's lower part")
    loss.add_argument("--temperature", type=bounded(float, 0, above=True), default=4.0,
                      help="T of the distillations L_kp and L_pt")
    switches = parser.add_argument_group("choices that the paper leaves open")
    # A random label that hits the true class teaches what is to be forgotten, once in ten images.
    switches.add_argument("--random_label", choices=["wrong", "any", "preserved"], default="wrong",
                          help="y_r of L_kr: drawn among the wrong classes, among all (authors' code), or among the "
                               "preserved ones, which teaches T to name no deposit class")
    # L_re asks for the true class; through z_T it would undo what L_kr does to T.
    switches.add_argument("--re_target", choices=["detached", "attached"], default="detached",
                          help="whether L_re's gradient also reaches T through z_T (attached: authors' code)")
    switches.add_argument("--kp_on", choices=["softmax", "logits"], default="softmax",
                          help="L_kp between softened probabilities (paper) or, by mean squared error, raw logits")
    switches.add_argument("--pt_classes", choices=["deposit", "all"], default="all",
                          help="columns of the logits that L_pt moves into T_r: the deposit classes' (paper), or all")
    switches.add_argument("--unlike", choices=["none", *UNLIKE], default="none",
                          help="images made of D_r's that are unlike them, one for each, on which L_kp, L_pt and L_ft "
                               "hold as well: mixed two by two, cut into patches that are shuffled over the batch, or "
                               "noise added")
    # Statistics of D_r might misfit the preserved classes, but on validation images they did not: Pre was 3 points
    # higher, Dep 1 lower, every merge rule some 1 higher than with T0's (results/settings.md).
    switches.add_argument("--bn_stats", choices=["frozen", "updated", "target", "deposit"], default="updated",
                          help="batch norm of lower_T and T_r: T0's statistics, or the batch's, and updated on D_r; "
                               "target, deposit: updated in lower_T alone, in T_r alone")
    # T, T_r and T~ share one upper part; a trained one is no longer T0's, which L_kp and L_pt compare with.
    switches.add_argument("--upper", choices=["frozen", "trained"], default="frozen",
                          help="whether the shared upper part stays T0's")
    # On D_r alone, far from T0's data, single steps can explode in bfloat16: hence a limit by default below.
    add_optimiser_args(parser, epochs=10, lr=0.01, schedule="cosine")
    parser.set_defaults(clip_norm=5.0)
    add_running_args(parser)
    return parser


class Deposit(torch.nn.Module):
    """T0 (frozen), lower_T, T_r and the upper part they share, with the losses of one step."""

    def __init__(self, original, partition, args):
        super().__init__()
        self.original_lower, self.original_upper = split_network(original.requires_grad_(False), args.split_at)
        self.target = copy.deepcopy(self.original_lower).requires_grad_(True)
        self.deposit = build_deposit_module(self.target, args.prune_ratio, partition.image_size)
        self.upper = self.original_upper
        if args.upper == "trained":
            self.upper = copy.deepcopy(self.original_upper).requires_grad_(True)
        self.args = args
        self.register_buffer("preserved", torch.tensor(partition.preserved_classes))
        self.register_buffer("deposited", torch.tensor(partition.deposit_classes))
        self.register_buffer("all_classes", torch.tensor(partition.classes("all")))

    def trained(self):
        """{name: module} of what the deposit changes."""
        modules = {"target": self.target, "deposit": self.deposit}
        return {**modules, "upper": self.upper} if self.args.upper == "trained" else modules

    def parameter_groups(self):
        """For the optimiser, a group each: T's gradient, when --clip_norm cuts it short, does not slow T_r down."""
        return [{"params": list(module.parameters())} for module in self.trained().values()]

    def parts(self):
        """Its modules, a shared upper part once."""
        return {self.original_lower, self.original_upper, self.upper, self.target, self.deposit}

    def train(self, mode=True):
        # T0 and a frozen upper part stay in eval mode whatever their parent does, and with --bn_stats
        # frozen batch norm is the whole difference between the modes.
        super().train(False)
        for name, module in self.trained().items():
            if self.args.bn_stats == "updated" or self.args.bn_stats == name:
                module.train(mode)
        self.training = mode
        return self

    def forward(self, x, y, generator, autocast):
        """The named losses of one batch of D_r, their sum "loss" to be minimised. x: this rank's part of the images;
        y: the labels of the whole batch."""
        args, real = self.args, len(x)
        if args.unlike != "none":  # the losses between networks hold on any image; those with a label, on D_r's own
            x = torch.cat([x, UNLIKE[args.unlike](x, generator)])
        with autocast():
            with torch.no_grad():
                f_0 = self.original_lower(x)
                z_0 = self.original_upper(f_0)
            f_t, f_r = self.target(x), self.deposit(x)
            if args.upper == "frozen":
                z_t, z_r = self.upper(torch.cat([f_t, f_r])).chunk(2)
            else:  # its batch norm may be in train mode, where the branches must not share statistics
                z_t, z_r = self.upper(f_t), self.upper(f_r)
        z_re = concat(z_t[:real].detach() if args.re_target == "detached" else z_t[:real], z_r[:real],
                      self.preserved, self.deposited, calibration=None)
        y_r = distributed.mine(losses.draw_random_labels(
            y, self.preserved if args.random_label == "preserved" else self.all_classes, args.random_label == "wrong",
            generator))
        l_at = losses.attention_transfer(f_t[:real], f_0[:real])
        l_kr = losses.knowledge_removal(z_t[:real], y_r, l_at, args.lambda_at)
        preserving = losses.knowledge_preserving if args.kp_on == "softmax" else losses.logits_preserving
        l_kp = preserving(z_t, z_0, self.preserved, args.temperature)
        l_pt = losses.partial_transfer(z_r, z_0, self.deposited if args.pt_classes == "deposit" else self.all_classes,
                                       args.temperature)
        l_ft = losses.feature_transfer(f_r, f_0, lambda mean: distributed.summed(mean * (real / len(y))))
        l_re = losses.recoverability(z_re, distributed.mine(y))
        terms = {"l_kr": l_kr, "l_at": l_at, "l_kp": l_kp, "l_pt": l_pt, "l_re": l_re, "l_ft": l_ft}
        total = sum(getattr(args, f"lambda_{name}") * terms[f"l_{name}"] for name in WEIGHTED_LOSSES)
        return {**terms, "loss": total}


def first_images(images, count, seed):
    """The first `count` images of each class in an order drawn by `seed`: a larger count adds to a smaller one's."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in images.labels.unique():
        of_class = (images.labels == label).nonzero()[:, 0]
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    return images[torch.cat(rows)]


def refit_deposit_module(networks, images, runtime, args):
    """Fit T_r to T0's lower part by least squares on --refit_images images of D_r: passes over it, each augmented anew,
    until there are enough."""
    passes = (batches(images, args.batch_size, runtime.device, generator=runtime.generator(0, again))
              for again in itertools.count())
    drawn, count = [], 0
    for x, _ in itertools.chain.from_iterable(passes):
        drawn.append(x[:args.refit_images - count])
        count += len(drawn[-1])
        if count == args.refit_images:
            break
    refit(networks.deposit, networks.original_lower, drawn, runtime.autocast)


def train_one_epoch(networks, optimizer, images, runtime, run, args, epoch):
    """One pass over D_r; returns the mean of every loss."""
    networks.train()
    meter, steps = LossMeter(epoch), steps_per_epoch(images, args.batch_size)
    generator = runtime.generator(epoch)
    data = batches(images, args.batch_size, runtime.device, generator=generator, mine=distributed.mine)
    for i, (x, y) in enumerate(run.progress(data, epoch, steps)):
        terms = networks(x, y, generator, runtime.autocast)
        meter.update(terms, len(x))
        take_step(optimizer, terms["loss"] * distributed.weight(x, y),
                  learning_rate(args, epoch * steps + i, steps), args.clip_norm)
    return meter.means()


@torch.no_grad()
def calibrate(networks, images, runtime):
    """The Calibration of the merge rules, over D_r as it is (no augmentation), in eval mode."""
    networks.eval()
    z_0, z_t = [], []
    for x, _ in batches(images, evaluation_batch_size(images), runtime.device):
        with runtime.autocast():
            z_0.append(networks.original_upper(networks.original_lower(x)).float())
            z_t.append(networks.upper(networks.target(x)).float())
    z_0, z_t = torch.cat(z_0), torch.cat(z_t)
    return Calibration(scale=spread_ratio(z_0, z_t, networks.preserved),
                       margin=preserved_margin(z_t.double(), networks.preserved, networks.deposited).mean().item())


def main(args):
    runtime = Runtime(args)
    original_path = args.original or os.path.join(args.save_path, "original.pt")
    content, partition = read(original_path, "original")
    if args.partition is not None:
        chosen = read_partition(args.partition)
        if chosen.data_hash != partition.data_hash:
            raise UserError(f"{args.partition} partitions other data than {original_path} was trained on: "
                            f"partition that data, or name another --original")
        partition = chosen
    original = network_of(content, partition, original_path)
    settings = settings_of(args, leave_out=("save_path", "data_dir", "original", "partition", "device", "precision"),
                           partition=partition.hash, precision=runtime.precision, original=content["checksum"])
    out, target_out = (os.path.join(args.save_path, name) for name in ("deposit.pt", "target.pt"))
    original_counts = counts_of(content, original_path)
    if already_done(out, "deposit", "deposit", settings, beside=[target_out]) is not None:
        record_original(args.save_path, partition, original_counts)
        return
    split_network(original, args.split_at)  # an impossible cut is told before the data are read
    fewest = min(len(partition.rows("train", c)) for c in partition.deposit_classes)
    if args.images_per_class is not None and args.images_per_class > fewest:
        raise UserError(f"--images_per_class {args.images_per_class}: a deposit class has {fewest} training images, "
                        f"no more")
    for split in original_counts:  # and a folder of another partition before the training
        read_metrics(metrics_path(args.save_path, split), partition)
    training = TrainingRun(args.save_path, "deposit", settings, runtime, args.epochs)
    logged = partition.logged_split
    prefix = "target" if logged == "test" else f"{logged}_target"

    with distributed.rank_0_first():
        images = load_images(partition, args.data_dir, "train", partition.deposit_classes)
        shown = load_if_there(partition, args.data_dir, logged, "no accuracies will be logged")
    if args.images_per_class is not None:
        images = first_images(images, args.images_per_class, args.seed)
    images = images.to(runtime.device)
    if shown is not None:
        shown = shown.to(runtime.device)

    networks = runtime.place(Deposit(original, partition, args))
    before, after = (cost(part, partition.image_size) for part in (networks.original_lower, networks.deposit))
    for unit in before:
        print(f"deposit module: {after[unit]:,} of the lower part's {before[unit]:,} {unit} "
              f"({100 * after[unit] / before[unit]:.1f} %)", flush=True)
    if args.compile:
        runtime.compile(*networks.parts())
    optimizer = make_optimizer(networks.parameter_groups(), args)
    training.track(optimizer, **networks.trained())
    if args.refit_images and args.prune_ratio and training.next_epoch == 0:
        refit_deposit_module(networks, images, runtime, args)
    parallel = distributed.parallel(networks)
    for epoch in training.remaining_epochs():
        figures = train_one_epoch(parallel, optimizer, images, runtime, training, args, epoch)
        if shown is not None:  # for the log alone: the last epoch is what is kept
            networks.eval()
            counts = evaluate(lambda x, y: {"target": networks.upper(networks.target(x))}, shown,
                              partition.num_classes, runtime)
            figures.update({f"{prefix}_{name}": value for name, value in
                            table1(counts["target"], partition, original_counts[logged]).items()})
        training.end_epoch(epoch, figures)

    if distributed.rank > 0:
        return
    calibration = calibrate(networks, images, runtime)
    fits = describe(content["arch"], partition.classes("all"), partition, split_at=args.split_at, settings=settings)
    upper = networks.upper.state_dict()
    record_original(args.save_path, partition, original_counts)
    target = save_checkpoint(target_out, "target", {**networks.target.state_dict(), **upper}, **fits)
    # deposit.pt last: it says that the deposit is complete, and which target and upper part it fits
    save_checkpoint(out, "deposit", networks.deposit.state_dict(), **fits, target=target,
                    calibration=calibration._asdict(), upper=checksum({"tensors": upper}),
                    cost={"lower": before, "deposit": after})
    training.finish()
    print(f"wrote target.pt and deposit.pt in {args.save_path} ({calibration})")


if __name__ == "__main__":
    # --compile: as in train_scratch.py; --unlike: mixes the images of a batch, of which each device has a part
    run(main, get_args_parser(), parallel={"compile": False, "unlike": "none"})
