"""The deposit's method: what is frozen, what each term's gradient reaches, the sum of the terms, the random labels, the
presets."""

import dataclasses

import pytest
import torch
from conftest import TINY

import train_deposit
from models import losses
from models.checkpoints import load_network
from models.lirf import LIRF, TERMS, Term
from utils.cli import make_parser
from utils.errors import UserError
from utils.files import read_log
from utils.optim import make_optimizer, take_step


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
    with pytest.raises(UserError, match="more than the 2 of the lower part"):
        make("--trained_blocks", "3")


def test_at_the_start_t_is_the_original_and_t_r_is_pruned(make):
    lirf = make("--bn_stats", "frozen")
    out = lirf(X)
    assert torch.equal(out.f_0, out.f_t) and torch.equal(out.z_0, out.z_t) and out.f_r.shape == out.f_t.shape
    assert sum(p.numel() for p in lirf.deposit.parameters()) < 0.6 * sum(p.numel() for p in lirf.target.parameters())
    assert not any(t.requires_grad for t in (out.f_0, out.z_0)) and out.z_r.requires_grad


def test_the_loss_is_the_signed_and_weighted_sum_of_its_terms(make):
    weights = {name: float(i + 2) for i, name in enumerate(TERMS)}
    lirf = make(*[word for name, w in weights.items() for word in (f"--lambda_{name}", str(w))])
    step(lirf)
    terms = lirf.losses(lirf(X, X), Y, Y_R)
    signed = {name: w * (-1 if name == "at" else 1) for name, w in weights.items()}
    assert terms.keys() == {"loss", *(f"l_{name}" for name in TERMS)} and all(terms.values())
    assert terms["loss"].item() == pytest.approx(sum(w * terms[f"l_{n}"].item() for n, w in signed.items()), rel=1e-5)


@pytest.mark.parametrize("name,reached,flags", [
    ("kr", "target", []), ("at", "target", []), ("kp", "target", []), ("pt", "deposit", []), ("re", "deposit", []),
    ("ft", "deposit", []), ("mt", "target", []), ("ll", "target", []), ("ur", "target", []),
    ("re", "target deposit", ["--re_target", "attached"])])
def test_a_terms_gradient_reaches_its_own_network_alone(make, name, reached, flags):
    lirf = make(*flags)
    step(lirf)  # at the start L_at and L_kp are 0
    lirf.zero_grad()
    lirf.losses(lirf(X, X), Y, Y_R)[f"l_{name}"].backward()
    for other, part in lirf.trained().items():
        gradient = part.stem.conv1.weight.grad  # both branches share a pass, so it may be zero instead of none
        assert (gradient is not None and gradient.abs().sum() > 0) == (other in reached.split())


@pytest.mark.parametrize("term,network,columns,flags", [
    ("kp", "z_t", [0, 3], []), ("pt", "z_r", [1, 2], ["--pt_classes", "deposit"]),
    ("pt", "z_r", [0, 1, 2, 3], ["--pt_classes", "all"])])
def test_the_distillations_are_of_the_columns_of_their_classes(make, term, network, columns, flags):
    lirf = make(*flags)
    step(lirf)  # at the start L_kp is 0
    out = lirf(X)
    expected = losses.distillation(getattr(out, network)[:, columns], out.z_0[:, columns], 4.0)
    assert lirf.losses(out, Y, Y_R)[f"l_{term}"].item() == pytest.approx(expected.item()) != 0


@pytest.mark.parametrize("flag,classes", [("wrong", {0, 2, 3}), ("any", {0, 1, 2, 3}), ("preserved", {0, 3})])
def test_random_labels_come_from_the_classes_that_the_flag_names(make, flag, classes):
    y, lirf = torch.ones(600, dtype=torch.int64), make("--random_label", flag)
    assert set(lirf.random_labels(y, torch.Generator().manual_seed(0)).tolist()) == classes


def test_every_term_has_a_flag_with_its_default_and_is_logged(chain):
    args = chosen()
    assert {name: args[f"lambda_{name}"] for name in TERMS} == {name: term.weight for name, term in TERMS.items()}
    head, *epochs = read_log(chain[0] / "deposit_log.jsonl")
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


def test_a_flag_on_the_command_line_wins_over_the_preset_wherever_it_stands():
    preset, flags = ["--preset", "authors"], ["--prune_ratio", "0.25", "--lambda_at", "100"]
    for args in (chosen(*preset, *flags), chosen(*flags, *preset)):
        assert args["prune_ratio"] == 0.25 and args["lambda_at"] == 100  # the latter is the default, and asked for
        assert args["random_label"] == "any"
    assert make_parser("").presets == {}  # of a script without any
