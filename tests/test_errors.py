"""Every mistake of the user and every fault of the machine: one clear line on stderr, an exit status, nothing lost;
what is damaged is refused, and code in a file never run. The campaign of faults stands here in short."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import faults
import pytest
import torch
from conftest import MEASURE, ROOT, call, deposit_flags, epochs_of, fail, rewrite, scratch_flags, snapshot, succeed
from fixtures import MARKER, Call, make_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_deposit
import train_scratch
import utils.run
import utils.runtime
import withdraw
from datasets import read_partition
from utils.checkpoint import checksum, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import locked, write_atomically


def withdraw_fails(run):
    """The line of a withdrawal in `run` that fails and changes nothing there."""
    return fail("withdraw.py", "--save_path", run, unchanged=run)


def redeposit_fails(chain, run, *more):
    """The line of a deposit in `run` that fails, from the original there, and changes nothing."""
    for name in ("deposit.pt", "target.pt"):
        (run / name).unlink(missing_ok=True)
    return fail("train_deposit.py", *deposit_flags(chain, run, "--original", run / "original.pt", *more), unchanged=run)


# the campaigns: in short, or as many times as long as the environment variable says (faults.py)

TIMES = int(os.environ.get("CAMPAIGN", "1"))


def test_faults_change_no_result(tmp_path):
    """What is killed, stopped or starved, and resumed, equals bit for bit the run that was left alone."""
    records = list(faults.campaign(tmp_path, count=6 * TIMES, epochs=3, seed=TIMES))
    assert {"original", "deposit"} <= {record["stage"] for record in records} and len(records) >= 8
    assert [record for record in records if record["verdict"] != "good"] == []


def spoil(content, rng):
    """Bytes with some bits flipped, cut off, or with a block of others in their midst."""
    data, start = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(3)
    if kind == 0:
        for _ in range(2 ** rng.randrange(4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start:]
    else:
        data[start:start + rng.randrange(100)] = rng.randbytes(rng.randrange(100))
    return bytes(data)


def test_a_damaged_file_is_refused_or_read_as_it_was_written(chain, spoiled, tmp_path):
    rng = random.Random(TIMES)

    def parts():
        content, of_content, modules, _ = withdraw.load_parts(str(spoiled))
        return checksum({"tensors": modules.state_dict(), "rest": [content["checksum"], of_content.hash]})

    def manifest():
        return read_partition(str(spoiled / "partition.json")).hash

    for name, read in [*((f"{kind}.pt", parts) for kind in ("target", "deposit", "difference")),
                       ("partition.json", manifest)]:
        whole, expected, refused = (spoiled / name).read_bytes(), read(), 0
        for _ in range(40 * TIMES):
            (spoiled / name).write_bytes(spoil(whole, rng))
            try:
                assert read() == expected, name
            except UserError:
                refused += 1
        assert refused > 20 * TIMES
        (spoiled / name).write_bytes(whole)


# the command line

PARTITION, SCRATCH, DEPOSIT, WITHDRAW = "partition_data.py", "train_scratch.py", "train_deposit.py", "withdraw.py"
ROWS = [
    # files and folders that are not there; {run} and {data} are those of the chain
    (PARTITION, "--data_dir nowhere", "nowhere"), (SCRATCH, "--partition none.json", "(none.json)"),
    (SCRATCH, "--data_dir nowhere", "nowhere"), (DEPOSIT, "--data_dir nowhere", "nowhere"),
    (DEPOSIT, "--original none.pt", "none.pt does not exist"),
    (WITHDRAW, "", "target.pt does not exist"), (WITHDRAW, "--target {run}/target.pt", "deposit.pt does not exist"),
    (WITHDRAW, "--target {run}/target.pt --deposit {run} --data_dir nowhere", "nowhere"),
    (DEPOSIT, "--save_path {run}/metrics.json", "metrics.json"),
    ("analysis/recovery.py", "--runs {run} --original {run}/original.pt --out new/", "add a name for the files"),
    ("analysis/bank.py", "--deposits {run} --original {run}/original.pt --out {run}/original.pt/bank", "is no folder"),
    (WITHDRAW, "--save_path ~/none", "{home}/none/target.pt"),
    # values of flags
    (DEPOSIT, "--epochs 1" + 400 * "0", "out of range"),
    *((DEPOSIT, flags, flags.split()[0]) for flags in (
        "--prune_ratio 1", "--temperature 0", "--lambda_kp -1", "--lr inf", "--epochs 0", "--lambda_at x", "--lambda 1",
        "--images_per_class 0", "--images_per_class 13", "--difference_bits 9", "--preset theirs", "--split_at 0",
        "--split_at 4", "--split_at two", "--seed -1", "--device gpu", "--save_path s3://bucket/run")),
    (SCRATCH, "--warmup_epochs 2", "at the full rate"), (SCRATCH, "--schedule step", "no milestone within --epochs 2"),
    (SCRATCH, "--milestones 80 120", "read by --schedule step alone"),
    (SCRATCH, "--epochs 0", "name the weights"),
    (SCRATCH, "--subset retrain --weights {run}/original.pt", "trained from scratch"),
    (SCRATCH, "--weights imagenet --arch resnet18", "larger --image_size"),
    (PARTITION, "--out s3://bucket/p.json", "not a path"),
    # deposit classes, held-out images, mean and std
    (PARTITION, "--deposit_classes bee,eel", "'eel' is no class"), (PARTITION, "--deposit_classes ,", "0 of 4"),
    (PARTITION, "--deposit_classes 4", "'4' is no class"), (PARTITION, "--deposit_classes ant,bee,cow,dog", "4 of 4"),
    (PARTITION, "--deposit_classes 0,dog", "'0' is no class"),
    (PARTITION, "--deposit_fraction 1.5", "out of range"), (PARTITION, "--deposit_fraction nan", "out of range"),
    (PARTITION, "--deposit_fraction 0.1", "deposits 0 of 4"), (PARTITION, "--dataset mnist", "invalid"),
    (PARTITION, "--deposit_fraction 0.3 --deposit_classes ant", "not allowed with"),
    (PARTITION, "--val_fraction 0.01", "holds out no image"),
    (PARTITION, "--mean 0.5 0.5 0.5", "belong together"), (PARTITION, "--std 0.5 0.5 0.5", "belong together"),
    (PARTITION, "--mean 0.5 0.5 1.5 --std 1 1 1", "out of range"), (PARTITION, "--mean 0.5 --std 0.5", "expected 3"),
    (PARTITION, "--mean 0 0 0 --std 0 1 1", "out of"), (PARTITION, "--mean nan 0 0 --std 1 1 1", "out of range"),
]


def test_a_manifest_goes_into_the_folder_that_is_named(chain, tmp_path):
    for out, file in (("run", "run/partition.json"), ("run/", "run/partition.json"), ("other.json", "other.json")):
        succeed(PARTITION, "--dataset", "folder", "--data_dir", chain[1], "--out", f"{tmp_path}/{out}")
        assert (tmp_path / file).is_file()


@pytest.mark.parametrize("script,flags,word", ROWS)
def test_a_mistake_on_the_command_line_is_named_and_nothing_is_made(chain, tmp_path, monkeypatch, script, flags, word):
    monkeypatch.chdir(tmp_path)
    (run, data), new = chain, tmp_path / "new"
    common = {PARTITION: ["--dataset", "folder", "--data_dir", data, "--out", new / "p.json"],
              SCRATCH: scratch_flags(chain, new), DEPOSIT: deposit_flags(chain, new), WITHDRAW: ["--save_path", new]}
    line = fail(script, *common.get(script, []), *flags.format(run=run, data=data).split())
    assert word.format(home=Path.home()) in line
    assert not {path.name for path in new.rglob("*")} - {"partition.json"}


# checkpoints

def flip_a_bit(path):
    """Damage one weight, leaving the archive readable to a reader that checks nothing."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil,word", [
    (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "damaged"), (flip_a_bit, "damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "remove a damaged file"), (flip_a_bit, "remove it"),
    (lambda path: path.write_bytes(b""), "damaged or no checkpoint"),
    (lambda path: path.write_text("{}"), "damaged or no checkpoint"),
    (lambda path: torch.save({"state_dict": {"w": torch.zeros(3)}}, path), "no checkpoint of this project"),
    (lambda path: torch.save([1, 2], path), "no checkpoint of this project"),
    (lambda path: torch.save({"format": Call()}, path), "pickled code"),
    (lambda path: shutil.copy(path.parent / "original.pt", path), "kind 'original', not target or recover"),
    *((lambda path, change=change: rewrite(path, change, seal=False), "does not match its checksum") for change in (
        lambda c: c.update(arch="resnet20"), lambda c: c["counts"]["test"]["correct"].reverse(),
        lambda c: c["settings"].update(lr=0.5), lambda c: c.update(more=1))),
])
def test_a_damaged_or_foreign_checkpoint_is_refused(spoiled, spoil, word):
    spoil(spoiled / "target.pt")
    assert word in withdraw_fails(spoiled)
    assert not os.path.exists(MARKER)


