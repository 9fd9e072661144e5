"""Residual knowledge: each measure on features whose answer is known, on T0 and between two R; the command lines."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, fail, succeed
from fixtures import make_folder

from analysis import measures, methods, residual
from datasets import read_partition
from datasets.partition import save_partition
from models.architectures import build_network, take_rows
from models.checkpoints import load_network
from models.difference import decode, encode, shifted

DEPOSITED = np.array([1, 3])
OF_FEATURES = [measures.linear_probe, measures.class_means, measures.told_from_rest, measures.named_among]
WITHOUT_RHO = {"prototype_1", "prototype_5", "prototype_25", "relearn", "recovery"}
QUICK = ["answers", "probe", "probe_cut", "means", "means_cut", "told", "named", "prototype_5", "membership"]


def made_up(seed, knows, n=60):
    """(x, y, x_test, y_test, deposited) of four classes, each a direction of its own: all of them, if the network knows
    all; else an image of D_r lies at random at one of the preserved classes."""
    rng, sets = np.random.default_rng(seed), []
    for _ in range(2):
        y = np.repeat(np.arange(4), n)
        place = y if knows else np.where(np.isin(y, DEPOSITED), 2 * rng.integers(0, 2, 4 * n), y)
        sets += [np.eye(4)[place] * 4 + rng.normal(0, 0.5, (4 * n, 4)), y]
    return *sets, DEPOSITED


def first(measure, *data):
    return next(iter(measure(*data).values()))


@pytest.mark.parametrize("measure", OF_FEATURES)
def test_rho_is_one_for_what_knows_all_and_about_zero_between_two_that_do_not(measure, recwarn):
    a_0, a_r = first(measure, *made_up(0, True)), [first(measure, *made_up(seed, False)) for seed in (1, 2, 3)]
    assert a_0 > (0.97 if measure is measures.told_from_rest else 97) and measures.rho(a_0, a_r, a_0)["rho"] == 1
    found = measures.rho(first(measure, *made_up(4, False)), a_r, a_0)
    assert abs(found["rho"]) < 0.2 and found["usable"]
    assert measures.rho(60, [69, 71], 90)["rho"] == -0.5 and not measures.rho(80, [50, 89], 90)["usable"]
    x, y, x_test, y_test, d = made_up(1, False)  # scaled features change nothing
    assert first(measure, x * 1e-3, y, x_test * 1e-3, y_test, d) == pytest.approx(a_r[0], abs=0.9)
    assert not [warning for warning in recwarn if "onverge" in str(warning.message)]


def test_a_common_grave_and_a_hole_in_the_map_are_told_apart():
    x, y, x_test, y_test, d = made_up(0, True)
    rng = np.random.default_rng(0)
    grave = [np.where(np.isin(labels, d)[:, None], [0, 4, 0, 0] + 0.1 * rng.normal(size=(len(labels), 4)), features)
             for features, labels in ((x, y), (x_test, y_test))]
    assert measures.told_from_rest(grave[0], y, grave[1], y_test, d)["auc"] > 0.99
    assert 35 < measures.named_among(grave[0], y, grave[1], y_test, d)["acc"] < 65
    assert measures.named_among(x, y, x_test, y_test, np.array([1])) == {"acc": 100.0}
    assert measures.split_accuracy(np.full(240, 1), y, d) == {"dep": 50.0, "pre": 0.0}
    dead = measures.class_means(np.ones_like(x), y, np.ones_like(x_test), y_test, d)  # a network without features
    assert dead == {"dep": 0.0, "pre": 50.0}


def test_prototypes_bring_rows_back_where_the_features_part():
    weight, bias = 100 * np.eye(4), np.array([0.0, -1000.0, 0.0, -1000.0])
    weight[DEPOSITED] = 0
    for k in (1, 25):
        assert measures.prototype(*made_up(0, True), weight, bias, k)["dep"] > 95
        assert measures.prototype(*made_up(0, False), weight, bias, k)["dep"] < 75
    assert (weight[DEPOSITED] == 0).all() and bias[1] == -1000  # the network's own rows stay


def test_membership_is_half_for_unknown_members_and_one_for_known_ones():
    rng, y = np.random.default_rng(0), np.repeat(np.arange(4), 200)
    z, z_test = (rng.normal(size=(800, 4)) for _ in range(2))
    assert abs(measures.membership(z, y, z_test, y, DEPOSITED)["auc"] - 0.5) < 0.06
    z[np.arange(800), y] += 20
    assert measures.membership(z, y, z_test, y, DEPOSITED)["auc"] > 0.99


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folder with images/, original/original.pt, retrained_0/ and retrained_1/, lirf/seed0/; bee and dog deposited."""
    root = tmp_path_factory.mktemp("residual")
    make_folder(root / "images", train=20, test=8)
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", root / "images", "--deposit_classes", "bee,dog",
            "--out", root / "partition.json")
    common = ["--data_dir", root / "images", "--partition", root / "partition.json", *TINY]
    for name, more in (("original", []), ("retrained_0", ["--subset", "retrain"]),
                       ("retrained_1", ["--subset", "retrain", "--seed", "1"])):
        succeed("train_scratch.py", "--save_path", root / name, "--arch", "resnet8", *common, "--epochs", "6", *more)
    succeed("train_deposit.py", "--save_path", root / "lirf" / "seed0", "--original", root / "original/original.pt",
            *common, "--lr", "0.05")
    return root


