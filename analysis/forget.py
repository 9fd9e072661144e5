"""Other ways to forget, under the deposit's constraint: from T0 and the deposit set D_r alone make a target network T
by one of METHODS. It logs and writes T's figures; analysis.residual tells what T still knows."""

import copy
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from datasets import batches, evaluation_batches, first_images, load_images, partition_of_run
from datasets.batches import steps_per_epoch
from models import losses
from models.architectures import before_last_layer, build_network, take_rows
from models.checkpoints import describe, load_network, network_of, read
from utils.checkpoint import save_checkpoint
from utils.cli import add_optimiser_args, add_running_args, bounded, make_parser, path, run
from utils.errors import UserError
from utils.metrics import (count_correct, logged_target, metrics_path, percent, record_network, refuse_other_figures,
                           table1, write_metrics)
from utils.optim import LossMeter, learning_rate, make_optimizer, take_step
from utils.run import TrainingRun, already_done, settings_of
from utils.runtime import Runtime

CHECK_EVERY = 10  # steps between two looks at whether a method with a stop has forgotten


class Networks:
    """T0 (frozen, eval mode), T, which starts as its copy, B with random weights, class ids, pixels' mean and std, and
    the weight of Spotter's cosine."""

    def __init__(self, original, arch, partition, runtime, lambda_cosine):
        self.lambda_cosine = lambda_cosine
        self.original = runtime.place(original).requires_grad_(False).eval()
        self.target = copy.deepcopy(self.original).requires_grad_(True)
        self.teacher = build_network(arch, partition.num_classes, partition.image_size)
        self.teacher = runtime.place(self.teacher).requires_grad_(False).eval()
        self.preserved, self.deposited = (torch.tensor(partition.classes(subset), device=runtime.device)
                                          for subset in ("preservation", "deposit"))
        self.mean, self.std = (torch.tensor(v, device=runtime.device).view(1, 3, 1, 1)
                               for v in (partition.mean, partition.std))

    def best_preserved(self, x):
        """The preserved class (b,) that T0 finds likeliest. The likeliest of all may be another deposit class."""
        with torch.no_grad():
            return self.preserved[losses.select(self.original(x), self.preserved).argmax(1)]

    def attacked(self, x, labels, radius, steps, sign):
        """x (b, 3, s, s) moved along the sign of the gradient of CE(z_0(x), labels): up (sign 1) or down (-1).

        radius: of the whole way, in pixels of [0, 1], where they stay. One step is FGSM (Goodfellow et al., ICLR 2015).
        """
        with torch.autocast(x.device.type, enabled=False):  # a gradient that bfloat16 rounds to 0 has no sign
            for _ in range(steps):
                x = x.detach().requires_grad_()
                gradient, = torch.autograd.grad(F.cross_entropy(self.original(x), labels), x)
                x = x + sign * radius / steps / self.std * gradient.sign()
                x = x.minimum((1 - self.mean) / self.std).maximum(-self.mean / self.std)
        return x.detach()


# The methods: edits of the last layer, then losses. A loss gets the Networks, images x (b, 3, s, s) of D_r, their
# labels y (b,) and a generator, and gives "loss", which is minimised, and what else is to be logged.


def logit_mask(head, deposited):
    """Logits of D_r := -1000, a probability of 0 (the naive scheme of Baumhauer et al., 2002.02730). Nothing is removed
    but D_r's own rows."""
    take_rows(head, deposited)


def pour_p(head, deposited):
    """POUR-P (2511.19339): features times I - QQ^T, Q an orthonormal basis of D_r's rows, folded into the last layer,
    and D_r masked. After the abstract and second-hand notes: the authors' code could not be established."""
    q = torch.linalg.qr(head.weight[deposited].T).Q
    head.weight -= head.weight @ q @ q.T
    logit_mask(head, deposited)


def neg_grad(net, x, y, generator):
    """-CE(z, y): gradient ascent. It is unbounded, so it has a stop."""
    return {"loss": -F.cross_entropy(net.target(x).float(), y)}


def random_labels(net, x, y, generator):
    """CE(z, y_r), y_r drawn among the preserved classes, anew for every batch."""
    y_r = losses.draw_random_labels(y, net.preserved, False, generator)
    return {"loss": F.cross_entropy(net.target(x).float(), y_r)}


