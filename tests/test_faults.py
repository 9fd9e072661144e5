"""Runs that can be trusted: faults, damaged and hostile files, mixed-up files, numerics. Short forms of the campaigns
in results/reliability.md, and what they found."""

import json
import os
import random
import shutil
import tempfile
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, fail, run_script, snapshot, succeed
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import analysis.mutations as mutations
import train_scratch
from datasets import batches, load_images, make_partition
from datasets.cache import FOLDER
from datasets.sources import FolderSource
from models import build_deposit_module, build_network, split_network
from utils.checkpoint import checksum, load_checkpoint, save_checkpoint, sealed
from utils.errors import UserError
from utils.losses import draw_random_labels
from utils.runtime import Runtime


def scratch_flags(save, chain, *more):
    return ["--save_path", save, "--data_dir", chain[1], "--partition", chain[0] / "partition.json", "--arch",
            "resnet8", *TINY, *more]


def deposit_flags(save, chain, *more):
    return ["--save_path", save, "--data_dir", chain[1], "--original", chain[0] / "original.pt", *TINY, *more]


# the campaigns in short

def test_faults_change_no_result(tmp_path):
    log = tmp_path / "log.jsonl"
    done = run_script("analysis/faults.py", "--campaign", "kills", "stops", "full_disk", "--count", "4", "--epochs",
                      "2", "--seed", "1", "--out", log)
    assert done.returncode == 0, done.stderr + log.read_text()
    head, *records = [json.loads(line) for line in log.read_text().splitlines()]
    assert {r["fault"] for r in records if "fault" in r} >= {"SIGKILL", "full disk"} and head["commit"]
    assert all(r["verdict"] == "good" for r in records) and sum("fault" in r for r in records) == 4


def test_mutated_files_are_refused_or_read_as_they_were_written(tmp_path):
    verdicts = [(name, kind, verdict, detail) for name, kind, _, verdict, detail
                in mutations.campaign(str(tmp_path), cases=250, seed=1)]
    assert len(verdicts) == 250 and {"refused", "same"} <= {verdict for _, _, verdict, _ in verdicts}
    assert [v for v in verdicts if v[2] == "wrong"] == []


@pytest.mark.parametrize("read,kind,verdict", [
    (lambda: "as written", mutations.flip, "same"), (lambda: "other", mutations.flip, "wrong"),
    (lambda: "other", mutations.forge, "accepted"), (lambda: [][0], mutations.forge, "wrong"),
    (lambda: os.mkdir(mutations.MARKER) or "as written", mutations.code, "wrong"),
])
def test_the_campaign_judges(read, kind, verdict):
    assert mutations.judge(mutations.Subject("", read), kind, "as written")[0] == verdict


# files that lie about themselves

@pytest.mark.parametrize("change", [
    lambda c: c.update(arch="resnet20"), lambda c: c["counts"]["test"]["correct"].reverse(),
    lambda c: c["settings"].update(lr=0.5), lambda c: c.update(classes=[0, 1, 2]), lambda c: c.update(more=1),
])
def test_the_checksum_covers_what_describes_the_tensors(chain, tmp_path, change):
    content = load_checkpoint(str(chain[0] / "original.pt"), "original")
    change(content)
    torch.save(content, tmp_path / "original.pt")
    with pytest.raises(UserError, match="does not match its checksum"):
        load_checkpoint(str(tmp_path / "original.pt"), "original")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(2**20), torch.zeros(1).expand(2**40),
                                    torch.empty(2**40, device="meta"), torch.zeros(2, 2).to_sparse()])
def test_tensors_that_no_stage_writes_are_refused_before_memory_is_taken(tmp_path, tensor):
    path = tmp_path / "x.pt"
    torch.save({"format": "lirf/2", "kind": "state", "tensors": {"w": tensor}, "checksum": ""}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match="holds what no stage writes"):
        load_checkpoint(str(path), "state")


