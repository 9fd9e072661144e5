"""The four stages from their command lines: what they write, the constraints, resume."""

import ast
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, call, make_folder, run_script, succeed
from PIL import Image

from datasets import batches, load_images, read_partition
from models import MERGE_RULES, load_network, split_network
from models.files import read
from utils.checkpoint import load_checkpoint
from utils.metrics import TABLE1_ROWS

SCRIPTS = ["partition_data.py", "train_scratch.py", "train_deposit.py", "withdraw.py", "analysis/plot_accuracies.py",
           "analysis/table1.py", "analysis/benchmark.py", "analysis/memory.py", "analysis/plain.py", "analysis/tsne.py",
           "analysis/transfer.py", "analysis/table3.py", "analysis/ablation.py", "analysis/report.py",
           "analysis/faults.py", "analysis/mutations.py"]
WITHDRAW = ["--device", "cpu", "--precision", "fp32"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_flag_with_its_default(script):
    status, out, err = call(script, "--help")
    assert status == 0 and err == ""
    flags = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert flags and all("-" not in flag[2:] for flag in flags)  # snake_case
    assert "default:" in out
    # what `call` bypasses
    assert re.search(r'\nif __name__ == "__main__":\n(    #.*\n)*    run\(main, get_args_parser\(\).*\)\n\Z',
                     (ROOT / script).read_text())


def test_the_chain_writes_its_files(chain):
    save, _ = chain
    names = {path.name for path in save.iterdir()}
    assert names == {"partition.json", "original.pt", "target.pt", "deposit.pt", "recover.pt", "metrics.json",
                     "original_log.jsonl", "deposit_log.jsonl", "tensorboard"}  # no state file is left
    for stage in ("original", "deposit"):
        head, *epochs = [json.loads(line) for line in (save / f"{stage}_log.jsonl").read_text().splitlines()]
        assert head["command"][0] == f"train_{'scratch' if stage == 'original' else stage}.py"
        assert head["torch"] == torch.__version__ and head["settings"]["batch_size"] == 16
        assert [record["epoch"] for record in epochs] == [1, 2] and all("loss" in record for record in epochs)
        assert list((save / "tensorboard" / stage).iterdir())
    assert {"l_kr", "l_at", "l_kp", "l_pt", "l_re", "loss", "target_pre_acc"} <= set(epochs[0])


def test_metrics_agree_with_the_networks_in_the_files(chain):
    save, data = chain
    metrics = json.loads((save / "metrics.json").read_text())
    assert set(metrics["recover"]) == {*MERGE_RULES, "released"} and metrics["recover"]["released"]["reads_label"]
    for name, figures in (("original", metrics["original"]), ("target", metrics["target"]),
                          ("recover", metrics["recover"]["calibrated"])):
        network, partition = load_network(str(save / f"{name}.pt"))
        images = load_images(partition, str(data), "test", range(4))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (partition.mean, partition.std))
        with torch.no_grad():
            hits = network((images.images / 255 - mean) / std).argmax(1) == images.labels
        deposit = images.labels == 1
        assert figures["avg_acc"] == pytest.approx(100 * hits.double().mean().item())
        assert figures["dep_acc"] == pytest.approx(100 * hits[deposit].double().mean().item())
        assert figures["pre_acc"] == pytest.approx(100 * hits[~deposit].double().mean().item())
    assert metrics["target"]["forgetting"] == pytest.approx(
        metrics["original"]["dep_acc"] - metrics["target"]["dep_acc"])


def test_the_readme_measures_a_network_as_the_stages_do(chain, tmp_path, monkeypatch, capsys):
    save, data = chain
    (tmp_path / "run").symlink_to(save)
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(program, {})
    metrics = json.loads((save / "metrics.json").read_text())
    figures = metrics["recover"]["calibrated"]
    assert ast.literal_eval(capsys.readouterr().out) == {key: figures[key] for key in TABLE1_ROWS}


