"""Other ways to forget, under the deposit's constraint: from T0 and the deposit set D_r alone make a target network T,
by one of METHODS, or enter a network that was made elsewhere (--file). Writes what the stages of LIRF write: target.pt,
T0 - T over the whole network as difference.pt, recover.pt, to which the two add up, and their figures."""

import copy
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from analysis.tsne import features_of
from datasets import batches, evaluation_batches, load_if_there, load_images
from datasets.batches import steps_per_epoch
from models import losses
from models.architectures import build_network, split_network
from models.checkpoints import describe, network_of, read, read_difference
from models.difference import BITS, encode
from models.weights import load_weights, read_weights
from train_deposit import first_images, read_original
from utils.checkpoint import checksum, save_checkpoint
from utils.cli import add_optimiser_args, add_running_args, bounded, make_parser, path, run
from utils.errors import UserError
from utils.files import read_log
from utils.metrics import (count_correct, evaluate, metrics_path, percent, read_metrics, record_network, table1,
                           write_metrics)
from utils.optim import LossMeter, learning_rate, make_optimizer, take_step
from utils.run import TrainingRun, already_done, settings_of
from utils.runtime import Runtime
from utils.tables import markdown, table1_rows

MASKED = -1000.0  # the logit of a masked class: softmax makes it 0, and 16 bits of a difference still bring it back
CHECK_EVERY = 10  # steps between two looks at --stop_acc


class Batch:
    """A batch of D_r: images x (b, 3, s, s), labels y (b,), a second view x_a of the images where the method has one.

    h (b, d), z (b, classes): last features and logits of T; z_0 (b, classes): logits of T0, without gradient. All are
    float32 and computed when first asked for.
    """

    def __init__(self, net, generator, x, y, x_a=None):
        self.net, self.generator, self.x, self.y, self.x_a = net, generator, x, y, x_a

    @functools.cached_property
    def h(self):
        return features_of(self.net.target, self.x)

    @functools.cached_property
    def z(self):
        return self.net.target.head.fc(self.h).float()

    @functools.cached_property
    def z_0(self):
        with torch.no_grad():
            return self.net.original(self.x).float()


def masked(logits, classes):
    """Logits (b, C) with the columns `classes` at MASKED, so that softmax restricts itself to the others."""
    return logits.index_fill(1, classes, MASKED)


def best_preserved(logits, preserved):
    """The class (b,) among `preserved` with the largest logit. Over all classes it could be another deposit class."""
    return preserved[losses.select(logits, preserved).argmax(1)]


def attack(network, x, labels, radius, steps, pixels, sign=1):
    """x (b, 3, s, s) moved along the sign of the gradient of CE(network(x), labels): up, or down for sign -1.

    radius: of the whole way, in pixels of [0, 1], where they stay; pixels: its mean and std normalised x. One step is
    FGSM (Goodfellow et al., ICLR 2015).
    """
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (pixels.mean, pixels.std))
    with torch.autocast(x.device.type, enabled=False):  # a gradient that bfloat16 rounds to 0 has no sign
        for _ in range(steps):
            x = x.detach().requires_grad_()
            gradient, = torch.autograd.grad(F.cross_entropy(network(x), labels), x)
            x = x + sign * radius / steps / std * gradient.sign()
            x = x.minimum((1 - mean) / std).maximum(-mean / std)
    return x.detach()


def same_class_cosine(features, labels):
    """Mean cosine of the features (b, d) of two different images of one class; 0 where no class has two."""
    unit = F.normalize(features.float(), dim=1)
    pairs = (labels[:, None] == labels).fill_diagonal_(False)
    return ((unit @ unit.T) * pairs).sum() / pairs.sum().clamp_min(1)


# The methods: edits of the last layer, then losses. A loss gets the Forgetting `net` and a Batch and gives its terms,
# whose sum is minimised.


def logit_mask(head, deposited):
    """Columns of D := -inf (the naive scheme of Baumhauer et al., 2002.02730). Nothing is removed but D's own rows."""
    head.weight[deposited], head.bias[deposited] = 0.0, MASKED


