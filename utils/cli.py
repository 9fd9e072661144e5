"""The command line of the scripts: flags that they share, and one line for an error."""

import argparse
import contextlib
import math
import os
import re
import sys
import threading

from utils import distributed
from utils.errors import UserError
from utils.files import locked, stop_between_writes


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, an unknown one beside --help, too, and gives the flags that --preset (or
    preset_flag) names their values."""

    presets, preset_flag = {}, "preset"

    def error(self, message):
        sys.exit(_fail(self.prog, f"{message} (see {self.prog} --help)", 2))

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        unknown = [word for word in words
                   if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        parsed = super().parse_args(args, namespace)
        preset = self.presets.get(getattr(parsed, self.preset_flag, None))
        if preset:  # read again, so that a flag on the command line wins over the preset
            self.set_defaults(**preset)
            parsed = super().parse_args(args, namespace)
        return parsed


def make_parser(description):
    """An ArgumentParser that shows defaults and reports a wrong flag in one line."""
    return _Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)


def prefix(text):
    """An argparse type: the path of files without their endings."""
    if not os.path.basename(text):
        raise argparse.ArgumentTypeError(f"'{text}' names a folder: add a name for the files, as in "
                                         f"{os.path.join(text, 'name')}")
    name = path(text)
    folder = os.path.dirname(os.path.abspath(name))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):  # known now, and not when all is measured
        raise argparse.ArgumentTypeError(f"'{folder}' is no folder that files can be written into: name another")
    return name


def bounded(kind, low=-math.inf, high=math.inf, *, above=False):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high] if `above`."""

    def parse(text):
        value = kind(text)
        try:
            finite = math.isfinite(value)
        except OverflowError:  # an integer of hundreds of digits
            raise argparse.ArgumentTypeError(f"{text[:20]}... is out of range: it is too large") from None
        if not finite or value > high or value < low or above and value == low:
            limits = [f"{'>' if above else '>='} {low}"] if low > -math.inf else []
            limits += [f"<= {high}"] if high < math.inf else []
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {' and '.join(limits) or 'finite'}")
        return value

    parse.__name__ = kind.__name__  # for argparse, which names it where the text is no number
    return parse


def path(text):
    """An argparse type: the path of a file or folder, with ~ expanded."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"'{text}' is an address, not a path: copy the data to this machine and name "
                                         f"their folder")
    return os.path.expanduser(text)


def _device(text):
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is unknown: choose auto, cpu, cuda or cuda:1")
    return text


def add_running_args(parser, *, seed="seed of initialisation, data order, augmentation and random labels",
                     precision=True):
    """Flags of every stage that computes on images: where it runs. seed: what --seed decides, None where nothing is
    drawn; precision: whether there is --precision."""
    group = parser.add_argument_group("running")
    if seed is not None:
        group.add_argument("--seed", type=bounded(int, 0, 2**31 - 1), default=0, help=seed)
    group.add_argument("--device", type=_device, default="auto",
                       help="auto: CUDA when there is a GPU, else the CPU; or cpu, cuda, cuda:1")
    if precision:
        group.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                           help="of training. auto: bfloat16 autocast where the processor has instructions for it, "
                                "else float32. Accuracies are always measured in float32")
    group.add_argument("--deterministic", action="store_true",
                       help="on CUDA choose only algorithms that give the same bits again, which costs some speed; "
                            "a CPU with a given number of threads does so anyway")


def add_optimiser_args(parser, *, epochs, lr, clip_norm=0.0, least_epochs=1):
    """Flags of SGD with momentum 0.9, with a stage's own defaults; returns the group."""
    group = parser.add_argument_group("optimisation (the paper's settings are not known: these defaults are ours)")
    group.add_argument("--epochs", type=bounded(int, least_epochs), default=epochs,
                       help="passes over the training images")
    group.add_argument("--batch_size", type=bounded(int, 1), default=128,
                       help="images a step, those of all devices together")
    group.add_argument("--lr", type=bounded(float, 0, above=True), default=lr, help="peak learning rate")
    group.add_argument("--weight_decay", type=bounded(float, 0), default=5e-4, help="weight decay of SGD")
    group.add_argument("--clip_norm", type=bounded(float, 0), default=clip_norm,
                       help="largest norm of a network's gradient in a step; 0: no limit")
    return group


