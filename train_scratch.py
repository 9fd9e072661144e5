"""Stage 2: train the original network T0 on all classes, or a network that is compared with: an "Independent" one of
Table 1 on one subset, or R, retrained from scratch without the deposit classes."""

import os

import torch
import torch.nn.functional as F

from datasets import batches, evaluation_batches, evaluation_sets, load_images, make_partition, read_partition
from datasets.batches import images_per_step, steps_per_epoch
from datasets.partition import save_partition
from models.architectures import ARCHITECTURES, build_network
from models.checkpoints import describe
from models.weights import imagenet_weights, load_weights, read_weights
from utils import distributed
from utils.checkpoint import checksum, is_ours, load_checkpoint, save_checkpoint
from utils.cli import add_optimiser_args, add_running_args, add_schedule_args, make_parser, path, run
from utils.errors import UserError
from utils.metrics import count_correct, percent, record_network, refuse_other_figures
from utils.optim import LossMeter, learning_rate, make_optimizer, take_step
from utils.run import TrainingRun, already_done, settings_of
from utils.runtime import Runtime

# --subset -> (kind of checkpoint, its name, subset of the classes that it is trained on, that its head has)
SUBSETS = {
    "all": ("original", "original", "all", "all"),
    "deposit": ("independent", "independent_deposit", "deposit", "deposit"),
    "preservation": ("independent", "independent_preservation", "preservation", "preservation"),
    "retrain": ("retrained", "retrained", "preservation", "all"),
}


def get_args_parser():
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", type=path, default=os.path.join("checkpoints", "lirf"),
                       help="folder of the run: gets original.pt, the logs and the resumable state")
    files.add_argument("--data_dir", type=path, default="data",
                       help="folder that holds the data set, or gets the download")
    files.add_argument("--partition", type=path, default=None,
                       help="manifest of partition_data.py; unset: partition.json in --save_path, made for CIFAR-10 "
                            "with 30 %% of the classes drawn by --seed when absent")
    network = parser.add_argument_group("network")
    network.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet18", help="architecture of T0")
    network.add_argument("--subset", choices=list(SUBSETS), default="all",
                         help="all: the original network T0; deposit, preservation: Table 1's Independent network of "
                              "that subset, with a head of its classes only; retrain: R, trained on the preservation "
                              "set with the head of all classes")
    network.add_argument("--weights", type=path, default=None,
                         help="start from weights that others trained: a file of torch.save or safetensors in the "
                              "layout of torchvision, timm, pytorch-cifar or pytorch_resnet_cifar10, or imagenet for "
                              "torchvision's; with --epochs 0 they are measured and written as they are")
    # 30 epochs are our choice; the authors' probable recipe is
    # --epochs 160 --schedule step --milestones 80 120
    add_schedule_args(add_optimiser_args(parser, epochs=30, lr=0.1, least_epochs=0))
    add_running_args(parser)
    return parser


@distributed.by_rank_0
def obtain_partition(args):
    """The manifest that the flags mean. Raises UserError when the folder has figures or a manifest of another."""
    kept = os.path.join(args.save_path, "partition.json")
    given = read_partition(args.partition) if args.partition is not None else None
    partition = read_partition(kept) if os.path.exists(kept) else given
    if given is not None and given.hash != partition.hash:
        raise UserError(f"{args.save_path} holds a run of another partition: choose another --save_path")
    partition = partition or make_partition("cifar10", args.data_dir, seed=args.seed)
    refuse_other_figures(args.save_path, ("test", "val"), partition)
    return partition


@distributed.by_rank_0
def keep_partition(args, partition):
    """Write the manifest beside the run, for the later stages."""
    kept = os.path.join(args.save_path, "partition.json")
    if not os.path.exists(kept):
        save_partition(kept, partition)


def train_one_epoch(network, optimizer, images, runtime, training, args, epoch):
    """One pass over the images; returns {"loss": mean cross-entropy, "lr": last rate}."""
    network.train()
    meter, steps = LossMeter(), steps_per_epoch(images, args.batch_size)
    data = batches(images, args.batch_size, generator=runtime.generator(epoch))
    for i, (x, y) in enumerate(training.progress(data, epoch, steps)):
        lr = learning_rate(args, epoch * steps + i, steps)
        with runtime.autocast():
            logits = network(x)
        loss = F.cross_entropy(logits.float(), y)
        meter.update({"loss": loss}, len(x))
        take_step(optimizer, loss, lr, args.clip_norm)
    return {**meter.means(), "lr": lr}