def test_handed_out_files_hold_nothing_of_the_original_but_the_upper_part(chain):
    save, _ = chain
    original = load_checkpoint(str(save / "original.pt"), "original")["tensors"]
    target = load_checkpoint(str(save / "target.pt"), "target")
    deposit = load_checkpoint(str(save / "deposit.pt"), "deposit")
    shared = {name for name, tensor in target["tensors"].items() if torch.equal(tensor, original[name])
              and not name.endswith("num_batches_tracked")}
    _, upper = split_network(load_network(str(save / "original.pt"))[0], 2)
    trained_lower = {n for n in target["tensors"] if n.endswith(("conv1.weight", "conv2.weight"))} - set(
        upper.state_dict())
    assert not shared & trained_lower and shared >= {n for n in upper.state_dict() if "num_batches" not in n}
    assert set(target) == {"format", "kind", "tensors", "checksum", "arch", "classes", "partition", "split_at",
                           "settings"}
    assert set(deposit) == set(target) | {"calibration", "target", "upper", "cost"}
    assert not any(name.startswith(("layer3", "head")) for name in deposit["tensors"])
    assert deposit["cost"]["deposit"]["parameters"] < 0.6 * deposit["cost"]["lower"]["parameters"]


def test_deposit_needs_no_image_of_the_preservation_set(chain, tmp_path, monkeypatch):
    save, data = chain
    kept = tmp_path / "kept"
    shutil.copytree(data / "train" / "bee", kept / "train" / "bee")
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    out = tmp_path / "run"
    flags = ["--original", save / "original.pt", "--save_path", out, *TINY]
    printed = succeed("train_deposit.py", *flags, "--data_dir", kept)
    assert "no accuracies will be logged" in printed
    assert opened and all("/train/bee/" in path for path in opened)
    for name in ("target.pt", "deposit.pt"):  # and the preserved images change nothing when they are there
        kind = name[:-3]
        assert load_checkpoint(str(out / name), kind)["checksum"] == load_checkpoint(str(save / name), kind)["checksum"]


def test_withdraw_needs_neither_data_nor_original(chain, tmp_path, monkeypatch):
    save, _ = chain
    for name in ("target.pt", "deposit.pt"):
        shutil.copy(save / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a gradient was taken"))
    out = succeed("withdraw.py", "--save_path", tmp_path, *WITHDRAW)
    assert "not measured" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deposit.pt", "recover.pt", "target.pt"]
    x = torch.randn(2, 3, 16, 16)
    network, _ = load_network(str(tmp_path / "recover.pt"))
    assert torch.equal(network(x), load_network(str(save / "recover.pt"))[0](x))
    (tmp_path / "target.pt").unlink()
    (tmp_path / "deposit.pt").unlink()
    assert load_network(str(tmp_path / "recover.pt"))[0](x).shape == (2, 4)  # usable on its own


def test_withdraw_without_the_originals_figures_leaves_its_column_empty(chain, tmp_path):
    save, data = chain
    out = succeed("withdraw.py", "--save_path", tmp_path, "--target", save / "target.pt", "--deposit",
                  save / "deposit.pt", "--data_dir", data, "--merge", "concat", *WITHDRAW)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "original" not in metrics and metrics["target"]["forgetting"] is None
    assert metrics["target"]["pre_acc"] is not None and "concat*" in out and "(reads label)" in out
    assert load_checkpoint(str(tmp_path / "recover.pt"), "recover")["merge"] == "concat"


def test_concat_of_an_untrained_unpruned_deposit_is_the_original(chain, tmp_path):
    """A rate too small to move a float32 weight, and frozen statistics, leave T and T_r as they began."""
    save, data = chain
    succeed("train_deposit.py", "--original", save / "original.pt", "--save_path", tmp_path, "--data_dir", data,
            *TINY, "--lr", "1e-30", "--prune_ratio", "0", "--bn_stats", "frozen")
    succeed("withdraw.py", "--save_path", tmp_path, "--data_dir", data, "--merge", "concat", *WITHDRAW)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["recover"]["concat"]["counts"] == metrics["original"]["counts"]
    x = torch.randn(4, 3, 16, 16)
    original, recover = (load_network(str(p))[0] for p in (save / "original.pt", tmp_path / "recover.pt"))
    assert torch.equal(recover(x), original(x))
    assert load_checkpoint(str(tmp_path / "deposit.pt"), "deposit")["calibration"]["scale"] == pytest.approx(1.0)


@pytest.mark.parametrize("flags,moved", [
    (["--bn_stats", "frozen"], {"weights"}), (["--bn_stats", "updated"], {"weights", "statistics", "T_r's"}),
    (["--bn_stats", "target"], {"weights", "statistics"}), (["--bn_stats", "deposit"], {"weights", "T_r's"}),
    (["--upper", "trained"], {"weights", "upper"}),
])
def test_switches_of_what_is_frozen(chain, tmp_path, flags, moved):
    save, data = chain
    switches = {"--bn_stats": "frozen", "--upper": "frozen", flags[0]: flags[1]}
    succeed("train_deposit.py", "--original", save / "original.pt", "--save_path", tmp_path, "--data_dir", data,
            *TINY, *[word for pair in switches.items() for word in pair])
    before = load_checkpoint(str(save / "original.pt"), "original")["tensors"]
    after = load_checkpoint(str(tmp_path / "target.pt"), "target")["tensors"]

    def changed(*names):
        return any(not torch.equal(before[name], after[name]) for name in names)

    assert changed("layer1.0.conv1.weight") == ("weights" in moved)
    assert changed("layer1.0.bn1.running_mean", "layer1.0.bn1.running_var") == ("statistics" in moved)
    module = load_checkpoint(str(tmp_path / "deposit.pt"), "deposit")["tensors"]
    assert torch.equal(module["stem.bn1.running_mean"], before["stem.bn1.running_mean"]) == ("T_r's" not in moved)
    assert changed("head.fc.weight", "layer3.0.conv1.weight") == ("upper" in moved)
    assert not changed("layer3.0.bn1.running_mean") or "upper" in moved


@pytest.mark.parametrize("flag", ["wrong", "any", "preserved"])
def test_random_labels_come_from_the_classes_that_the_flag_names(chain, tmp_path, monkeypatch, flag):
    import train_deposit

    save, data = chain
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "0,1",
            "--out", tmp_path / "partition.json")
    partition, drawn = read_partition(str(tmp_path / "partition.json")), []
    draw = train_deposit.losses.draw_random_labels
    monkeypatch.setattr(train_deposit.losses, "draw_random_labels",
                        lambda y, *rest: drawn.append((y, draw(y, *rest))) or drawn[-1][1])
    succeed("train_deposit.py", "--original", save / "original.pt", "--partition", tmp_path / "partition.json",
            "--save_path", tmp_path / "run", "--data_dir", data, *TINY, "--epochs", "10", "--random_label", flag)
    y, y_r = (torch.cat(parts) for parts in zip(*drawn))
    assert set(y_r.tolist()) == set(partition.classes("preservation" if flag == "preserved" else "all"))
    assert (y == y_r).any() == (flag == "any")


