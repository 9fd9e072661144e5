"""Other forgetting methods and the deep deposit: losses by hand, the constraint, the trials, the tables, the script."""

import itertools
import json
import os
import shutil
import subprocess
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, deposit_flags, fail, run_shell, succeed
from fixtures import make_folder

import train_deposit
from analysis import forget, methods
from analysis.robustness import average_rows
from datasets import load_images
from models import losses, synthesis
from models.checkpoints import load_network
from models.lirf import LIRF
from utils.errors import UserError
from utils.runtime import Runtime

PRESERVED, DEPOSITED = torch.tensor([0, 2]), torch.tensor([1, 3])
X, Y = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)), DEPOSITED[torch.arange(6) % 2]


def forget_flags(chain, save, *more):
    return ["--save_path", save, "--data_dir", chain[1], "--original", chain[0] / "original.pt", *TINY, *more]


@pytest.fixture
def net():
    """Networks as a loss gets them: T, T0 and B linear, with logits of four classes."""
    torch.manual_seed(0)
    made = forget.Networks.__new__(forget.Networks)
    for name in ("original", "target", "teacher"):
        setattr(made, name, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Sequential(torch.nn.Identity())))
        getattr(made, name)[-1].add_module("fc", torch.nn.Linear(48, 4))
    made.preserved, made.deposited = PRESERVED, DEPOSITED
    made.mean, made.std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]))
    return made