def test_a_compressed_archive_is_refused(chain, tmp_path):
    whole = (chain[0] / "target.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(mutations.bomb(whole, random.Random(0)))
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(str(tmp_path / "x.pt"), "target")


def test_names_in_a_forged_checkpoint_lead_to_no_file(chain, tmp_path):
    content = load_checkpoint(str(chain[0] / "original.pt"), "original")
    content["counts"]["/../../outside/x"] = content["counts"]["test"]
    torch.save(sealed(content), tmp_path / "original.pt")
    assert "test counts" in fail("train_deposit.py", *deposit_flags(tmp_path / "run", chain), "--original",
                                 tmp_path / "original.pt", unchanged=tmp_path)


@pytest.mark.parametrize("change", [
    lambda p: p["mean"].reverse(), lambda p: p.update(draw="first"), lambda p: p.update(seed=7),
    lambda p: p["counts"]["train"].update(all=1), lambda p: p.update(more=1), lambda p: p.pop("checksum"),
])
def test_no_entry_of_a_manifest_can_be_edited(chain, tmp_path, change):
    content = json.loads((chain[0] / "partition.json").read_text())
    change(content)
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert "changed after it was written" in fail("train_scratch.py", *scratch_flags(tmp_path / "new", chain),
                                                  "--partition", tmp_path / "p.json")


@pytest.mark.parametrize("seal", [False, True])
def test_an_edited_figure_is_refused(chain, tmp_path, seal):
    """The withdrawal's F rests on T0's counts in metrics.json."""
    for name in ("target.pt", "deposit.pt", "metrics.json"):
        shutil.copy(chain[0] / name, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["original"]["counts"]["correct"][1] -= 1
    (tmp_path / "metrics.json").write_text(json.dumps(sealed(metrics) if seal else metrics))
    line = fail("withdraw.py", "--save_path", tmp_path, "--data_dir", chain[1], unchanged=tmp_path)
    assert ("do not follow" if seal else "changed after") in line


def test_a_log_that_was_edited_or_is_of_another_run_is_not_continued(chain, tmp_path, monkeypatch):
    save, flags = tmp_path / "run", deposit_flags(tmp_path / "run", chain)
    interrupted_deposit(flags, monkeypatch)
    log = save / "deposit_log.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"l_kp": ', '"l_kp": 1'))
    assert "was changed after" in fail("train_deposit.py", *flags, unchanged=save)
    (save / "deposit_state.pt").unlink()
    log.write_text(text)
    assert "another deposit run (lr" in fail("train_deposit.py", *flags, "--lr", "0.5", unchanged=save)


def test_a_run_begun_anew_logs_its_own_figures(chain, tmp_path, monkeypatch):
    flags = deposit_flags(tmp_path, chain)
    interrupted_deposit(flags, monkeypatch)
    (tmp_path / "deposit_state.pt").unlink()
    log = tmp_path / "deposit_log.jsonl"
    log.write_text(log.read_text().replace('"l_kp": ', '"l_kp": 1'))
    succeed("train_deposit.py", *flags)
    _, *ours = [json.loads(line) for line in log.read_text().splitlines()]
    _, *theirs = [json.loads(line) for line in (chain[0] / "deposit_log.jsonl").read_text().splitlines()]
    assert [record["l_kp"] for record in ours] == [record["l_kp"] for record in theirs]


def interrupted_deposit(flags, monkeypatch, epoch=1):
    """A deposit that is stopped at the start of an epoch."""
    import train_deposit
    real = train_deposit.train_one_epoch
    with monkeypatch.context() as patch:
        patch.setattr(train_deposit, "train_one_epoch", lambda *a: real(*a) if a[-1] < epoch else stop())
        with pytest.raises(KeyboardInterrupt):
            train_deposit.main(train_deposit.get_args_parser().parse_args([str(flag) for flag in flags]))


def stop(*_, **__):
    raise KeyboardInterrupt


def test_an_epoch_whose_state_was_lost_stays_in_log_and_curves(chain, tmp_path, monkeypatch):
    """Killed between the log's line and the state file, an epoch runs again: each is there once."""
    flags = deposit_flags(tmp_path, chain)
    with monkeypatch.context() as patch:
        patch.setattr("utils.run.save_checkpoint", stop)
        interrupted_deposit(flags, monkeypatch, epoch=9)
    succeed("train_deposit.py", *flags)
    records = [json.loads(line) for line in (tmp_path / "deposit_log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records if "epoch" in r] == [1, 2]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "deposit")).Reload()
    assert [e.step for e in events.Scalars("l_kr")] == [1, 2]


def test_a_kill_just_before_the_end_leaves_nothing(chain, tmp_path, monkeypatch):
    flags = deposit_flags(tmp_path, chain)
    with monkeypatch.context() as patch:
        patch.setattr("utils.run.os.remove", stop)
        interrupted_deposit(flags, monkeypatch, epoch=9)
    assert (tmp_path / "deposit.pt").exists() and (tmp_path / "deposit_state.pt").exists()
    assert "nothing to do" in succeed("train_deposit.py", *flags)
    assert not list(tmp_path.glob("*_state.pt"))


# images

def test_a_changed_byte_of_an_image_is_noticed_by_the_stages_after_the_partition(folder):
    partition = make_partition("folder", str(folder), listed="bee")
    path = folder / "train" / "bee" / "003.png"
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    os.utime(path, ns=times)  # neither size nor time tells, and the cache is whole
    with pytest.raises(UserError, match="not those that were partitioned"):
        load_images(partition, str(folder), "train", [1])


def test_files_of_other_formats_are_not_opened(folder):
    """PIL would hand an EPS to Ghostscript, whatever the file is called."""
    Image.new("RGB", (16, 16)).save(folder / "train" / "bee" / "000.png", format="EPS")
    assert "cannot be read as an image" in fail("partition_data.py", "--dataset", "folder", "--data_dir", folder,
                                                "--out", folder / "p.json")


def test_a_huge_image_is_told_before_it_is_decoded(folder):
    path = folder / "train" / "bee" / "000.png"
    content = bytearray(path.read_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    assert "too large an image" in fail("partition_data.py", "--dataset", "folder", "--data_dir", folder,
                                        "--out", folder / "p.json")


def test_a_renamed_cache_is_made_anew(folder):
    first, _ = FolderSource(folder).load("train", [1])
    other, _ = FolderSource(folder).load("train", [2])
    bee, cow = sorted((folder / FOLDER).iterdir())
    bee.write_bytes(cow.read_bytes())
    again, _ = FolderSource(folder).load("train", [1])
    assert torch.equal(again, first) and not torch.equal(again, other)


# mixed-up runs

@pytest.mark.parametrize("what,flags", [
    ("data or deposit classes", ["--partition"]), ("split point", ["--split_at", "1"]),
    ("upper part", ["--upper", "trained"]), ("deposit run", ["--seed", "1"]),
])
def test_a_target_and_a_deposit_module_that_differ_are_refused(chain, tmp_path, what, flags):
    save, data = chain
    if flags == ["--partition"]:
        succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant", "--out",
                tmp_path / "p.json")
        flags = [*flags, tmp_path / "p.json"]
    succeed("train_deposit.py", *deposit_flags(tmp_path / "run", chain), *flags, "--epochs", "1")
    for target, deposit in ((save, tmp_path / "run"), (tmp_path / "run", save)):
        assert f"do not belong together (another {what})" in fail(
            "withdraw.py", "--save_path", tmp_path / "new", "--target", target / "target.pt", "--deposit",
            deposit / "deposit.pt")
    assert not (tmp_path / "new").exists()


def test_another_original_is_refused(chain, tmp_path):
    other = tmp_path / "other"
    succeed("train_scratch.py", *scratch_flags(other, chain, "--seed", "1", "--epochs", "1"))
    run = tmp_path / "run"
    shutil.copytree(chain[0], run)
    assert "another deposit run (original" in fail("train_deposit.py", *deposit_flags(run, chain), "--original",
                                                   other / "original.pt", unchanged=run)


# disks

@contextmanager
def unwritable():
    """A folder that can be read and not written, for root too, who becomes nobody for the time being."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        folder.mkdir()

        @contextmanager
        def closed():
            for path in (Path(root), folder):
                path.chmod(0o555)
            if os.getuid() == 0:
                os.seteuid(65534)
            try:
                yield
            finally:
                if os.getuid() == 0:
                    os.seteuid(0)
                for path in (Path(root), folder):
                    path.chmod(0o755)

        yield folder, closed


def test_a_folder_that_cannot_be_written_is_told_in_one_line(chain):
    with unwritable() as (folder, closed):
        for name in ("target.pt", "deposit.pt", "metrics.json"):
            shutil.copy(chain[0] / name, folder)
        before = snapshot(folder)
        with closed():
            line = fail("withdraw.py", "--save_path", folder)
        assert "Permission denied" in line and str(folder) in line and snapshot(folder) == before


def test_a_full_disk_under_tensorboard_is_told_in_one_line(chain, tmp_path, monkeypatch):
    """Its file is written by a thread, which would print a traceback of its own."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    assert "No space left" in fail("train_deposit.py", *deposit_flags(tmp_path, chain))
    assert not printed and not (tmp_path / "deposit.pt").exists()


# numerics

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
    line = fail("train_scratch.py", *scratch_flags(tmp_path, chain))
    assert f"weight network.stem.conv1.weight became {value}" in line and "epoch 2" in line
    state = load_checkpoint(str(tmp_path / "original_state.pt"), "state")
    assert state["next_epoch"] == 1 and all(torch.isfinite(t.float()).all() for t in state["tensors"].values())
    assert not (tmp_path / "original.pt").exists()


def test_deterministic_gives_the_same_bits_twice_and_another_seed_others(chain, tmp_path):
    def sums(name, *flags):
        save = tmp_path / name
        succeed("train_scratch.py", *scratch_flags(save, chain, "--deterministic", *flags))
        succeed("train_deposit.py", *deposit_flags(save, chain, "--deterministic", *flags))
        return [checksum({"tensors": load_checkpoint(str(save / f"{kind}.pt"), kind)["tensors"]})
                for kind in ("original", "target", "deposit")]

    first, second, other = sums("first"), sums("second"), sums("other", "--seed", "1")
    assert first == second and all(a != b for a, b in zip(first, other))


def test_the_seed_covers_order_augmentation_and_random_labels(folder):
    partition = make_partition("folder", str(folder), listed="bee")
    images = load_images(partition, str(folder), "train", [0, 1])

    def draws(seed, epoch):
        args = train_scratch.get_args_parser().parse_args(["--seed", str(seed), "--device", "cpu"])
        generator = Runtime(args).generator(epoch)
        torch.rand(3)  # the global generator has no part in it
        order = torch.cat([y for _, y in batches(images, 8, "cpu", generator=generator)])
        crops = torch.cat([x for x, _ in batches(images, 8, "cpu", generator=generator)])
        return order, crops, draw_random_labels(images.labels, torch.arange(4), True, generator)

    for same, other in zip(draws(0, 0), draws(0, 0)):
        assert torch.equal(same, other)
    for seed, epoch in ((1, 0), (0, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(draws(0, 0), draws(seed, epoch)))


def test_pruning_depends_on_the_weights_alone():
    torch.manual_seed(0)
    lower, _ = split_network(build_network("resnet20", 4, 16), 2)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        states.append(build_deposit_module(lower, 0.5, 16).state_dict())
    assert checksum({"tensors": states[0]}) == checksum({"tensors": states[1]})


def test_a_state_with_another_networks_momentum_is_refused(chain, tmp_path, monkeypatch):
    flags = deposit_flags(tmp_path, chain)
    interrupted_deposit(flags, monkeypatch)
    state = load_checkpoint(str(tmp_path / "deposit_state.pt"), "state")
    tensors = state["tensors"]
    tensors["momentum.target.stem.conv1.weight"] = torch.zeros(1)
    save_checkpoint(str(tmp_path / "deposit_state.pt"), "state", tensors, next_epoch=1, settings=state["settings"],
                    log=state["log"])
    assert "does not fit this run" in fail("train_deposit.py", *flags, unchanged=tmp_path)