@pytest.mark.parametrize("re_target,reaches", [("detached", False), ("attached", True)])
def test_l_re_reaches_the_target_only_when_attached(chain, re_target, reaches):
    import train_deposit
    from utils.runtime import Runtime

    save, _ = chain
    args = train_deposit.get_args_parser().parse_args([*TINY, "--re_target", re_target, "--lambda_re", "1"])
    original, partition = load_network(str(save / "original.pt"))
    networks = train_deposit.Deposit(original, partition, args).train()
    x, y, runtime = torch.randn(4, 3, 16, 16), torch.ones(4, dtype=torch.int64), Runtime(args)
    networks(x, y, torch.Generator(), runtime.autocast)["l_re"].backward()
    gradient = networks.target.stem.conv1.weight.grad  # both branches share a pass, so it may be zero instead of none
    assert (gradient is not None and gradient.abs().sum() > 0) == reaches
    assert networks.deposit.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in networks.upper.parameters())


def test_the_loss_is_the_weighted_sum_of_its_terms(chain):
    import train_deposit
    from utils.runtime import Runtime

    save, _ = chain
    weights = {"l_kr": 2.0, "l_kp": 3.0, "l_pt": 5.0, "l_re": 7.0, "l_ft": 11.0}
    args = train_deposit.get_args_parser().parse_args(
        [*TINY, *[word for name, w in weights.items() for word in (f"--lambda_{name[2:]}", str(w))]])
    original, partition = load_network(str(save / "original.pt"))
    networks, runtime = train_deposit.Deposit(original, partition, args).train(), Runtime(args)
    terms = networks(torch.randn(4, 3, 16, 16), torch.ones(4, dtype=torch.int64), torch.Generator(), runtime.autocast)
    assert all(terms[name] != 0 for name in weights)
    assert terms["loss"].item() == pytest.approx(sum(w * terms[name].item() for name, w in weights.items()), rel=1e-5)


