"""One training run in a --save_path: its identity, its resumable state, its logs and its progress."""

import contextlib
import datetime
import json
import math
import os
import subprocess
import sys
import time

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import load_checkpoint, load_into, save_checkpoint
from utils.errors import Diverged, UserError
from utils.files import read_log, write_atomically

# Flags of the stages that do not decide what a run gives: where it lies and runs.
NO_SETTINGS = ("save_path", "data_dir", "device")


class TrainingRun:
    """Keeps <save_path>/<stage>_state.pt, <stage>_log.jsonl and tensorboard/<stage>.

    settings: plain types, all that decides the run's result. A save_path that holds a run of the same stage
    with other settings is refused, before anything is written; the same settings resume it.

        run = TrainingRun(save_path, "original", settings, runtime, epochs)
        run.track(optimizer, network=network)
        for epoch in run.remaining_epochs():
            ...
            run.end_epoch(epoch, {"loss": 0.1, ...})
        run.finish()
    """

    def __init__(self, save_path, stage, settings, runtime, epochs):
        self.stage, self.runtime, self.epochs = stage, runtime, epochs
        self.settings = settings
        self.state_path = os.path.join(save_path, f"{stage}_state.pt")
        self.log_path = os.path.join(save_path, f"{stage}_log.jsonl")
        self._tensorboard_path = os.path.join(save_path, "tensorboard", stage)
        self._state = self._read_state()

    @distributed.by_rank_0
    def _read_state(self):
        if not os.path.exists(self.state_path):
            return None
        state = load_checkpoint(self.state_path, "state")
        refuse_other_settings(os.path.dirname(self.state_path), self.stage, state["settings"], self.settings)
        return state

    def track(self, optimizer, **modules):
        """Name what an epoch changes. Loads it from the state file if there is one."""
        self._optimizer, self._trained = optimizer, torch.nn.ModuleDict(modules)
        self.next_epoch = 0
        if self._state is None:
            return
        tensors = self._state["tensors"]
        load_into(self._trained, {name: tensor for name, tensor in tensors.items() if not name.startswith("momentum.")},
                  self.state_path)
        for name, parameter in self._trained.named_parameters():
            if f"momentum.{name}" in tensors:  # in the parameter's memory layout, without which a step is slower
                buffer = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
                optimizer.state[parameter]["momentum_buffer"] = buffer
        self.next_epoch = self._state["next_epoch"]
        print(f"resuming {self.stage} after epoch {self.next_epoch} of {self.epochs} ({self.state_path})", flush=True)

    def remaining_epochs(self):
        """Yield the epochs still to run, counted from 0; opens the logs before the first."""
        if (self.next_epoch < self.epochs or self.epochs == 0) and distributed.rank == 0:
            self._open_logs()
        for epoch in range(self.next_epoch, self.epochs):
            self._started = time.monotonic()
            yield epoch

    def _open_logs(self):
        os.makedirs(os.path.dirname(self.log_path), exist_ok=True)
        if os.path.exists(self.log_path):
            records = read_log(self.log_path)
            for record in records:
                if "settings" in record:
                    refuse_other_settings(os.path.dirname(self.log_path), self.stage, record["settings"], self.settings)
            # The log tells of the epochs that made the result. What the state does not vouch for goes: an epoch whose
            # state a kill prevented, which runs again, or all of a run that begins anew.
            epochs = [record.get("epoch", 0) for record in records]
            end = max((i + 1 for i, epoch in enumerate(epochs) if 0 < epoch <= self.next_epoch), default=0)
            kept = records[:end] if self._state is not None else []
            write_atomically(self.log_path, lambda file: file.writelines(
                json.dumps(record).encode() + b"\n" for record in kept))
        self._append({**head_of_log(self.runtime), "settings": self.settings})
        self._writer = SummaryWriter(self._tensorboard_path, purge_step=self.next_epoch + 1)

    def _append(self, record):
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def end_epoch(self, epoch, figures, accuracies=dict):
        """Log an epoch's figures and save the state. accuracies: gives further figures, where `is_measured`; its time
        is none of the epoch's seconds. Raises Diverged when a figure or weight is not finite, before the state of the
        last good epoch is overwritten."""
        seconds = round(time.monotonic() - self._started, 2)
        if is_measured(epoch, self.epochs):
            figures = {**figures, **accuracies()}
        tensors = self._trained.state_dict()
        # the last step's update has met no loss yet; a sum in float64 is finite when all its terms are
        weights = {f"weight {name}": tensor.double().sum().item() for name, tensor in tensors.items()}
        for name, value in {**figures, **weights}.items():
            if value is not None and not math.isfinite(value):
                raise Diverged(f"{name} became {value} in epoch {epoch + 1}: lower --lr or that term's weight, or set "
                               f"--clip_norm; the state after the epoch before is kept")
        if distributed.rank > 0:
            return
        done = epoch + 1
        record = {"epoch": done, **figures, "seconds": seconds}
        self._append(record)  # the log first: killed in between, the epoch runs again and its line is cut off
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, done)
        self._writer.flush()
        for name, parameter in self._trained.named_parameters():
            if parameter in self._optimizer.state:
                tensors[f"momentum.{name}"] = self._optimizer.state[parameter]["momentum_buffer"]
        save_checkpoint(self.state_path, "state", tensors, next_epoch=done, settings=self.settings)
        shown = [f"{name} {value:.4g}" for name, value in record.items() if name != "epoch" and value is not None]
        print(f"{self.stage} epoch {done}/{self.epochs}: {', '.join(shown)}", flush=True)

    def progress(self, batches, epoch, total):
        """Wrap an epoch's batches in a progress bar on a terminal; elsewhere the line an epoch suffices."""
        return tqdm(batches, total=total, desc=f"{self.stage} {epoch + 1}/{self.epochs}", leave=False,
                    disable=distributed.rank > 0 or None)  # None: where there is no terminal

    def finish(self):
        """Close the logs and remove the resumable state, once the stage's checkpoints are written."""
        if hasattr(self, "_writer"):
            self._writer.close()
        if os.path.exists(self.state_path):
            os.remove(self.state_path)


