"""How fast the original's and the deposit's step are: images per second beside a plain reference written the usual
way (files decoded by a DataLoader, float32, NCHW, a forward a branch, .item() at every step), on the same machine by
turns, and the share of the machine's matrix-multiplication peak that is reached."""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import train_deposit
import train_scratch
from datasets import load_images, make_partition
from models.architectures import ARCHITECTURES, build_network, split_network
from models.lirf import LIRF
from models.pruning import build_deposit_module
from utils.cli import add_running_args, bounded, make_parser, path, run
from utils.files import save_json
from utils.optim import make_optimizer
from utils.runtime import Runtime, usable_processors

CLASSES, SIZE, EPOCH = 10, 32, 50_000  # CIFAR-10's; pixels are random, which changes no speed


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet18", help="architecture")
    parser.add_argument("--batch_size", type=bounded(int, 2), default=128, help="images a step")
    parser.add_argument("--steps", type=bounded(int, 1), default=3, help="steps of a round; before the first, as many "
                                                                         "to warm up (at most 3)")
    parser.add_argument("--rounds", type=bounded(int, 1), default=3,
                        help="turns that either side takes; what counts is the median")
    parser.add_argument("--workers", type=bounded(int, 0), default=usable_processors(),
                        help="DataLoader processes of the reference")
    parser.add_argument("--compile", action="store_true", help="compile our networks, as the stages' flag does")
    parser.add_argument("--out", type=path, default=None, help="JSON file to write as well")
    add_running_args(parser)
    return parser


def make_images(root, count):
    """Random images as an image folder train/<class>/, test/<class>/."""
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        for split, share in (("train", count // CLASSES + 1), ("test", 1)):
            folder = os.path.join(root, split, f"class{c}")
            os.makedirs(folder)
            for i in range(share):
                Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(f"{folder}/{i}.png")


class NoProgress:
    """Stands for a TrainingRun where nothing is shown."""

    @staticmethod
    def progress(data, epoch, total):
        return data


def stage_args(module, args):
    """The defaults of a stage, with the flags that this script shares with it."""
    flags = ["--batch_size", str(args.batch_size), "--device", args.device, "--precision", args.precision]
    flags += ["--compile"] * args.compile + ["--deterministic"] * args.deterministic
    return module.get_args_parser().parse_args(flags)


def our_original(args, runtime, partition):
    """images -> None: an epoch of train_scratch.py over them."""
    stage = stage_args(train_scratch, args)
    network = runtime.place(build_network(args.arch, CLASSES, SIZE))
    if args.compile:
        runtime.compile(network)
    optimizer = make_optimizer(network.parameters(), stage, nesterov=True)
    return lambda part: train_scratch.train_one_epoch(network, optimizer, part, runtime, NoProgress, stage, 0)


def our_deposit(args, runtime, partition):
    """images -> None: an epoch of train_deposit.py over them."""
    stage = stage_args(train_deposit, args)
    lirf = runtime.place(LIRF(build_network(args.arch, CLASSES, SIZE).eval(), partition, stage))
    if args.compile:
        runtime.compile(lirf.original_lower, lirf.upper, lirf.target, lirf.deposit)
    optimizer = make_optimizer([p for part in lirf.trained().values() for p in part.parameters()], stage)
    return lambda part: train_deposit.train_one_epoch(lirf, lirf, optimizer, part, runtime, NoProgress, stage, 0)


def reference_loader(root, args, deposit_classes=None):
    """The usual loader: files decoded and augmented in worker processes."""
    data = torchvision.datasets.ImageFolder(os.path.join(root, "train"), transforms.Compose([
        transforms.RandomCrop(SIZE, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.25,) * 3)]))
    if deposit_classes is not None:
        data = torch.utils.data.Subset(data, [i for i, c in enumerate(data.targets) if c in deposit_classes])
    # sampled with replacement, so that a few files make as many batches as are wanted
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=args.batch_size * 10_000)
    return iter(DataLoader(data, args.batch_size, sampler=sampler, num_workers=args.workers, pin_memory=True))


def reference_original(args, device, root):
    """steps -> None: a plain training loop."""
    stage = stage_args(train_scratch, args)
    network, loader = build_network(args.arch, CLASSES, SIZE).to(device).train(), reference_loader(root, args)
    optimizer = make_optimizer(network.parameters(), stage, nesterov=True)

    def steps(count):
        for _ in range(count):
            x, y = (t.to(device) for t in next(loader))
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return steps