def test_refit_starts_t_r_on_as_many_images_of_the_deposit_set_as_asked(chain, tmp_path, monkeypatch):
    import train_deposit

    save, data = chain
    drawn = []
    monkeypatch.setattr(train_deposit, "refit", lambda module, lower, images, autocast: drawn.extend(images))
    flags = ["--save_path", tmp_path, "--original", save / "original.pt", "--data_dir", data, *TINY]
    train_deposit.main(train_deposit.get_args_parser().parse_args([*map(str, flags), "--refit_images", "50"]))
    assert len(torch.cat(drawn)) == 50  # D_r has fewer
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(torch.cat(drawn), 2)), "augmented once"


def test_refit_changes_t_r_alone(chain, tmp_path):
    save, data = chain
    succeed("train_deposit.py", "--save_path", tmp_path, "--original", save / "original.pt", "--data_dir", data, *TINY,
            "--lr", "1e-30", "--weight_decay", "0", "--bn_stats", "frozen", "--refit_images", "32")
    content, original = (load_checkpoint(str(path), kind)["tensors"] for path, kind in
                         ((tmp_path / "deposit.pt", "deposit"), (save / "original.pt", "original")))
    assert torch.equal(content["stem.bn1.weight"], original["stem.bn1.weight"])
    assert not torch.equal(content["layer1.0.bn2.running_mean"], original["layer1.0.bn2.running_mean"])
    target = load_checkpoint(str(tmp_path / "target.pt"), "target")["tensors"]
    assert all(torch.equal(target[name], tensor) for name, tensor in original.items())


def test_fewer_images_are_the_first_of_a_draw(chain, tmp_path):
    import train_deposit

    save, data = chain
    _, partition = read(str(save / "original.pt"), "original")
    images = load_images(partition, str(data), "train", [1, 2])
    few, more = (train_deposit.first_images(images, count, seed=3) for count in (3, 8))
    assert few.labels.tolist() == [1] * 3 + [2] * 3 and len(more) == 16
    assert all(any(torch.equal(a, b) for b in more.images) for a in few.images)
    assert not torch.equal(few.images, train_deposit.first_images(images, 3, seed=4).images)
    succeed("train_deposit.py", "--save_path", tmp_path, "--original", save / "original.pt", "--data_dir", data, *TINY,
            "--images_per_class", "4")
    ours, all_images = (load_checkpoint(str(path / "target.pt"), "target") for path in (tmp_path, save))
    assert ours["settings"]["images_per_class"] == 4 and ours["checksum"] != all_images["checksum"]


def test_another_draw_uses_the_same_original(chain, tmp_path):
    save, data = chain
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant,dog",
            "--out", tmp_path / "other.json")
    succeed("train_deposit.py", "--original", save / "original.pt", "--save_path", tmp_path / "run", "--data_dir", data,
            "--partition", tmp_path / "other.json", *TINY)
    _, partition = read(str(tmp_path / "run" / "target.pt"), "target")
    assert partition.deposit_classes == [0, 3]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    ours = json.loads((save / "metrics.json").read_text())["original"]
    assert metrics["original"]["counts"] == ours["counts"] and metrics["original"]["avg_acc"] == ours["avg_acc"]


def test_independent_networks_know_their_own_classes_only(chain, tmp_path):
    save, data = chain
    run, totals = tmp_path / "run", {}
    for subset, classes, row in (("deposit", [1], "dep_acc"), ("preservation", [0, 2, 3], "pre_acc")):
        opened = tmp_path / subset  # the other subset's images are not needed
        for split in ("train", "test"):
            for c in classes:
                name = ["ant", "bee", "cow", "dog"][c]
                shutil.copytree(data / split / name, opened / split / name)
        succeed("train_scratch.py", "--save_path", run, "--partition", save / "partition.json",
                "--data_dir", opened, "--subset", subset, "--arch", "resnet8", *TINY)
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
    _, data = chain
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "bee",
            "--val_fraction", "0.25", "--out", tmp_path / "partition.json")
    flags = ["--save_path", tmp_path, "--data_dir", data]
    succeed("train_scratch.py", *flags, "--arch", "resnet8", *TINY)
    succeed("train_deposit.py", *flags, *TINY)
    succeed("withdraw.py", *flags, *WITHDRAW, "--eval_split", "val")
    metrics = json.loads((tmp_path / "metrics_val.json").read_text())
    assert sum(metrics["target"]["counts"]["total"]) == 12 == sum(metrics["original"]["counts"]["total"])
    assert "target" not in json.loads((tmp_path / "metrics.json").read_text())
    last = json.loads((tmp_path / "deposit_log.jsonl").read_text().splitlines()[-1])
    assert last["val_target_pre_acc"] == pytest.approx(metrics["target"]["pre_acc"])
    assert not any(name.startswith("target") for name in last)  # no test figure is shown before the end


