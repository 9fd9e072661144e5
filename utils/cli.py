"""The command line of the stage scripts: one line for an error, flags that are shared."""

import argparse
import math
import os
import sys
import threading

import torch

from utils import distributed, stopping
from utils.errors import UserError


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(_fail(self.prog, f"{message} (see {self.prog} --help)", 2))


def make_parser(description):
    """An ArgumentParser that shows defaults and reports a wrong flag in one line."""
    return _OneLineParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def bounded(kind, low=None, high=None, *, above=False):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high] if `above`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number of type {kind.__name__}") from None
        too_low = low is not None and (value <= low if above else value < low)
        if not math.isfinite(value) or too_low or (high is not None and value > high):
            sign = ">" if above else ">="
            limit = f"{sign} {low}" + (f" and <= {high}" if high is not None else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limit}")
        return value

    return parse


def add_running_args(parser):
    """Flags of every stage that computes on images: where it runs, in which precision."""
    group = parser.add_argument_group("running")
    group.add_argument("--seed", type=bounded(int, 0, 2**31 - 1), default=0,
                       help="seed of initialisation, data order, augmentation and random labels")
    group.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto",
                       help="auto: CUDA when there is a GPU, else the CPU")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                       help="auto: bfloat16 autocast where the processor has instructions for it, else float32")
    group.add_argument("--deterministic", action="store_true",
                       help="on CUDA choose only algorithms that give the same bits again, which costs some speed; "
                            "a CPU with a given number of threads does so anyway")
    return group


def add_optimiser_args(parser, *, epochs, lr, schedule):
    """Flags of SGD with momentum and a learning-rate schedule, with a stage's own defaults."""
    group = parser.add_argument_group("optimisation (the paper's settings are not known: these defaults are ours)")
    group.add_argument("--epochs", type=bounded(int, 1), default=epochs, help="passes over the training images")
    group.add_argument("--batch_size", type=bounded(int, 1), default=128,
                       help="images a step, those of all devices together")
    group.add_argument("--lr", type=bounded(float, 0, above=True), default=lr, help="peak learning rate")
    group.add_argument("--momentum", type=bounded(float, 0, 1), default=0.9, help="momentum of SGD")
    group.add_argument("--weight_decay", type=bounded(float, 0), default=5e-4, help="weight decay of SGD")
    group.add_argument("--schedule", choices=["cosine", "step", "constant"], default=schedule,
                       help="cosine: to zero at the last step; step: times 0.1 at each milestone")
    group.add_argument("--milestones", type=bounded(int, 1), nargs="+", default=[80, 120],
                       help="epochs at which --schedule step decays")
    group.add_argument("--warmup_epochs", type=bounded(float, 0), default=0.0,
                       help="epochs over which the rate rises linearly from zero")
    group.add_argument("--clip_norm", type=bounded(float, 0), default=0.0,
                       help="largest norm of the gradient of a step; 0: no limit")
    group.add_argument("--compile", action="store_true",
                       help="compile the networks with torch.compile: minutes at first, then faster steps")
    return group


def run(main, parser, argv=None, *, parallel=None):
    """Call ``main(args)``; a mistake of the user becomes one line on stderr and an exit status.

    parallel: {flag: the one value that it may have on several devices (utils.distributed)}; None: torchrun is refused.
    Status: 0 done, 1 a :class:`UserError` or a failing file system, 2 a wrong flag,
    130 or 143 stopped by Ctrl-C or SIGTERM.
    """
    distributed.join()
    args = parser.parse_args(argv)
    stopping.install()
    # of TensorBoard's writer, whose error is raised again where the run next flushes its log
    threading.excepthook = lambda failure: None
    try:
        if distributed.ranks > 1:
            _refuse_what_needs_one_device(args, parallel)
        if hasattr(args, "schedule"):
            _refuse_a_schedule_that_does_nothing(args)
        main(args)
        distributed.leave()
    except UserError as error:
        sys.exit(_fail(parser.prog, str(error), 1))
    except OSError as error:
        # disk full, folder not writable, path too long: the operating system's word is clear enough
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_fail(parser.prog, f"{error.strerror or error}{where}", 1))
    except torch.OutOfMemoryError:
        sys.exit(_fail(parser.prog, "the GPU's memory does not suffice: lower --batch_size, or free the GPU", 1))
    except KeyboardInterrupt as stopped:
        sys.exit(_fail(parser.prog, "stopped; run the same command again to go on after the last whole epoch",
                       128 + stopped.args[0]))
    except Exception as error:
        if not distributed.lost_a_rank(error):
            raise
        sys.exit(_fail(parser.prog, "another process of this run has ended, for the reason above or in torchrun's "
                                    "report below; run the same command again to go on after the last whole epoch", 1))


def _refuse_a_schedule_that_does_nothing(args):
    if args.warmup_epochs >= args.epochs:
        raise UserError(f"--warmup_epochs {args.warmup_epochs:g} leaves none of --epochs {args.epochs} at the full "
                        f"rate: give fewer, or train longer")
    if args.schedule == "step" and min(args.milestones) >= args.epochs:
        raise UserError(f"--schedule step has no milestone within --epochs {args.epochs}, so the rate would never "
                        f"fall: set --milestones")


def _refuse_what_needs_one_device(args, parallel):
    if parallel is None:
        raise UserError("it runs on one device: call it with python, not with torchrun")
    for name, value in parallel.items():
        if getattr(args, name) != value:
            raise UserError(f"--{name} runs on one device: leave it out, or call the script with python")


def _fail(prog, message, status):
    sys.stdout.flush()
    if distributed.first_to_fail():
        print(f"{os.path.basename(prog)}: error: {' '.join(message.split())}", file=sys.stderr)
    return status
