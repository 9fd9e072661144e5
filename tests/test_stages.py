"""The four stages from their command lines: what they write, what they read, what is resumed and measured."""

import importlib
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (MEASURE, PLAIN, ROOT, TINY, call, deposit_flags, epochs_of, fail, scratch_flags, succeed,
                      tensors_of)
from fixtures import CLASSES, make_folder

import train_deposit
import train_scratch
from datasets import first_images, load_images, read_partition
from models.architectures import build_network, split_network
from models.checkpoints import load_network, read
from models.recover import MERGE_RULES
from utils.checkpoint import load_checkpoint
from utils.files import read_log
from utils.optim import learning_rate, take_step
from utils.run import is_measured
from utils.runtime import Runtime

SCRIPTS = [str(path.relative_to(ROOT)) for paths in (ROOT.glob("*.py"), (ROOT / "analysis").rglob("*.py"))
           for path in sorted(paths) if "\ndef get_args_parser" in path.read_text()]


def test_the_rate_warms_up_and_then_follows_its_schedule():
    args = SimpleNamespace(lr=0.4, epochs=5, warmup_epochs=1, schedule="cosine", milestones=[2, 4])
    rates = [learning_rate(args, step, 10) for step in range(50)]
    assert rates[:3] == pytest.approx([0.04, 0.08, 0.12]) and rates[9] == max(rates) == pytest.approx(0.4)
    assert rates[30] == pytest.approx(0.2) and sorted(rates[9:], reverse=True) == rates[9:]  # half way, half the rate
    assert 0 < rates[-1] < 0.001
    args.schedule = "step"
    assert [learning_rate(args, step, 10) for step in (15, 19, 20, 39, 40, 49)] == pytest.approx(
        [0.4, 0.4, 0.04, 0.04, 0.004, 0.004])
    assert learning_rate(SimpleNamespace(lr=1.0, epochs=1), 0, 10) == 1.0  # no warm-up unless said


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_flag_with_its_default(script):
    status, out, err = call(script, "--help")
    assert status == 0 and err == "" and len(SCRIPTS) > 12
    flags = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert flags and all("-" not in flag[2:] for flag in flags) and "default:" in out  # snake_case
    parser = importlib.import_module(script.removesuffix(".py").replace("/", ".")).get_args_parser()
    assert all(action.help for action in parser._actions)  # argparse adds a default to a help, and to nothing else
    assert len(flags) <= 34
    # what `call` bypasses
    text = (ROOT / script).read_text()
    assert re.search(r'\nif __name__ == "__main__":\n    run\(main, get_args_parser\(\).*\)\n\Z', text)


# what is written

def test_the_chain_writes_its_files(chain):
    save, _ = chain
    names = {path.name for path in save.iterdir()}
    assert names == {"partition.json", "original.pt", "target.pt", "deposit.pt", "difference.pt", "recover.pt",
                     "metrics.json", "original_log.jsonl", "deposit_log.jsonl", "tensorboard"}  # no state file is left
    for stage in ("original", "deposit"):
        head, *epochs = read_log(save / f"{stage}_log.jsonl")
        assert head["command"][0] == f"train_{'scratch' if stage == 'original' else stage}.py"
        assert head["torch"] == torch.__version__ and head["settings"]["batch_size"] == 16
        assert [record["epoch"] for record in epochs] == [1, 2] and all("loss" in record for record in epochs)
        assert list((save / "tensorboard" / stage).iterdir())
    assert {"target_pre_acc", "target_dep_acc", "target_h_mean"} <= set(epochs[0])


def test_metrics_agree_with_the_networks_in_the_files(chain):
    save, data = chain
    metrics = json.loads((save / "metrics.json").read_text())
    assert set(metrics["recover"]) == {*MERGE_RULES, "difference", "released"}
    assert metrics["recover"]["released"]["reads_label"] and metrics["merge"] == "concat"
    for name, figures in (("original", metrics["original"]), ("target", metrics["target"]),
                          ("recover", metrics["recover"]["concat"])):
        network, partition = load_network(str(save / f"{name}.pt"))
        images = load_images(partition, str(data), "test", range(4))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (partition.mean, partition.std))
        with torch.no_grad():
            hits = network((images.images / 255 - mean) / std).argmax(1) == images.labels
        deposit = images.labels == 1
        for key, rows in (("avg_acc", deposit | True), ("dep_acc", deposit), ("pre_acc", ~deposit)):
            assert figures[key] == pytest.approx(100 * hits[rows].double().mean().item())
    assert metrics["target"]["forgetting"] == pytest.approx(
        metrics["original"]["dep_acc"] - metrics["target"]["dep_acc"])


