"""Stages that are killed, stopped or starved, and the same command again: the results equal those of a run left
alone, file for file and bit for bit. Runs the four stages on the embedded digits, each in a process of its own.

They are killed at random times and within writes, stopped by Ctrl-C and SIGTERM, and find the disk full. A resumed run
may lose no epoch but the running one. tests/test_errors.py runs this campaign and a second one, of damaged files, in
short. With 25 times as many faults, and other random numbers:

    CAMPAIGN=25 bash scripts/test.sh tests/test_errors.py -k "faults_change or a_damaged_file"
"""

import contextlib
import logging
import random
import shutil
import signal
import time

from conftest import epochs_of
from forked import Process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import read_partition
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.files import load_json

SCRIPTS = {"partition": "partition_data.py", "original": "train_scratch.py", "deposit": "train_deposit.py",
           "withdraw": "withdraw.py"}
TRAINED = ("original", "deposit")
TURNS = (*TRAINED, "withdraw", "partition")
KINDS = ("original", "target", "deposit", "difference", "recover", "state")
MOST = 3  # faults in a row before a stage may end


def start(stage, save, epochs, **options):
    """A stage on the digits, small enough to be run a hundred times."""
    flags = {"partition": ["--dataset", "digits", "--image_size", "8", "--out", save / "partition.json"],
             "original": ["--save_path", save, "--arch", "resnet8", "--epochs", epochs],
             "deposit": ["--save_path", save, "--split_at", 2, "--epochs", epochs],
             "withdraw": ["--save_path", save, "--data_dir", save]}[stage]
    if stage != "partition":
        flags += ["--device", "cpu"]
    if stage in ("original", "deposit"):
        flags += ["--precision", "fp32"]
    return Process(SCRIPTS[stage], *flags, **options)


def epochs_on(save, stage):
    """The epoch after which the stage would go on. Raises unless every file that is no .part can be read whole, and
    the log agrees with the resumable state beside it on the epochs that are done."""
    for path in save.glob("*.json"):
        (read_partition if path.name == "partition.json" else load_json)(str(path))
    contents = {path.name: load_checkpoint(str(path), KINDS) for path in save.glob("*.pt")}
    logged = {path.name.split("_")[0]: len(epochs_of(path)) for path in save.glob("*_log.jsonl")}
    for name, content in contents.items():
        ahead = logged.get(name.split("_")[0], 0) - content["next_epoch"] if content["kind"] == "state" else 0
        if ahead not in (0, 1):  # the log is written first
            raise UserError(f"the log of {name} is {ahead} epochs ahead of it")
    if f"{stage}_state.pt" in contents:
        return contents[f"{stage}_state.pt"]["next_epoch"]
    return logged.get(stage, 0) if f"{stage}.pt" in contents else 0


def result_of(save):
    """All that a run leaves, in a form to compare: bytes of checkpoints and figures, epochs of logs, TensorBoard's
    curves. Raises when an epoch is missing or doubled, or something temporary is left, but by a killed partition."""
    result = {}
    for path in save.rglob("*"):
        if path.suffix in (".pt", ".json"):
            result[path.name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            result[path.name] = epochs_of(path)
            if [record["epoch"] for record in result[path.name]] != list(range(1, len(result[path.name]) + 1)):
                raise UserError(f"{path.name} does not hold every epoch once, in order")
        elif path.parent.name == "tensorboard":
            events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
            result[f"curves of {path.name}"] = {tag: [(e.step, e.value) for e in events.Scalars(tag)]
                                                for tag in events.Tags()["scalars"]}
        elif path.is_file() and not path.name.startswith(("events.out", "partition.json.")):
            raise UserError(f"{path.name} is left over")
    return result


class Reference:
    """The run that is left alone: for each stage its duration, and what the folder holds before and after it."""

    def __init__(self, root, epochs):
        self.epochs, self.seconds, self.results, self.before = epochs, {}, {}, {}
        save = root / "alone"
        save.mkdir()
        for stage in SCRIPTS:
            self.before[stage] = shutil.copytree(save, root / f"before_{stage}")
            process = start(stage, save, epochs)
            status, _, err = process.end()
            if status:
                raise UserError(f"the run that is left alone failed at {stage}: {err}")
            self.seconds[stage], self.results[stage] = process.seconds(), result_of(save)


def listing(save):
    """Names of the files in a folder with their times: it changes when a stage begins to write."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # one goes while this looks
        found.update((path.name, path.stat().st_mtime_ns) for path in save.iterdir())
    return found


def kill(stage, save, reference, rng):
    """SIGKILL, either at a random time or in the middle of a write; None when the stage ended before."""
    process = start(stage, save, reference.epochs)
    if rng.random() < 0.5:
        fault, until = "SIGKILL at a random time", rng.uniform(0, reference.seconds[stage])
        reached = process.reaches(lambda: process.seconds() >= until)
    else:
        fault, seen = "SIGKILL within a write", set()
        count = rng.randrange(1, reference.epochs + 3) if stage in TRAINED else 1

        def writing():
            seen.update(path.name for path in save.glob("*.part"))
            return len(seen) >= count

        reached = process.reaches(writing, 0.0002)
    status, _, _ = process.end(signal.SIGKILL if reached else None)
    return fault if status == -signal.SIGKILL else None


def stop(stage, save, reference, rng):
    """Ctrl-C or SIGTERM once the stage has begun to work: one line, and status 130 or 143."""
    signum, written = rng.choice((signal.SIGINT, signal.SIGTERM)), listing(save)
    process = start(stage, save, reference.epochs)
    reached = process.reaches(lambda: listing(save) != written, 0.0002)
    if reached and stage in TRAINED:  # the other stages end at once
        time.sleep(rng.uniform(0, 0.3 * reference.seconds[stage]))
    status, _, err = process.end(signum if reached else None)
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


FAULTS = (kill, stop, starve)


def campaign(root, count, epochs, seed):
    """Yield an object for each of `count` faults and for each stage's end, with the verdict "good" or what was wrong.

    Every stage meets up to MOST faults in a row, and is then left to end."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each epoch that ran again
    reference, rng, faults, turn = Reference(root, epochs), random.Random(seed), 0, 0
    while faults < count:
        stage, save, before = TURNS[turn % len(TURNS)], root / f"turn{turn}", 0
        shutil.copytree(reference.before[stage], save)
        for _ in range(min(rng.randint(1, MOST), count - faults)):
            verdict, fault = "good", "one that broke a promise"
            try:
                fault = FAULTS[faults % len(FAULTS)](stage, save, reference, rng)
                if fault is None:
                    break
                before, lost = epochs_on(save, stage), before
                if before < lost:
                    raise UserError(f"epoch {lost} was saved, and epoch {before} is there")
            except (UserError, ValueError) as error:
                verdict = str(error)
            faults += 1
            yield {"stage": stage, "fault": fault, "verdict": verdict}
        status, out, err = start(stage, save, epochs).end()
        # the epoch that the disk held last is the one that the command goes on after
        resumed = f"after epoch {before} of" in out or "nothing to do" in out or not before
        try:
            same = status == 0 and resumed and result_of(save) == reference.results[stage]
            verdict = "good" if same else f"status {status}, {err}, or another result"
        except (UserError, ValueError) as error:
            verdict = str(error)
        yield {"stage": stage, "fault": "ends compared", "verdict": verdict}
        shutil.rmtree(save)
        turn += 1
