"""Every mistake of the user and every fault of the machine: one clear line on stderr, an exit status, nothing lost;
what is damaged or hostile is refused and never run. The campaigns, which try this at random, stand here in short."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from campaigns import faults, mutations
from conftest import ROOT, call, deposit_flags, fail, run_script, scratch_flags, snapshot, succeed
from fixtures import make_folder
from forked import Process
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_deposit
import train_scratch
from datasets import batches, load_images, make_partition
from models.losses import draw_random_labels
from utils.checkpoint import checksum, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import locked, read_log, write_atomically
from utils.optim import LossMeter, check_finite
from utils.runtime import Runtime


@pytest.fixture
def run(chain, tmp_path):
    """A copy of the finished tiny chain, for a test to spoil."""
    shutil.copytree(chain[0], tmp_path / "run")
    return tmp_path / "run"


def rewrite(path, kind, change, seal=True):
    """Change what a checkpoint holds; seal: with a right checksum, so that only its own description can tell."""
    content = load_checkpoint(str(path), kind)
    change(content)
    if seal:
        content["checksum"] = checksum(content)
    torch.save(content, path)


def redeposit(chain, run, *more, unchanged=None):
    """The line of a deposit that fails in `run`, from the original there."""
    for name in ("deposit.pt", "target.pt"):
        (run / name).unlink(missing_ok=True)
    return fail("train_deposit.py", *deposit_flags(chain, run, "--original", run / "original.pt", *more),
                unchanged=unchanged or run)


# the campaigns in short

def test_faults_change_no_result(tmp_path):
    records = list(faults.campaign(str(tmp_path), ["kills", "stops", "full_disk"], count=6, epochs=2, seed=1))
    assert sum("fault" in record for record in records) == 6
    assert [record for record in records if record["verdict"] != "good"] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_files_are_refused_or_read_as_they_were_written(tmp_path):
    verdicts = list(mutations.campaign(tmp_path, cases=250, seed=1))
    assert len(verdicts) == 250 and {"refused", "same"} <= {verdict for _, _, verdict, _ in verdicts}
    assert [v for v in verdicts if v[2] == "wrong"] == []


@pytest.mark.parametrize("read,kind,verdict", [
    (lambda: "as written", mutations.flip, "same"), (lambda: "other", mutations.flip, "wrong"),
    (lambda: "other", mutations.forge, "accepted"), (lambda: [][0], mutations.forge, "wrong"),
    (lambda: os.mkdir(mutations.MARKER) or "as written", mutations.code, "wrong"),
])
def test_the_campaign_judges(read, kind, verdict):
    assert mutations.judge(mutations.Subject("", read), kind, "as written")[0] == verdict


# flags and paths

def test_missing_files_are_named_and_nothing_is_made(chain, tmp_path):
    save, data = chain
    new, original = tmp_path / "new", ["--original", save / "original.pt"]
    for script, word, flags in (
            ("train_scratch.py", "none.json does not exist", ["--partition", "none.json", "--data_dir", data]),
            ("train_deposit.py", "original.pt does not exist", ["--data_dir", data]),
            ("train_deposit.py", "nowhere", ["--data_dir", "nowhere", *original]),
            ("withdraw.py", "target.pt does not exist", []),
            ("withdraw.py", "difference.pt does not exist", ["--target", save / "target.pt"])):
        assert word in fail(script, "--save_path", new, *flags)
    assert "nowhere" in fail("partition_data.py", "--dataset", "folder", "--data_dir", "nowhere", "--out", new / "p")
    assert not new.exists()
    assert "nowhere" in fail("withdraw.py", "--save_path", save, "--data_dir", "nowhere", unchanged=save)


@pytest.mark.parametrize("flags", [
    ["--prune_ratio", "1"], ["--temperature", "0"], ["--lambda_kp", "-1"], ["--lr", "inf"], ["--epochs", "0"],
    ["--lambda_at", "x"], ["--lambda", "1"], ["--images_per_class", "0"], ["--difference_bits", "9"],
    ["--preset", "theirs"], ["--split_at", "0"], ["--split_at", "4"], ["--split_at", "two"], ["--seed", "-1"],
    ["--images_per_class", "13"], ["--device", "gpu"], ["--save_path", "s3://bucket/run"],
])
def test_a_flag_that_makes_no_sense_is_named(chain, tmp_path, flags):
    assert flags[0] in fail("train_deposit.py", *deposit_flags(chain, tmp_path / "new", *flags))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags,word", [
    (["--warmup_epochs", "2"], "at the full rate"), (["--schedule", "step"], "no milestone within --epochs 2"),
])
def test_a_schedule_that_would_do_nothing_is_refused(chain, tmp_path, flags, word):
    assert word in fail("train_scratch.py", *scratch_flags(chain, tmp_path, *flags), unchanged=tmp_path)


@pytest.mark.parametrize("flags,word", [
    (["--deposit_classes", "bee,eel"], "'eel' is no class"), (["--deposit_classes", " , "], "empty"),
    (["--deposit_classes", "4"], "'4' is no class"), (["--deposit_classes", "ant,bee,cow,dog"], "every class"),
    (["--deposit_fraction", "1.5"], "out of range"), (["--deposit_fraction", "nan"], "out of range"),
    (["--deposit_fraction", "0.1"], "--deposit_fraction 0.1 deposits 0 of 4"), (["--dataset", "mnist"], "invalid"),
    (["--deposit_fraction", "0.3", "--deposit_classes", "ant"], "not allowed with"),
    (["--val_fraction", "0.01"], "holds out no image"), (["--val_fraction", "0.9"], "no training image"),
])
def test_a_senseless_partition_is_refused(tmp_path, flags, word):
    folder = make_folder(tmp_path / "data", train=4, test=1)
    out = tmp_path / "new" / "p.json"
    assert word in fail("partition_data.py", "--dataset", "folder", "--data_dir", folder, "--out", out, *flags)
    assert not out.parent.exists()


def test_home_is_expanded_in_paths():
    args = train_deposit.get_args_parser().parse_args(["--save_path", "~/run"])
    assert args.save_path == os.path.expanduser("~/run") != "~/run"


# checkpoints

def flip_a_bit(path):
    """Damage one weight, leaving the archive readable to a reader that checks nothing."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil,word", [
    (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "truncated"), (flip_a_bit, "damaged"),
    (lambda path: path.write_bytes(b""), "truncated or not a checkpoint"),
    (lambda path: path.write_text("{}"), "not a checkpoint"),
    (lambda path: path.write_bytes(mutations.bomb(path.read_bytes(), random.Random(0))), "damaged"),
    (lambda path: torch.save({"state_dict": {"w": torch.zeros(3)}}, path), "not a checkpoint of this project"),
    (lambda path: torch.save([1, 2], path), "not a checkpoint of this project"),
    (lambda path: path.write_bytes(mutations.code(path.read_bytes(), random.Random(0))), "pickled code"),
])
def test_a_damaged_or_foreign_checkpoint_is_refused(chain, run, spoil, word):
    for name in ("original.pt", "target.pt"):
        spoil(run / name)
    assert word in fail("withdraw.py", "--save_path", run, unchanged=run)
    assert word in redeposit(chain, run)
    assert not os.path.exists(mutations.MARKER)