def test_handed_out_files_hold_nothing_of_the_original_but_the_upper_part(chain):
    save, _ = chain
    original = tensors_of(save / "original.pt")
    target, deposit = (load_checkpoint(str(save / f"{kind}.pt"), kind) for kind in ("target", "deposit"))
    shared = {name for name, tensor in target["tensors"].items() if torch.equal(tensor, original[name])
              and not name.endswith("num_batches_tracked")}
    _, upper = split_network(load_network(str(save / "original.pt"))[0], 2)
    assert shared == {name for name in upper.state_dict() if not name.endswith("num_batches_tracked")}
    common = {"format", "kind", "tensors", "checksum", "settings"}
    assert set(target) == common | {"arch", "classes", "partition", "split_at", "counts", "original", "away"}
    assert set(deposit) == common | {"target", "cost"}
    assert not any(name.startswith(("layer3", "head")) for name in deposit["tensors"])
    assert deposit["cost"]["deposit"]["parameters"] < 0.6 * deposit["cost"]["lower"]["parameters"]


# what is read

def test_the_deposit_needs_no_image_of_the_preservation_set(chain, tmp_path, opened):
    save, data = chain
    kept = tmp_path / "kept"
    shutil.copytree(data / "train" / "bee", kept / "train" / "bee")
    out = tmp_path / "run"
    printed = succeed("train_deposit.py", *deposit_flags(chain, out, "--data_dir", kept))
    assert "no accuracies will be logged" in printed and "L_pt, a softmax over one logit" in printed
    assert opened and all("/train/bee/" in path for path in opened)
    for kind in ("target", "deposit", "difference"):  # and the preserved images change nothing when they are there
        assert (out / f"{kind}.pt").read_bytes() == (save / f"{kind}.pt").read_bytes()


@pytest.mark.parametrize("merge", ["concat", "difference"])
def test_withdraw_takes_no_gradient_and_reads_neither_training_images_nor_the_original(chain, tmp_path, monkeypatch,
                                                                                       opened, merge):
    save, data = chain
    images, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(data / "test", images / "test")
    run.mkdir()
    for name in ("target.pt", "deposit.pt", "difference.pt"):
        shutil.copy(save / name, run)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a gradient was taken"))
    out = succeed("withdraw.py", "--save_path", run, "--data_dir", images, "--merge", merge, *MEASURE)
    assert opened and all("/test/" in path for path in opened)
    assert json.loads((run / "metrics.json").read_text()) == {**json.loads((save / "metrics.json").read_text()),
                                                              "merge": merge} and "(reads label)" in out
    monkeypatch.chdir(tmp_path)
    (run / "metrics.json").unlink()
    assert "not measured" in succeed("withdraw.py", "--save_path", run, "--merge", merge, *MEASURE)
    for name in ("target.pt", "deposit.pt", "difference.pt"):
        (run / name).unlink()
    network, _ = load_network(str(run / "recover.pt"))  # usable on its own
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(x), load_network(str(save / "recover.pt"))[0](x)) == (merge == "concat")


def test_concat_of_an_untrained_unpruned_deposit_is_the_original(chain, tmp_path):
    """A rate too small to move a float32 weight, and frozen statistics, leave T and T_r as they began."""
    save, data = chain
    succeed("train_deposit.py", *deposit_flags(chain, tmp_path, "--lr", "1e-30", "--prune_ratio", "0", "--bn_stats",
                                               "frozen"))
    succeed("withdraw.py", "--save_path", tmp_path, "--data_dir", data, *MEASURE)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for rule in ("concat", "difference", "tr_alone"):
        assert metrics["recover"][rule]["counts"] == metrics["original"]["counts"]
    x = torch.randn(4, 3, 16, 16)
    original, recover = (load_network(str(p))[0] for p in (save / "original.pt", tmp_path / "recover.pt"))
    assert torch.equal(recover(x), original(x))


# choices of images, classes and draws

def test_fewer_images_are_the_first_of_a_draw(chain, tmp_path):
    save, data = chain
    _, partition = read(str(save / "original.pt"), "original")
    images = load_images(partition, str(data), "train", [1, 2])
    few, more, others = (first_images(images, count, seed) for count, seed in ((3, 3), (8, 3), (3, 4)))
    assert few.labels.tolist() == [1] * 3 + [2] * 3 and len(more) == 16
    assert all(any(torch.equal(a, b) for b in more.images) for a in few.images)
    assert not torch.equal(few.images, others.images)
    succeed("train_deposit.py", *deposit_flags(chain, tmp_path, "--images_per_class", "4"))
    stem = [tensors_of(folder / "target.pt")["stem.conv1.weight"] for folder in (tmp_path, save)]
    assert not torch.equal(*stem)