CONTRADICTIONS = {
    "original": [
        (lambda c: c["tensors"].pop("head.fc.bias"), 'Missing key(s) in state_dict: "head.fc.bias"'),
        (lambda c: c["tensors"].update({"extra": torch.zeros(1)}), 'Unexpected key(s) in state_dict: "extra"'),
        (lambda c: c["tensors"].update({"head.fc.weight": torch.zeros(3, 64)}), "head.fc.weight"),
        (lambda c: c.update(arch="resnet20"), "does not fit"), (lambda c: c.update(arch="vgg"), "is unknown"),
        (lambda c: c["partition"].pop("samples"), "not a partition"),
        (lambda c: c["partition"].pop("samples"), "another version of this project wrote it"),
        (lambda c: c.update(kind="deposit"), "kind 'deposit', not original or target")],
    "target": [(lambda c: c.pop("away"), "before deposits had names")],
    "deposit": [
        (lambda c: c.update(target="0" * 64), "does not belong to"),
        (lambda c: c["tensors"].update({"stem.conv1.weight": torch.zeros(99, 3, 3, 3)}), "stem.conv1"),
        (lambda c: c["tensors"].pop("layer1.0.conv1.weight"), "layer1.0.conv1"),
        (lambda c: c["tensors"].update(rows=torch.zeros(1, 3)), "(1, 3) rows for 1 classes")],
    "difference": [
        (lambda c: c.pop("means"), "deposit again"), (lambda c: c.update(id="0"), "not away from"),
        (lambda c: c["tensors"].update(rows=torch.zeros(2, 65)), "(2, 65) rows for 1 classes"),
        (lambda c: c["tensors"].update(difference=c["tensors"]["difference"][:-9]), "does not fit its own description"),
        (lambda c: c.update(original="0"), "another original or cut")],
}