def test_the_masked_target_is_l_kp_minus_the_log_of_the_preserved_mass(net):
    z, z_0 = net.target(X), net.original(X)
    loss = forget.delete(net, X, Y, None)["loss"]
    q = torch.zeros(6, 4).index_copy(1, PRESERVED, z_0[:, PRESERVED].softmax(1))
    assert loss.item() == pytest.approx((torch.xlogy(q, q) - q * z.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    mass = z.softmax(1)[:, PRESERVED].sum(1)
    l_kp = losses.knowledge_preserving(z, z_0, PRESERVED, 1.0)
    assert loss.item() == pytest.approx((l_kp - mass.log().mean()).item(), rel=1e-5)
    z_0[:, DEPOSITED] += 5.0  # what T0 says of any deposit class, the image's own or another, does not count
    assert losses.masked_target(z, z_0, DEPOSITED).item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_losses_of_the_other_methods_by_hand(net):
    z, log_p = net.target(X), net.target(X).log_softmax(1)
    assert forget.neg_grad(net, X, Y, None)["loss"].item() == pytest.approx(log_p[range(6), Y].mean().item(), rel=1e-5)
    b = net.teacher(X).softmax(1)
    assert forget.bad_teacher(net, X, Y, None)["loss"].item() == pytest.approx(
        (b * (b.log() - log_p)).sum(1).mean().item(), rel=1e-5)
    assert forget.random_labels(net, X, Y, torch.Generator().manual_seed(0))["loss"].item() in [
        pytest.approx(F.cross_entropy(z, torch.tensor(y_r)).item(), rel=1e-5)
        for y_r in itertools.product([0, 2], repeat=6)]
    net.original[-1].fc.bias.data = torch.tensor([0.0, 90.0, 1.0, 90.0])  # deposit classes always win; 2 beats 0
    net.original[-1].fc.weight.data *= 0.01
    assert forget.boundary_shrink(net, X, Y, None)["loss"].item() == pytest.approx(
        F.cross_entropy(z, torch.full((6,), 2)).item(), rel=1e-5)
    x_a = net.attacked(X, torch.full((6,), 2), 0.03, 3, sign=-1)
    cosines = [F.cosine_similarity(X[i].flatten(), X[j].flatten(), dim=0) for i in range(6) for j in range(6)
               if i != j and Y[i] == Y[j]]
    net.lambda_cosine = 0.1
    terms = forget.spotter(net, X, Y, None)
    expected = 0.1 * sum(cosines) / len(cosines) + sum(share * forget.delete(net, x, Y, None)["loss"]
                                                 for share, x in ((0.7, X), (0.3, x_a)))
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    net.original[-1].fc.bias.data = torch.tensor([0.0, 1.0, 0.001, 1.0])  # so near that the attack decides
    x = X.clone().requires_grad_()
    F.cross_entropy(net.original(x), Y).backward()
    moved = (X + 0.1 / net.std * x.grad.sign()).minimum((1 - net.mean) / net.std).maximum(-net.mean / net.std)
    nearest = PRESERVED[net.original(moved)[:, PRESERVED].argmax(1)]
    assert not torch.equal(nearest, net.best_preserved(X)) and len(nearest.unique()) == 2
    assert forget.boundary_shrink(net, X, Y, None)["loss"].item() == pytest.approx(
        F.cross_entropy(z, nearest).item(), rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_attack_climbs_or_descends_within_its_radius_and_the_pixels(net, sign):
    x = (X - net.mean) / net.std
    moved = net.attacked(x, Y, 0.03, 3, sign)
    change, shown = (moved - x) * net.std, moved * net.std + net.mean
    assert 0.02 < change.abs().max() <= 0.03 + 1e-5 and shown.min() >= -1e-6 and shown.max() <= 1 + 1e-6
    assert sign * (F.cross_entropy(net.original(moved), Y) - F.cross_entropy(net.original(x), Y)) > 0


def test_the_edits_of_the_head():
    torch.manual_seed(0)
    features = torch.randn(50, 8)
    for edit in (forget.logit_mask, forget.pour_p):
        head = torch.nn.Linear(8, 4).requires_grad_(False)
        rows, before = head.weight[DEPOSITED].clone(), head(features)[:, PRESERVED]
        edit(head, DEPOSITED)
        assert torch.isin(head(features + 30 * rows.sum(0)).argmax(1), PRESERVED).all()  # though drawn towards D
        if edit is forget.logit_mask:  # a row of zeros alone would win where the others are negative
            assert torch.equal(head(features)[:, PRESERVED], before)
        else:
            assert torch.allclose(head.weight @ rows.T, torch.zeros(4, 2), atol=1e-6)


@pytest.mark.parametrize("name", list(forget.METHODS))
def test_a_method_trains_on_d_alone_and_writes_what_the_stages_write(chain, tmp_path, name):
    asked, load, trains = [], forget.load_images, forget.METHODS[name].loss is not None

    def noted(partition, data_dir, split, classes, **more):
        asked.append((split, tuple(classes)))
        return load(partition, data_dir, split, classes, **more)

    with mock.patch.object(forget, "load_images", noted):
        succeed("analysis/forget.py", "--method", name, *forget_flags(chain, tmp_path, "--bn_stats", "frozen"))
    assert asked == [("train", (1,)), ("test", (0, 1, 2, 3))]  # the latter for the log alone
    target, partition = load_network(str(tmp_path / "target.pt"))
    before = load_network(str(chain[0] / "original.pt"))[0].state_dict()
    changed = {key for key, tensor in target.state_dict().items() if not torch.equal(tensor, before[key])}
    assert partition.deposit_classes == [1] and changed and not any("running" in key for key in changed)
    assert trains or changed == {"head.fc.weight", "head.fc.bias"}
    assert {"original", "target"} <= json.loads((tmp_path / "metrics.json").read_text()).keys()
    head, *epochs = [json.loads(line) for line in (tmp_path / "forget_log.jsonl").read_text().splitlines()]
    assert head["settings"]["method"] == name and all({"loss", "passes"} <= epoch.keys() for epoch in epochs)
    assert "deposit.pt" in fail("withdraw.py", "--save_path", tmp_path)
    assert "holds another deposit run" in fail("train_deposit.py", *deposit_flags(chain, tmp_path), unchanged=tmp_path)


def test_a_stopped_method_goes_on_to_the_same_bits_and_neg_grad_stops(chain, tmp_path):
    flags = ["--method", "random_labels", "--epochs", "2"]
    succeed("analysis/forget.py", *forget_flags(chain, tmp_path / "whole", *flags))
    end_epoch = forget.TrainingRun.end_epoch

    def stop_after_one(training, *epoch):
        end_epoch(training, *epoch)
        raise UserError("stopped")

    with mock.patch.object(forget.TrainingRun, "end_epoch", stop_after_one):
        fail("analysis/forget.py", *forget_flags(chain, tmp_path / "cut", *flags))
    succeed("analysis/forget.py", *forget_flags(chain, tmp_path / "cut", *flags))
    states = [load_network(str(tmp_path / name / "target.pt"))[0].state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with mock.patch.object(forget, "write_metrics", side_effect=UserError("killed while T is measured")):
        fail("analysis/forget.py", *forget_flags(chain, tmp_path / "measuring", *flags))
    succeed("analysis/forget.py", *forget_flags(chain, tmp_path / "measuring", *flags))
    assert json.loads((tmp_path / "measuring" / "metrics.json").read_text()).keys() >= {"original", "target"}
    figures = (tmp_path / "whole" / "metrics.json").read_bytes()
    (tmp_path / "whole" / "metrics.json").unlink()  # figures that were lost are measured again, of the same T
    with mock.patch.object(forget, "train", side_effect=AssertionError("trained anew")):
        succeed("analysis/forget.py", *forget_flags(chain, tmp_path / "whole", *flags))
    assert (tmp_path / "whole" / "metrics.json").read_bytes() == figures
    with mock.patch.object(forget, "CHECK_EVERY", 1):
        succeed("analysis/forget.py", "--method", "neg_grad", *forget_flags(
            chain, tmp_path / "ng", "--epochs", "19", "--lr", "0.1"))
    epochs = (tmp_path / "ng" / "forget_log.jsonl").read_text().splitlines()[1:]
    assert len(epochs) < 19 and json.loads(epochs[-1])["target_dep_acc"] <= 40


def test_a_method_that_would_do_nothing_or_starts_from_a_target_is_refused(chain, tmp_path):
    flags = forget_flags(chain, tmp_path / "new", "--method", "delete")
    assert "would leave T0 as it is" in fail("analysis/forget.py", *flags, "--epochs", "0", unchanged=tmp_path)
    assert "not original" in fail("analysis/forget.py", *flags, "--original", chain[0] / "target.pt",
                                  unchanged=tmp_path)


# the deep deposit


def test_synthetic_images_are_of_d_mixed_and_moved_to_preserved_classes(chain, monkeypatch):
    args = train_deposit.get_args_parser().parse_args([*TINY, "--split_at", "2", "--preset", "deep"])
    original, partition = load_network(str(chain[0] / "original.pt"))
    lirf, runtime = LIRF(original, partition, args), Runtime("cpu", "fp32")
    monkeypatch.setattr(synthesis, "COUNT", 6)
    d_r = load_images(partition, str(chain[1]), "train", [1])
    pixels = d_r.images.clone()
    moved = synthesis.moved_to_preserved(lirf, d_r, runtime)
    assert len(moved) == 6 and moved.images.dtype == torch.uint8 and torch.equal(d_r.images, pixels)
    assert not any(module._forward_pre_hooks for module in original.modules())

    def mass(image_set):
        z = original(synthesis.normalise(image_set.images, partition.mean, partition.std))
        return z.softmax(1)[:, partition.preserved_classes].sum(1).mean()

    assert mass(moved) > mass(d_r)
    monkeypatch.setattr(synthesis, "LAMBDA_BN", 0)
    assert not torch.equal(moved.images, synthesis.moved_to_preserved(lirf, d_r, runtime).images)
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 16, 16)
    mixed = synthesis.cutmix(x, torch.Generator().manual_seed(0))
    for i, image in enumerate(mixed):  # one box of the image before
        assert set(image.unique().tolist()) <= {i, (i - 1) % 6}
    assert (mixed != x).any((1, 2, 3)).sum() >= 4
    extra = synthesis.synthetic(x, moved, torch.Generator().manual_seed(0))
    out = lirf(x, extra)
    assert len(extra) == len(out.s_t) == len(out.s_0) == 6 and len(out.z_t) == len(out.f_0) == len(out.z_r) == 6
    lirf.losses(out, torch.ones(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))["l_ur"].backward()
    assert lirf.target.stem.conv1.weight.grad.abs().sum() > 0
    # the mean over D_r and the synthetic images, of which there are as many
    parts = [losses.masked_target(z_t, z_0, lirf.deposited) for z_t, z_0 in ((out.z_t, out.z_0), (out.s_t, out.s_0))]
    found = lirf.losses(out, *2 * [torch.ones(6, dtype=torch.int64)])["l_mt"]
    assert found.item() == pytest.approx(sum(parts).item() / 2, rel=1e-5)


def test_a_deep_deposit_reads_no_preserved_image_and_comes_back_exactly(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "STEPS", 2)
    succeed("train_deposit.py", *deposit_flags(chain, tmp_path / "deep", "--preset", "deep", "--split_at", "3"))
    succeed("withdraw.py", "--save_path", tmp_path / "deep", "--data_dir", chain[1], "--merge", "difference")
    metrics = json.loads((tmp_path / "deep" / "metrics.json").read_text())
    assert metrics["recover"]["difference"]["counts"] == metrics["original"]["counts"]
    head, *epochs = [json.loads(line) for line in (tmp_path / "deep" / "deposit_log.jsonl").read_text().splitlines()]
    assert head["settings"]["lambda_ur"] == 20 and all(epoch["l_ur"] > 0 for epoch in epochs)
    assert [epoch["passes"] for epoch in epochs] == [4] + (len(epochs) - 1) * [2]  # all of D_r was moved, in two steps
    logged = {name.removeprefix("target_"): value for name, value in epochs[-1].items() if name.startswith("target_")}
    assert logged == {name: pytest.approx(metrics["target"][name]) for name in logged} and logged
    succeed("analysis/robustness.py", "--runs", tmp_path / "deep", "--data_dir", chain[1], "--steps", 0, 2, "--out",
            tmp_path / "robustness.md")
    content = json.loads((tmp_path / "deep" / "robustness.json").read_text())
    steps = content["steps"]
    steps["2"]["target"]["dep_acc"] = 12.5  # which no network of these gives
    (tmp_path / "deep" / "robustness.json").write_text(json.dumps(content))
    for more in ([0], [2, 1], [1]):  # what was measured before is kept, and not measured again
        succeed("analysis/robustness.py", "--runs", tmp_path / "deep", "--data_dir", chain[1], "--steps", *more,
                "--out", tmp_path / "robustness.md")
        assert f"T~, difference, {more[-1]} steps" in (tmp_path / "robustness.md").read_text()
    after = json.loads((tmp_path / "deep" / "robustness.json").read_text())["steps"]
    assert list(after) == ["0", "1", "2"] and all(after[step] == figures for step, figures in steps.items())
    assert "measured with lr 0.01, not 0.5" in fail("analysis/robustness.py", "--runs", tmp_path / "deep", "--data_dir",
                                                    chain[1], "--steps", 0, "--lr", "0.5")
    rows = average_rows([{"steps": after}, {"steps": steps}])
    assert list(rows["T"]) == ["0 steps", "2 steps"] and rows["T: Dep Acc"]["2 steps"]["mean"] == 12.5
    assert steps["0"]["difference"]["avg_acc"] == pytest.approx(metrics["original"]["avg_acc"])
    assert steps["0"]["concat"]["dep_acc"] == pytest.approx(metrics["recover"]["concat"]["dep_acc"])


def test_rows_of_a_cleared_last_layer_stand_in_each_file_and_not_in_t(chain, tmp_path):
    """T is without the rows of D_r, and T_r alone gives them back as the difference does."""
    original, partition = load_network(str(chain[0] / "original.pt"))
    deposited, fc = partition.deposit_classes, original.head.fc
    succeed("train_deposit.py", *deposit_flags(chain, tmp_path, "--last_layer", "cleared"))
    target, _ = load_network(str(tmp_path / "target.pt"))
    assert not target.head.fc.weight[deposited].any()
    assert target.head.fc.weight[partition.preserved_classes].equal(fc.weight[partition.preserved_classes])
    x = torch.randn(20, 3, 16, 16)
    with torch.no_grad():
        assert not target(x).softmax(1)[:, deposited].any() and original(x).softmax(1)[:, deposited].all()
    for file in ("difference", "deposit"):
        rows = torch.load(tmp_path / f"{file}.pt", weights_only=True)["tensors"]["rows"]
        assert rows.equal(torch.cat([fc.weight[deposited], fc.bias[deposited, None]], 1))
    assert "--last_layer shared" in fail("analysis/recovery.py", "--runs", tmp_path, "--original",
                                         chain[0] / "original.pt", "--out", tmp_path / "recovery")
    (tmp_path / "difference.pt").rename(tmp_path / "elsewhere.pt")
    succeed("withdraw.py", "--save_path", tmp_path, "--data_dir", chain[1])
    recover, _ = load_network(str(tmp_path / "recover.pt"))
    assert recover.upper.head.fc.weight.equal(fc.weight) and recover.upper.head.fc.bias.equal(fc.bias)
    assert json.loads((tmp_path / "metrics.json").read_text())["target"]["dep_acc"] == 0


def test_l_ur_is_refused_where_the_rows_read_every_direction(chain):
    original, partition = load_network(str(chain[0] / "original.pt"))
    original[-1].fc = torch.nn.Linear(3, 4)  # as many features as there are preserved classes
    args = train_deposit.get_args_parser().parse_args([*TINY, "--preset", "deep"])
    with pytest.raises(UserError, match="--lambda_ur"):
        LIRF(original, partition, args)


# trials and tables


def test_a_trial_is_chosen_on_held_out_images(tmp_path):
    trials = {"a": (91.5, 80), "b": (93.0, 70), "c": (92.0, 60), "d": (50.0, 10)}
    for trial, (h_mean, dep) in trials.items():
        (tmp_path / trial).mkdir()
        measures = {"answers": {"dep": 5.0, "pre": h_mean}, "probe": {"dep": dep, "pre": 90}}
        original = {"answers": {"dep": h_mean + measures["answers"]["dep"]}}
        record = {"measures": measures, "reference": {"original": original}, "original": "0", "network": trial,
                  "settings": {"eval_split": "val", "partition": "1"}}
        (tmp_path / trial / "target_residual_0.json").write_text(json.dumps(record))
    folders = [str(tmp_path / trial) for trial in trials]
    assert methods.choose(folders)[0] == {"h_mean": "b", "probe": "c"}
    succeed("analysis/methods.py", "--choose", *folders, "--rule", "probe")
    assert (tmp_path / "choice.txt").read_text() == "c\n" and "| probe" in (tmp_path / "choice.md").read_text()
    succeed("analysis/methods.py", "--choose", folders[3], "--rule", "probe")  # which no trial fits
    assert (tmp_path / "choice.txt").read_text() == "d\n"
    assert "9_methods" in fail("analysis/methods.py", "--choose", tmp_path)
    shutil.copytree(tmp_path / "d", tmp_path / "other" / "b")  # which would stand in for the b of this folder
    assert "do not lie in one folder" in fail("analysis/methods.py", "--choose", *folders, tmp_path / "other" / "b",
                                              unchanged=tmp_path)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "target_residual_0.json").write_text(json.dumps({**record, "measures": {}}))
    assert "lacks answers or probe" in fail("analysis/methods.py", "--choose", tmp_path / "e")
    record["settings"]["eval_split"] = "test"
    (tmp_path / "d" / "target_residual_0.json").write_text(json.dumps(record))
    assert "not all measured on the same held-out" in fail("analysis/methods.py", "--choose", *folders)


def test_a_further_setting_is_a_point_of_the_figure(tmp_path):
    def run(pre, rho):
        return [{"measures": {"answers": {"pre": pre, "dep": 0}, "recovery": {"bytes": 2000}}, "rho": {"probe": rho},
                 "reference": {"original": {"answers": {"dep": 94}}}}]

    pictures = []
    for trade in ({}, {"setting": run(92, {"rho": 0.3})}, {"setting": run(92, {"rho": 0.3, "usable": False})}):
        methods.plot({"lirf": run(91, {"rho": 0.9}), "unknown": run(90, {})}, trade, tmp_path / "m.png")
        pictures.append((tmp_path / "m.png").read_bytes())
    assert pictures[0] != pictures[1] and pictures[0] == pictures[2]  # no usable rho, no place


@pytest.mark.parametrize("status,expected", [(3, 0), (1, 1), (130, 130)])
def test_a_trial_is_left_out_only_if_it_diverged(tmp_path, status, expected):
    stand_in = f"python() {{ case $* in *train_deposit*frozen*) return {status} ;; esac; }}; export -f python"
    done = subprocess.run(["bash", "-c", f"{stand_in}; bash {ROOT}/scripts/9_methods.sh trials"], check=False,
                          env={**os.environ, "VIRTUAL_ENV": "active", "METHODS": "lirf", "SAVE": str(tmp_path)},
                          capture_output=True, text=True)
    assert done.returncode == expected and done.stderr.count("left out") == (3 if expected == 0 else 0)


def test_the_script_tries_freezes_and_then_runs_every_draw(tmp_path):
    images = make_folder(tmp_path / "images", classes=[f"c{i}" for i in range(10)], train=10, test=2, size=16)
    save, small = tmp_path / "S", {"train_deposit.py": ["--epochs", "1", "--batch_size", "16"],
                                   "analysis/robustness.py": ["--steps", "0", "1"]}
    variables = {"ARCH": "resnet8", "EPOCHS": 1, "ORIGINAL_FLAGS": "--batch_size 16", "DATA_DIR": images, "SAVE": save,
                 "MEASURES": "answers means recovery"}
    (save / "lirf" / "seed4").mkdir(parents=True)  # a draw that was begun
    for word in ("trials", 3):
        status, text, commands = run_shell("scripts/9_methods.sh", word, **variables, METHODS="lirf", flags=small)
        assert status == 0, text
    tried = [command for command in commands if "S/trials" in " ".join(command) and "train_deposit" in command[0]]
    assert len(tried) == 6 and all(command[command.index("--seed") + 1] == "10" for command in tried)
    for path in save.rglob("partition.json"):
        assert json.loads(path.read_text())["val_fraction"] == (0.1 if "trials" in path.parts else 0)
    frozen = [command for command in commands if str(save / "lirf" / "seed3") in command and "--bn_stats" in command]
    choice = (save / "trials" / "lirf" / "choice.txt").read_text().strip()
    flags = frozen[0][frozen[0].index("--lr"):]
    assert len(frozen) == 1 and f"lr{flags[1]}" == choice.rsplit("_", 1)[0].removesuffix("_lambda_kp10")
    assert flags[-2:] == ["--bn_stats", choice.rsplit("_", 1)[1]]
    assert ("--lambda_kp" in flags) == ("lambda_kp10" in choice)
    table = (save / "methods.md").read_text()
    assert all(f"| {name}" in table for name in ("T0", "R", "logit_mask", "pour_p", "lirf"))
    assert (save / "methods.png").stat().st_size > 5000
    steps = json.loads((save / "lirf" / "seed3" / "robustness.json").read_text())["steps"]  # of training T further
    recover = json.loads((save / "lirf" / "seed3" / "metrics.json").read_text())["recover"]
    assert set(steps) == {"0", "1"} and "T~, difference, 1 steps" in (save / "robustness_lirf.md").read_text()
    assert all(steps["0"][rule]["dep_acc"] == recover[rule]["dep_acc"] for rule in ("concat", "difference"))
    assert all(set(of_step) == {"target", *recover} for of_step in steps.values())
    again = ["--runs", save / "lirf" / "seed3", "--data_dir", images, "--out", tmp_path / "again.md", "--steps", 0, 1]
    with mock.patch("analysis.robustness.tune", side_effect=AssertionError("trained anew")):
        succeed("analysis/robustness.py", *again)
    assert (tmp_path / "again.md").read_text() == (save / "robustness_lirf.md").read_text()
    status, text, _ = run_shell("scripts/collect.sh", save, tmp_path / "records")
    assert status == 0 and (tmp_path / "records" / "trials" / "lirf" / "choice.txt").is_file()