@pytest.fixture(scope="module")
def sets(networks):
    """(Partition, image sets) of that folder."""
    partition = read_partition(str(networks / "partition.json"))
    args = SimpleNamespace(data_dir=str(networks / "images"), eval_split="test", seed=0)
    return partition, residual.image_sets(partition, args, "cpu")


def examine(root, *files, wanted=(), retrained=("retrained_0", "retrained_1")):
    """(records of analysis.residual for networks, what it printed)."""
    text = succeed("analysis/residual.py", "--networks", *files, "--original", root / "original/original.pt",
                   "--retrained", *(root / name / "retrained.pt" for name in retrained), "--data_dir", root / "images",
                   *(["--measures", *wanted] if wanted else []), "--device", "cpu")
    beside = [next(Path(file).parent.glob(f"{Path(file).stem}_residual_*.json")) for file in files]
    return [json.loads(file.read_text()) for file in beside], text


def test_t0_has_rho_one_and_r_itself_zero(networks):
    found, _ = examine(networks, networks / "original/original.pt", networks / "retrained_0/retrained.pt", wanted=QUICK,
                       retrained=["retrained_0"])
    for record, value in zip(found, (1.0, 0.0)):
        assert set(record["rho"]) == set(QUICK) - WITHOUT_RHO
        rhos = {figures["rho"] for figures in record["rho"].values()}
        assert value in rhos and rhos <= {None, value}


