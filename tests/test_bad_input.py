"""Every mistake of the user: one clear line on stderr, an exit status, nothing overwritten."""

import json
import os
import shutil
import zipfile

import pytest
import torch
from conftest import TINY, fail, make_folder, run_script, snapshot, succeed

from utils.checkpoint import checksum, load_checkpoint, save_checkpoint, write_atomically
from utils.errors import UserError
from utils.run import LossMeter, check_finite


@pytest.fixture
def run(chain, tmp_path):
    """A copy of the finished tiny chain, for a test to spoil: (save_path, data_dir)."""
    save, data = chain
    copy = tmp_path / "run"
    shutil.copytree(save, copy)
    return copy, data


def deposit_flags(save, data, original=None):
    return ["--save_path", save, "--data_dir", data, "--original", original or save / "original.pt", *TINY]


# no such file

def test_missing_files_are_named(chain, tmp_path):
    save, data = chain
    new = tmp_path / "new"
    assert "none.json does not exist" in fail("train_scratch.py", "--save_path", new, "--partition", "none.json",
                                              "--data_dir", data, *TINY)
    assert "original.pt does not exist" in fail("train_deposit.py", "--save_path", new, "--data_dir", data)
    assert "target.pt does not exist" in fail("withdraw.py", "--save_path", new)
    assert "deposit.pt does not exist" in fail("withdraw.py", "--save_path", new, "--target", save / "target.pt")
    assert "nowhere" in fail("train_deposit.py", *deposit_flags(new, "nowhere", save / "original.pt"))
    assert "nowhere" in fail("withdraw.py", "--save_path", save, "--data_dir", "nowhere", unchanged=save)
    assert "nowhere" in fail("partition_data.py", "--dataset", "folder", "--data_dir", "nowhere", "--out", new / "p")
    assert not new.exists()


# checkpoints

