"""Stages that are killed, stopped or starved, and the same command again: the results equal those of a run left
alone, file for file and bit for bit. Runs the four stages on the embedded digits, each in a process of its own."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process would wait for threads that it has not got
import sklearn.datasets  # noqa: F401  which a stage would load when it needs it
import sklearn.model_selection  # noqa: F401
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
import partition_data
import train_deposit
import train_scratch
import withdraw
from datasets import read_partition
from utils.checkpoint import load_checkpoint, load_json
from utils.cli import bounded, make_parser, run
from utils.errors import UserError
from utils.run import current_commit
from utils.runtime import Runtime

STAGES = {"partition": partition_data, "original": train_scratch, "deposit": train_deposit, "withdraw": withdraw}
KINDS = ("original", "target", "deposit", "recover", "state")
MOST = 3  # faults in a row before a stage may end


def flags_of(stage, save, epochs):
    """A stage's flags on the digits, small enough to be run a hundred times."""
    flags = {"partition": ["--dataset", "digits", "--image_size", "8", "--out", os.path.join(save, "partition.json")],
             "original": ["--save_path", save, "--arch", "resnet8"], "deposit": ["--save_path", save],
             "withdraw": ["--save_path", save, "--data_dir", save]}[stage]
    if stage != "partition":
        flags += ["--device", "cpu", "--precision", "fp32"]
    if stage in ("original", "deposit"):
        flags += ["--epochs", str(epochs)]
    return flags


def _run_stage(script, flags, out, err, most_bytes):
    os.dup2(out, 1)
    os.dup2(err, 2)
    if most_bytes is not None:  # a write beyond this many bytes of a file fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    sys.argv = [f"{script.__name__}.py", *flags]
    run(script.main, script.get_args_parser(), flags)


class Process:
    """A stage in a process of its own, forked from this one, which has loaded the libraries: so a kill meets the stage
    and not Python's start."""

    def __init__(self, stage, save, epochs, most_bytes=None):
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        sys.stdout.flush()
        self.process = multiprocessing.get_context("fork").Process(target=_run_stage, args=(
            STAGES[stage], flags_of(stage, save, epochs), self.out.fileno(), self.err.fileno(), most_bytes))
        self.started = time.monotonic()
        self.process.start()
        self.pid = self.process.pid

    def seconds(self):
        return time.monotonic() - self.started

    def reaches(self, condition, every):
        """Wait until the condition holds; False if the process ends before."""
        while self.process.is_alive():
            if condition():
                return True
            time.sleep(every)
        return False

    def end(self, signum=None):
        """Send a signal, if one is given, and wait: (exit status, text on stdout, lines on stderr)."""
        if signum is not None:
            os.kill(self.pid, signum)
        self.process.join()
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return self.process.exitcode, texts[0], texts[1].splitlines()


def records_of(path):
    """The epochs of a log, without their times; every line must be whole."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file.read().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records if "epoch" in record]


def state_of(save):
    """What is on the disk: {file: what it holds}. Raises when a file that is no .part cannot be read whole, or when a
    log and the resumable state beside it disagree on the epochs that are done."""
    state = {}
    for name in sorted(os.listdir(save)):
        path = os.path.join(save, name)
        if name.endswith(".part") or os.path.isdir(path):
            continue
        if name.endswith(".pt"):
            content = load_checkpoint(path, KINDS)
            state[name] = f"epoch {content['next_epoch']}" if content["kind"] == "state" else "whole"
        elif name.endswith("_log.jsonl"):
            state[name] = len(records_of(path))
        else:
            (read_partition if name == "partition.json" else load_json)(path)
            state[name] = "whole"
    for stage in ("original", "deposit"):
        logged, saved = state.get(f"{stage}_log.jsonl", 0), state.get(f"{stage}_state.pt")
        if saved and logged - int(saved.split()[1]) not in (0, 1):  # the log is written first
            raise UserError(f"the {stage} log has {logged} epochs, its state {saved}")
    return state


def result_of(save):
    """All that a run leaves, in a form to compare: bytes of checkpoints and figures, epochs of logs, TensorBoard's
    curves. Raises when an epoch is missing or doubled, or something temporary is left."""
    result = {}
    for folder, _, names in os.walk(save):
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith((".pt", ".json")):
                with open(path, "rb") as file:
                    result[name] = file.read()
            elif name.endswith("_log.jsonl"):
                result[name] = records_of(path)
                if [record["epoch"] for record in result[name]] != list(range(1, len(result[name]) + 1)):
                    raise UserError(f"{name} does not hold every epoch once, in order")
            elif not name.startswith("events.out"):
                raise UserError(f"{name} is left over")
    for stage in ("original", "deposit"):
        curves = os.path.join(save, "tensorboard", stage)
        if os.path.isdir(curves):
            events = EventAccumulator(curves, size_guidance={"scalars": 0}).Reload()
            result[f"tensorboard/{stage}"] = {tag: [(e.step, e.value) for e in events.Scalars(tag)]
                                              for tag in events.Tags()["scalars"]}
    return result


class Reference:
    """The run that is left alone: for each stage its duration and what the folder holds after it."""

    def __init__(self, root, epochs):
        self.epochs, self.seconds, self.results, self.saves = epochs, {}, {}, {}
        before = None
        for stage in STAGES:
            save = os.path.join(root, f"after_{stage}")
            shutil.copytree(before, save) if before else os.makedirs(save)
            process = Process(stage, save, epochs)
            status, _, err = process.end()
            if status:
                raise UserError(f"the run that is left alone failed at {stage}: {err}")
            self.seconds[stage], self.results[stage], self.saves[stage] = process.seconds(), result_of(save), save
            before = save

    def folder_before(self, stage, save):
        """A copy of what the stages before left."""
        stages = list(STAGES)
        if stage == stages[0]:
            os.makedirs(save)
        else:
            shutil.copytree(self.saves[stages[stages.index(stage) - 1]], save)


def parts(save):
    """The files that are being written: {(name, inode)}. Empty when they vanish while looked at."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(save):
            if entry.name.endswith(".part"):
                found.add((entry.name, entry.inode()))
    return found