def test_all_measures_of_ours_and_of_a_network_of_ones_own_in_one_command(networks, monkeypatch):
    """In another repository's layout, as README.md's command takes it; T0's own weights know all that T0 knows."""
    for name, value in (("RATES", (1e-1,)), ("REPEATS", 1), ("CAP", 100), ("SHOT_STEPS", (1, 2)), ("KEPT_STEPS", (2,))):
        monkeypatch.setattr(residual, name, value)
    mine = networks / "mine" / "seed0" / "mine.pth"
    mine.parent.mkdir(parents=True)
    theirs = {f"module.{name.replace('stem.', '').replace('head.fc', 'linear')}": tensor for name, tensor
              in load_network(str(networks / "original/original.pt"))[0].state_dict().items()}
    torch.save({"state_dict": theirs}, mine)
    files = networks / "lirf" / "seed0" / "target.pt", mine
    (of_t, of_mine), text = examine(networks, *files)
    possible = set(residual.MEASURES) - {"prototype_25", "k_shot_25"}  # 16 images a class are left to measure with
    assert "a class has 16 images" in text
    assert set(of_t["measures"]) == possible and set(of_t["rho"]) == possible - WITHOUT_RHO
    for name, figures in of_t["measures"].items():  # Dep never without Pre
        assert "dep" not in figures or figures["pre"] is not None, name
    assert of_t["measures"]["recovery"]["parameters"] > 1000 > of_mine["measures"]["recovery"]["parameters"] == 0
    assert of_mine["measures"]["answers"] == of_mine["reference"]["original"]["answers"]
    assert {figures["rho"] for figures in of_mine["rho"].values()} <= {1.0, None}
    assert "Anamnesis index" in text and str(mine) in text
    for name, measure in residual.MEASURES.items():  # nothing is measured twice
        monkeypatch.setitem(residual.MEASURES, name, measure._replace(figures=None))
    assert examine(networks, *files)[0] == [of_t, of_mine]
    succeed("analysis/methods.py", "--runs", networks)
    table = (networks / "methods.md").read_text()
    assert "| mine" in table and "| lirf" in table and "H Mean" in table and " / " in table
    rows = methods.forgetting_rows(methods.records_of(map(str, networks.glob("*/seed0/*_residual_*.json"))))
    assert list(rows) == ["T0", "R", "lirf", "mine"] and rows["R"]["Pre"]["n"] == 2 > rows["lirf"]["Pre"]["n"]
    assert rows["lirf"]["passes over D_r"]["mean"] == 2 and rows["mine"]["seconds"] is None
    assert rows["mine"]["Dep"]["mean"] == pytest.approx(of_mine["measures"]["answers"]["dep"], abs=1e-4)
    rows, rhos = methods.rows_of({"mine": [of_mine]})
    usable = next(name for name, figures in of_mine["rho"].items() if figures["usable"])
    assert list(rows) == ["T0", "R", "mine"] and rhos["mine"][usable]["mean"] == 1
    of_mine["rho"][usable]["usable"] = False
    other = {**of_mine, "settings": {"partition": "another draw"},
             "reference": {"original": {"answers": {"dep": 0.0, "pre": 0.0}}, "retrained": []}}
    rows, rhos = methods.rows_of({"mine": [of_mine], "theirs": [of_mine], "lirf": [other]})
    before, answers = of_mine["measures"]["answers"], rows["T0"]["answers"].split(" / ")  # a draw counts once
    assert answers == [f"{before[key] / 2:.4g}" for key in ("pre", "dep")] and rhos["mine"][usable] is None
    # T0 and R have what any method was measured beside
    alone = {**of_mine, "reference": {"original": {"answers": before}, "retrained": []}}
    for records in ({"lirf": [of_t], "theirs": [alone]}, {"lirf": [alone], "theirs": [of_t]}):
        found = methods.measures_of(records)
        assert found["T0"] == [of_t["reference"]["original"]] and found["R"] == of_t["reference"]["retrained"]
    flags = ["--original", networks / "original/original.pt", "--data_dir", networks / "images", "--retrained",
             networks / "retrained_0/retrained.pt", "--device", "cpu"]
    assert "measured with seed 0, not 1" in fail("analysis/residual.py", "--networks", mine, "--seed", 1, *flags)


def test_the_kept_measures_of_r_stand_for_its_network(networks, tmp_path):
    target, r = networks / "lirf/seed0/target.pt", networks / "retrained_0/retrained.pt"
    (by_network,), _ = examine(networks, target, wanted=QUICK, retrained=["retrained_0"])
    (record,) = r.parent.glob("retrained_residual_*.json")
    kept = shutil.copy(record, tmp_path / "R.json")
    manifest = read_partition(str(networks / "partition.json"))
    save_partition(str(tmp_path / "partition.json"), dataclasses.replace(manifest, layout="array"))  # stored otherwise
    flags = ["--networks", target, "--data_dir", networks / "images", "--measures", *QUICK, "--device", "cpu",
             "--original"]
    mine = [networks / "original/original.pt", "--partition", networks / "partition.json", "--retrained", kept]
    succeed("analysis/residual.py", *flags, *mine)
    again = json.loads(next(target.parent.glob("target_residual_*.json")).read_text())
    assert again["rho"] == by_network["rho"] and len(again["reference"]["retrained"]) == 1
    succeed("analysis/residual.py", *flags, *mine[:-2])  # without R: what it gave is kept
    assert json.loads(next(target.parent.glob("target_residual_*.json")).read_text()) == again
    assert "measured with seed 0, not 1" in fail("analysis/residual.py", *flags, *mine, "--seed", 1)
    assert "names one network twice" in fail("analysis/residual.py", *flags, *mine, r)
    for key, value, said in (("original", "0", "another T0"), ("settings", {}, "eval_split None")):
        (tmp_path / "changed.json").write_text(json.dumps({**json.loads(record.read_text()), key: value}))
        assert said in fail("analysis/residual.py", *flags, *mine[:-1], tmp_path / "changed.json")
    assert "holds no measures" in fail("analysis/residual.py", *flags, *mine[:-1], networks / "partition.json")
    save_partition(str(tmp_path / "partition.json"), manifest.with_deposit([0, 1]))
    assert "other deposit classes" in fail("analysis/residual.py", *flags, *mine)


