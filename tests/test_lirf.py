"""The deposit's method: what is frozen, what each term's gradient reaches, the sum of the terms, the random labels, the
presets."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY

import train_deposit
from datasets import ImageSet
from models import losses
from models.checkpoints import load_network
from models.lirf import LIRF, TERMS, Term, spread_on
from utils.cli import make_parser
from utils.optim import make_optimizer, take_step
from utils.runtime import Runtime


@pytest.fixture
def make(chain):
    """A function: flags -> a fresh LIRF in train mode on the chain's original, whose deposit classes are 1 and 2."""

    def made(*flags):
        args = train_deposit.get_args_parser().parse_args([*TINY, "--split_at", "2", *flags])
        original, partition = load_network(str(chain[0] / "original.pt"))
        # A KD over a single class would be 0, whatever the logits are.
        partition = dataclasses.replace(partition, deposit_classes=[1, 2], preserved_classes=[0, 3])
        return LIRF(original, partition, args).train()

    return made


X, Y, Y_R = torch.randn(6, 3, 16, 16), torch.tensor([1, 2] * 3), torch.tensor([0, 3] * 3)


def step(lirf, lr=0.05):
    optimizer = make_optimizer([{"params": list(part.parameters())} for part in lirf.trained().values()], lirf.args)
    take_step(optimizer, lirf.losses(lirf(X), Y, Y_R)["loss"], lr, 0.0)


@pytest.mark.parametrize("bn_stats,moving", [("frozen", []), ("updated", ["target", "deposit"]),
                                             ("deposit", ["deposit"])])
def test_frozen_parts_stay_in_eval_have_no_gradient_and_do_not_change(make, bn_stats, moving):
    lirf = make("--bn_stats", bn_stats)
    frozen = {"original_lower": lirf.original_lower, "upper": lirf.upper}
    before = {name: {k: t.clone() for k, t in part.state_dict().items()} for name, part in lirf.named_children()}
    step(lirf)
    for name, part in frozen.items():
        assert all(not m.training for m in part.modules()) and all(p.grad is None for p in part.parameters())
        assert all(torch.equal(t, before[name][k]) for k, t in part.state_dict().items())
    for name, part in lirf.trained().items():
        moved = {k for k, t in part.state_dict().items() if not torch.equal(t, before[name][k])}
        assert {"stem.conv1.weight", "layer2.0.bn2.weight"} <= moved
        assert ("stem.bn1.running_mean" in moved) == (name in moving) == part.stem.bn1.training
    lirf.eval()
    assert not any(m.training for m in lirf.modules())


def test_blocks_that_are_not_trained_stay_those_of_t0(make):
    lirf = make("--trained_blocks", "1")
    before = {name: t.clone() for name, t in lirf.target.state_dict().items()}
    step(lirf)
    moved = {name for name, t in lirf.target.state_dict().items() if not torch.equal(t, before[name])}
    assert {name.split(".")[0] for name in moved} == {"layer2"} and "layer2.0.bn1.running_mean" in moved
    assert lirf.deposit.stem.conv1.weight.grad.abs().sum() > 0  # T_r is trained whole


def test_at_the_start_t_is_the_original_and_t_r_is_pruned(make):
    lirf = make("--bn_stats", "frozen")
    out = lirf(X)
    assert torch.equal(out.f_0, out.f_t) and torch.equal(out.z_0, out.z_t) and out.f_r.shape == out.f_t.shape
    assert sum(p.numel() for p in lirf.deposit.parameters()) < 0.6 * sum(p.numel() for p in lirf.target.parameters())
    assert not any(t.requires_grad for t in (out.f_0, out.z_0)) and out.z_r.requires_grad


def test_spread_on_is_one_before_training_and_what_the_rule_says_after(make):
    lirf, images = make("--bn_stats", "frozen"), torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    d_r = ImageSet(images, Y, [0.5] * 3, [0.25] * 3, flip=True)
    assert spread_on(lirf, d_r, Runtime("cpu", "fp32")) == pytest.approx(1.0)
    with torch.no_grad():
        for parameter in lirf.upper.head.fc.parameters():
            parameter.mul_(2)  # of both networks: the ratio stays
        assert spread_on(lirf, d_r, Runtime("cpu", "fp32")) == pytest.approx(1.0)


def test_the_loss_is_the_signed_and_weighted_sum_of_its_terms(make):
    weights = {name: float(i + 2) for i, name in enumerate(TERMS)}
    lirf = make(*[word for name, w in weights.items() for word in (f"--lambda_{name}", str(w))])
    step(lirf)
    terms = lirf.losses(lirf(X, X), Y, Y_R)
    signed = {name: w * (-1 if name == "at" else 1) for name, w in weights.items()}
    assert terms.keys() == {"loss", *(f"l_{name}" for name in TERMS)} and all(terms.values())
    assert terms["loss"].item() == pytest.approx(sum(w * terms[f"l_{n}"].item() for n, w in signed.items()), rel=1e-5)


