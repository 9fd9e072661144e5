"""Residual knowledge: each measure on features whose answer is known, on T0 and on R; the command lines."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import partition_data
import train_deposit
import train_scratch
from analysis import forget, methods, residual, robustness
from datasets import ImageSet
from models.architectures import build_network
from utils.cli import run
from utils.errors import UserError

CLASSES, DEPOSITED = ["ant", "bee", "cow", "dog"], np.array([1, 3])
RUNNING = ["--device", "cpu", "--precision", "fp32"]
FEATURE_MEASURES = {"probe": residual.linear_probe, "means": residual.class_means, "told": residual.told_from_rest,
                    "named": residual.named_among}


def made_up(seed, knows, n=60):
    """(x, y, x_test, y_test, deposited) of four classes, each a direction of its own: all of them, if the network knows
    all; else an image of D lies at random at one of the preserved classes."""
    rng = np.random.default_rng(seed)
    sets = []
    for _ in range(2):
        y = np.repeat(np.arange(4), n)
        place = y if knows else np.where(np.isin(y, DEPOSITED), 2 * rng.integers(0, 2, 4 * n), y)
        sets += [np.eye(4)[place] * 4 + rng.normal(0, 0.5, (4 * n, 4)), y]
    return *sets, DEPOSITED


def call(module, *flags):
    run(module.main, module.get_args_parser(), [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folder with images/, t0/original.pt, r0/ and r1/retrained.pt, lirf/ and delete/target.pt; bee, dog deposited."""
    root, rng = tmp_path_factory.mktemp("residual"), np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        for split, count in (("train", 20), ("test", 8)):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.array([(c & 1) * 160, (c >> 1) * 160, c * 30]) + 40 + rng.normal(0, 60, (16, 16, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
    data = ["--data_dir", root / "images"]
    call(partition_data, "--dataset", "folder", *data, "--deposit_classes", "bee,dog", "--out", root / "partition.json")
    training = [*data, "--partition", root / "partition.json", "--batch_size", "16", *RUNNING]
    for name, more in (("t0", []), ("r0", ["--subset", "retrain"]), ("r1", ["--subset", "retrain", "--seed", "1"])):
        call(train_scratch, "--save_path", root / name, "--arch", "resnet8", "--epochs", "4", *training, *more)
    made = [*training, "--original", root / "t0" / "original.pt"]
    call(forget, "--method", "delete", "--save_path", root / "delete" / "seed0", "--epochs", "1", *made)
    call(train_deposit, "--save_path", root / "lirf" / "seed0", "--epochs", "1", *made)
    return root


def examine(networks, network, *measures, retrained=("r0",)):
    """residual.json of a network; measures: all when there is none."""
    call(residual, "--network", network, "--original", networks / "t0" / "original.pt", "--retrained",
         *(networks / name / "retrained.pt" for name in retrained), "--data_dir", networks / "images",
         "--partition", networks / "partition.json", *(["--measures", *measures] if measures else []), *RUNNING)
    return json.loads((Path(network).parent / "residual.json").read_text())


@pytest.mark.parametrize("name", list(FEATURE_MEASURES))
def test_rho_is_one_for_what_knows_all_and_about_zero_between_two_that_do_not(name):
    def first(*data):
        return next(iter(FEATURE_MEASURES[name](*data).values()))

    a_0, a_r = first(*made_up(0, True)), [first(*made_up(seed, False)) for seed in (1, 2, 3)]
    scale = 1 if name == "told" else 100
    assert a_0 > 0.97 * scale
    assert residual.rho(a_0, a_r, a_0)["rho"] == 1
    found = residual.rho(first(*made_up(4, False)), a_r, a_0)
    assert abs(found["rho"]) < 0.2 and found["usable"]


@pytest.mark.parametrize("name", list(FEATURE_MEASURES))
def test_scaled_features_change_nothing(name):
    x, y, x_test, y_test, d = made_up(0, False)
    for scale in (1e-3, 1e3):
        assert FEATURE_MEASURES[name](x * scale, y, x_test * scale, y_test, d) == pytest.approx(
            FEATURE_MEASURES[name](x, y, x_test, y_test, d), abs=0.9)


def test_a_common_grave_and_a_hole_in_the_map_are_told_apart():
    """All of D in one place: told from the rest, not from each other. D spread over the others: the reverse is seen."""
    x, y, x_test, y_test, d = made_up(0, True)
    grave = [np.where(np.isin(labels, d)[:, None], np.array([0, 4, 0, 0]) + 0.1 * np.random.default_rng(i).normal(
        size=(len(labels), 4)), features) for i, (features, labels) in enumerate(((x, y), (x_test, y_test)))]
    assert residual.told_from_rest(grave[0], y, grave[1], y_test, d)["auc"] > 0.99
    assert 35 < residual.named_among(grave[0], y, grave[1], y_test, d)["acc"] < 65
    assert residual.named_among(x, y, x_test, y_test, np.array([1])) == {"acc": 100.0}


def test_the_probe_converges_and_dep_stands_beside_pre(recwarn):
    figures = residual.linear_probe(*made_up(0, False))
    assert list(figures) == ["dep", "pre"] and not [w for w in recwarn if "onverge" in str(w.message)]
    everything = np.full(240, 1)
    assert residual.split_accuracy(everything, np.repeat(np.arange(4), 60), DEPOSITED) == {"dep": 50.0, "pre": 0.0}


def test_prototypes_by_hand():
    """Rows of D gone: one image a class brings them back where the features part, at the scale of the other rows."""
    x, y, x_test, y_test, d = made_up(0, True)
    weight, bias = 100 * np.eye(4), np.array([0.0, -1000.0, 0.0, -1000.0])
    weight[d] = 0
    for k in (1, 5, 25):
        assert residual.prototype(x, y, x_test, y_test, d, weight, bias, k)["dep"] > 95
    for k in (1, 25):
        assert residual.prototype(*made_up(0, False), weight, bias, k)["dep"] < 75
    assert (weight[d] == 0).all() and bias[1] == -1000  # the network's own rows stay


def test_membership_is_half_where_members_are_like_others_and_one_where_they_are_known():
    rng, y = np.random.default_rng(0), np.repeat(np.arange(4), 200)
    z, z_test = (rng.normal(size=(800, 4)) for _ in range(2))
    assert abs(residual.membership(z, y, z_test, y, DEPOSITED)["auc"] - 0.5) < 0.06
    known = z.copy()
    known[np.arange(800), y] += 20
    figures = residual.membership(known, y, z_test, y, DEPOSITED)
    assert figures["auc"] > 0.99 and figures["tpr"] > 90
    known = z.copy()
    known[:, [0, 2]] += 20  # preserved classes' answers do not count by their own label
    assert residual.membership(np.where(np.isin(y, DEPOSITED)[:, None], z, known), y, z_test, y,
                               DEPOSITED)["auc"] == residual.membership(z, y, z_test, y, DEPOSITED)["auc"]


def test_class_membership_tells_other_answers_and_not_like_ones_by_images():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 4))
    shifted = z + np.array([3, 0, 0, 0])
    assert residual.class_membership(z, shifted, [0, 2])["acc"] > 80
    assert residual.class_membership(z, z + np.array([0, 9, 0, 9]), [0, 2])["acc"] <= 50  # deposit columns do not count


