"""Table 3: how much a student learns from a teacher. Trains a student on the whole training set, from its labels and by
distillation from T0, T or R, and measures its Pre Acc and Dep Acc."""

import os

import torch
import torch.nn.functional as F

from datasets import batches, evaluation_batches, evaluation_sets, load_images, read_partition
from datasets.batches import images_per_step, steps_per_epoch
from models import losses
from models.architectures import ARCHITECTURES, build_network
from models.checkpoints import describe, network_of, read
from utils.checkpoint import save_checkpoint
from utils.cli import add_optimiser_args, add_running_args, add_schedule_args, bounded, make_parser, path, run
from utils.errors import UserError
from utils.metrics import count_correct, metrics_path, refuse_other_figures, table1, write_metrics
from utils.optim import LossMeter, learning_rate, make_optimizer, take_step
from utils.run import TrainingRun, already_done, settings_of
from utils.runtime import Runtime


def get_args_parser():
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--save_path", type=path, default=os.path.join("checkpoints", "lirf", "student"),
                       help="folder of the student: gets student.pt, the log, the resumable state, metrics.json "
                            "and, if the partition holds images out, metrics_val.json")
    files.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    files.add_argument("--teacher", type=path, default=os.path.join("checkpoints", "lirf", "target.pt"),
                       help="original.pt, target.pt or retrained.pt")
    files.add_argument("--partition", type=path, default=None,
                       help="manifest that tells the preserved and the deposit classes; unset: the one in the "
                            "teacher's file")
    student = parser.add_argument_group("student and distillation (the paper's settings are not known)")
    student.add_argument("--student", choices=list(ARCHITECTURES), default="cnn", help="the student's architecture")
    student.add_argument("--distillation", choices=["none", "logits", "attention"], default="logits",
                         help="logits: (1 - alpha) CE + alpha KD (Hinton et al., 2015); attention: CE + beta times the "
                              "sum of L_at over the layers of one resolution (Zagoruyko and Komodakis, 2017)")
    student.add_argument("--alpha", type=bounded(float, 0, 1), default=0.9, help="share of KD in --distillation logits")
    student.add_argument("--beta", type=bounded(float, 0), default=1000.0, help="weight of --distillation attention")
    student.add_argument("--temperature", type=bounded(float, 0, above=True), default=4.0, help="tau of KD")
    add_schedule_args(add_optimiser_args(parser, epochs=30, lr=0.1))
    add_running_args(parser)
    return parser


def with_layers(network, x):
    """(logits, [output of each layer before the head])."""
    layers = []
    for part in network[:-1]:
        x = part(x)
        layers.append(x)
    return network[-1](x), layers


def attention_pairs(student_layers, teacher_layers):
    """The last layer of each resolution that both have, as pairs."""
    last = [{f.shape[-1]: f for f in layers} for layers in (student_layers, teacher_layers)]
    return [(last[0][size], last[1][size]) for size in sorted(last[0].keys() & last[1].keys(), reverse=True)]


def require_attention_pairs(arch, teacher, partition):
    """Raise UserError when a student of this architecture has no layer of the resolution of one of the teacher's."""
    x = torch.zeros(1, 3, partition.image_size, partition.image_size)
    student = build_network(arch, partition.num_classes, partition.image_size).eval()
    with torch.no_grad():
        if not attention_pairs(with_layers(student, x)[1], with_layers(teacher, x)[1]):
            raise UserError(f"--student {arch}: none of its layers has the resolution of one of the teacher's at "
                            f"{partition.image_size} pixels: choose another student, or another --image_size of "
                            f"partition_data.py")


