"""Stages that are killed, stopped or starved, and the same command again: the results equal those of a run left
alone, file for file and bit for bit. Runs the four stages on the embedded digits, each in a process of its own."""

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter

from forked import Process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import read_partition
from utils.checkpoint import load_checkpoint
from utils.cli import bounded, make_parser, run
from utils.errors import UserError
from utils.files import load_json, read_log

SCRIPTS = {"partition": "partition_data.py", "original": "train_scratch.py", "deposit": "train_deposit.py",
           "withdraw": "withdraw.py"}
KINDS = ("original", "target", "deposit", "difference", "recover", "state")
MOST = 3  # faults in a row before a stage may end


def start(stage, save, epochs, **options):
    """A stage on the digits, small enough to be run a hundred times."""
    flags = {"partition": ["--dataset", "digits", "--image_size", "8", "--out", os.path.join(save, "partition.json")],
             "original": ["--save_path", save, "--arch", "resnet8", "--epochs", epochs],
             "deposit": ["--save_path", save, "--split_at", 2, "--epochs", epochs],
             "withdraw": ["--save_path", save, "--data_dir", save]}[stage]
    if stage != "partition":
        flags += ["--device", "cpu", "--precision", "fp32"]
    return Process(SCRIPTS[stage], *flags, **options)