def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def flip_a_bit(path):
    """Damage one weight, leaving the archive readable to a reader that checks nothing."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("spoil,word", [
    (truncate, "truncated"), (flip_a_bit, "damaged"),
    (lambda path: path.write_bytes(b""), "truncated or not a checkpoint"),
    (lambda path: path.write_bytes(b"PK" + bytes(500)), "not a checkpoint"),
    (lambda path: path.write_text("{}"), "not a checkpoint"),
    (lambda path: torch.save({"state_dict": {"w": torch.zeros(3)}}, path), "not a checkpoint of this project"),
    (lambda path: torch.save([1, 2], path), "not a checkpoint of this project"),
    (lambda path: torch.save(torch.nn.Linear(2, 2), path), "pickled code"),
])
def test_a_damaged_or_foreign_checkpoint_is_refused(run, spoil, word):
    save, data = run
    for name in ("original.pt", "target.pt"):
        spoil(save / name)
    (save / "deposit.pt").unlink()
    assert word in fail("train_deposit.py", *deposit_flags(save, data), unchanged=save)
    assert word in fail("withdraw.py", "--save_path", save, unchanged=save)


def test_pickled_code_is_never_run(run, tmp_path):
    save, data = run
    marker = tmp_path / "it ran"
    torch.save({"format": "lirf/1", "kind": "original", "tensors": Evil(str(marker))}, save / "original.pt")
    (save / "deposit.pt").unlink()
    assert "pickled code" in fail("train_deposit.py", *deposit_flags(save, data), unchanged=save)
    assert not marker.exists()


def test_a_checkpoint_of_another_kind_is_refused(run):
    save, data = run
    assert "kind 'original', not target" in fail("withdraw.py", "--save_path", save, "--target", save / "original.pt",
                                                 unchanged=save)
    assert "kind 'target', not original" in fail(
        "train_deposit.py", *deposit_flags(save, data, save / "target.pt"), unchanged=save)


@pytest.mark.parametrize("change", [
    lambda c: c["tensors"].pop("head.fc.bias"),
    lambda c: c["tensors"].update({"extra": torch.zeros(1)}),
    lambda c: c["tensors"].update({"head.fc.weight": torch.zeros(3, 64)}),
    lambda c: c["tensors"].update({"head.fc.weight": c["tensors"]["head.fc.weight"].double()}),
    lambda c: c.update(arch="resnet20"), lambda c: c.update(arch="vgg"), lambda c: c.pop("arch"),
    lambda c: c.update(classes=[0, 1]), lambda c: c.update(classes=[0, 1, 2, 9]), lambda c: c.update(classes=None),
    lambda c: c.pop("partition"), lambda c: c["partition"].pop("samples"),
    lambda c: c.pop("counts"), lambda c: c.update(counts={}), lambda c: c["counts"]["test"].pop("total"),
    lambda c: c["counts"]["test"].update(correct=[1, 2]), lambda c: c["counts"].update(val=[0.5]),
])
def test_a_checkpoint_that_contradicts_itself_is_refused(run, change):
    """Rewritten with a right checksum, so that only its own description can tell."""
    save, data = run
    content = load_checkpoint(str(save / "original.pt"), "original")
    change(content)
    content["checksum"] = checksum(content)
    torch.save(content, save / "original.pt")
    (save / "deposit.pt").unlink()
    assert "original.pt" in fail("train_deposit.py", *deposit_flags(save, data), unchanged=save)


@pytest.mark.parametrize("change,word", [
    (lambda c: c["calibration"].update(scale=float("nan")), "calibration"),
    (lambda c: c["calibration"].pop("margin"), "calibration"), (lambda c: c.update(calibration=3), "calibration"),
    (lambda c: c.update(split_at=9), "belong together"),
    (lambda c: c["tensors"].update({"stem.conv1.weight": torch.zeros(99, 3, 3, 3)}), "stem.conv1"),
    (lambda c: c["tensors"].pop("layer1.0.conv1.weight"), "layer1.0.conv1"),
    (lambda c: c["tensors"].update({"stem.conv1.weight": torch.full((16, 3, 3, 3), float("inf"))}), "not finite"),
    (lambda c: c.update(target="0" * 64), "another deposit run"), (lambda c: c.update(upper="0"), "another upper part"),
])
def test_a_deposit_module_that_contradicts_itself_is_refused(run, change, word):
    save, _ = run
    content = load_checkpoint(str(save / "deposit.pt"), "deposit")
    change(content)
    content["checksum"] = checksum(content)
    torch.save(content, save / "deposit.pt")
    assert word in fail("withdraw.py", "--save_path", save, unchanged=save)


def test_target_and_deposit_module_of_different_runs_are_refused(chain, tmp_path):
    save, data = chain
    succeed("train_deposit.py", *deposit_flags(tmp_path, data, save / "original.pt"), "--seed", "1")
    line = fail("withdraw.py", "--save_path", tmp_path, "--deposit", save / "deposit.pt", unchanged=tmp_path)
    assert "do not belong together (another deposit run)" in line


# partitions

def test_a_partition_of_other_data_is_refused(chain, tmp_path):
    save, data = chain
    other = make_folder(tmp_path / "other", seed=1)
    assert "not those that were partitioned" in fail(
        "train_scratch.py", "--save_path", tmp_path / "new", "--data_dir", other, "--partition",
        save / "partition.json", "--arch", "resnet8", *TINY)
    assert "not those that were partitioned" in fail(
        "train_deposit.py", *deposit_flags(tmp_path / "new", other, save / "original.pt"))
    succeed("partition_data.py", "--dataset", "digits", "--out", tmp_path / "digits.json")
    line = fail("train_deposit.py", *deposit_flags(tmp_path / "new", data, save / "original.pt"),
                "--partition", tmp_path / "digits.json")
    assert "other data" in line


@pytest.mark.parametrize("text,word", [("", "not a JSON file"), ("[]", "no JSON object"), ("{}", "not a partition"),
                                       ('{"format": "lirf-partition/2"}', "'dataset' is missing"),
                                       ("[" * 100_000, "not a JSON file")])
def test_a_damaged_manifest_is_refused(chain, tmp_path, text, word):
    (tmp_path / "p.json").write_text(text)
    assert word in fail("train_scratch.py", "--save_path", tmp_path / "new", "--data_dir", chain[1], "--partition",
                        tmp_path / "p.json", *TINY)


def test_an_edited_manifest_is_refused(chain, tmp_path):
    content = json.loads((chain[0] / "partition.json").read_text())
    content["deposit_classes"], content["preserved_classes"] = [0], [1, 2, 3]
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert "changed after it was written" in fail("train_scratch.py", "--save_path", tmp_path / "new", "--data_dir",
                                                  chain[1], "--partition", tmp_path / "p.json", *TINY)


@pytest.mark.parametrize("flags,word", [
    (["--deposit_classes", "eel"], "'eel' is no class"), (["--deposit_classes", ""], "empty"),
    (["--deposit_classes", "ant,bee,cow,dog"], "every class"), (["--deposit_fraction", "0"], "at least one"),
    (["--deposit_fraction", "1.5"], "out of range"), (["--deposit_fraction", "nan"], "out of range"),
    (["--deposit_fraction", "0.3", "--deposit_classes", "ant"], "not allowed with"), (["--seed", "-1"], "out of range"),
    (["--dataset", "mnist"], "invalid choice"),
])
def test_a_senseless_deposit_set_is_refused(folder, tmp_path, flags, word):
    out = tmp_path / "p.json"
    flags = ["--dataset", "folder", "--data_dir", folder, "--out", out, *flags]
    assert word in fail("partition_data.py", *flags) and not out.exists()


def test_another_partition_is_not_overwritten(chain, tmp_path):
    save, data = chain
    flags = ["--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant", "--out", save / "partition.json"]
    assert "holds another partition" in fail("partition_data.py", *flags, unchanged=save)


def test_images_are_checked_before_the_manifest_is_written(folder, tmp_path):
    flags = ["--dataset", "folder", "--data_dir", folder, "--deposit_classes", "ant", "--out", tmp_path / "p.json"]
    (folder / "test" / "bee" / "002.png").write_bytes(b"not an image")
    assert "bee/002.png" in fail("partition_data.py", *flags)
    shutil.rmtree(folder / "test" / "bee")
    assert "class folders of train and test differ" in fail("partition_data.py", *flags)
    assert not (tmp_path / "p.json").exists()


# settings

@pytest.mark.parametrize("fraction,word", [(0.01, "holds out no image"), (0.9, "no training image")])
def test_a_senseless_validation_fraction_is_refused(tmp_path, fraction, word):
    make_folder(tmp_path / "data", train=4)
    line = fail("partition_data.py", "--dataset", "folder", "--data_dir", tmp_path / "data", "--val_fraction", fraction,
                "--out", tmp_path / "run" / "partition.json")
    assert word in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags,word", [(["--warmup_epochs", "2"], "at the full rate"),
                                        (["--schedule", "step"], "no milestone within --epochs 2")])
def test_a_schedule_that_would_do_nothing_is_refused(chain, tmp_path, flags, word):
    save, data = chain
    line = fail("train_deposit.py", *deposit_flags(tmp_path, data, save / "original.pt"), *flags, unchanged=tmp_path)
    assert word in line


@pytest.mark.parametrize("split_at", [0, 4, -1, "two"])
def test_an_impossible_split_is_refused(chain, tmp_path, split_at):
    save, data = chain
    assert "split_at" in fail("train_deposit.py", *deposit_flags(tmp_path / "new", data, save / "original.pt"),
                              "--split_at", split_at)
    assert not (tmp_path / "new").exists()


def test_more_images_than_there_are_are_refused(chain, tmp_path):
    save, data = chain
    line = fail("train_deposit.py", *deposit_flags(tmp_path, data, save / "original.pt"), "--images_per_class", "13",
                unchanged=tmp_path)
    assert "a deposit class has 12 training images" in line


@pytest.mark.parametrize("flags", [["--prune_ratio", "1"], ["--temperature", "0"], ["--lambda_kp", "-1"],
                                   ["--lr", "inf"], ["--epochs", "0"], ["--lambda_at", "x"], ["--lambda", "1"],
                                   ["--images_per_class", "0"]])
def test_flags_out_of_range_are_refused(chain, tmp_path, flags):
    save, data = chain
    assert flags[0] in fail("train_deposit.py", *deposit_flags(tmp_path / "new", data, save / "original.pt"), *flags)


def test_the_released_rule_is_refused_as_a_network(chain):
    assert "true label" in fail("withdraw.py", "--save_path", chain[0], "--merge", "released", unchanged=chain[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(chain):
    assert "--device cpu" in fail("withdraw.py", "--save_path", chain[0], "--device", "cuda", unchanged=chain[0])


def test_a_gpu_that_pytorch_cannot_use_is_told(chain, monkeypatch):
    """A GPU for which the installed build has no kernels: PyTorch finds it, and fails at the first of them."""

    def ones(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    line = fail("withdraw.py", "--save_path", chain[0], unchanged=chain[0])
    assert "no kernel image" in line and "install a build" in line


def test_a_full_gpu_is_told(chain, tmp_path, monkeypatch):
    def step(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    save, data = chain
    monkeypatch.setattr("train_deposit.take_step", step)
    assert "lower --batch_size" in fail("train_deposit.py", *deposit_flags(tmp_path, data, save / "original.pt"))


# runs

def test_another_finished_run_is_not_overwritten(chain, tmp_path):
    save, data = chain
    common = ["--save_path", save, "--data_dir", data]
    line = fail("train_scratch.py", *common, "--arch", "resnet8", *TINY, "--lr", "0.2", unchanged=save)
    assert "another original run (lr 0.1, not 0.2)" in line
    line = fail("train_deposit.py", *common, *TINY, "--lambda_kp", "7", unchanged=save)
    assert "another deposit run (lambda_kp" in line
    other = tmp_path / "other"
    succeed("train_deposit.py", *deposit_flags(other, data, save / "original.pt"), "--seed", "1")
    line = fail("withdraw.py", *common, "--target", other / "target.pt", "--deposit", other / "deposit.pt",
                unchanged=save)
    assert "another target" in line
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant",
            "--out", other / "p.json")
    figures = tmp_path / "figures"
    figures.mkdir()
    shutil.copy(save / "metrics.json", figures)
    line = fail("train_deposit.py", *deposit_flags(figures, data, save / "original.pt"), "--partition",
                other / "p.json", unchanged=figures)
    assert "figures of another partition" in line
    line = fail("train_scratch.py", *common, "--partition", other / "p.json", "--arch", "resnet8", *TINY,
                unchanged=save)
    assert "another partition" in line


def test_another_unfinished_run_is_not_overwritten(run):
    save, data = run
    done = load_checkpoint(str(save / "deposit.pt"), "deposit")
    (save / "deposit.pt").unlink()
    save_checkpoint(str(save / "deposit_state.pt"), "state", {}, settings=done["settings"], next_epoch=1)
    assert "another deposit run (seed 0, not 5)" in fail("train_deposit.py", *deposit_flags(save, data), "--seed", "5",
                                                         unchanged=save)
    truncate(save / "deposit_state.pt")
    assert "deposit_state.pt" in fail("train_deposit.py", *deposit_flags(save, data), unchanged=save)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(chain, tmp_path):
    save, data = chain
    flags = ["--save_path", tmp_path, "--data_dir", data, "--partition", save / "partition.json", "--arch", "resnet8",
             *TINY, "--epochs", "40", "--schedule", "constant", "--lr", "1e4"]
    line = fail("train_scratch.py", *flags)
    assert "loss became" in line and "--lr" in line
    assert not (tmp_path / "original.pt").exists()
    if (tmp_path / "original_state.pt").exists():
        state = load_checkpoint(str(tmp_path / "original_state.pt"), "state")
        assert all(torch.isfinite(t).all() for name, t in state["tensors"].items() if name.startswith("network.head"))


def test_the_term_that_is_not_finite_is_named():
    meter = LossMeter(epoch=4)
    with pytest.raises(UserError, match="l_kp became nan in epoch 5"):
        meter.update({"l_kr": torch.tensor(1.0), "l_kp": torch.tensor(float("nan"))}, 3)
    with pytest.raises(UserError, match="l_re became inf"):
        check_finite({"target_pre_acc": None, "l_re": float("inf")}, 0)


def test_a_path_that_cannot_be_a_folder_is_refused(chain, tmp_path):
    (tmp_path / "file").write_text("")
    line = fail("train_deposit.py", *deposit_flags(tmp_path / "file", chain[1], chain[0] / "original.pt"))
    assert "file" in line


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "original.pt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(str(path), write)
    assert snapshot(tmp_path) == {path: b"old"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_full_disk_is_told_in_one_line(chain, tmp_path):
    """The state file's temporary neighbour is a device that is always full."""
    save, data = chain
    (tmp_path / "deposit_state.pt.part").symlink_to("/dev/full")
    line = fail("train_deposit.py", *deposit_flags(tmp_path, data, save / "original.pt"))
    assert "space" in line.lower() or "could not be written" in line
    assert not (tmp_path / "deposit.pt").exists()