@pytest.mark.parametrize("kind,change,word", [(kind, *row) for kind, rows in CONTRADICTIONS.items() for row in rows])
def test_a_checkpoint_that_contradicts_itself_is_refused(chain, spoiled, kind, change, word):
    """Rewritten with a right checksum, so that only its own description can tell."""
    rewrite(spoiled / f"{kind}.pt", change)
    assert word in (redeposit_fails(chain, spoiled) if kind == "original" else withdraw_fails(spoiled))


# partitions

@pytest.mark.parametrize("change,word", [
    ("", "not a JSON file"), ("[]", "no JSON object"), ("{}", "not a partition"), ("[" * 100_000, "not a JSON file"),
    ('{"format": "lirf-partition/3"}', "'dataset' is missing"), ({"format": "other/1"}, "format is not"),
    *(({key: value}, "changed after it was written") for key, value in (
        ("deposit_classes", [0]), ("mean", [0.1, 0.2, 0.3]), ("more", 1), ("hash", "0"))),
    ("mine", "its data set 'mine' is unknown here"),
])
def test_a_damaged_or_edited_manifest_is_refused(chain, tmp_path, change, word):
    partition = read_partition(chain[0] / "partition.json")
    if change == "mine":  # written where such a data set was added
        change = json.dumps(dataclasses.replace(partition, dataset=change).as_dict())
    if isinstance(change, dict):
        more = {"preserved_classes": [1, 2, 3]} if "deposit_classes" in change else {}
        change = json.dumps({**partition.as_dict(), **change, **more})
    (tmp_path / "p.json").write_text(change)
    assert word in fail("train_scratch.py", *scratch_flags(chain, tmp_path / "new", "--partition", tmp_path / "p.json"))


def test_a_partition_of_other_data_is_refused(chain, tmp_path):
    other, word = make_folder(tmp_path / "other", seed=1), "not those that were partitioned"
    assert word in fail("train_scratch.py", *scratch_flags(chain, tmp_path / "new", "--data_dir", other))
    assert word in fail("train_deposit.py", *deposit_flags(chain, tmp_path / "new", "--data_dir", other))
    succeed("partition_data.py", "--dataset", "digits", "--out", tmp_path / "digits.json")
    line = fail("train_deposit.py", *deposit_flags(chain, tmp_path / "run", "--partition", tmp_path / "digits.json"))
    assert "other data" in line


# runs