def epochs_saved(save, stage):
    path = os.path.join(save, f"{stage}_state.pt")
    if os.path.exists(path):
        return load_checkpoint(path, "state")["next_epoch"]
    return epochs_logged(save, stage) if os.path.exists(os.path.join(save, f"{stage}.pt")) else 0


def epochs_logged(save, stage):
    with contextlib.suppress(FileNotFoundError), open(os.path.join(save, f"{stage}_log.jsonl"), "rb") as file:
        return file.read().count(b'"epoch": ')
    return 0


def kill(stage, save, reference, rng):
    """SIGKILL, either at a random time or in the middle of a write; None when the stage ended before."""
    process = Process(stage, save, reference.epochs)
    if rng.random() < 0.5:
        moment, until = "any", rng.uniform(0, reference.seconds[stage])
        reached = process.reaches(lambda: process.seconds() >= until, 0.005)
    else:
        moment, seen = "writing", set()
        count = rng.randrange(1, reference.epochs + 3) if stage in ("original", "deposit") else 1

        def writing():
            seen.update(parts(save))
            return len(seen) >= count

        reached = process.reaches(writing, 0.0002)
    seconds = round(process.seconds(), 2)
    status, out, _ = process.end(signal.SIGKILL if reached else None)
    if status != -signal.SIGKILL:
        return None
    return {"fault": "SIGKILL", "moment": moment, "seconds": seconds, "half-written": sorted(n for n, _ in parts(save))}


def stop(stage, save, reference, rng):
    """Ctrl-C or SIGTERM once the stage has begun to work: one line, and status 130 or 143."""
    signum = rng.choice((signal.SIGINT, signal.SIGTERM))
    process = Process(stage, save, reference.epochs)
    begun = {"partition": "partition.json.part", "withdraw": "recover.pt.part"}.get(stage, f"{stage}_log.jsonl")
    if not process.reaches(lambda: os.path.exists(os.path.join(save, begun)), 0.0002):
        process.end()
        return None
    if begun.endswith("jsonl"):  # the other stages end at once
        time.sleep(rng.uniform(0, 0.3 * reference.seconds[stage]))
    seconds = round(process.seconds(), 2)
    status, _, err = process.end(signum)
    if status == 0:
        return None
    if status != 128 + signum or len(err) != 1 or "same command again" not in err[0]:
        raise UserError(f"{signal.Signals(signum).name} gave status {status} and {err}")
    return {"fault": signal.Signals(signum).name, "seconds": seconds, "told": err[0]}


def starve(stage, save, reference, rng):
    """A full disk: writes fail from some size of a file on. One line, and status 1."""
    largest = {"partition": 4_000, "original": 900_000, "deposit": 900_000, "withdraw": 400_000}[stage]
    most = int(2_000 * (largest / 2_000) ** rng.random())  # what the process prints goes to files as well
    process = Process(stage, save, reference.epochs, most_bytes=most)
    status, _, err = process.end()
    if status == 0:
        return None
    if status != 1 or len(err) != 1 or "Traceback" in err[0]:
        raise UserError(f"a disk full at {most} bytes gave status {status} and {err}")
    return {"fault": "full disk", "bytes": most, "told": err[0].replace(save, "run")}