def pour_p(head, deposited):
    """POUR-P (2511.19339): features times I - QQ^T, Q an orthonormal basis of D's rows, folded into the last layer; D
    is masked as well. After the abstract and second-hand notes: the authors' code could not be established."""
    q = torch.linalg.qr(head.weight[deposited].T).Q
    head.weight -= head.weight @ q @ q.T
    logit_mask(head, deposited)


def neg_grad(net, b):
    """-CE(z, y): gradient ascent. Unbounded: it has a limit of the gradient and a stop."""
    return {"ce": -F.cross_entropy(b.z, b.y)}


def random_labels(net, b):
    """CE(z, y_r), y_r drawn among the preserved classes, anew for every batch."""
    return {"ce": F.cross_entropy(b.z, losses.draw_random_labels(b.y, net.preserved, False, b.generator))}


def boundary_shrink(net, b):
    """CE(z, y'), y' the best preserved class of T0 at x + epsilon sign(grad CE(z_0, y)) (Chen et al., CVPR 2023, whose
    y' is the best of all classes)."""
    moved = attack(net.original, b.x, b.y, net.args.epsilon, 1, net.partition)
    with torch.no_grad():
        nearest = best_preserved(net.original(moved), net.preserved)
    return {"ce": F.cross_entropy(b.z, nearest)}


def bad_teacher(net, b):
    """KL(p_B || p), B a network with random weights: the forget part of Chundawat et al. (AAAI 2023), summed over
    classes (their code averages over them)."""
    with torch.no_grad():
        z_b = net.teacher(b.x)
    return {"kl": losses.distillation(b.z, z_b, 1.0)}


def delete(net, b):
    """KL(t || p), t = T0's softmax without D (DELETE, Zhou et al., CVPR 2025, whose code masks the image's own class
    alone): L_kp at temperature 1, minus log M(x), M the mass of p on the preserved classes."""
    return {"kl": losses.distillation(b.z, masked(b.z_0, net.deposited), 1.0)}


def spotter(net, b):
    """0.7 KL(t || p) + 0.3 KL(t(x_a) || p(x_a)) + lambda_2 * cosine of same-class features (Ha et al., 2506.01318)."""
    with torch.no_grad():
        t_a = masked(net.original(b.x_a).float(), net.deposited)
    return {"kl": 0.7 * delete(net, b)["kl"], "kl_a": 0.3 * losses.distillation(net.target(b.x_a), t_a, 1.0),
            "cosine": net.args.lambda_2 * same_class_cosine(b.h, b.y)}


# What a method needs before its first step, from T0 and D_r: the views of D_r that its batches hold.


def random_teacher(net, images, runtime):
    """B of bad_teacher, drawn once for a seed. It names nearly one class for all images, which is noted."""
    torch.manual_seed(net.args.seed)
    net.teacher = runtime.place(build_network(net.arch, net.partition.num_classes, net.partition.image_size))
    net.teacher.requires_grad_(False).eval()
    with torch.no_grad():
        named = torch.cat([net.teacher(x).argmax(1) for x, _ in evaluation_batches(images, runtime.device)])
    net.notes["teacher_names"] = net.partition.class_names[named.mode().values.item()]
    return [images]


def moved_to_preserved(net, images, runtime):
    """x_a of spotter: three steps of 0.01 towards T0's best preserved class, made once. The authors' code goes away
    from the second-best class and clamps normalised pixels."""
    std, mean, parts = *(torch.tensor(v, device=runtime.device).view(3, 1, 1) for v in (images.std, images.mean)), []
    for x, _ in evaluation_batches(images, runtime.device):
        with torch.no_grad():
            nearest = best_preserved(net.original(x), net.preserved)
        moved = attack(net.original, x, nearest, 0.03, 3, net.partition, sign=-1)
        parts.append(((moved * std + mean) * 255).round().to(torch.uint8).contiguous())
    return [images, dataclasses.replace(images, images=torch.cat(parts))]