def test_a_checkpoint_of_another_kind_is_refused(chain, run):
    assert "kind 'original', not target or recover" in fail("withdraw.py", "--save_path", run, "--target",
                                                            run / "original.pt", unchanged=run)
    (run / "original.pt").write_bytes((run / "deposit.pt").read_bytes())
    assert "kind 'deposit', not original or target" in redeposit(chain, run)


@pytest.mark.parametrize("change", [
    lambda c: c["tensors"].pop("head.fc.bias"), lambda c: c["tensors"].update({"extra": torch.zeros(1)}),
    lambda c: c["tensors"].update({"head.fc.weight": torch.zeros(3, 64)}),
    lambda c: c["tensors"].update({"head.fc.weight": c["tensors"]["head.fc.weight"].double()}),
    lambda c: c.update(arch="resnet20"), lambda c: c.update(arch=["vgg"]), lambda c: c.pop("arch"),
    lambda c: c.update(classes=[0, 1]), lambda c: c.update(classes=[0, 1, 2, 9]), lambda c: c.update(classes=None),
    lambda c: c.pop("partition"), lambda c: c["partition"].pop("samples"),
    lambda c: c.pop("counts"), lambda c: c.update(counts={}), lambda c: c["counts"]["test"].pop("total"),
    lambda c: c["counts"]["test"].update(correct=[1, 2]), lambda c: c["counts"].update(val=[0.5]),
    lambda c: c["counts"].update({"/../../outside/x": c["counts"]["test"]}),  # these become names of files
])
def test_an_original_that_contradicts_itself_is_refused(chain, run, change):
    rewrite(run / "original.pt", "original", change)
    assert "original.pt" in redeposit(chain, run)