def refuse_other_original(args, partition):
    """Raise UserError when --weights is a file of ours that is no original or, taken as it is, was trained on images
    normalised otherwise. Say so where the weights may have been trained on the images that are held out here."""
    of_weights = {}  # of files of others nobody knows
    if is_ours(args.weights):  # T has forgotten, and a damaged file is no original
        of_weights = load_checkpoint(args.weights, "original")["partition"]
        if args.epochs == 0 and (of_weights["mean"], of_weights["std"]) != (partition.mean, partition.std):
            raise UserError(f"--weights {args.weights} was trained on images normalised otherwise: partition with its "
                            f"--mean and --std, or train with --epochs")
    if partition.val_fraction and of_weights.get("val_fraction") != partition.val_fraction and distributed.rank == 0:
        print(f"the images held out may be among those that {args.weights} was trained on, so T0 may do better on them "
              f"than on the test set")


def initial_network(args, num_classes, partition):
    """(network, what it starts from): --arch from scratch (None), or with --weights, then named by their checksum.
    Raises UserError for weights that do not fit, or where there is nothing to train."""
    if args.weights is not None and args.subset != "all":
        raise UserError(f"--subset {args.subset} is trained from scratch: weights of others may have seen the classes "
                        f"that it must not know, so leave --weights out")
    torch.manual_seed(args.seed)
    network = build_network(args.arch, num_classes, partition.image_size)
    if args.weights is None:
        if args.epochs == 0:
            raise UserError("--epochs 0 trains nothing: name the weights that are to be the original with --weights")
        return network, None
    if args.weights == "imagenet":
        tensors = imagenet_weights(args.arch, partition.image_size)
    else:
        refuse_other_original(args, partition)
        tensors = read_weights(args.weights)
    load_weights(network, args.arch, partition.image_size, tensors, f"--weights {args.weights}",
                 keep_head=args.epochs == 0)
    return network, checksum({"tensors": tensors})


def main(args):
    runtime = Runtime.of(args)
    partition = obtain_partition(args)
    kind, name, trained, head = SUBSETS[args.subset]
    classes = partition.classes(head)
    network, weights = initial_network(args, len(classes), partition)
    settings = settings_of(args, partition=partition.hash, precision=runtime.precision, weights=weights)
    out = os.path.join(args.save_path, f"{name}.pt")
    done = already_done(out, kind, name, settings)
    keep_partition(args, partition)
    if done is not None:
        record_network(args.save_path, partition, kind, done["counts"], classes)
        return
    training = TrainingRun(args.save_path, name, settings, runtime, args.epochs)

    with distributed.rank_0_first():
        images = load_images(partition, args.data_dir, "train", partition.classes(trained), download=True)
        images = images.to(runtime.device)
        evaluation = evaluation_sets(partition, args.data_dir, classes, runtime.device)
    for image_set in (images, *evaluation.values()):  # an Independent network numbers its own classes from 0
        image_set.labels = torch.searchsorted(torch.tensor(classes, device=runtime.device), image_set.labels)

    def counts_on(split):
        return count_correct(network, evaluation_batches(evaluation[split]), len(classes))

    runtime.place(network)
    optimizer = make_optimizer(network.parameters(), args, nesterov=True)
    training.track(optimizer, network=network)
    if training.next_epoch < args.epochs:
        runtime.captured(network, images_per_step(images, args.batch_size), partition.image_size)
    parallel = distributed.parallel(network)
    logged = partition.logged_split  # for the log alone: the last epoch is what is kept
    for epoch in training.remaining_epochs():
        values = train_one_epoch(parallel, optimizer, images, runtime, training, args, epoch)
        training.end_epoch(epoch, values, lambda: {f"{logged}_acc": percent(counts_on(logged))})

    if distributed.rank == 0:
        counts = {split: counts_on(split) for split in evaluation}
        record_network(args.save_path, partition, kind, counts, classes)
        # the checkpoint last: it says that the stage is complete
        save_checkpoint(out, kind, network.state_dict(), **describe(args.arch, classes, partition),
                        settings=settings, counts=counts)
        training.finish()
        print(f"wrote {out}: test accuracy {percent(counts['test']):.2f} over {len(classes)} classes")


if __name__ == "__main__":
    run(main, get_args_parser(), parallel=True)