def test_another_finished_run_is_not_overwritten_nor_mixed_with(chain, spoiled, tmp_path):
    save, data = chain
    other, run = tmp_path / "other", spoiled
    succeed("train_scratch.py", *scratch_flags(chain, other, "--seed", "1", "--epochs", "1"))
    succeed("train_deposit.py", *deposit_flags(chain, other, "--seed", "1", "--epochs", "1"))
    partition = ["--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant", "--out"]
    succeed("partition_data.py", *partition, other / "p.json")
    scratch, deposit = scratch_flags(chain, run), deposit_flags(chain, run)
    for script, flags, word in (
            ("train_scratch.py", [*scratch, "--lr", "0.2"], "another original run (lr 0.1, not 0.2)"),
            ("train_scratch.py", [*scratch, "--partition", other / "p.json"], "another partition"),
            ("train_deposit.py", [*deposit, "--lambda_kp", "7"], "another deposit run (lambda_kp"),
            ("train_deposit.py", [*deposit, "--original", other / "original.pt"], "another deposit run (original"),
            ("train_deposit.py", [*deposit, "--partition", other / "p.json"], "is of another partition than"),
            ("withdraw.py", ["--save_path", run, "--target", other / "target.pt", "--deposit", other],
             "another target"),
            ("withdraw.py", ["--save_path", run, "--deposit", other], "difference.pt does not belong to"),
            ("partition_data.py", [*partition, run / "partition.json"], "holds another partition")):
        assert word in fail(script, *flags, unchanged=run)


def state_of_a_finished_deposit(run, tensors=None, **more):
    """Write deposit_state.pt as it was before the last epoch, with other entries."""
    done = load_checkpoint(str(run / "deposit.pt"), "deposit")
    target = load_checkpoint(str(run / "target.pt"), "target")["tensors"]
    tensors = {**{f"target.{name}": t for name, t in target.items() if not name.startswith(("layer3", "head"))},
               **{f"deposit.{name}": t for name, t in done["tensors"].items()}, **(tensors or {})}
    save_checkpoint(str(run / "deposit_state.pt"), "state", tensors, settings=done["settings"], **more)


@pytest.mark.parametrize("state,flags,word", [
    ({"next_epoch": 1}, ["--seed", "5"], "another deposit run (seed 0, not 5)"),
    ({"next_epoch": 1, "tensors": {"target.stem.conv1.weight": torch.zeros(1)}}, [], "for target.stem.conv1.weight"),
])
def test_a_state_of_another_run_is_not_gone_on_with(chain, spoiled, state, flags, word):
    state_of_a_finished_deposit(spoiled, **state)
    assert word in redeposit_fails(chain, spoiled, *flags)


@pytest.mark.parametrize("line", ["nonsense", "{", "[1]", '{"epoch": "two"}'])
def test_a_log_that_holds_something_else_is_not_written_to(chain, tmp_path, line):
    (tmp_path / "deposit_log.jsonl").write_text(f'{{"epoch": 1}}\n{line}\n{{"epo')
    message = fail("train_deposit.py", *deposit_flags(chain, tmp_path), unchanged=tmp_path)
    assert "line 2" in message and "deposit_log.jsonl" in message