@pytest.mark.parametrize("name,reached", [("kr", "target"), ("at", "target"), ("kp", "target"), ("pt", "deposit"),
                                          ("re", "deposit"), ("ft", "deposit"), ("mt", "target"), ("ms", "target")])
def test_a_terms_gradient_reaches_its_own_network_alone(make, name, reached):
    lirf = make()
    step(lirf)  # at the start L_at and L_kp are 0
    lirf.zero_grad()
    lirf.losses(lirf(X, X), Y, Y_R)[f"l_{name}"].backward()
    for other, part in lirf.trained().items():
        gradient = part.stem.conv1.weight.grad  # both branches share a pass, so it may be zero instead of none
        assert (gradient is not None and gradient.abs().sum() > 0) == (other == reached)


def test_attached_l_re_reaches_the_target_too(make):
    lirf = make("--re_target", "attached")
    lirf.losses(lirf(X), Y, Y_R)["l_re"].backward()
    assert all(part.stem.conv1.weight.grad.abs().sum() > 0 for part in lirf.trained().values())


def test_minimising_the_loss_raises_the_attention_difference(make):
    lirf = make("--lambda_kr", "0", "--lambda_kp", "0", "--lambda_at", "100")
    step(lirf)
    before = lirf.losses(lirf(X), Y, Y_R)["l_at"]
    step(lirf)
    assert lirf.losses(lirf(X), Y, Y_R)["l_at"] > before > 0


@pytest.mark.parametrize("classes", ["deposit", "all"])
def test_l_pt_transfers_the_columns_that_its_flag_names(make, classes):
    lirf = make("--pt_classes", classes)
    out = lirf(X)
    columns = torch.tensor([1, 2]) if classes == "deposit" else torch.arange(4)
    expected = losses.distillation(out.z_r[:, columns], out.z_0[:, columns], 4.0)
    assert lirf.losses(out, Y, Y_R)["l_pt"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("flag,classes", [("wrong", {0, 2, 3}), ("any", {0, 1, 2, 3}), ("preserved", {0, 3})])
def test_random_labels_come_from_the_classes_that_the_flag_names(make, flag, classes):
    y, lirf = torch.ones(600, dtype=torch.int64), make("--random_label", flag)
    assert set(lirf.random_labels(y, torch.Generator().manual_seed(0)).tolist()) == classes


def test_every_term_has_a_flag_with_its_default_and_is_logged(chain):
    args = train_deposit.get_args_parser().parse_args([])
    assert {name: getattr(args, f"lambda_{name}") for name in TERMS} == {n: t.weight for n, t in TERMS.items()}
    head, *epochs = [json.loads(line) for line in (chain[0] / "deposit_log.jsonl").read_text().splitlines()]
    assert all({"loss", *(f"l_{name}" for name in TERMS)} <= record.keys() for record in epochs)
    assert all(f"lambda_{name}" in head["settings"] for name in TERMS)


def test_a_loss_is_added_in_one_place(make, monkeypatch):
    toy = Term(3.0, "a toy", lambda lirf, out, y, y_r: out.z_t.square().mean())
    monkeypatch.setitem(TERMS, "toy", toy)
    lirf = make()
    terms = lirf.losses(lirf(X), Y, Y_R)
    others = sum(t.sign * t.weight * terms[f"l_{name}"] for name, t in TERMS.items() if name != "toy")
    assert terms["loss"].item() == pytest.approx((others + 3 * terms["l_toy"]).item(), rel=1e-5)
    assert make("--lambda_toy", "5").args.lambda_toy == 5


# presets

def chosen(*flags):
    return vars(train_deposit.get_args_parser().parse_args(flags))


def test_a_preset_sets_what_it_says_and_nothing_else():
    default = chosen()
    assert chosen("--preset", "paper") == default
    for name, values in train_deposit.PRESETS.items():
        assert chosen("--preset", name) == {**default, **values, "preset": name}
    assert chosen("--preset", "authors")["prune_ratio"] == 0 and chosen("--preset", "ours")["lambda_ft"] > 0


@pytest.mark.parametrize("flags", [["--preset", "authors", "--prune_ratio", "0.25", "--lambda_at", "100"],
                                   ["--lambda_at", "100", "--prune_ratio", "0.25", "--preset", "authors"]])
def test_a_flag_on_the_command_line_wins_over_the_preset(flags):
    args = chosen(*flags)
    assert args["prune_ratio"] == 0.25 and args["lambda_at"] == 100  # the latter is the default, and asked for
    assert args["random_label"] == "any"


def test_a_script_without_presets_has_none():
    assert make_parser("").presets == {}