@pytest.mark.parametrize("change,word", [
    (lambda c: c.update(scale=float("nan")), "'scale'"), (lambda c: c.update(scale=3), "'scale'"),
    (lambda c: c.pop("scale"), "'scale'"), (lambda c: c.update(target="0" * 64), "does not belong to"),
    (lambda c: c["tensors"].update({"stem.conv1.weight": torch.zeros(99, 3, 3, 3)}), "stem.conv1"),
    (lambda c: c["tensors"].pop("layer1.0.conv1.weight"), "layer1.0.conv1"),
    (lambda c: c["tensors"].update({"stem.conv1.weight": torch.full((16, 3, 3, 3), float("inf"))}), "not finite"),
])
def test_a_deposit_module_that_contradicts_itself_is_refused(run, change, word):
    rewrite(run / "deposit.pt", "deposit", change)
    assert word in fail("withdraw.py", "--save_path", run, unchanged=run)


@pytest.mark.parametrize("change", [
    lambda c: c.update(arch="resnet20"), lambda c: c["counts"]["test"]["correct"].reverse(),
    lambda c: c["settings"].update(lr=0.5), lambda c: c.update(classes=[0, 1, 2]), lambda c: c.update(more=1),
])
def test_the_checksum_covers_what_describes_the_tensors(run, change):
    rewrite(run / "original.pt", "original", change, seal=False)
    with pytest.raises(UserError, match="does not match its checksum"):
        load_checkpoint(str(run / "original.pt"), "original")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(2**20), torch.zeros(1).expand(2**40),
                                    torch.empty(2**40, device="meta"), torch.zeros(2, 2).to_sparse()])
def test_tensors_that_no_stage_writes_are_refused_before_memory_is_taken(tmp_path, tensor):
    path = tmp_path / "x.pt"
    torch.save({"format": "lirf/2", "kind": "state", "tensors": {"w": tensor}, "checksum": ""}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match="holds what no stage writes"):
        load_checkpoint(str(path), "state")


# partitions and images

@pytest.mark.parametrize("text,word", [
    ("", "not a JSON file"), ("[]", "no JSON object"), ("{}", "not a partition"), ("[" * 100_000, "not a JSON file"),
    ('{"format": "lirf-partition/3"}', "'dataset' is missing"),
    *((change, "changed after it was written") for change in (
        lambda p: p.update(deposit_classes=[0], preserved_classes=[1, 2, 3]), lambda p: p["mean"].reverse(),
        lambda p: p.update(more=1), lambda p: p["samples"]["test"][0].update(count=4))),
])
def test_a_damaged_or_edited_manifest_is_refused(chain, tmp_path, text, word):
    if callable(text):
        content = json.loads((chain[0] / "partition.json").read_text())
        text(content)
        text = json.dumps(content)
    (tmp_path / "p.json").write_text(text)
    assert word in fail("train_scratch.py", *scratch_flags(chain, tmp_path / "new", "--partition", tmp_path / "p.json"))


def test_a_partition_of_other_data_is_refused(chain, tmp_path):
    other, word = make_folder(tmp_path / "other", seed=1), "not those that were partitioned"
    assert word in fail("train_scratch.py", *scratch_flags(chain, tmp_path / "new", "--data_dir", other))
    assert word in fail("train_deposit.py", *deposit_flags(chain, tmp_path / "new", "--data_dir", other))
    succeed("partition_data.py", "--dataset", "digits", "--out", tmp_path / "digits.json")
    line = fail("train_deposit.py", *deposit_flags(chain, tmp_path / "new", "--partition", tmp_path / "digits.json"))
    assert "other data" in line


