"""Several devices, as two processes on the CPU: they give what one process gives, or one reason why not."""

import functools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, call, epochs_of, fail, scratch_flags, snapshot, succeed, tensors_of
from forked import Process

import train_deposit
from datasets import ImageSet, batches
from datasets.batches import RaggedImages
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.files import read_log
from utils.run import TrainingRun

# Steps of 14 images are 7 on each of two ranks, and leave 6 of the 48 out; of D_r, with 12, they are 4 of 2 and 2. L_pt
# over the one deposit class would be 0.
ORIGINAL = ["--epochs", "3", "--batch_size", "14", "--clip_norm", "1"]
DEPOSIT = [*TINY, "--split_at", "2", "--epochs", "3", "--batch_size", "4", "--pt_classes", "all"]


def compute_in_float64(killed_in=None):
    """In float32 two orders of the same sum drift apart within an epoch, as far as a mean that is wrong would. Rank 1
    is killed at the end of epoch `killed_in`, counted from 1."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    end_epoch = TrainingRun.end_epoch

    def end_or_die(self, epoch, *more):
        if epoch + 1 == killed_in and distributed.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        end_epoch(self, epoch, *more)

    TrainingRun.end_epoch = end_or_die


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def on_two_ranks(script, *flags, killed_in=None):
    """A script on two ranks in float64, with the environment that torchrun makes; [(status, stdout, stderr lines)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    processes = [Process(script, *flags, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         prepare=functools.partial(compute_in_float64, killed_in)) for rank in range(2)]
    return [process.end() for process in processes]


def assert_same_run(one, two, stage, files, ranks):
    """Equal weights, statistics and logged figures, but for the rounding of float64; `two` was begun and resumed on
    these numbers of ranks."""
    for name in files:
        a, b = (tensors_of(folder / f"{name}.pt") for folder in (one, two))
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            torch.testing.assert_close(b[key], tensor, rtol=1e-9, atol=1e-12)
    expected, epochs = (epochs_of(folder / f"{stage}_log.jsonl") for folder in (one, two))
    assert [record["ranks"] for record in read_log(two / f"{stage}_log.jsonl") if "command" in record] == ranks
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    for a, b in zip(expected, epochs):
        assert b == pytest.approx(a, rel=1e-9)


def batches_on(monkeypatch, rank, ranks, images, size, training=True):
    monkeypatch.setattr(distributed, "rank", rank)
    monkeypatch.setattr(distributed, "ranks", ranks)
    return list(batches(images, size, generator=torch.Generator().manual_seed(0) if training else None))


@pytest.mark.parametrize("ragged", [True, False])
def test_the_ranks_share_every_batch_evenly_and_drop_what_is_left_over(monkeypatch, ragged):
    pixels = torch.randint(256, (11, 3, 8, 8), dtype=torch.uint8)
    if ragged:
        pixels = RaggedImages(list(pixels.permute(0, 2, 3, 1).numpy()), 8)
    images = ImageSet(pixels, torch.arange(11), [0.5] * 3, [0.2] * 3, flip=True)
    whole = batches_on(monkeypatch, 0, 1, images, 4)
    shares = [batches_on(monkeypatch, rank, 2, images, 4) for rank in range(2)]
    assert [len(y) for _, y in whole] == [4, 4] and len(whole) == len(shares[0]) == len(shares[1])
    for batch, *parts in zip(whole, *shares):
        assert all(len(part) == 2 for _, part in parts)
        assert all(map(torch.equal, batch, map(torch.cat, zip(*parts))))
    seen = [torch.cat([y for _, y in batches_on(monkeypatch, rank, 2, images, 4, training=False)]) for rank in (0, 1)]
    assert all(y.tolist() == list(range(11)) for y in seen)  # evaluation: all of them, on any rank
    for size in (4, 100):  # the latter is cut to the 11 images that there are
        with pytest.raises(UserError, match="cannot be shared evenly by 3 devices: make --batch_size a multiple"):
            batches_on(monkeypatch, 0, 3, images, size)


def test_the_deep_deposit_which_looks_at_whole_batches_is_refused_on_several_devices(chain, monkeypatch):
    monkeypatch.setattr(distributed, "ranks", 2)
    flags = ["--save_path", str(chain[0]), "--lambda_ur", "20"]
    with pytest.raises(UserError, match="run it without torchrun"):
        train_deposit.main(train_deposit.get_args_parser().parse_args(flags))


def test_one_gpu_for_all_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", 2)
    with pytest.raises(UserError, match="name --device cuda"):
        distributed.start("cuda:1")


def test_torchrun_ends_all_ranks_with_one_line_and_another_launcher_is_refused(chain, tmp_path, monkeypatch):
    shutil.copy(chain[0] / "partition.json", tmp_path)
    before = snapshot(tmp_path)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           ROOT / "train_scratch.py", *map(str, scratch_flags(chain, tmp_path, "--batch_size", "7"))],
                          capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    line, = (line for line in done.stderr.splitlines() if ".py: error: " in line)
    assert "make --batch_size a multiple" in line
    assert {k: v for k, v in snapshot(tmp_path).items() if k in before} == before
    assert not list(tmp_path.glob("*.pt"))
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "torchrun --nproc_per_node" in fail("train_scratch.py", *scratch_flags(chain, tmp_path))