def epochs_in(path):
    """The epochs of a log, without their times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(path) if "epoch" in record]


def check_disk(save):
    """Raise unless every file that is no .part can be read whole, and logs agree with the resumable states beside
    them on the epochs that are done."""
    for name in sorted(os.listdir(save)):
        path = os.path.join(save, name)
        if name.endswith(".pt"):
            content = load_checkpoint(path, KINDS)
            if content["kind"] == "state":
                logged = len(epochs_in(path.replace("_state.pt", "_log.jsonl")))
                if logged - content["next_epoch"] not in (0, 1):  # the log is written first
                    raise UserError(f"the log of {name} has {logged} epochs, the state {content['next_epoch']}")
        elif name.endswith("_log.jsonl"):
            epochs_in(path)
        elif name.endswith(".json"):
            (read_partition if name == "partition.json" else load_json)(path)


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
                result[name] = epochs_in(path)
                if [record["epoch"] for record in result[name]] != list(range(1, len(result[name]) + 1)):
                    raise UserError(f"{name} does not hold every epoch once, in order")
            elif not name.startswith(("events.out", "partition.json.")):  # a killed partition's stays
                raise UserError(f"{name} is left over")
    for stage in ("original", "deposit"):
        curves = os.path.join(save, "tensorboard", stage)
        if os.path.isdir(curves):
            events = EventAccumulator(curves, size_guidance={"scalars": 0}).Reload()
            result[f"tensorboard/{stage}"] = {tag: [(e.step, e.value) for e in events.Scalars(tag)]
                                              for tag in events.Tags()["scalars"]}
    return result


class Reference:
    """The run that is left alone: for each stage its duration, and what the folder holds before and after it."""

    def __init__(self, root, epochs):
        self.epochs, self.seconds, self.results, self.before = epochs, {}, {}, {}
        save = os.path.join(root, "alone")
        os.makedirs(save)
        for stage in SCRIPTS:
            self.before[stage] = shutil.copytree(save, os.path.join(root, f"before_{stage}"))
            process = start(stage, save, epochs)
            status, _, err = process.end()
            if status:
                raise UserError(f"the run that is left alone failed at {stage}: {err}")
            self.seconds[stage], self.results[stage] = process.seconds(), result_of(save)


def parts(save):
    """Names of the files that are being written."""
    return {name for name in os.listdir(save) if name.endswith(".part")}


def listing(save):
    """Names of the files in a folder with their times: it changes when a stage begins to write."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # one goes while this looks
        found.update((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(save))
    return found


def epochs_saved(save, stage):
    path = os.path.join(save, f"{stage}_state.pt")
    if os.path.exists(path):
        return load_checkpoint(path, "state")["next_epoch"]
    return epochs_logged(save, stage) if os.path.exists(os.path.join(save, f"{stage}.pt")) else 0


def epochs_logged(save, stage):
    path = os.path.join(save, f"{stage}_log.jsonl")
    return len(epochs_in(path)) if os.path.exists(path) else 0


def kill(stage, save, reference, rng):
    """SIGKILL, either at a random time or in the middle of a write; None when the stage ended before."""
    process = start(stage, save, reference.epochs)
    if rng.random() < 0.5:
        fault, until = "SIGKILL at a random time", rng.uniform(0, reference.seconds[stage])
        reached = process.reaches(lambda: process.seconds() >= until)
    else:
        fault, seen = "SIGKILL within a write", set()
        count = rng.randrange(1, reference.epochs + 3) if stage in ("original", "deposit") else 1

        def writing():
            seen.update(parts(save))
            return len(seen) >= count

        reached = process.reaches(writing, 0.0002)
    status, _, _ = process.end(signal.SIGKILL if reached else None)
    return fault if status == -signal.SIGKILL else None


def stop(stage, save, reference, rng):
    """Ctrl-C or SIGTERM once the stage has begun to work: one line, and status 130 or 143."""
    signum = rng.choice((signal.SIGINT, signal.SIGTERM))
    written = listing(save)
    process = start(stage, save, reference.epochs)
    if not process.reaches(lambda: listing(save) != written, 0.0002):
        process.end()
        return None
    if stage in ("original", "deposit"):  # the other stages end at once
        time.sleep(rng.uniform(0, 0.3 * reference.seconds[stage]))
    status, _, err = process.end(signum)
    if status == 0:
        return None
    if status != 128 + signum or len(err) != 1 or "same command again" not in err[0]:
        raise UserError(f"{signal.Signals(signum).name} gave status {status} and {err}")
    return signal.Signals(signum).name


def starve(stage, save, reference, rng):
    """A full disk: writes fail from some size of a file on. One line, and status 1."""
    largest = {"partition": 4_000, "original": 900_000, "deposit": 900_000, "withdraw": 400_000}[stage]
    most = int(2_000 * (largest / 2_000) ** rng.random())  # what the process prints goes to files as well
    status, _, err = start(stage, save, reference.epochs, most_bytes=most).end()
    if status == 0:
        return None
    if status != 1 or len(err) != 1 or "Traceback" in err[0]:
        raise UserError(f"a disk full at {most} bytes gave status {status} and {err}")
    return "full disk"


FAULTS = {"kills": kill, "stops": stop, "full_disk": starve}


def campaign(root, kinds, count, epochs, seed):
    """Yield an object for each of `count` faults and for each stage's end, with the verdict "good" or what was wrong.

    Every stage meets up to MOST faults in a row, and is then left to end."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each epoch that ran again
    reference, rng, faults, turn = Reference(root, epochs), random.Random(seed), 0, 0
    while faults < count:
        stage, save = list(SCRIPTS)[turn % len(SCRIPTS)], os.path.join(root, f"turn{turn}")
        shutil.copytree(reference.before[stage], save)
        before = 0
        for _ in range(min(rng.randint(1, MOST), count - faults)):
            verdict, fault = "good", "one that broke a promise"
            try:
                fault = FAULTS[kinds[faults % len(kinds)]](stage, save, reference, rng)
                if fault is None:
                    break
                check_disk(save)
                if (after := epochs_saved(save, stage)) < before:
                    raise UserError(f"epoch {before} was saved, and epoch {after} is there")
                before = after
            except (UserError, ValueError) as error:
                verdict = str(error)
            faults += 1
            yield {"turn": turn, "stage": stage, "fault": fault, "verdict": verdict}
        status, out, err = start(stage, save, epochs).end()
        # the epoch that the disk held last is the one that the command goes on after
        resumed = f"after epoch {before} of" in out or "nothing to do" in out or not before
        try:
            same = status == 0 and resumed and result_of(save) == reference.results[stage]
            verdict = "good" if same else f"status {status}, {err}, or another result"
        except (UserError, ValueError) as error:
            verdict = str(error)
        yield {"turn": turn, "stage": stage, "verdict": verdict}
        shutil.rmtree(save)
        turn += 1


def long_run(root, epochs):
    """Yield whether memory and log of an original and of a deposit stay as they should over many epochs."""
    reference = Reference(root, 1)
    for stage in ("original", "deposit"):
        save, resident = shutil.copytree(reference.before[stage], os.path.join(root, f"long_{stage}")), []

        def further(save=save, stage=stage, resident=resident):
            return epochs_logged(save, stage) > len(resident)

        process = start(stage, save, epochs)
        while process.reaches(further, 0.05):
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
                resident += [int(row.split()[1]) for row in file if row.startswith("VmRSS")]  # none of one that ends
        status, _, err = process.end()
        resident = resident or [0]
        early, late = (sorted(part)[len(part) // 2] for part in (resident[5:15] or resident, resident[-10:]))
        good = status == 0 and epochs_logged(save, stage) == epochs and late <= 1.02 * early
        yield {"stage": stage, "fault": "none", "verdict": "good" if good else
               f"status {status}, {err}, {early} KiB after some epochs and {late} at the end"}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--campaign", nargs="+", choices=[*FAULTS, "long_run"], default=[*FAULTS],
                        help="kills: SIGKILL at random times and within writes; stops: Ctrl-C and SIGTERM; full_disk: "
                             "writes that fail; by turns. long_run, alone: memory over many epochs")
    parser.add_argument("--count", type=bounded(int, 1), default=150, help="faults")
    parser.add_argument("--epochs", type=bounded(int, 1), default=4, help="epochs of each training; long_run wants 200")
    parser.add_argument("--seed", type=bounded(int, 0, 2**31 - 1), default=0, help="seed of the faults")
    return parser


def main(args):
    faults, broken = Counter(), []
    with tempfile.TemporaryDirectory() as root:
        for record in (long_run(root, args.epochs) if "long_run" in args.campaign else
                       campaign(root, args.campaign, args.count, args.epochs, args.seed)):
            faults[record.get("fault", "ends compared")] += 1
            if record["verdict"] != "good":
                broken.append(record)
                print(json.dumps(record), flush=True)
    print(", ".join(f"{name}: {count}" for name, count in sorted(faults.items())) + f"; broken: {len(broken)}")
    if broken:
        raise UserError(f"{len(broken)} times a promise was not kept")


if __name__ == "__main__":
    run(main, get_args_parser())