def test_rho_names_its_parts_and_says_when_it_cannot_be_used():
    assert residual.rho(80, [70], 90) == {"rho": 0.5, "A_T": 80, "A_R": 70, "A_0": 90, "spread_R": None, "usable": None}
    assert residual.rho(60, [69, 71], 90)["rho"] == -0.5
    assert not residual.rho(80, [50, 89], 90)["usable"] and residual.rho(80, [70], 70)["rho"] is None


def test_masked_rows_are_opened_and_others_left():
    head = torch.nn.Linear(3, 4)
    partition = SimpleNamespace(preserved_classes=[0, 2], deposit_classes=[1, 3])
    head.bias.data = torch.tensor([1.0, -1000.0, 2.0, 1.5])
    residual.open_rows(head, partition)
    assert head.bias.tolist() == [1.0, 1.0, 2.0, 1.5]


def test_tuning_leaves_the_network_and_frozen_statistics_as_they_are():
    model = build_network("resnet8", 4, 16).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = ImageSet(torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 4, [0.5] * 3,
                      [0.2] * 3, True)
    steps = list(residual.tune(model, images, 3, 0.1, residual.Runtime("cpu", "fp32"), 0))
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    after = steps[-1][1].state_dict()
    assert all(torch.equal(after[n], before[n]) == ("running" in n or "tracked" in n) for n in after if "bn" in n)