def is_measured(epoch, epochs):
    """Whether accuracies are logged after an epoch, counted from 0: at every epoch of a short run, ten to twenty times
    in a long one, and at its end. On photographs, to measure takes as long as to train."""
    return (epoch + 1) % max(1, epochs // 10) == 0 or epoch + 1 == epochs


def settings_of(args, *, leave_out=(), **more):
    """What decides a run's result, as plain types: the flags but those in leave_out and NO_SETTINGS, and `more`, which
    stands for the flags of its names: a checksum for a path, say."""
    chosen = {name: value for name, value in vars(args).items() if name not in (*NO_SETTINGS, *leave_out)}
    return {**chosen, **more}


def refuse_other_settings(save_path, stage, found, wanted):
    """Raise UserError unless the settings `found` in save_path are those `wanted`."""
    for name in sorted(found.keys() | wanted.keys(), key=str):
        if found.get(name) != wanted.get(name):
            short = [str(value)[:60] for value in (found.get(name), wanted.get(name))]
            raise UserError(f"{save_path} holds another {stage} run ({name} {short[0]}, not {short[1]}): "
                            f"choose another --save_path, or remove that one")


@distributed.by_rank_0
def already_done(path, kind, stage, settings, beside=()):
    """The entries, but the tensors, of the checkpoint `path` when it and the files `beside` it are there: the finished
    result of these very settings. None when one is missing; refuses the result of other settings."""
    if not os.path.exists(path):
        return None
    content = load_checkpoint(path, kind)
    refuse_other_settings(os.path.dirname(path), stage, content["settings"], settings)
    if not all(map(os.path.exists, beside)):
        return None
    with contextlib.suppress(FileNotFoundError):  # left by a kill just after the result was written
        os.remove(os.path.join(os.path.dirname(path), f"{stage}_state.pt"))
    print(f"{path} is there already, trained with these settings: nothing to do", flush=True)
    return {name: value for name, value in content.items() if name != "tensors"}


def head_of_log(runtime):
    """What a log says first: command, commit, date, hardware and versions."""
    return {"command": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "commit": current_commit(),
            "date": datetime.datetime.now().isoformat(timespec="seconds"), **runtime.describe()}


def current_commit():
    """What git says of this code; None when it is no checkout of its own."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        return subprocess.run(["git", f"--git-dir={root}/.git", "describe", "--always", "--dirty", "--abbrev=12",
                               "--exclude=*"], cwd=root, capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