def test_what_another_process_measures_meanwhile_is_kept(networks, tmp_path, monkeypatch):
    root = shutil.copytree(networks, tmp_path / "root")
    for path in root.rglob("*_residual_*.json"):
        path.unlink()
    target, answers = root / "lirf/seed0/target.pt", residual.MEASURES["answers"]

    def measured_by_both(known):
        monkeypatch.setitem(residual.MEASURES, "answers", answers)
        examine(root, target, wanted=["means"], retrained=["retrained_0"])
        return answers.figures(known)

    monkeypatch.setitem(residual.MEASURES, "answers", answers._replace(figures=measured_by_both))
    (record,), _ = examine(root, target, wanted=["answers"], retrained=["retrained_0"])
    of_r, of_0 = record["reference"]["retrained"][0], record["reference"]["original"]
    assert set(record["measures"]) == set(of_r) == set(of_0) == set(record["rho"]) == {"answers", "means"}


def test_a_network_that_diverged_is_told(networks, tmp_path):
    tensors = torch.load(networks / "lirf/seed0/target.pt", weights_only=True)["tensors"]
    tensors["stem.bn1.weight"] = torch.full_like(tensors["stem.bn1.weight"], 3e38)
    torch.save(tensors, tmp_path / "mine.pth")
    line = fail("analysis/residual.py", "--original", networks / "original/original.pt", "--data_dir",
                networks / "images", "--partition", networks / "partition.json", "--device", "cpu", "--networks",
                tmp_path / "mine.pth", "--measures", "means")
    assert "mine.pth gives numbers that are not finite" in line


def test_a_damaged_checkpoint_and_a_file_of_another_ending_are_refused(networks, tmp_path):
    target = shutil.copy(networks / "lirf/seed0/target.pt", tmp_path / "target.pt")
    content = torch.load(target, weights_only=True)
    content["tensors"]["stem.conv1.weight"] *= 3
    torch.save(content, target)
    flags = ["--original", networks / "original/original.pt", "--data_dir", networks / "images", "--partition",
             networks / "partition.json", "--device", "cpu", "--networks"]
    assert "does not match its checksum" in fail("analysis/residual.py", *flags, target, unchanged=tmp_path)
    for name in ("mine.pth", "mine.pt"):
        torch.save(content["tensors"], tmp_path / name)
    assert "differ in their ending" in fail("analysis/residual.py", *flags, tmp_path / "mine.pt", tmp_path / "mine.pth")


def test_all_networks_relearn_at_the_rate_of_r_and_giving_up_is_told(networks, sets, monkeypatch):
    for name, value in (("RATES", (1e-9, 1e-2)), ("REPEATS", 2), ("CAP", 10)):
        monkeypatch.setattr(residual, name, value)
    (partition, images), networks_of = sets, {}
    for name in ("original/original.pt", "retrained_0/retrained.pt"):
        networks_of[name] = load_network(str(networks / name))[0]
    t0, r = networks_of.values()
    runtime = residual.Runtime("cpu", "fp32")
    original = residual.Known(t0, partition, images, None, runtime)
    assert residual.relearn(original) == {"steps": 0, "deviation": 0, "censored": 0, "lr": 1e-9}  # the first of equals
    given_up = residual.relearn(residual.Known(r, partition, images, None, runtime, original, relearn_rate=1e-9))
    assert given_up == {"steps": 10, "deviation": 0, "censored": 2, "lr": 1e-9}
    record = {"measures": {"relearn": given_up}, "rho": {}, "settings": {"partition": "1"},
              "reference": {"original": {}, "retrained": [{"relearn": {**given_up, "censored": 0}}]}}
    values, rhos = methods.rows_of({"mine": [record]})
    assert values["mine"]["relearn"] == "> 10" and values["R"]["relearn"] == "10"
    assert "Anamnesis index" not in rhos["mine"]
    record["measures"]["relearn"] = {**given_up, "censored": 0, "steps": 5}
    assert methods.rows_of({"mine": [record]})[1]["mine"]["Anamnesis index"]["mean"] == 0.5