def test_another_draw_uses_the_same_original_down_to_a_single_preserved_class(chain, tmp_path):
    save, data = chain
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant,bee,cow",
            "--out", tmp_path / "other.json")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tmp_path / "other.json", run / "partition.json")  # found there, as by --partition
    succeed("train_deposit.py", *deposit_flags(chain, run))
    assert "nothing to do" in succeed("train_deposit.py", *deposit_flags(chain, run, "--partition",
                                                                         tmp_path / "other.json"))
    succeed("withdraw.py", "--save_path", run, "--data_dir", data, *MEASURE)
    _, partition = read(str(run / "target.pt"), "target")
    assert partition.deposit_classes == [0, 1, 2]
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["original"] for folder in (run, save))
    assert ours["counts"] == theirs["counts"] and ours["dep_acc"] != theirs["dep_acc"]


@pytest.mark.parametrize("epochs, expected", [(2, [0, 1]), (19, list(range(19))), (25, [*range(1, 25, 2), 24])])
def test_accuracies_are_logged_about_ten_times_and_at_the_end(epochs, expected):
    assert [epoch for epoch in range(epochs) if is_measured(epoch, epochs)] == expected


@pytest.mark.parametrize("program, flags, name, figure", [
    ("train_scratch.py", scratch_flags, "original", "test_acc"),
    ("train_deposit.py", deposit_flags, "target", "target_pre_acc")])
def test_to_log_accuracies_less_often_changes_nothing_else(program, flags, name, figure, chain, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.run.is_measured", lambda epoch, epochs: epoch + 1 == epochs)
    succeed(program, *flags(chain, tmp_path))
    log, = tmp_path.glob("*_log.jsonl")
    assert [figure in epoch for epoch in epochs_of(log)] == [False, True]
    ours, theirs = tensors_of(tmp_path / f"{name}.pt"), tensors_of(chain[0] / f"{name}.pt")
    assert all(tensor.equal(theirs[key]) for key, tensor in ours.items())


def test_independent_networks_know_their_own_classes_only(chain, tmp_path):
    save, data = chain
    run, totals = tmp_path / "run", {}
    for subset, classes, row in (("deposit", [1], "dep_acc"), ("preservation", [0, 2, 3], "pre_acc")):
        opened = tmp_path / subset  # the other subset's images are not needed
        for split in ("train", "test"):
            for c in classes:
                shutil.copytree(data / split / CLASSES[c], opened / split / CLASSES[c])
        succeed("train_scratch.py", *scratch_flags(chain, run, "--data_dir", opened, "--subset", subset))
        content = load_checkpoint(str(run / f"independent_{subset}.pt"), "independent")
        assert content["classes"] == classes and content["tensors"]["head.fc.weight"].shape[0] == len(classes)
        counts = content["counts"]["test"]
        assert sum(counts["total"]) == 5 * len(classes)
        totals[subset] = sum(counts["correct"])
        column = json.loads((run / "metrics.json").read_text())["independent"]
        assert column[row] == pytest.approx(100 * totals[subset] / (5 * len(classes)))
        assert (column["avg_acc"] is None) == (subset == "deposit")  # one of two is not all classes
    assert column["avg_acc"] == pytest.approx(100 * sum(totals.values()) / 20) and column["dep_acc"] is not None


def test_validation_images_choose_settings(chain, tmp_path):
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", chain[1], "--deposit_classes", "bee",
            "--val_fraction", "0.25", "--out", tmp_path / "partition.json")
    flags = ["--save_path", tmp_path, "--data_dir", chain[1]]
    succeed("train_scratch.py", *flags, "--arch", "resnet8", *TINY)
    succeed("train_deposit.py", *flags, *TINY)
    succeed("withdraw.py", *flags, *MEASURE, "--eval_split", "val")
    metrics = json.loads((tmp_path / "metrics_val.json").read_text())
    assert sum(metrics["target"]["counts"]["total"]) == 12 == sum(metrics["original"]["counts"]["total"])
    assert "target" not in json.loads((tmp_path / "metrics.json").read_text())
    last = read_log(tmp_path / "deposit_log.jsonl")[-1]
    assert last["val_target_pre_acc"] == pytest.approx(metrics["target"]["pre_acc"])
    assert not any(name.startswith("target") for name in last)  # no test figure is shown before the end