class Method(NamedTuple):
    """What --help says; edit(head, deposited) of the last layer, or loss(net, batch); what it needs first; its defaults
    of the flags; passes over D_r an epoch, and once."""

    help: str
    edit: Callable | None = None
    loss: Callable | None = None
    prepare: Callable = lambda net, images, runtime: [images]
    defaults: dict = {"epochs": 10, "lr": 1e-3}
    passes: tuple = (1, 0)


# This is the one place to add a method. The defaults lie in the middle of the grids of scripts/8_methods.sh.
METHODS = {
    "logit_mask": Method("deposit columns at -inf", edit=logit_mask, defaults={"epochs": 0}),
    "pour_p": Method("features projected off D's rows", edit=pour_p, defaults={"epochs": 0}),
    "neg_grad": Method("gradient ascent", loss=neg_grad,
                       defaults={"epochs": 10, "lr": 1e-4, "clip_norm": 1.0, "stop_acc": 10.0}),
    "random_labels": Method("random labels of preserved classes", loss=random_labels),
    "boundary_shrink": Method("the preserved class across the nearest boundary", loss=boundary_shrink, passes=(3, 0),
                              defaults={"epochs": 10, "lr": 5e-4}),
    "bad_teacher": Method("a random network's answers", loss=bad_teacher, prepare=random_teacher, passes=(1, 1)),
    "delete": Method("T0's answers without the deposit classes", loss=delete),
    "spotter": Method("delete, also on moved images, and same-class features spread", loss=spotter,
                      prepare=moved_to_preserved, passes=(2, 4),
                      defaults={"epochs": 10, "lr": 1e-3, "bn_stats": "frozen"}),
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.presets, parser.preset_flag = {name: method.defaults for name, method in METHODS.items()}, "method"
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", type=path, required=True,
                       help="folder of the run: gets target.pt, difference.pt, recover.pt, the log, metrics.json")
    files.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    files.add_argument("--original", type=path, default=None, help="T0; unset: original.pt in --save_path")
    files.add_argument("--partition", type=path, default=None, help="manifest with the deposit classes; unset: T0's")
    files.add_argument("--eval_split", choices=["test", "val"], default="test",
                       help="val: measure on held-out images, to choose settings; goes to metrics_val.json")
    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=list(METHODS), default=None,
                        help="; ".join(f"{name}: {m.help}" for name, m in METHODS.items()) + ". Sets its own defaults")
    method.add_argument("--file", type=path, default=None,
                        help="instead: a network made elsewhere, of T0's architecture, in a file that train_scratch.py "
                             "--weights reads, or a checkpoint of ours")
    method.add_argument("--images_per_class", type=bounded(int, 1), default=None, help="as of train_deposit.py")
    method.add_argument("--scope", choices=["all", "lower"], default="all",
                        help="what is trained: the whole network, or LIRF's lower part")
    method.add_argument("--split_at", type=bounded(int), default=3, help="n: the block after which T0 is cut")
    method.add_argument("--bn_stats", choices=["frozen", "updated"], default="updated",
                        help="batch norm of what is trained: T0's statistics, or the batch's, and updated on D_r")
    method.add_argument("--epsilon", type=bounded(float, 0), default=0.1, help="of boundary_shrink, pixels in [0, 1]")
    method.add_argument("--lambda_2", type=bounded(float, 0), default=1.0, help="weight of spotter's cosine")
    method.add_argument("--stop_acc", type=bounded(float, 0, 100), default=0.0,
                        help=f"end at the first look, every {CHECK_EVERY} steps, at which T names at most this share "
                             f"(%%) of held-out images of D_r, or of D_r where none are held out; 0: never")
    method.add_argument("--difference_bits", type=int, choices=BITS, default=8, help="bits an entry of difference.pt")
    # The limit of the gradient is train_deposit.py's: without it T0's certainty of D makes first steps that destroy T.
    add_optimiser_args(parser, epochs=10, lr=1e-3, clip_norm=5.0, least_epochs=0)
    parser.set_defaults(weight_decay=0.0)
    add_running_args(parser)
    return parser