def test_the_rate_of_relearning_is_that_at_which_r_is_fastest(networks, tmp_path, monkeypatch):
    """By a stand-in for the training, in which R arrives after 15 steps at the second rate and later at the others."""
    for name in ("original", "retrained_0", "lirf", "images"):
        shutil.copytree(networks / name, tmp_path / name)
    for path in tmp_path.rglob("*_residual_*.json"):
        path.unlink()
    monkeypatch.setattr(residual, "RATES", (1e-1, 1e-2, 1e-3))
    tried = []

    def tune(network, images, steps, lr, *_, **__):
        tried.append(lr)
        arrives = {1e-1: 40, 1e-2: 15, 1e-3: 30}[lr]
        for step in range(steps + 1):
            student = copy.deepcopy(network)
            if step >= arrives:
                student.load_state_dict(load_network(str(tmp_path / "original/original.pt"))[0].state_dict())
            else:
                student[-1].fc.bias.data[[1, 3]] -= 1e4
            yield step, student

    monkeypatch.setattr(residual, "tune", tune)
    (of_t,), _ = examine(tmp_path, tmp_path / "lirf/seed0/target.pt", wanted=["relearn"], retrained=["retrained_0"])
    of_r, of_0 = of_t["reference"]["retrained"][0]["relearn"], of_t["reference"]["original"]["relearn"]
    assert of_r == of_0 == of_t["measures"]["relearn"] == {"steps": 15, "deviation": 0, "censored": 0, "lr": 1e-2}
    assert tried == [1e-1, 1e-2, 1e-3] + [1e-2] * 3 * residual.REPEATS  # R alone tries


def test_recovery_takes_the_fewest_bits_that_give_the_images_of_d_back(networks, sets):
    (partition, images), runtime = sets, residual.Runtime("cpu", "fp32")
    t0, t = (load_network(str(networks / "original/original.pt"))[0] for _ in range(2))
    with torch.no_grad():
        for parameter in t.parameters():  # so far away that a rounded way back misses T0
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter += 5 * parameter.abs().mean() * noise
    original = residual.Known(t0, partition, images, None, runtime)
    assert residual.recovery(original)["bits"] == min(residual.BITS)  # there is nothing to give back
    known = residual.Known(t, partition, images, None, runtime, original)
    found, goal = residual.recovery(known), original.accuracy("deposit")["dep"] - 0.1

    def given_back(bits):
        whole, target, network = t0.state_dict(), t.state_dict(), copy.deepcopy(t)
        network.load_state_dict(shifted(target, decode(encode(whole, target, bits), target, bits), 1))
        return known.accuracy("deposit", network)["dep"] >= goal

    assert known.accuracy("deposit")["dep"] < goal and given_back(found["bits"]) and found["bits"] > min(residual.BITS)
    assert not any(given_back(bits) for bits in residual.BITS if bits < found["bits"])


def test_methods_compared_with_different_r_do_not_share_a_table(tmp_path):
    def write(method, probe):
        (tmp_path / method / "seed0").mkdir(parents=True, exist_ok=True)
        record = {"settings": {"partition": "0", "eval_split": "test"}, "original": "0", "network": "0", "rho": {},
                  "measures": {"answers": {"pre": 90.0, "dep": 1.0}},
                  "reference": {"original": {}, "retrained": [{"probe": {"dep": value}} for value in probe]}}
        (tmp_path / method / "seed0" / "target_residual_0.json").write_text(json.dumps(record))

    write("mine", [70.0])
    for probe, status in (([70.0], 0), ([71.0], 1), ([70.0, 71.0], 1), ([], 0)):  # one measured without R has no rho
        write("theirs", probe)
        text = (succeed if status == 0 else fail)("analysis/methods.py", "--runs", tmp_path)
        assert status == 0 or "mine and theirs take the rho of a draw by different R" in text
    shutil.copytree(tmp_path / "mine", tmp_path / "trade" / "mine")
    succeed("analysis/methods.py", "--runs", tmp_path, "--trade", tmp_path / "trade")
    write("trade/mine", [71.0])
    assert "mine and --trade mine" in fail("analysis/methods.py", "--runs", tmp_path, "--trade", tmp_path / "trade")


