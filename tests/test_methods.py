"""Other forgetting methods: their losses by hand, the constraint, the command line, the tables, the script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import partition_data
import train_scratch
from analysis import forget, methods
from models.architectures import build_network, split_network
from models.checkpoints import load_network
from utils.cli import run
from utils.errors import UserError

CLASSES = ["ant", "bee", "cow", "dog"]
PRESERVED, DEPOSITED = torch.tensor([0, 2]), torch.tensor([1, 3])
TINY = ["--batch_size", "16", "--device", "cpu", "--precision", "fp32"]


def call(module, *flags):
    run(module.main, module.get_args_parser(), [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(T0's file, the folder of its images) of a ResNet-8 on four classes that differ in colour; bee, dog deposited."""
    root, rng = tmp_path_factory.mktemp("methods"), np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        for split, count in (("train", 24), ("test", 8)):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.array([(c & 1) * 160, (c >> 1) * 160, c * 30]) + 40 + rng.normal(0, 25, (16, 16, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
    save, data = root / "original", root / "images"
    call(partition_data, "--dataset", "folder", "--data_dir", data, "--deposit_classes", "bee,dog", "--val_fraction",
         "0.25", "--out", save / "partition.json")
    call(train_scratch, "--save_path", save, "--data_dir", data, "--arch", "resnet8", "--epochs", "4", *TINY)
    return save / "original.pt", data


def flags_of(original, out, *more):
    return ["--save_path", out, "--original", original[0], "--data_dir", original[1], *TINY, *more]


def made_up(n=6):
    """(net, batch) as a loss gets them, with logits of four classes drawn at random."""
    torch.manual_seed(0)
    y = DEPOSITED[torch.arange(n) % 2]
    batch = SimpleNamespace(x=torch.rand(n, 3, 4, 4), y=y, h=torch.randn(n, 5), z=torch.randn(n, 4),
                            z_0=torch.randn(n, 4), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(preserved=PRESERVED, deposited=DEPOSITED, args=SimpleNamespace(epsilon=0.1, lambda_2=0.5),
                           partition=SimpleNamespace(mean=[0.5] * 3, std=[0.25] * 3)), batch


def test_neg_grad_is_minus_the_cross_entropy():
    net, b = made_up()
    by_hand = b.z.softmax(1)[torch.arange(6), b.y].log().mean()
    assert forget.neg_grad(net, b)["ce"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_random_labels_are_preserved_classes_drawn_anew():
    net, b = made_up(400)
    b.z = torch.zeros(400, 4)
    b.z[:, PRESERVED] = 50.0  # all the mass on preserved classes: the loss is ln 2 whichever is drawn
    assert forget.random_labels(net, b)["ce"].item() == pytest.approx(np.log(2), rel=1e-4)
    b.z = torch.randn(400, 4)
    assert forget.random_labels(net, b)["ce"] != forget.random_labels(net, b)["ce"]


def test_delete_masks_all_deposit_columns_and_is_l_kp_minus_log_m():
    net, b = made_up()
    q = torch.zeros(6, 4)
    q[:, PRESERVED] = b.z_0[:, PRESERVED].softmax(1)
    log_p = b.z.log_softmax(1)
    loss = forget.delete(net, b)["kl"]
    by_hand = (q * (q.clamp_min(1e-30).log() - log_p)).sum(1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    l_kp = F.kl_div(b.z[:, PRESERVED].log_softmax(1), b.z_0[:, PRESERVED].softmax(1), reduction="batchmean")
    mass = log_p.exp()[:, PRESERVED].sum(1)
    assert loss.item() == pytest.approx((l_kp - mass.log().mean()).item(), rel=1e-5)
    b.z_0[:, DEPOSITED] += 5.0  # what T0 says of any deposit class, the image's own or another, does not count
    assert forget.delete(net, b)["kl"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_bad_teacher_sums_over_classes_and_means_over_images():
    net, b = made_up()
    net.teacher = lambda x: b.z_0
    p, q = b.z.log_softmax(1), b.z_0.softmax(1)
    by_hand = (q * (q.log() - p)).sum(1).mean()
    assert forget.bad_teacher(net, b)["kl"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_boundary_shrink_names_a_preserved_class_also_where_a_deposit_class_is_nearer():
    net, b = made_up()
    weight = torch.zeros(4, 48)
    weight[2] = -0.01
    net.original = lambda x: x.flatten(1) @ weight.T + torch.tensor([0.0, 9.0, 1.0, 9.0])  # 1 and 3 always win
    nearest = forget.best_preserved(net.original(b.x), PRESERVED)
    assert forget.boundary_shrink(net, b)["ce"].item() == pytest.approx(F.cross_entropy(b.z, nearest).item(), rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_attack_climbs_or_descends_within_its_radius_and_the_pixels(sign):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    pixels, y = SimpleNamespace(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1]), torch.tensor([0, 1, 2])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pixels.mean, pixels.std))
    shown = torch.rand(3, 3, 4, 4)
    x = (shown - mean) / std
    moved = forget.attack(network, x, y, 0.03, 3, pixels, sign)
    change = (moved * std + mean) - shown
    assert change.abs().max() <= 0.03 + 1e-5 and change.abs().max() > 0.02
    assert (moved * std + mean).min() >= -1e-6 and (moved * std + mean).max() <= 1 + 1e-6
    assert sign * (F.cross_entropy(network(moved), y) - F.cross_entropy(network(x), y)) > 0


def test_same_class_cosine_by_hand():
    features = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, -3], [5, 5]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert forget.same_class_cosine(features, labels).item() == pytest.approx(0.0)  # cosines 1 and -1
    assert forget.same_class_cosine(features[:2], labels[:2]).item() == pytest.approx(1.0)
    assert forget.same_class_cosine(features[3:], labels[3:]).item() == 0  # no pair


def test_spotter_is_delete_on_both_views_and_the_cosine():
    net, b = made_up()
    z_a = torch.randn(6, 4)
    b.x_a, net.target, net.original = b.x, lambda x: z_a, lambda x: b.z_0
    terms = forget.spotter(net, b)
    view_a = SimpleNamespace(z=z_a, z_0=b.z_0)
    assert terms["kl"].item() == pytest.approx(0.7 * forget.delete(net, b)["kl"].item())
    assert terms["kl_a"].item() == pytest.approx(0.3 * forget.delete(net, view_a)["kl"].item(), rel=1e-5)
    assert terms["cosine"].item() == pytest.approx(0.5 * forget.same_class_cosine(b.h, b.y).item())


def test_the_edits_of_the_head():
    torch.manual_seed(0)
    features, deposited = torch.randn(50, 8), DEPOSITED
    for edit in (forget.logit_mask, forget.pour_p):
        head = torch.nn.Linear(8, 4).requires_grad_(False)
        rows, before = head.weight[deposited].clone(), head(features)[:, PRESERVED]
        edit(head, deposited)
        assert (torch.isin(head(features + 30 * rows.sum(0)).argmax(1), PRESERVED)).all()  # though drawn towards D
        if edit is forget.logit_mask:  # a row of zeros alone would win where the others are negative
            assert torch.equal(head(features)[:, PRESERVED], before)
        else:
            assert torch.allclose(head.weight @ rows.T, torch.zeros(4, 2), atol=1e-6)


def test_methods_see_no_image_but_those_of_d(original, tmp_path):
    """Of what is trained on: the images that are loaded to be measured on are of other splits."""
    asked, load = [], forget.load_images

    def noted(partition, data_dir, split, classes, **more):
        asked.append((split, tuple(classes)))
        return load(partition, data_dir, split, classes, **more)

    with mock.patch.object(forget, "load_images", noted):
        call(forget, "--method", "spotter", *flags_of(original, tmp_path, "--epochs", "1"))
    assert {classes for split, classes in asked if split == "train"} == {(1, 3)}
    assert {split for split, _ in asked} == {"train", "test"}


@pytest.mark.parametrize("name", list(forget.METHODS))
def test_a_run_of_every_method(original, tmp_path, name):
    trained = forget.METHODS[name].loss is not None
    call(forget, "--method", name, *flags_of(original, tmp_path, *(["--epochs", "1"] if trained else [])))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    cost = metrics["forget"]
    assert cost["method"] == name and (cost["trained_parameters"] > 0) == trained == (cost["images"] == 36)
    assert metrics["recover"]["difference"]["counts"]["total"] == [8] * 4
    target, partition = load_network(str(tmp_path / "target.pt"))
    recover, _ = load_network(str(tmp_path / "recover.pt"))
    before, _ = load_network(str(original[0]))
    assert partition.deposit_classes == [1, 3]
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():  # the difference covers the head, too, masked columns included
        gap = (recover(x) - before(x)).abs().max()
        assert gap < 0.2 and gap < 0.5 * (target(x) - before(x)).abs().max() + 0.05
    records = [json.loads(line) for line in (tmp_path / "forget_log.jsonl").read_text().splitlines()]
    assert records[0]["settings"]["method"] == name and len(records) == 1 + trained


def test_the_lower_scope_leaves_the_upper_part_and_frozen_statistics_as_they_are(original, tmp_path):
    call(forget, "--method", "delete", *flags_of(original, tmp_path, "--epochs", "1", "--scope", "lower", "--split_at",
                                                 "2", "--bn_stats", "frozen"))
    target, before = (load_network(str(file))[0] for file in (tmp_path / "target.pt", original[0]))
    (lower, upper), (lower_0, upper_0) = (split_network(network, 2) for network in (target, before))
    assert all(torch.equal(a, b) for a, b in zip(upper.state_dict().values(), upper_0.state_dict().values()))
    for name, tensor in lower.state_dict().items():
        assert torch.equal(tensor, lower_0.state_dict()[name]) == ("running" in name or "tracked" in name)


def test_a_stopped_run_goes_on_to_the_same_bits(original, tmp_path):
    flags = ["--epochs", "2", "--bn_stats", "updated", "--method", "random_labels"]
    call(forget, *flags_of(original, tmp_path / "whole", *flags))
    end_epoch = forget.TrainingRun.end_epoch

    def stop_after_one(training, epoch, figures):
        end_epoch(training, epoch, figures)
        raise KeyboardInterrupt(2)

    with mock.patch.object(forget.TrainingRun, "end_epoch", stop_after_one), pytest.raises(SystemExit):
        call(forget, *flags_of(original, tmp_path / "stopped", *flags))
    call(forget, *flags_of(original, tmp_path / "stopped", *flags))
    states = [load_network(str(tmp_path / name / "target.pt"))[0].state_dict() for name in ("whole", "stopped")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_neg_grad_stops_at_the_first_look_that_names_few_of_d(original, tmp_path):
    with mock.patch.object(forget, "CHECK_EVERY", 1):
        call(forget, "--method", "neg_grad", *flags_of(original, tmp_path, "--epochs", "30", "--lr", "0.05"))
    assert json.loads((tmp_path / "metrics.json").read_text())["forget"]["passes"] < 30


def test_a_network_of_ones_own_enters_the_tables_by_one_command(original, tmp_path):
    """In another repository's layout, as the page's snippet does; T0's own weights know all that T0 knows."""
    theirs = {f"module.{name.replace('stem.', '').replace('head.fc', 'linear')}": tensor
              for name, tensor in load_network(str(original[0]))[0].state_dict().items()}
    torch.save({"state_dict": theirs}, tmp_path / "mine.pth")
    call(forget, "--file", tmp_path / "mine.pth", *flags_of(original, tmp_path / "mine" / "seed0"))
    metrics = json.loads((tmp_path / "mine" / "seed0" / "metrics.json").read_text())
    assert metrics["target"]["counts"] == metrics["original"]["counts"]
    assert metrics["forget"] == {"method": "file"}
    call(forget, "--file", original[0], *flags_of(original, tmp_path / "ours" / "seed0"))
    rows = methods.method_rows([str(tmp_path / name / "seed0" / "metrics.json") for name in ("mine", "ours")])
    assert list(rows) == ["T0", "mine", "ours"]
    assert rows["mine"]["Pre Acc"] == rows["T0"]["Pre Acc"] and rows["mine"]["seconds"] is None


def test_a_file_that_does_not_fit_and_no_method_are_told(original, tmp_path, capsys):
    other = build_network("resnet20", 4, 16)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    for flags, word in ((["--file", tmp_path / "other.pt"], "--file"), ([], "--method"),
                        (["--file", tmp_path / "none.pt"], "--file")):
        with pytest.raises(SystemExit):
            call(forget, *flags, *flags_of(original, tmp_path / "out"))
        assert word in capsys.readouterr().err
    assert not (tmp_path / "out" / "target.pt").exists()


def test_the_cell_of_the_highest_h_mean_on_held_out_images_is_chosen(tmp_path):
    cells = {"lr1_frozen": (91.0, 0.4), "lr1_updated": (92.0, 0.3), "lr2_frozen": (92.0, 0.1), "lr2_updated": (50, 0.0)}
    for cell, (h_mean, kl) in cells.items():
        (tmp_path / cell).mkdir()
        (tmp_path / cell / "metrics_val.json").write_text(json.dumps({"target": {"h_mean": h_mean}}))
        drift = {"kl": kl, "held_out_dep": 60.0 if h_mean == 50 else 5.0}
        (tmp_path / cell / "residual.json").write_text(json.dumps({"measures": {"drift": drift}}))
    chosen, rows = methods.choose(str(tmp_path))
    assert chosen == "lr1_updated"  # the first of equals
    assert {cell: row["chosen by"] for cell, row in rows.items()} == {
        "lr1_frozen": "-", "lr1_updated": "A", "lr2_frozen": "B", "lr2_updated": "-"}
    (tmp_path / "lr1_frozen" / "metrics.json").write_text(json.dumps({"target": {"h_mean": 99.0}}))
    assert methods.choose(str(tmp_path))[0] == "lr1_updated"  # the test set's figures are not looked at
    with pytest.raises(UserError, match="8_methods"):
        methods.choose(str(tmp_path / "lr1_frozen"))


def test_the_script_tries_on_held_out_images_freezes_and_then_runs(tmp_path):
    """With a stand-in for python that notes its words."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text(f"""#!/bin/bash
    if [ "$1" = - ]; then exec {sys.executable} "$@"; fi
    printf '%s\\n' "$*" >> {tmp_path}/words
    case "$*" in *--choose*delete) echo lr1e-3_frozen ;; *--choose*lirf) echo kp5_updated ;; esac
    """)
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path), "SAVE": "S",
           "METHODS": "delete lirf", "OWN": "mine=own_%s.pt"}
    done = subprocess.run(["bash", ROOT / "scripts/8_methods.sh", "0", "1"], env=env, cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "words").read_text().splitlines()
    tried = [line for line in words if "--save_path S/tune/delete" in line]
    assert len(tried) == 6 and all("--eval_split val" in line and "--seed 0" in line for line in tried)
    frozen = [line for line in words if "--save_path S/delete" in line]
    assert len(frozen) == 4 and all("--lr 1e-3 --bn_stats frozen" in line and "test" in line for line in frozen)
    assert sum("--scope lower" in line for line in frozen) == 2
    assert sum("train_deposit.py --save_path S/lirf" in line and "--lambda_kp 5" in line for line in words) == 2
    partitions = [line for line in words if "partition_data.py" in line]
    assert all(("--val_fraction 0.1" in line) == ("S/tune/" in line) for line in partitions)
    assert any("--file own_1.pt" in line for line in words)
    measured = [line for line in words if "analysis.residual" in line and "--retrained" in line]
    assert len(measured) == 2 * 6 and all("S/retrained_1/" in line for line in measured)
    assert words[-1] == "-m analysis.methods --runs S"