def boundary_shrink(net, x, y, generator):
    """CE(z, y'), y' T0's best preserved class at x + 0.1 sign(grad CE(z_0, y)) (Chen et al., CVPR 2023, whose y' is the
    best of all classes)."""
    nearest = net.best_preserved(net.attacked(x, y, 0.1, 1, sign=1))
    return {"loss": F.cross_entropy(net.target(x).float(), nearest)}


def bad_teacher(net, x, y, generator):
    """KL(p_B || p): the forget part of Chundawat et al. (AAAI 2023), summed over classes (their code averages). B names
    nearly one class for all images; "b_names" is the mean of its number."""
    with torch.no_grad():
        z_b = net.teacher(x)
    return {"loss": losses.distillation(net.target(x), z_b, 1.0), "b_names": z_b.argmax(1).float().mean()}


def delete(net, x, y, generator):
    """DELETE (Zhou et al., CVPR 2025), whose code masks the image's own class alone: here all of D_r."""
    return {"loss": losses.masked_target(net.target(x), net.original(x), net.deposited)}


def spotter(net, x, y, generator):
    """0.7 of DELETE's loss on x, 0.3 of it on x_a, and lambda_cosine times the mean cosine of the features of two
    images of one class (Ha et al., ICML 2026, 2506.01318). x_a: three steps of 0.01 towards T0's best preserved class.
    The authors' code makes x_a once, steps away from the second-best class and clamps normalised pixels."""
    x_a = net.attacked(x, net.best_preserved(x), 0.03, 3, sign=-1)
    features = before_last_layer(net.target)(x)
    kl = losses.masked_target(net.target[-1].fc(features), net.original(x), net.deposited)
    unit = F.normalize(features.float(), dim=1)
    pairs = (y[:, None] == y).fill_diagonal_(False)
    cosine = ((unit @ unit.T) * pairs).sum() / pairs.sum().clamp_min(1)
    moved = delete(net, x_a, y, generator)["loss"]
    return {"loss": 0.7 * kl + 0.3 * moved + net.lambda_cosine * cosine, "cosine": cosine}


class Method(NamedTuple):
    """What --help says; edit(head, deposited) of the last layer, or a loss; defaults of the flags; passes over D_r that
    an epoch costs, forward and backward, of T or of an attack; the accuracy on D_r (%) at which it stops, 0: never."""

    help: str
    edit: Callable | None = None
    loss: Callable | None = None
    defaults: dict = {}
    passes: int = 1
    stop: float = 0.0