def test_two_networks_of_one_draw_are_not_two_draws(tmp_path):
    for name in ("mine", "old"):
        (tmp_path / "mine" / "seed0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / "seed0" / f"{name}_residual_0.json").write_text(json.dumps({
            "settings": {"partition": "0"}, "original": "0", "network": name, "measures": {}, "rho": {}}))
    assert "second network of its draw" in fail("analysis/methods.py", "--runs", tmp_path)
    (tmp_path / "mine" / "seed0" / "old_residual_0.json").write_text("{}")
    assert "holds no measures" in fail("analysis/methods.py", "--runs", tmp_path)


@pytest.mark.parametrize("other", [{"original": "1"}, {"settings": {"partition": "0", "eval_split": "val"}}])
def test_methods_measured_on_other_images_or_beside_another_original_do_not_share_a_table(tmp_path, other):
    record = {"settings": {"partition": "0", "eval_split": "test"}, "original": "0", "network": "0", "measures": {},
              "rho": {}}
    for method, changed in (("mine", {}), ("theirs", other)):
        (tmp_path / method / "seed0").mkdir(parents=True)
        (tmp_path / method / "seed0" / "target_residual_0.json").write_text(json.dumps({**record, **changed}))
    assert "measured on two splits, or beside two T0" in fail("analysis/methods.py", "--runs", tmp_path)


def test_steps_of_relearning_at_a_rate_that_is_not_rs_are_measured_again(tmp_path):
    identity = {"network": "0", "original": "0", "settings": {}}
    (tmp_path / "kept.json").write_text(json.dumps({**identity, "measures": {"relearn": {"steps": 5, "lr": 0.1}}}))
    known = SimpleNamespace(relearn_rate=0.01)
    assert residual.measured(known, [], str(tmp_path / "kept.json"), identity)["measures"] == {}
    known.relearn_rate = 0.1
    assert residual.measured(known, [], str(tmp_path / "kept.json"), identity)["measures"]["relearn"]["steps"] == 5


def test_a_call_that_does_not_ask_for_relearning_keeps_its_steps(networks, tmp_path):
    root = shutil.copytree(networks, tmp_path / "root")
    target = root / "lirf/seed0/target.pt"
    (record,), _ = examine(root, target, wanted=["answers"], retrained=["retrained_0"])
    for file, rate in ((next(target.parent.glob("target_residual_*.json")), 0.1),
                       (next((root / "retrained_0").glob("*_residual_*.json")), 0.01)):
        content = json.loads(file.read_text())
        content["measures"]["relearn"] = {"steps": 5, "deviation": 0, "censored": 0, "lr": rate}
        file.write_text(json.dumps(content))
    (again,), text = examine(root, target, wanted=["answers"], retrained=["retrained_0"])
    kept = {"steps": 5, "deviation": 0, "censored": 0, "lr": 0.1}
    assert again["measures"] == {**record["measures"], "relearn": kept}
    assert "Anamnesis index" not in text  # of steps at two rates


def test_measures_beside_another_original_are_not_lost(networks, tmp_path):
    root = shutil.copytree(networks, tmp_path / "root")
    target, mine, r = root / "lirf/seed0/target.pt", root / "mine.pth", root / "retrained_0/retrained.pt"
    torch.save(load_network(str(target))[0].state_dict(), mine)
    examine(root, mine, wanted=["answers"], retrained=["retrained_0"])
    succeed("train_scratch.py", "--save_path", root / "other", "--arch", "resnet8", "--data_dir", root / "images",
            "--partition", root / "partition.json", *TINY, "--seed", "3")
    flags = ["--original", root / "other/original.pt", "--data_dir", root / "images", "--measures", "answers",
             "--device", "cpu", "--networks"]
    for more in ([mine, "--partition", root / "partition.json"], [root / "other/original.pt", "--retrained", r]):
        before = {file: file.read_bytes() for file in root.rglob("*_residual_*.json")}
        assert "beside another T0" in fail("analysis/residual.py", *flags, *more)
        assert all(file.read_bytes() == content for file, content in before.items())


