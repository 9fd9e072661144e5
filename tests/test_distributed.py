"""Several devices, as two processes on the CPU: torchrun gives what one process gives, or one reason why not."""

import json
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, call, snapshot, succeed

from datasets import ImageSet, batches
from datasets.ragged import RaggedImages
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.run import TrainingRun

# 7 images a step are 4 and 3, or 3 and 3, on two ranks; 3 are 2 and 1
ORIGINAL = ["--arch", "resnet8", *TINY, "--epochs", "3", "--batch_size", "7", "--clip_norm", "1"]
DEPOSIT = [*TINY, "--epochs", "3", "--batch_size", "3", "--lambda_re", "0.1"]


@pytest.fixture
def float64(monkeypatch):
    """In float32 two orders of the same sum drift apart within an epoch, as far as a mean that is wrong would."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def on_two_ranks(*command):
    """torchrun of a command on two processes; returns the finished launcher."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           *map(str, command)], capture_output=True, text=True, timeout=240, check=False)


def in_float64(script, *flags, killed_in=0):
    return on_two_ranks(ROOT / "tests" / "in_float64.py", killed_in, ROOT / script, *flags)


def errors(done):
    """What our scripts, not the launcher, say on stderr."""
    return [line for line in done.stderr.splitlines() if ".py: error: " in line]


def log_of(folder, stage):
    """(numbers of ranks in the heads of a log, its epochs without their times)."""
    records = [json.loads(line) for line in (folder / f"{stage}_log.jsonl").read_text().splitlines()]
    return ([record["ranks"] for record in records if "command" in record],
            [{k: v for k, v in record.items() if k != "seconds"} for record in records if "epoch" in record])


def assert_same_run(one, two, stage, files, ranks):
    """Equal weights, statistics and logged figures, but for the rounding of float64; `two` was begun and resumed on
    these numbers of ranks."""
    for name in files:
        a, b = (load_checkpoint(str(folder / f"{name}.pt"), name)["tensors"] for folder in (one, two))
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            torch.testing.assert_close(b[key], tensor, rtol=1e-9, atol=1e-12)
    (_, expected), (begun, epochs) = log_of(one, stage), log_of(two, stage)
    assert begun == ranks and [record["epoch"] for record in epochs] == [1, 2, 3]
    for a, b in zip(expected, epochs):
        assert b == pytest.approx(a, rel=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_the_parts_of_a_batch_are_the_batch(monkeypatch, training, ragged):
    pixels = torch.randint(256, (11, 3, 8, 8), dtype=torch.uint8)
    if ragged:
        pixels = RaggedImages(list(pixels.permute(0, 2, 3, 1).numpy()), 8)
    images = ImageSet(pixels, torch.arange(11), [0.5] * 3, [0.2] * 3, flip=True)

    def on(rank, ranks):
        monkeypatch.setattr(distributed, "rank", rank)
        monkeypatch.setattr(distributed, "ranks", ranks)
        generator = torch.Generator().manual_seed(0) if training else None
        return list(batches(images, 4, "cpu", generator=generator, mine=distributed.mine))

    for (x, y), *parts in zip(on(0, 1), *(on(rank, 3) for rank in range(3))):
        assert torch.equal(x, torch.cat([part for part, _ in parts]))
        assert all(torch.equal(y, labels) for _, labels in parts)
        assert sum(distributed.weight(part, y) for part, _ in parts) == pytest.approx(3)


def test_one_process_is_resumed_by_two(chain, tmp_path, monkeypatch, float64):
    save, data = chain
    flags = ["--data_dir", data, "--partition", save / "partition.json", *ORIGINAL]
    one, two = tmp_path / "one", tmp_path / "two"
    succeed("train_scratch.py", "--save_path", one, *flags)
    with monkeypatch.context() as patch:
        end_epoch = TrainingRun.end_epoch

        def stop(self, epoch, figures):
            end_epoch(self, epoch, figures)
            raise KeyboardInterrupt(signal.SIGTERM)

        patch.setattr(TrainingRun, "end_epoch", stop)
        assert call("train_scratch.py", "--save_path", two, *flags)[0] == 143
    done = in_float64("train_scratch.py", "--save_path", two, *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()  # of rank 0 alone
    assert lines[0].startswith("resuming original after epoch 1") and len(lines) == 4
    assert_same_run(one, two, "original", ["original"], ranks=[1, 2])
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert metrics[0] == metrics[1] and sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())


def test_two_processes_one_of_them_killed_are_resumed_by_one(chain, tmp_path, float64):
    save, data = chain
    succeed("train_scratch.py", "--save_path", tmp_path, "--data_dir", data, "--partition", save / "partition.json",
            *ORIGINAL, "--epochs", "1")
    flags = ["--data_dir", data, "--original", tmp_path / "original.pt", *DEPOSIT]
    one, two = tmp_path / "one", tmp_path / "two"
    succeed("train_deposit.py", "--save_path", one, *flags)
    done = in_float64("train_deposit.py", "--save_path", two, *flags, killed_in=2)
    assert done.returncode == 1 and "SIGKILL" in done.stderr and len(errors(done)) == 1, done.stderr
    assert "same command again" in errors(done)[0] and not (two / "deposit.pt").exists()
    assert "resuming" in succeed("train_deposit.py", "--save_path", two, *flags)
    assert_same_run(one, two, "deposit", ["target", "deposit"], ranks=[2, 1])


def test_what_one_rank_cannot_do_ends_all_with_its_reason(chain, tmp_path):
    save, data = chain
    shutil.copy(save / "partition.json", tmp_path)
    before = snapshot(tmp_path)
    done = on_two_ranks(ROOT / "train_scratch.py", "--save_path", tmp_path, "--data_dir", data, *ORIGINAL,
                        "--batch_size", "1")
    assert done.returncode == 1
    line, = errors(done)
    assert "raise --batch_size" in line
    assert {k: v for k, v in snapshot(tmp_path).items() if k in before} == before
    assert not (tmp_path / "original_state.pt").exists()


@pytest.mark.parametrize("script,flags,what", [
    ("withdraw.py", [], "it"), ("partition_data.py", [], "it"), ("analysis/transfer.py", [], "it"),
    ("train_scratch.py", ["--compile"], "--compile"), ("train_deposit.py", ["--compile"], "--compile"),
    ("train_deposit.py", ["--unlike", "mixed"], "--unlike")])
def test_what_needs_one_device_says_so(monkeypatch, capsys, script, flags, what):
    monkeypatch.setattr(distributed, "ranks", 2)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 1 and f"error: {what} runs on one device" in capsys.readouterr().err