def test_a_real_process_prints_one_line_and_no_traceback(tmp_path):
    done = run_script("withdraw.py", "--save_path", tmp_path / "none")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("withdraw.py: error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"epoch": "two"}'])
def test_a_log_that_holds_something_else_is_not_written_to(chain, tmp_path, line):
    save, data = chain
    (tmp_path / "deposit_log.jsonl").write_text(f'{{"epoch": 1}}\n{line}\n{{"epo')
    message = fail("train_deposit.py", *deposit_flags(tmp_path, data), "--original", save / "original.pt",
                   unchanged=tmp_path)
    assert "line 2" in message and "deposit_log.jsonl" in message


@pytest.mark.parametrize("epoch", [None, "1", -1, 99, 1.5])
def test_a_state_of_an_impossible_epoch_is_refused(chain, tmp_path, epoch):
    save, data = chain
    done = load_checkpoint(str(save / "deposit.pt"), "deposit")
    save_checkpoint(str(tmp_path / "deposit_state.pt"), "state", deposit_state(done, save), settings=done["settings"],
                    next_epoch=epoch)
    assert "deposit_state.pt" in fail("train_deposit.py", *deposit_flags(tmp_path, data), "--original",
                                      save / "original.pt", unchanged=tmp_path)


def deposit_state(done, save):
    """The tensors of a resumable state with the weights of a finished deposit."""
    target = load_checkpoint(str(save / "target.pt"), "target")["tensors"]
    lower = {name: tensor for name, tensor in target.items() if not name.startswith(("layer3", "head"))}
    return {**{f"target.{n}": t for n, t in lower.items()}, **{f"deposit.{n}": t for n, t in done["tensors"].items()}}