def test_a_recover_network_of_two_branches_is_told(networks, tmp_path):
    for name in ("target.pt", "deposit.pt"):
        shutil.copy(networks / "lirf/seed0" / name, tmp_path)
    succeed("withdraw.py", "--save_path", tmp_path, "--data_dir", networks / "images", "--device", "cpu")
    assert "--merge difference" in fail("analysis/residual.py", "--networks", tmp_path / "recover.pt", "--original",
                                        networks / "original/original.pt", "--partition",
                                        networks / "partition.json", "--data_dir", networks / "images")


def test_the_attackers_rate_is_chosen_before_a_test_image_is_seen(networks, sets, monkeypatch):
    for name, value in (("RATES", (1e-2, 1e-3)), ("REPEATS", 2), ("CAP", 5), ("SHOT_STEPS", (1,))):
        monkeypatch.setattr(residual, name, value)
    partition, images = sets
    t0, r = (load_network(str(networks / name))[0] for name in ("original/original.pt", "retrained_0/retrained.pt"))
    runtime, seen, rates = residual.Runtime("cpu", "fp32"), [], []
    original = residual.Known(t0, partition, images, None, runtime)
    known = residual.Known(r, partition, images, None, runtime, original)
    accuracy, tune = residual.Known.accuracy, residual.tune

    def noted(self, split, network=None):
        if network is not None:  # one that is being trained
            seen.append(split)
        return accuracy(self, split, network)

    def tuned(network, train_images, steps, lr, *more):
        seen.append(lr)
        rates.append(lr)
        return tune(network, train_images, steps, lr, *more)

    monkeypatch.setattr(residual.Known, "accuracy", noted)
    monkeypatch.setattr(residual, "tune", tuned)
    for measure, split in (("k_shot_1", "test"), ("relearn", "test_deposit")):
        seen.clear(), rates.clear()
        rate = residual.MEASURES[measure].figures(known)["lr"]
        assert rates == [*residual.RATES, rate, rate]  # each is tried, then the chosen one is measured
        last_trial = seen.index(residual.RATES[-1])
        before = seen[:seen.index(rate, last_trial + 1)]
        assert split in seen and not {"test", "test_deposit"} & set(before)


def test_to_arrive_at_the_last_step_is_not_to_give_up(networks, sets, monkeypatch):
    """R arrives there at the second rate alone, as far as test images ask; T0 has seen the held-out ones."""
    monkeypatch.setattr(residual, "CAP", 10)
    monkeypatch.setattr(residual, "RATES", (0.1, 0.01))
    partition, images = sets
    t0, r = (load_network(str(networks / name))[0] for name in ("original/original.pt", "retrained_0/retrained.pt"))
    runtime = residual.Runtime("cpu", "fp32")
    original = residual.Known(t0, partition, images, None, runtime)
    monkeypatch.setattr(residual, "tune", lambda network, images, steps, lr, *_: (
        (step, t0 if step >= 10 and lr == 0.01 else r) for step in range(steps + 1)))
    monkeypatch.setattr(residual.Known, "accuracy", lambda self, split, network=None: {
        "dep": 0.0 if network is r else 100.0 if (network, split) == (None, "set_aside_deposit") else 60.0})
    for rate in (None, 0.01):
        known = residual.Known(r, partition, images, None, runtime, original, relearn_rate=rate)
        assert residual.relearn(known) == {"steps": 10, "deviation": 0, "censored": 0, "lr": 0.01}


def test_an_attack_opens_what_a_mask_closed(sets):
    partition, images = sets
    network = build_network("resnet8", 4, 16)
    take_rows(network[-1].fc, partition.deposit_classes)
    known = residual.Known(network, partition, images, None, residual.Runtime("cpu", "fp32"))
    closed, opened = known.network[-1].fc, known.opened[-1].fc
    deposited, preserved = partition.deposit_classes, partition.preserved_classes
    assert (closed.bias[deposited] < -100).all()  # the network itself stays as it is
    assert (opened.bias[deposited] == opened.bias[preserved].min()).all()
    assert opened.bias[preserved].equal(closed.bias[preserved]) and opened.weight.equal(closed.weight)
    x, y = images["deposit"].images[:4].float() / 255, images["deposit"].labels[:4]
    torch.nn.functional.cross_entropy(known.opened.requires_grad_(True)(x), y).backward()
    assert opened.weight.grad[deposited].abs().sum() > 1e-6


