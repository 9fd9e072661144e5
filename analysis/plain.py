"""The original network trained the usual way: files decoded and augmented by torchvision in a DataLoader's processes at
every epoch, float32, NCHW, .item() at every step. Its figures show whether train_scratch.py's ways to be fast cost
accuracy; its parts are the reference of analysis/benchmark.py."""

import os
import sys

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
from models import ARCHITECTURES, build_network
from models.files import describe
from train_scratch import count_correct, evaluation_sets, obtain_partition
from utils.checkpoint import save_checkpoint
from utils.cli import add_optimiser_args, add_running_args, bounded, make_parser, run
from utils.errors import UserError
from utils.metrics import record_original
from utils.run import TrainingRun, already_done, learning_rate, settings_of
from utils.runtime import Runtime


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--save_path", default=os.path.join("checkpoints", "plain"),
                        help="folder of the run: gets original.pt, figures, logs")
    parser.add_argument("--data_dir", default="data", help="image folder: train/<class>/, test/<class>/")
    parser.add_argument("--partition", default=None, help="manifest, as train_scratch.py's")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet18", help="architecture of T0")
    parser.add_argument("--workers", type=bounded(int, 0), default=os.cpu_count(), help="DataLoader processes")
    add_optimiser_args(parser, epochs=30, lr=0.1, schedule="cosine")
    add_running_args(parser)
    parser.set_defaults(precision="fp32")
    return parser


def training_files(root, size, mean, std):
    """torchvision's ImageFolder of root/train/<class>/, images cropped, flipped and normalised when they are read."""
    return torchvision.datasets.ImageFolder(os.path.join(root, "train"), transforms.Compose([
        transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(mean, std)]))


def training_images(root, partition):
    """The partition's training images among those files. Raises UserError when the classes are others."""
    files = training_files(root, partition.image_size, partition.mean, partition.std)
    if files.classes != partition.class_names:
        raise UserError(f"the classes of {root} are not the partition's: give the folder that it was made of")
    labels = torch.tensor(files.targets)
    rows = [(labels == c).nonzero()[:, 0][partition.rows("train", c)] for c in partition.classes("all")]
    return Subset(files, torch.cat(rows).tolist())


def training_step(network, args):
    """(x, y, learning rate) -> loss: a step of SGD on cross-entropy, with the flags of add_optimiser_args."""
    optimizer = torch.optim.SGD(network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
                                nesterov=args.momentum > 0)

    def step(x, y, lr):
        optimizer.param_groups[0]["lr"] = lr
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return optimizer, step


def main(args):
    if not os.path.isdir(os.path.join(args.data_dir, "train")):
        raise UserError(f"{args.data_dir} holds no folder train/<class>/, from which alone this training reads")
    if args.precision != "fp32" or args.compile or args.clip_norm:
        raise UserError("--precision but fp32, --compile and --clip_norm are train_scratch.py's: leave them out here")
    runtime = Runtime(args)
    partition = obtain_partition(args)
    settings = settings_of(args, leave_out=("save_path", "data_dir", "device", "partition"), partition=partition.hash)
    out = os.path.join(args.save_path, "original.pt")
    if already_done(out, "original", "original", settings):
        return
    training = TrainingRun(args.save_path, "original", settings, runtime, args.epochs)
    data = training_images(args.data_dir, partition)
    evaluation = evaluation_sets(partition, args, partition.classes("all"), runtime.device)

    torch.manual_seed(args.seed)
    network = build_network(args.arch, partition.num_classes, partition.image_size).to(runtime.device)
    optimizer, step = training_step(network, args)
    training.track(optimizer, network=network)
    for epoch in training.remaining_epochs():
        order = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers, generator=order,
                            pin_memory=runtime.device.type == "cuda")
        network.train()
        total, steps = 0.0, len(loader)
        for i, (x, y) in enumerate(training.progress(loader, epoch, steps)):
            lr = learning_rate(args, epoch * steps + i, steps)
            total += len(y) * step(x.to(runtime.device), y.to(runtime.device), lr)
        training.end_epoch(epoch, {"loss": total / len(data)})

    counts = {split: count_correct(network, images, partition.num_classes, runtime)
              for split, images in evaluation.items()}
    record_original(args.save_path, partition, counts)
    save_checkpoint(out, "original", network.state_dict(), **describe(args.arch, partition.classes("all"), partition),
                    settings=settings, counts=counts)
    training.finish()
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main, get_args_parser())