def add_schedule_args(group):
    """Flags of stages that train from scratch: the learning rate's schedule."""
    group.add_argument("--schedule", choices=["cosine", "step"], default="cosine",
                       help="cosine: falls towards zero; step: times 0.1 at each milestone")
    group.add_argument("--milestones", type=bounded(int, 1), nargs="+", default=None,
                       help="epochs at which --schedule step decays; unset: 80 120")
    group.add_argument("--warmup_epochs", type=bounded(float, 0), default=0.0,
                       help="epochs over which the rate rises linearly from zero")


def run(main, parser, argv=None, *, parallel=False):
    """Call ``main(args)``; a mistake of the user becomes one line on stderr and an exit status.

    parallel: whether torchrun may start the script on several devices (utils.distributed). A script with --save_path
    locks that folder. Status: 0 done, 1 a :class:`UserError` or a failing system, 2 a wrong flag, 3 a training that
    diverged, 130 or 143 stopped by Ctrl-C or SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows its escape
        with contextlib.suppress(AttributeError):  # a test's stand-in
            stream.reconfigure(errors="backslashreplace")
    stop_between_writes()
    # TensorBoard's writer has a thread. Its error is raised again where the run next flushes its log.
    threading.excepthook = lambda failure: None
    try:
        distributed.join()  # before the flags: one rank alone says what is wrong with them
        if distributed.ranks > 1 and not parallel:
            raise UserError("it runs on one device: call it with python, not with torchrun")
        args = parser.parse_args(argv)
        _check_schedule(args)
        alone = hasattr(args, "save_path") and distributed.rank == 0
        with locked(args.save_path) if alone else contextlib.nullcontext():
            main(args)
            distributed.leave()
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        sys.exit(_fail(parser.prog, "stopped; run the same command again, and a training goes on after its last whole "
                       "epoch", 128 + stopped.args[0]))
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        sys.exit(_fail(parser.prog, message, getattr(error, "status", 1)))


# What PyTorch and the system say of a machine that does not suffice -> what to do.
_EXPLANATIONS = (
    (("OutOfMemoryError", "CUDA out of memory", "CUDA error: out of memory", "out of memory on device"),
     "the GPU's memory does not suffice: lower --batch_size, or free the GPU"),
    (("MemoryError", "can't allocate memory", "not enough memory", "Cannot allocate memory"),
     "the memory of this machine does not suffice: lower --batch_size or --image_size, or end other programs"),
    (("can't start new thread", "Resource temporarily unavailable", "libgomp: Thread creation failed"),
     "the system allows no further process or thread: raise its limit (ulimit -u), or set OMP_NUM_THREADS=1"),
    (("more than 1 value per channel",),
     "batch norm cannot train on a single value a channel: raise --batch_size, or use larger images"),
)


def _explained(error):
    """The line that a user gets for an exception; None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "nobody reads the output any more; run the same command again to go on after the last whole epoch"
    text = f"{type(error).__name__}: {error}"
    for signs, advice in _EXPLANATIONS:
        if any(sign in text for sign in signs):
            return advice
    if isinstance(error, OSError):  # disk full, folder not writable, path too long: the system's word is clear enough
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}"
    if distributed.lost_a_rank(error):
        return (f"another process of this run has ended, for the reason above or in torchrun's report below, or the "
                f"processes cannot talk ({text.strip().splitlines()[-1]}); run the same command again to go on "
                f"after the last whole epoch")
    return None


def _check_schedule(args):
    """Refuse a schedule that does nothing, and milestones that no schedule reads; fill in those that are unset."""
    epochs, warmup = getattr(args, "epochs", 0), getattr(args, "warmup_epochs", 0)
    if epochs and warmup >= epochs:
        raise UserError(f"--warmup_epochs {warmup:g} leaves none of --epochs {epochs} at the full rate: give fewer, or "
                        f"train longer")
    if not hasattr(args, "schedule"):
        return
    if args.milestones is None:
        args.milestones = [80, 120]
    elif args.schedule != "step":
        raise UserError("--milestones are read by --schedule step alone: name that schedule, or leave them out")
    if epochs and args.schedule == "step" and min(args.milestones) >= epochs:
        raise UserError(f"--schedule step has no milestone within --epochs {epochs}, so the rate would never fall: set "
                        f"--milestones")


def _fail(prog, message, status):
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    if distributed.first_to_fail():
        print(f"{os.path.basename(prog)}: error: {' '.join(message.split())}", file=sys.stderr)
    return status