# This is the one place to add a method. The grids of its trials are in scripts/9_methods.sh.
METHODS = {
    "logit_mask": Method("deposit classes of probability 0", logit_mask),
    "pour_p": Method("features projected off D_r's rows", pour_p),
    "neg_grad": Method("gradient ascent", loss=neg_grad, stop=10.0, defaults={"lr": 1e-4, "clip_norm": 1.0}),
    "random_labels": Method("random labels of preserved classes", loss=random_labels),
    "boundary_shrink": Method("the preserved class across the nearest boundary", loss=boundary_shrink, passes=2),
    "bad_teacher": Method("a random network's answers", loss=bad_teacher),
    "delete": Method("T0's answers without the deposit classes", loss=delete),
    "spotter": Method("delete, also on moved images, and features of a class spread", loss=spotter, passes=5,
                      defaults={"bn_stats": "frozen"}),
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.presets, parser.preset_flag = {name: method.defaults for name, method in METHODS.items()}, "method"
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", type=path, required=True, help="folder of the run: gets target.pt, logs, metrics")
    files.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    files.add_argument("--original", type=path, default=None, help="T0; unset: original.pt in --save_path")
    files.add_argument("--partition", type=path, default=None,
                       help="manifest with the deposit classes; unset: partition.json in --save_path, else T0's")
    parser.add_argument("--method", choices=list(METHODS), required=True,
                        help="; ".join(f"{name}: {m.help}" for name, m in METHODS.items()) + ". Sets its own defaults")
    parser.add_argument("--bn_stats", choices=["frozen", "updated"], default="updated",
                        help="batch norm of T: T0's statistics, or the batch's, and updated on D_r")
    parser.add_argument("--lambda_cosine", type=bounded(float, 0), default=1.0, help="weight of spotter's cosine")
    # Five epochs for all methods, as LIRF and the deep deposit take two; their authors take 1 to 20. The limit
    # of the gradient is train_deposit.py's: without it T0's certainty of D_r makes first steps that destroy T.
    add_optimiser_args(parser, epochs=5, lr=1e-3, clip_norm=5.0, least_epochs=0)
    parser.set_defaults(weight_decay=0.0)
    add_running_args(parser)
    return parser


def read_original(args):
    """(content of T0's file, T0, Partition of the deposit) that the flags name, checked before anything is written.
    Raises UserError where they do not fit each other or the folder."""
    original_path = args.original or os.path.join(args.save_path, "original.pt")
    content, partition = read(original_path, "original")
    network = network_of(content, partition, original_path)
    partition = partition_of_run(args, partition, original_path)
    refuse_other_figures(args.save_path, content["counts"], partition)
    return content, network, partition


def train(net, images, logged, runtime, training, args):
    """Train T on the ImageSet `images`, D_r; where the method has a stop, until it names few of 200 of them a class.
    logged(): figures that each epoch's line holds, too; nothing is chosen by them."""
    method, steps = METHODS[args.method], steps_per_epoch(images, args.batch_size)
    optimizer = make_optimizer(net.target.parameters(), args)
    training.track(optimizer, network=net.target)
    looked_at = first_images(images, 200, args.seed)

    def forgotten():
        return method.stop and percent(count_correct(net.target, evaluation_batches(looked_at),
                                                     net.target[-1].fc.out_features)) <= method.stop

    for epoch in training.remaining_epochs():
        if forgotten():  # so a run that was killed after its stop ends there too
            break
        meter, generator = LossMeter(), runtime.generator(epoch)
        data = batches(images, args.batch_size, generator=generator)
        for i, (x, y) in enumerate(training.progress(data, epoch, steps)):
            net.target.train(args.bn_stats == "updated")
            with runtime.autocast():
                terms = method.loss(net, x, y, generator)
            meter.update(terms, len(x))
            take_step(optimizer, terms["loss"], learning_rate(args, epoch * steps + i, steps), args.clip_norm)
            if (i + 1) % CHECK_EVERY == 0 and forgotten():
                break
        training.end_epoch(epoch, {**meter.means(), "passes": method.passes * (i + 1) / steps}, logged)


def main(args):
    runtime, method, out = Runtime.of(args), METHODS[args.method], os.path.join(args.save_path, "target.pt")
    if method.edit:
        args.epochs = 0
    elif args.epochs == 0:
        raise UserError(f"--method {args.method} trains: with --epochs 0 it would leave T0 as it is")
    content, original, partition = read_original(args)
    settings = settings_of(args, partition=partition.hash, precision=runtime.precision, original=content["checksum"])
    split = partition.logged_split
    metrics = metrics_path(args.save_path, split)
    done = already_done(out, "target", "forget", settings) is not None
    if done and os.path.exists(metrics):
        return
    training = TrainingRun(args.save_path, "forget", settings, runtime, args.epochs)
    images = load_images(partition, args.data_dir, "train", partition.deposit_classes).to(runtime.device)
    shown = load_images(partition, args.data_dir, split, partition.classes("all")).to(runtime.device)
    net = Networks(original, content["arch"], partition, runtime, args.lambda_cosine)

    def figures():
        counts = count_correct(net.target, evaluation_batches(shown), partition.num_classes)
        return {**table1(counts, partition, content["counts"][split]), "counts": counts}

    if done:  # and its figures are missing
        net.target = runtime.place(load_network(out)[0])
    else:
        train(net, images, lambda: logged_target(figures(), split), runtime, training, args)
        if method.edit:
            with torch.no_grad():
                method.edit(net.target[-1].fc, net.deposited)
    record_network(args.save_path, partition, "original", content["counts"])
    write_metrics(metrics, partition, target=figures())
    if not done:  # the checkpoint last: it says that the stage is complete
        # No difference lies beside it, so as a bank's network this one is refused.
        save_checkpoint(out, "target", net.target.state_dict(), settings=settings, split_at=len(net.target) - 2,
                        **describe(content["arch"], partition.classes("all"), partition), counts=content["counts"],
                        original=content["checksum"], away={args.method: partition.deposit_classes})
        print(f"wrote {out}")
    training.finish()


if __name__ == "__main__":
    run(main, get_args_parser())