FAULTS = {"kills": kill, "stops": stop, "full_disk": starve}


def campaign(root, kinds, count, epochs, seed):
    """Yield an object for each of `count` faults and for each stage's end, with the verdict "good" or what was wrong.

    Every stage meets up to MOST faults in a row, and is then left to end."""
    reference, rng, faults, turn = Reference(root, epochs), random.Random(seed), 0, 0
    while faults < count:
        stage, save = list(STAGES)[turn % len(STAGES)], os.path.join(root, f"turn{turn}")
        reference.folder_before(stage, save)
        met = before = 0
        for _ in range(min(rng.randint(1, MOST), count - faults)):
            verdict, record = "good", None
            try:
                record = FAULTS[kinds[faults % len(kinds)]](stage, save, reference, rng)
                if record is None:
                    break
                record["on_disk"] = state_of(save)
                if (after := epochs_saved(save, stage)) < before:
                    raise UserError(f"epoch {before} was saved, and epoch {after} is there")
                before = after
            except (UserError, ValueError) as error:
                verdict = str(error)
            faults, met = faults + 1, met + 1
            yield {"turn": turn, "stage": stage, **(record or {}), "verdict": verdict}
        status, out, err = Process(stage, save, epochs).end()
        # the epoch that the disk held last is the one that the command goes on after
        resumed = f"after epoch {before} of" in out or "nothing to do" in out or not before
        try:
            same = status == 0 and resumed and result_of(save) == reference.results[stage]
            verdict = "good" if same else f"status {status}, {err}, or another result"
        except (UserError, ValueError) as error:
            verdict = str(error)
        yield {"turn": turn, "stage": stage, "ended_after": met, "verdict": verdict}
        shutil.rmtree(save)
        turn += 1


def long_run(root, epochs):
    """Yield the resident memory after each epoch of an original and of a deposit."""
    reference = Reference(root, 1)
    for stage in ("original", "deposit"):
        save = os.path.join(root, f"long_{stage}")
        reference.folder_before(stage, save)
        process = Process(stage, save, epochs)
        for epoch in range(1, epochs + 1):
            if not process.reaches(lambda log=(save, stage), epoch=epoch: epochs_logged(*log) >= epoch, 0.01):
                break
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
                resident = next(int(row.split()[1]) for row in file if row.startswith("VmRSS"))
            yield {"stage": stage, "epoch": epoch, "resident_kib": resident}
        status, _, err = process.end()
        records = result_of(save)[f"{stage}_log.jsonl"] if status == 0 else []
        verdict = "good" if len(records) == epochs else f"status {status}, {err}, {len(records)} epochs logged"
        yield {"stage": stage, "ended_after": epochs, "verdict": verdict}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--campaign", nargs="+", choices=[*FAULTS, "long_run"], default=["kills"],
                        help="kills: SIGKILL at random times and within writes; stops: Ctrl-C and SIGTERM; full_disk: "
                             "writes that fail; several: by turns; long_run, alone: memory over many epochs")
    parser.add_argument("--count", type=bounded(int, 1), default=50, help="faults")
    parser.add_argument("--epochs", type=bounded(int, 1), default=4, help="epochs of each training; long_run wants 200")
    parser.add_argument("--seed", type=bounded(int, 0, 2**31 - 1), default=0, help="seed of the faults")
    parser.add_argument("--out", default=None, help="log to write: a JSON object for each fault, end or epoch")
    return parser


def main(args):
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each epoch that ran again
    runtime = Runtime(train_scratch.get_args_parser().parse_args(["--device", "cpu", "--precision", "fp32"]))
    wrong = 0
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as files:
        log = None
        if args.out:
            os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
            log = files.enter_context(open(args.out, "w", encoding="utf-8"))
        records = (long_run(root, args.epochs) if "long_run" in args.campaign else
                   campaign(root, args.campaign, args.count, args.epochs, args.seed))
        head = {"command": ["faults.py", *sys.argv[1:]], "commit": current_commit(), **runtime.describe()}
        for record in itertools.chain([head], records):
            print(json.dumps(record), file=log or sys.stdout, flush=True)
            wrong += record.get("verdict", "good") != "good"
    if wrong:
        raise UserError(f"{wrong} times a promise was not kept: see {args.out or 'above'}")


if __name__ == "__main__":
    run(main, get_args_parser())