def test_a_locked_folder_is_refused_and_what_a_killed_process_was_writing_goes(tmp_path):
    with locked(str(tmp_path)):
        for name in ("recover.pt.0123cdef.part", "partition.json.0123cdef.part", "mine.part"):
            (tmp_path / name).write_text("half")
        assert f"another process works in {tmp_path}" in withdraw_fails(tmp_path)
    fail("withdraw.py", "--save_path", tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.part", "partition.json.0123cdef.part"}  # the latter is written without a lock


@pytest.mark.parametrize("merge,needed", [("difference", "difference"), ("concat", "deposit")])
def test_a_withdrawal_needs_the_file_of_its_own_rule_alone(chain, spoiled, merge, needed):
    other = {"difference": "deposit", "deposit": "difference"}[needed]
    (spoiled / f"{other}.pt").unlink()
    flags = ["--save_path", spoiled, "--data_dir", chain[1], "--merge", merge, *MEASURE]
    succeed("withdraw.py", *flags)
    assert load_checkpoint(str(spoiled / "recover.pt"), "recover")["away"] == {}
    recover = json.loads((spoiled / "metrics.json").read_text())["recover"]
    assert merge in recover and ("difference" in recover) == (needed == "difference")
    assert recover[merge] == json.loads((chain[0] / "metrics.json").read_text())["recover"][merge]
    (spoiled / f"{needed}.pt").unlink()
    assert f"{needed}.pt does not exist" in fail("withdraw.py", *flags, unchanged=spoiled)


def test_what_would_refuse_a_run_at_its_end_or_spoil_the_next_start_is_told_at_once(chain, tmp_path):
    metrics = json.loads((chain[0] / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "partition_hash": "another"}))
    from_original = ["--save_path", tmp_path, "--data_dir", chain[1], "--original", chain[0] / "original.pt", *MEASURE]
    for script, flags in (("train_scratch.py", scratch_flags(chain, tmp_path)), ("train_deposit.py", from_original),
                          ("analysis/forget.py", [*from_original, "--method", "delete"]),
                          ("withdraw.py", ["--save_path", tmp_path, "--target", chain[0] / "target.pt", "--deposit",
                                           chain[0], *MEASURE])):
        assert "figures of another partition" in fail(script, *flags, unchanged=tmp_path)
    (tmp_path / "metrics.json").unlink()
    for name, said in (("target", "original"), ("recover", "original")):
        weights = ["--weights", chain[0] / f"{name}.pt", "--epochs", "0"]
        assert said in fail("train_scratch.py", *scratch_flags(chain, tmp_path, *weights), unchanged=tmp_path)
    damaged = shutil.copy(chain[0] / "original.pt", tmp_path / "mine.pt")
    content = torch.load(damaged, weights_only=True)
    content["tensors"]["stem.conv1.weight"] *= 2
    torch.save(content, damaged)
    weights = ["--weights", damaged, "--epochs", "0"]
    assert "checksum" in fail("train_scratch.py", *scratch_flags(chain, tmp_path, *weights), unchanged=tmp_path)


def test_where_a_disk_has_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(38, "Function not implemented")))
    with locked(str(tmp_path)):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script,make,name", [("train_scratch.py", scratch_flags, "original"),
                                              ("train_deposit.py", deposit_flags, "deposit")])
@pytest.mark.parametrize("killed_at", ["save_checkpoint", "os.remove"])
def test_a_run_killed_between_two_writes_ends_with_the_bits_of_the_chains(chain, tmp_path, monkeypatch, script, make,
                                                                          name, killed_at):
    """Between the second epoch's line in the log and its state, after which the epoch runs again; and between the last
    checkpoint and the removal of the state."""
    save, flags = chain[0], make(chain, tmp_path)
    stops = [mock.DEFAULT, KeyboardInterrupt(2)] if killed_at == "save_checkpoint" else KeyboardInterrupt(2)
    wrapped = utils.run.save_checkpoint if killed_at == "save_checkpoint" else os.remove
    with monkeypatch.context() as patch:
        patch.setattr(f"utils.run.{killed_at}", mock.Mock(wraps=wrapped, side_effect=stops))
        assert call(script, *flags)[0] == 130
    assert (tmp_path / f"{name}.pt").exists() == (killed_at == "os.remove")
    succeed(script, *flags)
    for kind in ("deposit", "target", "difference") if name == "deposit" else (name,):
        assert (tmp_path / f"{kind}.pt").read_bytes() == (save / f"{kind}.pt").read_bytes()
    logs = [epochs_of(folder / f"{name}_log.jsonl") for folder in (tmp_path, save)]
    assert logs[0] == logs[1] and not list(tmp_path.glob("*_state.pt"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]


def test_a_log_whose_last_lines_a_crash_has_lost_keeps_the_others(chain, tmp_path, monkeypatch):
    flags = scratch_flags(chain, tmp_path, "--epochs", "3")
    with monkeypatch.context() as patch:
        patch.setattr("utils.run.save_checkpoint", mock.Mock(
            wraps=utils.run.save_checkpoint, side_effect=[mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt(2)]))
        assert call("train_scratch.py", *flags)[0] == 130
    log = tmp_path / "original_log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:2]))  # the head and the first epoch, where the state says two
    succeed("train_scratch.py", *flags)
    assert log.read_text().splitlines(keepends=True)[:2] == lines[:2]
    assert [epoch["epoch"] for epoch in epochs_of(log)] == [1, 3]


# machines

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(chain):
    assert "--device cpu" in fail("withdraw.py", "--save_path", chain[0], "--device", "cuda", unchanged=chain[0])


@pytest.mark.parametrize("error,word", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "the GPU's memory"),
    (RuntimeError("CUDA error: out of memory"), "the GPU's memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "of this machine"),
    (MemoryError(), "memory of this machine"), (RuntimeError("can't start new thread"), "ulimit -u"),
    (ValueError("Expected more than 1 value per channel when training"), "raise --batch_size"),
    (OSError(28, "No space left on device", "x"), "No space left on device (x)"),
    (PermissionError(13, "Permission denied", "x"), "Permission denied (x)"), (IndexError(), None),
])
def test_a_machine_that_does_not_suffice_is_told_what_to_do(chain, tmp_path, monkeypatch, error, word):
    """And a fault of the program is not taken for the user's."""
    monkeypatch.setattr(train_deposit, "take_step", mock.Mock(side_effect=error))
    if word is None:
        with pytest.raises(IndexError):
            call("train_deposit.py", *deposit_flags(chain, tmp_path))
    else:
        assert word in fail("train_deposit.py", *deposit_flags(chain, tmp_path))