def test_one_process_is_resumed_by_two(chain, tmp_path, monkeypatch, float64):
    one, two = tmp_path / "one", tmp_path / "two"
    succeed("train_scratch.py", *scratch_flags(chain, one, *ORIGINAL))
    end_epoch = TrainingRun.end_epoch

    def stop(self, *epoch):
        end_epoch(self, *epoch)
        raise KeyboardInterrupt(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "end_epoch", stop)
        assert call("train_scratch.py", *scratch_flags(chain, two, *ORIGINAL))[0] == 143
    (status, out, err), (other, nothing, _) = on_two_ranks("train_scratch.py", *scratch_flags(chain, two, *ORIGINAL))
    assert status == other == 0, err
    assert out.startswith("resuming original after epoch 1") and len(out.splitlines()) == 4 and not nothing
    assert_same_run(one, two, "original", ["original"], ranks=[1, 2])
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert metrics[0] == metrics[1] and sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())


def test_two_processes_one_of_them_killed_are_resumed_by_one(chain, tmp_path, float64):
    succeed("train_scratch.py", *scratch_flags(chain, tmp_path, *ORIGINAL, "--epochs", "1"))
    flags = ["--data_dir", chain[1], "--original", tmp_path / "original.pt", *DEPOSIT]
    one, two = tmp_path / "one", tmp_path / "two"
    succeed("train_deposit.py", "--save_path", one, *flags)
    (status, _, err), (killed, _, _) = on_two_ranks("train_deposit.py", "--save_path", two, *flags, killed_in=2)
    assert status == 1 and killed == -signal.SIGKILL
    assert len([line for line in err if ".py: error: " in line]) == 1 and "same command again" in err[-1]
    assert not (two / "deposit.pt").exists()
    assert "resuming" in succeed("train_deposit.py", "--save_path", two, *flags)
    assert_same_run(one, two, "deposit", ["target", "deposit"], ranks=[2, 1])
    on_two_ranks("train_deposit.py", "--save_path", tmp_path / "whole", *flags)
    costs = [load_checkpoint(str(run / "deposit.pt"), "deposit")["cost"] for run in (one, tmp_path / "whole")]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("script", ["withdraw.py", "partition_data.py", "analysis/train_student.py"])
def test_what_needs_one_device_says_so(monkeypatch, capsys, script):
    monkeypatch.setattr(distributed, "ranks", 2)
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 1 and "error: it runs on one device" in capsys.readouterr().err