def test_defaults_find_each_other(tmp_path, monkeypatch):
    """Only --save_path: CIFAR-10 in ./data, a default partition, ResNet-18. The defaults of size are cut down."""
    make_folder(tmp_path / "data", classes=[f"c{i}" for i in range(10)], train=3, test=1, size=16)
    monkeypatch.chdir(tmp_path)
    assert train_scratch.get_args_parser().get_default("arch") == "resnet18"
    for module, cut in ((train_scratch, {"epochs": 1, "arch": "resnet8"}), (train_deposit, {"epochs": 1})):
        parser = module.get_args_parser()
        parser.set_defaults(**cut)
        monkeypatch.setattr(module, "get_args_parser", lambda parser=parser: parser)
    for script in ("train_scratch.py", "train_deposit.py", "withdraw.py"):
        succeed(script, "--save_path", "X")
    partition = read_partition("X/partition.json")
    assert partition.dataset == "cifar10" and len(partition.deposit_classes) == 3 and partition.draw == "random"
    assert load_checkpoint("X/recover.pt", "recover")["merge"] == "concat"


# runs that are done or lost

def test_a_finished_run_is_not_run_again_and_what_was_lost_is_made_again(chain, tmp_path):
    shutil.copytree(chain[0], tmp_path, dirs_exist_ok=True)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    before = (tmp_path / "deposit.pt").stat().st_mtime_ns, (tmp_path / "deposit_log.jsonl").read_bytes()
    assert "nothing to do" in succeed("train_deposit.py", *deposit_flags(chain, tmp_path))
    assert ((tmp_path / "deposit.pt").stat().st_mtime_ns, (tmp_path / "deposit_log.jsonl").read_bytes()) == before
    (tmp_path / "metrics.json").unlink()
    assert "nothing to do" in succeed("train_scratch.py", *scratch_flags(chain, tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text())["original"] == figures["original"]
    for name in ("target.pt", "difference.pt"):
        (tmp_path / name).unlink()
        assert f"{name}" in succeed("train_deposit.py", *deposit_flags(chain, tmp_path))
    succeed("withdraw.py", "--save_path", tmp_path, "--data_dir", chain[1], *MEASURE)
    assert json.loads((tmp_path / "metrics.json").read_text()) == figures


# speed

def test_the_speed_of_both_steps_is_measured_beside_the_reference(tmp_path):
    succeed("analysis/speed.py", "--arch", "resnet8", "--batch_size", "8", "--steps", "1", "--rounds", "1",
            "--workers", "0", *PLAIN, "--out", tmp_path / "b.json")
    assert "is a folder" in fail("analysis/speed.py", "--out", tmp_path, unchanged=tmp_path)
    report = json.loads((tmp_path / "b.json").read_text())
    rates = report["images_per_s"]
    assert report["hardware"] and report["command"][0] == "speed.py"
    assert report["speedup"] == pytest.approx(rates["original"] / rates["reference"])
    assert rates.keys() == {"original", "deposit", "reference"} and min(rates.values()) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_captured_pass_trains_as_any_other(precision):
    def losses(captured):
        torch.manual_seed(0)
        runtime = Runtime("cuda", precision)
        torch.backends.cudnn.benchmark = False  # which may choose another algorithm the second time
        network = runtime.place(build_network("resnet8", 10, 32)).train()
        optimizer, found = torch.optim.SGD(network.parameters(), 0.05, 0.9), []
        if captured:
            runtime.captured(network, 16, 32)
        generator = torch.Generator("cuda").manual_seed(1)
        for _ in range(5):
            x = torch.randn(16, 3, 32, 32, device="cuda", generator=generator)
            with runtime.autocast():
                z = network(x.contiguous(memory_format=torch.channels_last))
            loss = torch.nn.functional.cross_entropy(z.float(), torch.arange(16, device="cuda") % 10)
            take_step(optimizer, loss, 0.05, 0.0)
            found.append(loss.item())
        with torch.no_grad():
            return found, network.eval()(x[:3])

    (found, z), (expected, z_0) = losses(True), losses(False)
    assert found == pytest.approx(expected, rel=1e-5)  # a backward pass may add in another order
    torch.testing.assert_close(z, z_0, rtol=1e-4, atol=1e-4)


def test_a_pass_is_captured_once_for_a_run_that_trains(chain, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(Runtime, "captured", lambda runtime, network, *size: sizes.append(size))
    succeed("train_scratch.py", *scratch_flags(chain, tmp_path / "a"))
    assert sizes == [(16, 16)]
    weights = ["--weights", tmp_path / "a" / "original.pt", "--epochs", "0"]  # which are measured alone
    succeed("train_scratch.py", *scratch_flags(chain, tmp_path / "b", *weights))
    assert len(sizes) == 1


def test_without_a_gpu_nothing_is_captured():
    network = build_network("resnet8", 10, 32)
    assert Runtime("cpu").captured(network, 16, 32) is network and "forward" not in vars(network)
