"""Stage 2: train the original network T0 on all classes, or an "Independent" network of Table 1 on one subset."""

import os

import torch
import torch.nn.functional as F

from datasets import batches, load_images, make_partition, read_partition
from datasets.batches import steps_per_epoch
from datasets.partition import save_partition
from models import ARCHITECTURES, build_network
from models.files import counts_of, describe
from utils import distributed
from utils.checkpoint import save_checkpoint
from utils.cli import add_optimiser_args, add_running_args, make_parser, run
from utils.errors import UserError
from utils.metrics import evaluate, percent, record_independent, record_original
from utils.run import LossMeter, TrainingRun, already_done, learning_rate, make_optimizer, settings_of, take_step
from utils.runtime import Runtime


def get_args_parser():
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", default=os.path.join("checkpoints", "lirf"),
                       help="folder of the run: gets original.pt, the logs and the resumable state")
    files.add_argument("--data_dir", default="data", help="folder that holds the data set, or gets the download")
    files.add_argument("--partition", default=None,
                       help="manifest of partition_data.py; unset: partition.json in --save_path, made for CIFAR-10 "
                            "with 30 %% of the classes drawn by --seed when absent")
    network = parser.add_argument_group("network")
    network.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet18", help="architecture of T0")
    network.add_argument("--subset", choices=["all", "deposit", "preservation"], default="all",
                         help="all: the original network T0; deposit, preservation: Table 1's Independent network of "
                              "that subset, with a head of its classes only")
    network.add_argument("--pretrained", action="store_true",
                         help="start from torchvision's ImageNet weights (images above 64 pixels; downloaded)")
    # 30 epochs are our choice; the authors' probable recipe is
    # --epochs 160 --schedule step --milestones 80 120
    add_optimiser_args(parser, epochs=30, lr=0.1, schedule="cosine")
    add_running_args(parser)
    return parser


@distributed.by_rank_0
def obtain_partition(args):
    """The manifest that the flags mean, kept as <save_path>/partition.json."""
    kept = os.path.join(args.save_path, "partition.json")
    if args.partition is not None:
        partition = read_partition(args.partition)
    elif os.path.exists(kept):
        partition = read_partition(kept)
    else:
        partition = make_partition("cifar10", args.data_dir, seed=args.seed)
    if not os.path.exists(kept):
        save_partition(kept, partition)
    elif read_partition(kept) != partition:
        raise UserError(f"{args.save_path} holds a run of another partition: choose another --save_path")
    return partition


def train_one_epoch(network, optimizer, images, runtime, run, args, epoch):
    """One pass over the images; returns {"loss": mean cross-entropy, "lr": last rate}."""
    network.train()
    meter, steps = LossMeter(epoch), steps_per_epoch(images, args.batch_size)
    data = batches(images, args.batch_size, runtime.device, generator=runtime.generator(epoch), mine=distributed.mine)
    for i, (x, y) in enumerate(run.progress(data, epoch, steps)):
        lr = learning_rate(args, epoch * steps + i, steps)
        with runtime.autocast():
            logits = network(x)
        loss = F.cross_entropy(logits.float(), distributed.mine(y))
        meter.update({"loss": loss}, len(x))
        take_step(optimizer, loss * distributed.weight(x, y), lr, args.clip_norm)
    return {**meter.means(), "lr": lr}


def evaluation_sets(partition, args, classes, device):
    """{split: ImageSet} of the test set and, if the partition holds some out, of the validation images."""
    splits = ["test", "val"] if partition.val_fraction else ["test"]
    return {split: load_images(partition, args.data_dir, split, classes).to(device) for split in splits}


def count_correct(network, images, num_classes, runtime):
    """Correct and total per class of one network, in eval mode."""
    network.eval()
    return evaluate(lambda x, y: {"network": network(x)}, images, num_classes, runtime)["network"]


def record(save_path, partition, subset, counts):
    """Write this network's part of Table 1 into the metrics files; counts: {split: counts over its classes}."""
    if subset == "all":
        record_original(save_path, partition, counts)
    else:
        record_independent(save_path, partition, partition.classes(subset), counts)


def main(args):
    runtime = Runtime(args)
    partition = obtain_partition(args)
    classes = partition.classes(args.subset)
    kind, name = ("original", "original") if args.subset == "all" else ("independent", f"independent_{args.subset}")
    settings = settings_of(args, leave_out=("save_path", "data_dir", "partition", "device", "precision"),
                           partition=partition.hash, precision=runtime.precision)
    out = os.path.join(args.save_path, f"{name}.pt")
    done = already_done(out, kind, name, settings)
    if done is not None:
        record(args.save_path, partition, args.subset, counts_of(done, out))
        return
    training = TrainingRun(args.save_path, name, settings, runtime, args.epochs)

    with distributed.rank_0_first():
        images = load_images(partition, args.data_dir, "train", classes, download=True).to(runtime.device)
        evaluation = evaluation_sets(partition, args, classes, runtime.device)
    for image_set in (images, *evaluation.values()):  # an Independent network numbers its own classes from 0
        image_set.labels = torch.searchsorted(torch.tensor(classes, device=runtime.device), image_set.labels)

    torch.manual_seed(args.seed)
    network = runtime.place(build_network(args.arch, len(classes), partition.image_size, args.pretrained))
    if args.compile:
        runtime.compile(network)
    optimizer = make_optimizer(network.parameters(), args, nesterov=args.momentum > 0)
    training.track(optimizer, network=network)
    parallel = distributed.parallel(network)
    shown = partition.logged_split  # for the log alone: the last epoch is what is kept
    for epoch in training.remaining_epochs():
        figures = train_one_epoch(parallel, optimizer, images, runtime, training, args, epoch)
        figures[f"{shown}_acc"] = percent(count_correct(network, evaluation[shown], len(classes), runtime))
        training.end_epoch(epoch, figures)

    counts = {split: count_correct(network, part, len(classes), runtime) for split, part in evaluation.items()}
    if distributed.rank > 0:
        return
    record(args.save_path, partition, args.subset, counts)
    # the checkpoint last: it says that the stage is complete
    save_checkpoint(out, kind, network.state_dict(), **describe(args.arch, classes, partition),
                    settings=settings, counts=counts)
    training.finish()
    print(f"wrote {out}: test accuracy {percent(counts['test']):.2f} over {len(classes)} classes")


if __name__ == "__main__":
    # compiled networks on two processes did not come to an end in a trial
    run(main, get_args_parser(), parallel={"compile": False})