class Forgetting(torch.nn.Module):
    """T0 (frozen), T, which starts as its copy, and what the methods share."""

    def __init__(self, original, arch, partition, args):
        super().__init__()
        self.arch, self.partition, self.args, self.notes = arch, partition, args, {}
        self.original = original.requires_grad_(False)
        self.target = copy.deepcopy(original)
        self.trained().requires_grad_(True)
        for name, subset in (("preserved", "preservation"), ("deposited", "deposit")):
            self.register_buffer(name, torch.tensor(partition.classes(subset)))

    def trained(self):
        """The part of T that --scope trains, as a module that shares T's."""
        return self.target if self.args.scope == "all" else split_network(self.target, self.args.split_at)[0]

    def train(self, mode=True):
        super().train(False)  # batch norm is the whole difference between the modes
        self.trained().train(mode and self.args.bn_stats == "updated")
        self.training = mode
        return self


def train_one_epoch(net, optimizer, views, runtime, training, epoch, forgotten):
    """One pass over D_r, or the part of it after which `forgotten` says that T names D_r no more; the means of the
    terms."""
    args, method = net.args, METHODS[net.args.method]
    net.train()
    meter, steps, generator = LossMeter(epoch), steps_per_epoch(views[0], args.batch_size), runtime.generator(epoch, 1)
    # the same draws for each view, so that an image and its x_a are cropped and flipped alike
    data = zip(*(batches(view, args.batch_size, runtime.device, generator=runtime.generator(epoch)) for view in views))
    for i, ((x, y), *others) in enumerate(training.progress(data, epoch, steps)):
        with runtime.autocast():
            terms = method.loss(net, Batch(net, generator, x, y, *(x_a for x_a, _ in others)))
        terms["loss"] = sum(terms.values())
        meter.update(terms, len(x))
        take_step(optimizer, terms["loss"], learning_rate(args, epoch * steps + i, steps), args.clip_norm)
        if (i + 1) % CHECK_EVERY == 0 and forgotten():
            break
    return meter.means()