def train_one_epoch(student, teacher, optimizer, images, runtime, training, args, epoch):
    """One pass over the images; returns the mean of every loss."""
    student.train()
    # feature maps where they are asked for, else the whole pass, which may be captured
    outputs = with_layers if args.distillation == "attention" else lambda network, x: (network(x), None)
    meter, steps = LossMeter(), steps_per_epoch(images, args.batch_size)
    data = batches(images, args.batch_size, generator=runtime.generator(epoch))
    for i, (x, y) in enumerate(training.progress(data, epoch, steps)):
        with runtime.autocast():
            if args.distillation != "none":
                with torch.no_grad():
                    z_0, f_0 = outputs(teacher, x)
            z, f = outputs(student, x)
        terms = {"ce": F.cross_entropy(z.float(), y)}
        terms["loss"] = terms["ce"]
        if args.distillation == "logits":
            terms["kd"] = losses.distillation(z, z_0, args.temperature)
            terms["loss"] = (1 - args.alpha) * terms["ce"] + args.alpha * terms["kd"]
        elif args.distillation == "attention":
            terms["at"] = sum(losses.attention_transfer(a, b) for a, b in attention_pairs(f, f_0))
            terms["loss"] = terms["ce"] + args.beta * terms["at"]
        meter.update(terms, len(y))
        take_step(optimizer, terms["loss"], learning_rate(args, epoch * steps + i, steps), args.clip_norm)
    return meter.means()


def accuracies(counts, partition):
    """Pre, Dep and Avg Acc of a student, which has no F."""
    return {key: value for key, value in table1(counts, partition).items() if key.endswith("_acc")}


def record(args, partition, teacher, counts):
    """Write the student's figures into the metrics files; teacher: its kind of checkpoint, counts: {split: counts}."""
    for split, of_split in counts.items():
        figures = accuracies(of_split, partition)
        write_metrics(metrics_path(args.save_path, split), partition,
                      student={**figures, "counts": of_split, "teacher": teacher, "distillation": args.distillation})
        print(f"{split}: Pre Acc {figures['pre_acc']:.2f}, Dep Acc {figures['dep_acc']:.2f}")


def main(args):
    runtime = Runtime.of(args)
    content, partition = read(args.teacher, ("original", "target", "retrained"))
    if args.partition is not None:
        partition = partition.other_draw(read_partition(args.partition), args.partition, args.teacher)
    if content["kind"] != "original" and content["partition"]["hash"] != partition.hash:
        raise UserError(f"{args.teacher} has forgotten other classes than {args.partition} deposits: name the manifest "
                        f"of its draw")
    settings = settings_of(args, precision=runtime.precision, teacher=content["checksum"], partition=partition.hash)
    out = os.path.join(args.save_path, "student.pt")
    done = already_done(out, "student", "student", settings)
    if done is not None:
        record(args, partition, content["kind"], done["counts"])
        return
    teacher = network_of(content, partition, args.teacher).requires_grad_(False)
    if args.distillation == "attention":
        require_attention_pairs(args.student, teacher, partition)
    training = TrainingRun(args.save_path, "student", settings, runtime, args.epochs)
    runtime.place(teacher)
    classes = partition.classes("all")
    images = load_images(partition, args.data_dir, "train", classes).to(runtime.device)
    evaluation = evaluation_sets(partition, args.data_dir, classes, runtime.device)
    refuse_other_figures(args.save_path, evaluation, partition)

    torch.manual_seed(args.seed)
    student = runtime.place(build_network(args.student, len(classes), partition.image_size))
    optimizer = make_optimizer(student.parameters(), args, nesterov=True)
    training.track(optimizer, student=student)
    if args.distillation != "attention" and training.next_epoch < args.epochs:
        runtime.captured(student, images_per_step(images, args.batch_size), partition.image_size)

    def counts_on(split):
        return count_correct(student, evaluation_batches(evaluation[split]), len(classes))

    def logged():  # for the log alone: the last epoch is what is kept
        split = partition.logged_split
        return {f"{split}_{key}": value for key, value in accuracies(counts_on(split), partition).items()}

    for epoch in training.remaining_epochs():
        values = train_one_epoch(student, teacher, optimizer, images, runtime, training, args, epoch)
        training.end_epoch(epoch, values, logged)
    counts = {split: counts_on(split) for split in evaluation}
    record(args, partition, content["kind"], counts)
    save_checkpoint(out, "student", student.state_dict(), **describe(args.student, classes, partition),
                    settings=settings, counts=counts)
    training.finish()
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main, get_args_parser())