@pytest.mark.parametrize("spoil,word", [
    (lambda path: path.write_bytes(b"not an image"), "bee/002.png cannot be read"),
    (lambda path: path.write_bytes(b""), "bee/002.png cannot be read"),
    (lambda path: path.write_bytes(path.read_bytes()[:200]), "bee/002.png is a damaged image"),
    (lambda path: [other.unlink() for other in path.parent.iterdir()], "'bee' has no test image"),
    (lambda path: Image.new("RGB", (16, 16)).save(path, format="EPS"), "cannot be read"),  # PIL: to Ghostscript
    (lambda path: claim_a_size(path, 20_000), "too large an image"),
    (lambda path: shutil.rmtree(path.parent), "class folders of train and test differ"),
])
def test_images_are_checked_before_the_manifest_is_written(folder, tmp_path, spoil, word):
    spoil(folder / "test" / "bee" / "002.png")
    out = tmp_path / "p.json"
    assert word in fail("partition_data.py", "--dataset", "folder", "--data_dir", folder, "--out", out)
    assert not out.exists()


def claim_a_size(path, side):
    content = bytearray(path.read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


# runs

@pytest.mark.parametrize("script", ["train_scratch.py", "train_deposit.py", "withdraw.py", "analysis/train_student.py",
                                    "analysis/tsne.py"])
def test_a_folder_in_which_another_process_works_is_refused(chain, tmp_path, script):
    flags = {"train_scratch.py": scratch_flags(chain, tmp_path), "train_deposit.py": deposit_flags(chain, tmp_path)}
    with locked(str(tmp_path)):
        line = fail(script, *flags.get(script, ["--save_path", tmp_path]))
    assert f"another process works in {tmp_path}" in line and not list(tmp_path.iterdir())


def test_what_a_killed_process_was_writing_goes_with_the_next_start(chain, tmp_path):
    for name in ("recover.pt.x1.part", "partition.json.x1.part"):
        (tmp_path / name).write_text("half")
    fail("withdraw.py", "--save_path", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["partition.json.x1.part"]


def test_ranks_that_torchrun_has_not_started_are_refused(chain, tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "torchrun --nproc_per_node" in fail("train_scratch.py", *scratch_flags(chain, tmp_path), unchanged=tmp_path)


def test_another_finished_run_is_not_overwritten(chain, run, tmp_path):
    save, data = chain
    other = tmp_path / "other"
    succeed("train_scratch.py", *scratch_flags(chain, other, "--seed", "1", "--epochs", "1"))
    succeed("train_deposit.py", *deposit_flags(chain, other, "--seed", "1", "--epochs", "1"))
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant", "--out",
            other / "p.json")
    scratch, deposit = scratch_flags(chain, run), deposit_flags(chain, run)
    for script, flags, word in (
            ("train_scratch.py", [*scratch, "--lr", "0.2"], "another original run (lr 0.1, not 0.2)"),
            ("train_scratch.py", [*scratch, "--partition", other / "p.json"], "another partition"),
            ("train_deposit.py", [*deposit, "--lambda_kp", "7"], "another deposit run (lambda_kp"),
            ("train_deposit.py", [*deposit, "--original", other / "original.pt"], "another deposit run (original"),
            ("train_deposit.py", [*deposit, "--partition", other / "p.json"], "figures of another partition"),
            ("withdraw.py", ["--save_path", run, "--target", other / "target.pt", "--deposit", other],
             "another target"),
            ("partition_data.py", ["--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant", "--out",
                                   run / "partition.json"], "holds another partition")):
        assert word in fail(script, *flags, unchanged=run)


def state_of_a_finished_deposit(run, **more):
    """Write deposit_state.pt as it was before the last epoch; its tensors."""
    done = load_checkpoint(str(run / "deposit.pt"), "deposit")
    target = load_checkpoint(str(run / "target.pt"), "target")["tensors"]
    tensors = {**{f"target.{name}": t for name, t in target.items() if not name.startswith(("layer3", "head"))},
               **{f"deposit.{name}": t for name, t in done["tensors"].items()}, **more.pop("tensors", {})}
    save_checkpoint(str(run / "deposit_state.pt"), "state", tensors, settings=done["settings"], **more)


@pytest.mark.parametrize("state,flags,word", [
    *(({"next_epoch": epoch}, [], "its epoch is out of range") for epoch in (None, "1", -1, 99, 1.5)),
    ({"next_epoch": 1}, ["--seed", "5"], "another deposit run (seed 0, not 5)"),
    ({"next_epoch": 1, "tensors": {"momentum.target.stem.conv1.weight": torch.zeros(1)}}, [], "does not fit this run"),
    ({"next_epoch": 1, "tensors": {"target.stem.conv1.weight": torch.zeros(1)}}, [], "target.stem.conv1.weight"),
])
def test_a_state_of_another_run_is_not_gone_on_with(chain, run, state, flags, word):
    state_of_a_finished_deposit(run, **state)
    line = redeposit(chain, run, *flags)
    assert "deposit" in line and word.removeprefix("target.") in line


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"epoch": "two"}'])
def test_a_log_that_holds_something_else_is_not_written_to(chain, tmp_path, line):
    (tmp_path / "deposit_log.jsonl").write_text(f'{{"epoch": 1}}\n{line}\n{{"epo')
    message = fail("train_deposit.py", *deposit_flags(chain, tmp_path), unchanged=tmp_path)
    assert "line 2" in message and "deposit_log.jsonl" in message


def stop(*_, **__):
    raise KeyboardInterrupt(2)


@pytest.mark.parametrize("killed_at", ["save_checkpoint", "os.remove"])
def test_a_run_killed_between_two_writes_goes_on_as_if_nothing_was(chain, tmp_path, monkeypatch, killed_at):
    """Between the log's line and the state file, after which the epoch runs again; and between the last checkpoint and
    the removal of the state."""
    flags = deposit_flags(chain, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(f"utils.run.{killed_at}", stop)
        assert call("train_deposit.py", *flags)[0] == 130
    assert (tmp_path / "deposit.pt").exists() == (tmp_path / "deposit_state.pt").exists() == (killed_at == "os.remove")
    succeed("train_deposit.py", *flags)
    assert not list(tmp_path.glob("*_state.pt"))
    logs = [[(r["epoch"], r["l_kp"]) for r in read_log(folder / "deposit_log.jsonl")[1:] if "epoch" in r]
            for folder in (tmp_path, chain[0])]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard" / "deposit")).Reload()
    assert [e.step for e in events.Scalars("l_kr")] == [1, 2]


# machines

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(chain):
    assert "--device cpu" in fail("withdraw.py", "--save_path", chain[0], "--device", "cuda", unchanged=chain[0])


@pytest.mark.parametrize("error,word", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "the GPU's memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "of this machine"),
    (MemoryError(), "memory of this machine"), (RuntimeError("can't start new thread"), "ulimit -u"),
    (ValueError("Expected more than 1 value per channel when training"), "raise --batch_size"),
    (RuntimeError("Failed to find C++ compiler. Please specify via CXX"), "leave --compile out"),
    (OSError(28, "No space left on device", "x"), "No space left on device (x)"),
])
def test_a_machine_that_does_not_suffice_is_told_what_to_do(chain, tmp_path, monkeypatch, error, word):
    def step(*args):
        raise error

    monkeypatch.setattr(train_deposit, "take_step", step)
    assert word in fail("train_deposit.py", *deposit_flags(chain, tmp_path))


def test_a_fault_of_the_program_is_not_taken_for_the_users(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(train_deposit, "take_step", lambda *args: [][0])
    with pytest.raises(IndexError):
        call("train_deposit.py", *deposit_flags(chain, tmp_path))


@contextmanager
def unwritable(folder):
    """A folder that can be read and not written, for root too, who becomes nobody for the time being."""
    folder.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(chain):
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to nobody
        folder = Path(root)
        for name in ("target.pt", "deposit.pt", "difference.pt", "metrics.json"):
            shutil.copy(chain[0] / name, folder)
        before = snapshot(folder)
        with unwritable(folder):
            line = fail("withdraw.py", "--save_path", folder)
        assert "Permission denied" in line and root in line and snapshot(folder) == before


def test_a_file_where_a_folder_should_be_is_told(chain, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fail("train_deposit.py", *deposit_flags(chain, tmp_path / "file"), unchanged=tmp_path)


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
    """Under a checkpoint; and under TensorBoard, whose thread would print a traceback of its own."""
    status, _, err = Process("train_deposit.py", *deposit_flags(chain, tmp_path), most_bytes=20_000).end()
    assert status == 1 and len(err) == 1 and "deposit_state.pt" in err[0]
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    assert "No space left" in fail("train_deposit.py", *deposit_flags(chain, tmp_path))
    assert not printed and not list(tmp_path.glob("*.p*"))


def test_a_real_process_prints_one_line_or_nothing_where_it_has_no_streams(tmp_path):
    done = run_script("withdraw.py", "--save_path", tmp_path / "none")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("withdraw.py: error: ") and len(done.stderr.splitlines()) == 1
    done = subprocess.run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, ROOT / "partition_data.py",
                           "--dataset", "digits", "--out", tmp_path / "p.json"], check=False, timeout=120)
    assert done.returncode == 0 and (tmp_path / "p.json").is_file()


# numerics

def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(chain, tmp_path):
    line = fail("train_scratch.py", *scratch_flags(chain, tmp_path, "--epochs", "40", "--schedule", "constant", "--lr",
                                                   "1e4"))
    assert "loss became" in line and "--lr" in line and not (tmp_path / "original.pt").exists()
    with pytest.raises(UserError, match="l_kp became nan in epoch 5"):
        LossMeter(epoch=4).update({"l_kr": torch.tensor(1.0), "l_kp": torch.tensor(float("nan"))}, 3)
    with pytest.raises(UserError, match="l_re became inf"):
        check_finite({"target_pre_acc": None, "l_re": float("inf")}, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_after_the_last_step_stops_the_run(chain, tmp_path, monkeypatch, value):
    """Every loss was finite, and no further one is computed."""
    real, steps = train_scratch.take_step, []

    def last_step_spoils(optimizer, loss, lr, clip_norm):
        real(optimizer, loss, lr, clip_norm)
        steps.append(loss.item())
        if len(steps) == 6:
            optimizer.param_groups[0]["params"][0].data[0, 0, 0, 0] = value

    monkeypatch.setattr(train_scratch, "take_step", last_step_spoils)
    line = fail("train_scratch.py", *scratch_flags(chain, tmp_path))
    assert f"weight network.stem.conv1.weight became {value}" in line and "epoch 2" in line
    state = load_checkpoint(str(tmp_path / "original_state.pt"), "state")
    assert state["next_epoch"] == 1 and all(torch.isfinite(t.float()).all() for t in state["tensors"].values())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(chain, tmp_path):
    sums = []
    for name, seed in (("first", "0"), ("second", "0"), ("other", "1")):
        succeed("train_scratch.py", *scratch_flags(chain, tmp_path / name, "--seed", seed, "--deterministic"))
        sums.append(checksum({"tensors": load_checkpoint(str(tmp_path / name / "original.pt"), "original")["tensors"]}))
    assert sums[0] == sums[1] != sums[2]


def test_the_seed_covers_order_augmentation_and_random_labels(folder):
    partition = make_partition("folder", str(folder), listed="bee")
    images = load_images(partition, str(folder), "train", [0, 1])

    def draws(seed, epoch):
        generator = Runtime("cpu", seed=seed).generator(epoch)
        torch.rand(3)  # the global generator has no part in it
        order = torch.cat([y for _, y in batches(images, 8, "cpu", generator=generator)])
        crops = torch.cat([x for x, _ in batches(images, 8, "cpu", generator=generator)])
        return order, crops, draw_random_labels(images.labels, torch.arange(4), True, generator)

    for same, other in zip(draws(0, 0), draws(0, 0)):
        assert torch.equal(same, other)
    for seed, epoch in ((1, 0), (0, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(draws(0, 0), draws(seed, epoch)))
