"""How fast the original's and the deposit's step are, in images per second. Beside the original's step stands a
reference written the usual way (files decoded by a DataLoader, float32, NCHW, .item() at every step), by turns."""

import json
import os
import statistics
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import train_deposit
import train_scratch
from datasets import load_images, make_partition
from models.architectures import ARCHITECTURES, build_network
from models.lirf import LIRF
from utils.cli import add_running_args, bounded, make_parser, path, run
from utils.errors import UserError
from utils.files import write_atomically
from utils.optim import make_optimizer
from utils.run import head_of_log
from utils.runtime import Runtime, usable_processors

CLASSES, SIZE = 10, 32  # CIFAR-10's; pixels are random, which changes no speed
UNSHOWN = SimpleNamespace(progress=lambda data, epoch, total: data)  # for a TrainingRun that would show its progress


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet18", help="architecture")
    parser.add_argument("--batch_size", type=bounded(int, 2), default=128, help="images a step")
    parser.add_argument("--steps", type=bounded(int, 1), default=3, help="steps of a turn")
    parser.add_argument("--rounds", type=bounded(int, 1), default=3,
                        help="turns that either side takes, after one to warm up; what counts is the median")
    parser.add_argument("--workers", type=bounded(int, 0), default=usable_processors(),
                        help="DataLoader processes of the reference")
    parser.add_argument("--out", type=path, default=None, help="log to write as well, a line of JSON")
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


def ours(stage, args, runtime, root):
    """A function that takes --steps steps of train_scratch.py or train_deposit.py as they are."""
    partition = make_partition("folder", root, draw="first")
    module = {"original": train_scratch, "deposit": train_deposit}[stage]
    flags = module.get_args_parser().parse_args(
        ["--batch_size", str(args.batch_size), "--device", args.device, "--precision", args.precision])
    network = build_network(args.arch, CLASSES, SIZE)
    if stage == "deposit":
        network = LIRF(network.eval(), partition, flags)
    runtime.place(network)
    if stage == "original":
        optimizer = make_optimizer(network.parameters(), flags, nesterov=True)
        runtime.captured(network, args.batch_size, SIZE)
    else:
        optimizer = train_deposit.optimizer_of(network, flags)
    images = load_images(partition, root, "train", partition.classes("all" if stage == "original" else "deposit"))
    images = images.to(runtime.device)

    def steps():
        part = images[torch.arange(args.steps * args.batch_size, device=runtime.device) % len(images)]
        if stage == "original":
            train_scratch.train_one_epoch(network, optimizer, part, runtime, UNSHOWN, flags, 0)
        else:
            train_deposit.train_one_epoch(network, network, optimizer, part, runtime, UNSHOWN, flags, 0)

    return steps


def reference(args, runtime, root):
    """A function that takes --steps steps of the original's training in a plain loop."""
    data = torchvision.datasets.ImageFolder(os.path.join(root, "train"), transforms.Compose([
        transforms.RandomCrop(SIZE, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.25,) * 3)]))
    # sampled with replacement, so that a few files make a turn's batches, all of which are decoded within the turn
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=args.batch_size * args.steps)
    loader = DataLoader(data, args.batch_size, sampler=sampler, num_workers=args.workers,
                        persistent_workers=args.workers > 0, pin_memory=runtime.device.type == "cuda")
    network = build_network(args.arch, CLASSES, SIZE).to(runtime.device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)

    def steps():
        for x, y in loader:
            x, y = x.to(runtime.device), y.to(runtime.device)
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return steps


def seconds_of(call, device):
    """Wall time of call(), with the work that it leaves to a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def measure(args, runtime, root):
    """{"images_per_s", "speedup"}. The sides take turns, since the speed of a machine that others share changes."""
    sides = {"original": ours("original", args, runtime, root), "deposit": ours("deposit", args, runtime, root),
             "reference": reference(args, runtime, root)}
    seconds = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name, steps in sides.items():
            taken = seconds_of(steps, runtime.device) / args.steps
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    rates = {name: args.batch_size / statistics.median(of_side) for name, of_side in seconds.items()}
    return {"images_per_s": rates, "speedup": rates["original"] / rates["reference"]}


def main(args):
    runtime = Runtime.of(args)
    if args.out and os.path.isdir(args.out):  # before the measuring
        raise UserError(f"--out {args.out} is a folder: name a file in it")
    report = {**head_of_log(runtime), "arch": args.arch, "batch_size": args.batch_size, "steps": args.steps}
    with tempfile.TemporaryDirectory() as root:
        make_images(root, 4 * args.batch_size)
        report |= measure(args, runtime, root)
    print(json.dumps(report, indent=2))
    if args.out:
        write_atomically(args.out, lambda file: file.write(json.dumps(report).encode() + b"\n"))


if __name__ == "__main__":
    run(main, get_args_parser())