def test_a_finished_run_is_not_run_again(chain):
    save, data = chain
    before = (save / "deposit.pt").stat().st_mtime_ns, (save / "deposit_log.jsonl").read_bytes()
    out = succeed("train_deposit.py", "--save_path", save, "--data_dir", data, *TINY)
    assert "nothing to do" in out
    assert ((save / "deposit.pt").stat().st_mtime_ns, (save / "deposit_log.jsonl").read_bytes()) == before


def test_lost_figures_and_files_are_made_again_by_the_stages(chain, tmp_path):
    save, data = chain
    shutil.copytree(save, tmp_path, dirs_exist_ok=True)
    figures = json.loads((save / "metrics.json").read_text())
    flags = ["--save_path", tmp_path, "--data_dir", data]
    (tmp_path / "metrics.json").unlink()
    assert "nothing to do" in succeed("train_scratch.py", *flags, *TINY, "--arch", "resnet8")
    assert json.loads((tmp_path / "metrics.json").read_text())["original"] == figures["original"]
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "target.pt").unlink()
    assert "wrote target.pt" in succeed("train_deposit.py", *flags, *TINY)
    succeed("withdraw.py", *flags, "--device", "cpu", "--precision", "fp32")
    assert json.loads((tmp_path / "metrics.json").read_text()) == figures


def test_a_single_preserved_class_can_be_withdrawn(chain, tmp_path):
    save, data = chain
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", data, "--deposit_classes", "ant,bee,cow",
            "--out", tmp_path / "partition.json")
    flags = ["--save_path", tmp_path, "--data_dir", data]
    succeed("train_deposit.py", *flags, "--original", save / "original.pt", "--partition", tmp_path / "partition.json",
            *TINY)
    succeed("withdraw.py", *flags, "--device", "cpu", "--precision", "fp32")
    assert load_checkpoint(str(tmp_path / "deposit.pt"), "deposit")["calibration"]["scale"] == 1.0


def test_defaults_find_each_other(tmp_path, monkeypatch):
    """Only --save_path: CIFAR-10 in ./data, a default partition, ResNet-18. The defaults of size are cut down."""
    import train_deposit
    import train_scratch

    make_folder(tmp_path / "data", classes=[f"c{i}" for i in range(10)], train=3, test=1, size=32)
    monkeypatch.chdir(tmp_path)
    for module in (train_scratch, train_deposit):
        parser = module.get_args_parser()
        parser.set_defaults(epochs=1)
        monkeypatch.setattr(module, "get_args_parser", lambda parser=parser: parser)
    for script in ("train_scratch.py", "train_deposit.py", "withdraw.py"):
        succeed(script, "--save_path", "X")
    assert load_checkpoint("X/original.pt", "original")["arch"] == "resnet18"
    partition = read_partition("X/partition.json")
    assert partition.dataset == "cifar10" and len(partition.deposit_classes) == 3 and partition.draw == "random"
    assert (tmp_path / "X" / "recover.pt").exists()