def test_t0_has_rho_one_and_r_itself_zero(networks):
    quick = ["probe", "probe_cut", "means", "means_cut", "told", "named", "prototype_5", "membership"]
    for name, value in (("t0/original.pt", 1.0), ("r0/retrained.pt", 0.0)):
        found = examine(networks, networks / name, *quick)
        assert set(found["rho"]) == set(quick)
        for figures in found["rho"].values():
            assert figures["rho"] in (None, value) and {"A_T", "A_R", "A_0"} <= figures.keys()
        assert any(figures["rho"] == value for figures in found["rho"].values())


def test_all_measures_of_a_network_and_the_tables(networks, monkeypatch):
    monkeypatch.setattr(residual, "RATES", (1e-2,))
    monkeypatch.setattr(residual, "DRAWS", 1)
    monkeypatch.setattr(residual, "RELEARN_CAP", 10)
    monkeypatch.setattr(residual, "SHOT_STEPS", 12)
    monkeypatch.setattr(residual, "KEPT_STEPS", 3)
    found = examine(networks, networks / "delete" / "seed0" / "target.pt", retrained=("r0", "r1"))
    assert set(found["measures"]) == {*residual.MEASURES, *residual.COMPARISONS}
    assert set(found["rho"]) == set(residual.MEASURES) - {"relearn"}
    for name, figures in found["measures"].items():  # Dep never without Pre
        assert "dep" not in figures or figures["pre"] is not None, name
    recovery = found["measures"]["recovery"]
    assert recovery["bytes"] > 1000 and recovery["bits"] in residual.BITS
    assert found["measures"]["class_membership"].keys() == {"acc", "between_retrained"}
    kept = sorted(networks.glob("*/*_residual_*.json"))
    assert [file.parent.name for file in kept] == ["r0", "r1", "t0"]  # not measured twice
    monkeypatch.setattr(residual, "linear_probe", None)
    assert examine(networks, networks / "delete" / "seed0" / "target.pt", retrained=("r0", "r1")) == found
    call(methods, "--runs", networks)
    table = (networks / "residual.md").read_text()
    assert "rho, probe" in table and "anamnesis index" in table and " / " in table
    assert (networks / "bytes_and_rho.png").stat().st_size > 5000
    assert "delete" in (networks / "methods.md").read_text()


def test_an_r_of_other_classes_is_refused(networks, tmp_path, capsys):
    call(partition_data, "--dataset", "folder", "--data_dir", networks / "images", "--deposit_classes", "ant",
         "--out", tmp_path / "partition.json")
    with pytest.raises(SystemExit):
        call(residual, "--network", networks / "t0" / "original.pt", "--original", networks / "t0" / "original.pt",
             "--retrained", networks / "r0" / "retrained.pt", "--partition", tmp_path / "partition.json",
             "--data_dir", networks / "images", *RUNNING)
    assert "retrained without other classes" in capsys.readouterr().err


def test_held_out_images_are_none_of_those_fitted_on(networks):
    _, partition = residual.read(str(networks / "t0" / "original.pt"), "original")
    sets = residual.image_sets(partition, SimpleNamespace(data_dir=str(networks / "images"), images_per_class=1000,
                                                          seed=0), "cpu")
    fitted, every, held_out = ({image.numpy().tobytes() for image in sets[name].images}
                               for name in ("train", "all", "held_out"))
    assert len(fitted) == 64 and len(held_out) == 16 and fitted <= every and not every & held_out
    assert set(sets["held_out_deposit"].labels.tolist()) == set(sets["deposit"].labels.tolist()) == {1, 3}


def test_withdrawal_after_further_training(networks, tmp_path):
    folder = networks / "lirf" / "seed0"
    call(robustness, "--runs", folder, "--data_dir", networks / "images", "--steps", "0", "2", "--out",
         tmp_path / "robustness.md", *RUNNING)
    found = json.loads((folder / "robustness.json").read_text())
    assert set(found["steps"]) == {"0", "2"} and {"concat", "difference", "target"} <= found["steps"]["0"].keys()
    assert set(found["alone"]) == {"T_r", "difference", "new"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert found["steps"]["0"]["difference"]["dep_acc"] == metrics["original"]["dep_acc"]
    assert "probe of T_r alone" in (tmp_path / "robustness.md").read_text()


def test_a_wrong_network_is_told(networks, capsys):
    with pytest.raises(SystemExit):
        call(residual, "--network", networks / "lirf" / "seed0" / "deposit.pt", "--original",
             networks / "t0" / "original.pt", "--data_dir", networks / "images", *RUNNING)
    assert "kind 'deposit'" in capsys.readouterr().err
    with pytest.raises(UserError):
        methods.main(SimpleNamespace(runs=None, choose=None))