def test_a_gpu_that_others_fill_is_not_taken_for_one_without_kernels(monkeypatch):
    for said, kind in (("CUDA error: out of memory", RuntimeError), ("no kernel image is available", UserError)):
        monkeypatch.setattr(torch, "ones", mock.Mock(side_effect=RuntimeError(said)))
        with pytest.raises(kind, match=said):
            utils.runtime._try_out(torch.device("cpu"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "original.pt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(str(path), write)
    assert snapshot(tmp_path) == {path: b"old"}


def test_a_full_disk_is_told_in_one_line(chain, tmp_path, monkeypatch):
    """Under TensorBoard, whose thread would print a traceback of its own; the campaign has it under other files."""
    printed, full = [], mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(threading, "excepthook", printed.append)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    assert "No space left" in fail("train_deposit.py", *deposit_flags(chain, tmp_path))
    assert not printed and not list(tmp_path.glob("*.p*"))


# consoles

def test_a_console_without_a_character_shows_its_escape(tmp_path):
    folder = make_folder(tmp_path / "images", classes=["$5", "猫"], train=2, test=1)
    command = [sys.executable, ROOT / "partition_data.py", "--dataset", "folder", "--data_dir", folder,
               "--deposit_classes", "猫", "--out", tmp_path / "p.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u732b" in done.stdout and not done.stderr


def test_a_reader_that_leaves_is_told_in_one_line_and_the_run_can_go_on(chain, tmp_path):
    flags = [str(flag) for flag in scratch_flags(chain, tmp_path / "run", "--epochs", "5")]
    process = subprocess.Popen([sys.executable, str(ROOT / "train_scratch.py"), *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    line, = process.stderr.read().splitlines()
    assert process.wait() == 1 and line.startswith("train_scratch.py: error: nobody reads the output")
    assert "same command again" in line and "resuming" in succeed("train_scratch.py", *flags)


# numerics

def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(chain, tmp_path):
    line = fail("train_scratch.py", *scratch_flags(chain, tmp_path, "--epochs", "40", "--lr", "1e4"),
                statuses=[3])
    assert "loss became" in line and "--lr" in line and not (tmp_path / "original.pt").exists()


def test_a_weight_that_is_not_finite_after_the_last_step_stops_the_run(chain, tmp_path, monkeypatch):
    """Every loss was finite, and no further one is computed."""
    real, steps = train_scratch.take_step, []

    def last_step_spoils(optimizer, loss, lr, clip_norm):
        real(optimizer, loss, lr, clip_norm)
        steps.append(loss.item())
        if len(steps) == 6:
            optimizer.param_groups[0]["params"][0].data[0, 0, 0, 0] = float("nan")

    monkeypatch.setattr(train_scratch, "take_step", last_step_spoils)
    line = fail("train_scratch.py", *scratch_flags(chain, tmp_path), statuses=[3])
    assert "weight network.stem.conv1.weight became nan" in line and "epoch 2" in line
    state = load_checkpoint(str(tmp_path / "original_state.pt"), "state")
    assert state["next_epoch"] == 1 and all(torch.isfinite(t.float()).all() for t in state["tensors"].values())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(chain, tmp_path):
    sums = []
    for name, seed in (("again", "0"), ("other", "1")):
        succeed("train_scratch.py", *scratch_flags(chain, tmp_path / name, "--seed", seed, "--deterministic"))
        sums.append(checksum({"tensors": load_checkpoint(str(tmp_path / name / "original.pt"), "original")["tensors"]}))
    first = checksum({"tensors": load_checkpoint(str(chain[0] / "original.pt"), "original")["tensors"]})
    assert first == sums[0] != sums[1]