def train(net, training, runtime, counts_0):
    """Train T on D_r by its loss, logging as train_deposit.py does; returns what it cost."""
    args, partition, method = net.args, net.partition, METHODS[net.args.method]
    images = load_images(partition, args.data_dir, "train", partition.deposit_classes)
    if args.images_per_class is not None:
        images = first_images(images, args.images_per_class, args.seed)
    images = watched = images.to(runtime.device)
    if args.stop_acc and partition.val_fraction:
        watched = load_images(partition, args.data_dir, "val", partition.deposit_classes).to(runtime.device)
    watched = watched[torch.arange(0, len(watched), max(1, len(watched) // 600), device=runtime.device)]
    logged = partition.logged_split
    shown = load_if_there(partition, args.data_dir, logged, "no accuracies will be logged")
    shown = shown and shown.to(runtime.device)
    if args.compile:
        runtime.compile(*net.original, *net.target)  # whose layers are called one by one
    began = time.monotonic()
    views = method.prepare(net.eval(), images, runtime)
    seconds = time.monotonic() - began

    def counts_on(image_set):
        counts = count_correct(net.target, evaluation_batches(image_set, runtime.device), partition.num_classes)
        net.train()
        return counts

    def forgotten():
        return args.stop_acc > 0 and percent(counts_on(watched)) <= args.stop_acc

    optimizer = make_optimizer([p for p in net.target.parameters() if p.requires_grad], args)
    training.track(optimizer, network=net.target)
    for epoch in training.remaining_epochs():
        if forgotten():  # so a run that was killed after its stop ends there too
            break
        values = train_one_epoch(net, optimizer, views, runtime, training, epoch, forgotten)
        if shown is not None:  # for the log alone: the last epoch is what is kept
            values.update({f"{'' if logged == 'test' else 'val_'}target_{name}": value for name, value in
                           table1(counts_on(shown), partition, counts_0[logged]).items()})
        training.end_epoch(epoch, values)
    done = [line for line in read_log(training.log_path) if "epoch" in line]
    return {"seconds": round(seconds + sum(line["seconds"] for line in done), 2), "images": len(images),
            "passes": method.passes[0] * len(done) + method.passes[1],
            "trained_parameters": sum(p.numel() for p in net.trained().parameters())}


def make_target(args, original, content, partition, counts_0, given, settings, runtime):
    """Train, edit or read T and write target.pt and, last, difference.pt."""
    method = METHODS.get(args.method)
    trains = method is not None and method.loss is not None
    training = TrainingRun(args.save_path, "forget", settings, runtime, args.epochs if trains else 0)
    net = runtime.place(Forgetting(original, content["arch"], partition, args))
    costs = {}  # those of a file are not known
    if trains:
        costs = train(net, training, runtime, counts_0)
    else:
        training.track(None, network=net.target)
        list(training.remaining_epochs())  # opens the log
    if given is not None:
        load_weights(net.target, content["arch"], partition.image_size, given, f"--file {args.file}", keep_head=True)
    elif not trains:
        with torch.no_grad():
            method.edit(net.target.head.fc, net.deposited)
        costs = {"seconds": 0.0, "images": 0, "passes": 0, "trained_parameters": 0}
    entries = {"settings": settings, "split_at": args.split_at,
               "forget": {"method": args.method or "file", **costs, **net.notes}}
    target = save_checkpoint(os.path.join(args.save_path, "target.pt"), "target", net.target.state_dict(), **entries,
                             **describe(content["arch"], partition.classes("all"), partition))
    difference = encode(net.original.state_dict(), net.target.state_dict(), args.difference_bits)  # the head, too
    save_checkpoint(os.path.join(args.save_path, "difference.pt"), "difference", {"difference": difference},
                    bits=args.difference_bits, target=target)
    training.finish()


def record(args, content_0, partition, counts_0, runtime):
    """Withdraw by the difference, measure T and T~, and write recover.pt and the figures; from the files alone."""
    out = {name: os.path.join(args.save_path, f"{name}.pt") for name in ("target", "difference", "recover")}
    record_network(args.save_path, partition, "original", counts_0)
    content, _ = read(out["target"], "target")
    target = network_of(content, partition, out["target"])
    recover = copy.deepcopy(target)
    recover.load_state_dict(read_difference(out["difference"], out["target"], content, recover))
    save_checkpoint(out["recover"], "recover", recover.state_dict(), merge="difference", split_at=content["split_at"],
                    **describe(content_0["arch"], partition.classes("all"), partition), target=content["checksum"])
    images = load_images(partition, args.data_dir, args.eval_split, partition.classes("all")).to(runtime.device)
    networks = {"target": runtime.place(target), "difference": runtime.place(recover)}
    counts = evaluate(lambda x, y: {name: network(x) for name, network in networks.items()},
                      evaluation_batches(images, runtime.device), partition.num_classes)
    columns = {name: {**table1(c, partition, counts_0[args.eval_split]), "counts": c} for name, c in counts.items()}
    metrics = metrics_path(args.save_path, args.eval_split)
    write_metrics(metrics, partition, target=columns["target"], recover={"difference": columns["difference"]},
                  merge="difference", forget=content["forget"])
    print(markdown(table1_rows([read_metrics(metrics, partition)])), end="")


def main(args):
    if (args.method is None) == (args.file is None):
        raise UserError("name either a --method or a --file")
    runtime = Runtime.of(args)
    original, content, partition, counts_0 = read_original(args)
    if args.eval_split not in counts_0:
        raise UserError("the partition holds out no images: write one with partition_data.py --val_fraction")
    given = read_weights(args.file, "--file") if args.file else None
    settings = settings_of(args, leave_out=("save_path", "data_dir", "original", "partition", "device", "precision",
                                            "eval_split"),
                           file=given and checksum({"tensors": given}), partition=partition.hash,
                           precision=runtime.precision, original=content["checksum"])
    out, beside = (os.path.join(args.save_path, f"{name}.pt") for name in ("target", "difference"))
    if already_done(out, "target", "forget", settings, [beside]) is None:
        make_target(args, original, content, partition, counts_0, given, settings, runtime)
    record(args, content, partition, counts_0, runtime)


if __name__ == "__main__":
    run(main, get_args_parser())