def kill_after_epoch(command, log, epochs, signum):
    """Start a stage, wait until its log holds that many epochs, and send it a signal."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count('"epoch"') >= epochs:
            break
        time.sleep(0.01)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("script,stage,kind", [("train_scratch.py", "original", "original"),
                                               ("train_deposit.py", "deposit", "target")])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(chain, tmp_path, script, stage, kind, signum):
    save, data = chain
    # bn_stats updated: running statistics must survive as well; step: so must the schedule;
    # refit_images: T_r is fitted before the first epoch, not when it is resumed
    flags = ["--data_dir", str(data), *TINY, "--epochs", "6", "--schedule", "step", "--milestones", "3"]
    flags += (["--original", str(save / "original.pt"), "--bn_stats", "updated", "--refit_images", "16"]
              if stage == "deposit" else
              ["--partition", str(save / "partition.json"), "--arch", "resnet8", "--lr", "0.02"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed(script, "--save_path", whole, *flags)
    command = [sys.executable, str(ROOT / script), "--save_path", str(cut), *flags]
    status, err = kill_after_epoch(command, cut / f"{stage}_log.jsonl", 2, signum)
    if signum == signal.SIGTERM:
        assert status == 143 and len(err.splitlines()) == 1 and "same command again" in err
    else:
        assert status == -signal.SIGKILL
    assert not (cut / f"{kind}.pt").exists()
    out = succeed(script, "--save_path", cut, *flags)
    assert "resuming" in out
    for name in {kind, stage}:
        a, b = (load_checkpoint(str(path / f"{name}.pt"), name)["tensors"] for path in (whole, cut))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    def epochs(path):
        records = [json.loads(line) for line in (path / f"{stage}_log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records if "epoch" in r]

    assert epochs(cut) == epochs(whole)
    assert not list(cut.glob("*_state.pt")) and not list(cut.glob("*.part"))


def test_the_figure_of_the_quickstart(chain, tmp_path):
    save, _ = chain
    succeed("analysis/plot_accuracies.py", "--metrics", save / "metrics.json", "--out", tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        assert image.format == "PNG" and image.width > 400


def test_the_benchmark_measures_both_steps_beside_the_reference(tmp_path):
    done = run_script("analysis/benchmark.py", "--arch", "resnet8", "--batch_size", "8", "--steps", "1",
                      "--rounds", "2", "--workers", "0", "--device", "cpu", "--precision", "fp32",
                      "--out", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    for stage in ("original", "deposit"):
        ours, reference = report[stage]["ours"], report[stage]["reference"]
        assert report[stage]["speedup"] == pytest.approx(ours["images_per_s"] / reference["images_per_s"])
        assert all(len(side["rounds"]) == 2 for side in (ours, reference))
        assert 0 < report[stage]["share_of_peak"] < 1.5 and ours["peak_memory_bytes"] > 1e7
    # ResNet-8: 12.4 million multiply-adds forward, twice that again backward, but for the first layer's input
    assert report["original"]["ours"]["flops_per_step"] == pytest.approx(8 * 6 * 12.4e6, rel=0.1)


@pytest.mark.parametrize("script,parts", [("train_scratch.py", 1), ("train_deposit.py", 4),
                                          ("analysis/transfer.py", 10)])
def test_compile_reaches_every_network(chain, tmp_path, monkeypatch, script, parts):
    save, data = chain
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    flags = {"train_scratch.py": ["--partition", save / "partition.json", "--arch", "resnet8"],
             "train_deposit.py": ["--original", save / "original.pt"],
             "analysis/transfer.py": ["--teacher", save / "original.pt", "--student", "resnet8"]}[script]
    succeed(script, "--save_path", tmp_path, "--data_dir", data, *flags, *TINY, "--compile")
    # lower_T, T_r, lower_0 and the shared upper part are four; a student and its teacher have five layers each
    assert len(set(compiled)) == parts


@pytest.mark.parametrize("script", ["train_deposit.py", "analysis/transfer.py"])
def test_compile_leaves_nothing_uncompiled_where_batches_differ_in_size(chain, tmp_path, monkeypatch, script):
    """Compiled parts share a limit of graphs, above which they would run as they are without a word."""
    save, data = chain
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    flags = {"train_deposit.py": ["--images_per_class", "11", "--batch_size", "4", "--original"],
             "analysis/transfer.py": ["--batch_size", "7", "--teacher"]}[script]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        succeed(script, "--save_path", tmp_path, "--data_dir", data, *TINY, "--compile", *flags, save / "original.pt")


def test_bfloat16_logits_are_those_of_float32_within_a_hundredth(chain):
    save, data = chain
    network, partition = load_network(str(save / "original.pt"))
    images = load_images(partition, str(data), "test", range(4))
    (x, _), = batches(images, len(images), "cpu")
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x).float()
    assert 0 < (rounded - exact).norm() / exact.norm() < 1e-2