def test_what_no_number_of_bits_gives_back_has_no_size(networks, sets, tmp_path):
    partition, images = sets
    t0, t = (load_network(str(networks / "original/original.pt"))[0] for _ in range(2))
    with torch.no_grad():
        for parameter in t.parameters():  # float32 itself does not hold T0's weights beside these
            parameter += 1e9 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    runtime = residual.Runtime("cpu", "fp32")
    original = residual.Known(t0, partition, images, None, runtime)
    found = residual.recovery(residual.Known(t, partition, images, None, runtime, original))
    assert found["bytes"] is found["bits"] is None and found["dep"] < original.accuracy("test")["dep"]
    answers = {"answers": {"pre": 90.0, "dep": 1.0}}
    record = {"measures": {**answers, "recovery": found}, "rho": {"probe": {"rho": 0.5}},
              "settings": {"partition": "1"}, "reference": {"original": answers, "retrained": []}}
    assert methods.rows_of({"mine": [record]})[0]["mine"]["bytes"] is None
    methods.plot({"mine": [record]}, {}, tmp_path / "m.png")


def test_a_probe_of_few_images_a_class_holds_out_one_of_each():
    x, y = np.eye(10).repeat(2, 0) * 4, np.arange(10).repeat(2)
    assert measures.probe(x, y).score(x, y) == 1


def test_where_nothing_comes_back_the_attackers_rate_keeps_the_rest(networks, sets, monkeypatch):
    """At a rate of 1e4 the network names one class for all images."""
    partition, images = sets
    network = load_network(str(networks / "retrained_0/retrained.pt"))[0]
    with torch.no_grad():
        network[-1].fc.bias[partition.deposit_classes] = -1000.0
    known = residual.Known(network, partition, images, None, residual.Runtime("cpu", "fp32"))
    monkeypatch.setattr(residual.Known, "opened", network)
    monkeypatch.setattr(residual, "RATES", (1e4, 1e-6))
    monkeypatch.setattr(residual, "KEPT_STEPS", (2,))
    found = residual.preserved_only(known)
    assert found["dep"] == 0 and found["lr"] == 1e-6


def test_files_that_do_not_fit_are_told_in_one_line(networks, tmp_path):
    flags = ["--original", networks / "original/original.pt", "--data_dir", networks / "images", "--device", "cpu"]
    torch.save(build_network("resnet20", 4, 16).state_dict(), tmp_path / "other.pt")
    assert "does not fit resnet8" in (line := fail("analysis/residual.py", "--networks", tmp_path / "other.pt", *flags))
    assert line.endswith(": it would fit resnet20")  # there is no --arch here
    assert "does not exist" in fail("analysis/residual.py", "--networks", tmp_path / "none.pt", *flags)
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", networks / "images", "--deposit_classes", "ant",
            "--out", tmp_path / "partition.json")
    assert "different deposit classes" in fail(
        "analysis/residual.py", "--networks", networks / "original/original.pt", "--partition",
        tmp_path / "partition.json", "--retrained", networks / "retrained_0/retrained.pt", *flags)
    assert "other classes than are measured" in fail(
        "analysis/residual.py", "--networks", networks / "lirf/seed0/target.pt", "--partition",
        tmp_path / "partition.json", *flags)
    retrained = networks / "retrained_0/retrained.pt"
    assert "other classes than are measured" in fail("analysis/residual.py", "--networks", retrained, "--partition",
                                                     tmp_path / "partition.json", *flags)
    assert "there is no draw" in fail("analysis/methods.py", "--runs", tmp_path)


def test_images_set_aside_are_none_of_those_fitted_on(sets):
    _, sets = sets
    fitted, every, set_aside = ({image.numpy().tobytes() for image in sets[name].images}
                               for name in ("train", "all", "set_aside"))
    assert len(fitted) == 64 and len(set_aside) == 16 and fitted <= every and not every & set_aside
    assert set(sets["test_deposit"].labels.tolist()) == set(sets["deposit"].labels.tolist()) == {1, 3}
    tested, relearned = ({image.numpy().tobytes() for image in sets[name].images} for name in ("test", "test_deposit"))
    assert len(relearned) == 16 and relearned <= tested and not tested & (every | set_aside)
    assert set(sets["preserved"].labels.tolist()) == {0, 2}