def reference_deposit(args, device, root, partition):
    """steps -> None: the deposit's losses, T0 and each branch with a forward of its own through both parts."""
    stage = stage_args(train_deposit, args)
    lower, upper = split_network(build_network(args.arch, CLASSES, SIZE).to(device), stage.split_at)
    target = build_deposit_module(lower, 0, SIZE).train()
    deposit = build_deposit_module(lower, stage.prune_ratio, SIZE).train()
    for original in (lower, upper):
        original.requires_grad_(False).eval()
    optimizer = torch.optim.SGD([*target.parameters(), *deposit.parameters()], 0.01, 0.9, weight_decay=5e-4)
    loader = reference_loader(root, args, partition.deposit_classes)
    kept, gone = (torch.tensor(c, device=device) for c in (partition.preserved_classes, partition.deposit_classes))

    def kd(student, teacher, t=4.0):
        return t * t * F.kl_div(F.log_softmax(student / t, 1), F.softmax(teacher / t, 1), reduction="batchmean")

    def attention(features):
        return F.normalize(features.pow(2).mean(1).flatten(1))

    def steps(count):
        for _ in range(count):
            x, y = (t.to(device) for t in next(loader))
            with torch.no_grad():
                f_0 = lower(x)
                z_0 = upper(f_0)
            f_t, f_r = target(x), deposit(x)
            z_t, z_r = upper(f_t), upper(f_r)
            recover = z_t.detach().clone()
            recover[:, gone] = z_r[:, gone]
            terms = [F.cross_entropy(z_t, torch.randint(CLASSES, y.shape, device=device)),
                     -100 * (attention(f_t) - attention(f_0)).pow(2).mean(),
                     5 * kd(z_t[:, kept], z_0[:, kept]), kd(z_r[:, gone], z_0[:, gone]),
                     0.1 * F.cross_entropy(recover, y)]
            optimizer.zero_grad()
            sum(terms).backward()
            optimizer.step()
            [term.item() for term in terms]

    return steps


def _prepare(flags, root, stage, ours):
    """Make the steps of one side, kept as its process' global, and warm them up."""
    global side
    args = argparse.Namespace(**flags)
    device, partition = torch.device(args.device), make_partition("folder", root, draw="first")
    if ours:
        runtime = Runtime.of(args)
        classes = partition.classes("all" if stage == "original" else "deposit")
        images = load_images(partition, root, "train", classes).to(device)
        epoch = (our_original if stage == "original" else our_deposit)(args, runtime, partition)

        def steps(count):
            rows = torch.arange(count * args.batch_size, device=device) % len(images)
            epoch(images[rows])
    else:
        steps = (reference_original(args, device, root) if stage == "original"
                 else reference_deposit(args, device, root, partition))
    # the counter of operations sees what eager mode calls
    side = argparse.Namespace(steps=steps, device=device, counted=ours and not args.compile)
    steps(min(args.steps, 3))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # in the first steps cuDNN tries algorithms out


def _seconds_per_step(count):
    return seconds_of(lambda: side.steps(count), side.device) / count


def _memory_and_work():
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if side.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    figures = {"peak_memory_bytes": memory}
    if side.counted:
        with FlopCounterMode(display=False) as counter:
            side.steps(1)
        figures["flops_per_step"] = counter.get_total_flops()
    return figures


def matmul_peak(flags, repeats=5):
    """FLOP/s of the best of some square matrix products, in the precision that our steps run in."""
    runtime = Runtime.of(argparse.Namespace(**flags))
    size = 16384 if runtime.device.type == "cuda" else 2048  # large, so that its start counts for nothing
    kind = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=runtime.device, dtype=kind) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, runtime.device) for _ in range(repeats + 1))


def compare(flags, root, stage):
    """({side: figures} of a stage, FLOP/s of matrix products). Both sides and the matrix products take turns, since a
    machine that others share is not as fast at one time as at another; a figure is the median of its rounds. Each has
    a process of its own, so that its peak memory is its own."""
    args, rounds, peak, figures = argparse.Namespace(**flags), {"ours": [], "reference": []}, 0, {}
    with contextlib.ExitStack() as stack:
        multiplying, *sides = (stack.enter_context(own_process(*prepare)) for prepare in (
            (), *((_prepare, flags, root, stage, name == "ours") for name in rounds)))
        for _ in range(args.rounds):
            for name, process in zip(rounds, sides):
                rounds[name].append(process.submit(_seconds_per_step, args.steps).result())
            peak = max(peak, multiplying.submit(matmul_peak, flags).result())
        for name, process in zip(rounds, sides):
            seconds = statistics.median(rounds[name])
            images_s = args.batch_size / seconds
            figures[name] = {"seconds_per_step": seconds, "rounds": rounds[name], "images_per_s": images_s,
                             "seconds_per_epoch": EPOCH * (1.0 if stage == "original" else 0.3) / images_s,
                             **process.submit(_memory_and_work).result()}
    return figures, peak


def seconds_of(call, device):
    """Wall time of call(), with the work that it leaves to a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def own_process(prepare=None, *arguments):
    """A process that makes ready by prepare(*arguments), and then does what is submitted to it."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare, arguments)


def main(args):
    runtime = Runtime.of(args)
    flags = {**vars(args), "device": runtime.device.type}
    report = {**runtime.describe(), "arch": args.arch, "batch_size": args.batch_size, "compile": args.compile,
              "steps": args.steps}
    peaks = []
    with tempfile.TemporaryDirectory() as root:
        make_images(root, 4 * args.batch_size)
        for stage in ("original", "deposit"):
            report[stage], peak = compare(flags, root, stage)
            peaks.append(peak)
    report["matmul_flops_per_s"] = max(peaks)
    for stage in ("original", "deposit"):
        ours, reference = report[stage]["ours"], report[stage]["reference"]
        report[stage]["speedup"] = ours["images_per_s"] / reference["images_per_s"]
        if "flops_per_step" in ours:
            report[stage]["share_of_peak"] = (ours["flops_per_step"] / ours["seconds_per_step"]
                                              / report["matmul_flops_per_s"])
    print(json.dumps(report, indent=2))
    if args.out:
        save_json(args.out, report)


if __name__ == "__main__":
    run(main, get_args_parser())
