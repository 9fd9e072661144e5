"""Composition of lower and upper part, pruning, the recover network."""

import copy
import math

import pytest
import torch

from models import (ARCHITECTURES, MERGE_RULES, Calibration, RecoverNetwork, build_deposit_module, build_network, cost,
                    refit, split_network)
from models.deposit import shape_like, stream_writers
from models.recover import (EVIDENCE, branch, calibrated, concat, evidence, preserved_margin, released, scaled,
                            spread_ratio, total)
from utils.errors import UserError

SPLITS = [(arch, n) for arch in ARCHITECTURES for n in range(1, len(build_network(arch, 3, 32)) - 1)]


def shaken(network, seed=0):
    """Random batch-norm statistics and affine weights, so that no layer is an identity by accident."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return network.eval()


@pytest.mark.parametrize("arch,split_at", SPLITS)
def test_lower_then_upper_is_the_uncut_network(arch, split_at):
    network = shaken(build_network(arch, 3, 32))
    lower, upper = split_network(network, split_at)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(upper(lower(x)), network(x))
    assert {*lower.state_dict(), *upper.state_dict()} == {*network.state_dict()}


@pytest.mark.parametrize("arch", ["resnet20", "resnet18"])
@pytest.mark.parametrize("split_at", [0, -1, 9])
def test_split_out_of_range_is_refused(arch, split_at):
    with pytest.raises(UserError, match="--split_at"):
        split_network(build_network(arch, 3, 32), split_at)


@pytest.mark.parametrize("arch,split_at", SPLITS)
def test_pruned_module_is_smaller_and_keeps_its_output_shape(arch, split_at):
    lower, upper = split_network(build_network(arch, 3, 32).eval(), split_at)
    module = build_deposit_module(lower, 0.5, 32)
    x = torch.randn(1, 3, 32, 32)
    assert module(x).shape == lower(x).shape
    assert upper(module(x)).shape == (1, 3)
    before, after = cost(lower, 32), cost(module, 32)
    assert all(after[unit] < before[unit] for unit in before)
    # stems and the layers that write the output stay whole: at split 1 that is all of the stream
    assert after["parameters"] <= 0.72 * before["parameters"]


def test_pruning_of_the_released_split_matches_the_known_figures():
    lower, _ = split_network(build_network("resnet18", 10, 32), 2)
    before, after = cost(lower, 32), cost(build_deposit_module(lower, 0.5, 32), 32)
    assert (before["parameters"], after["parameters"]) == (675_392, 282_784)
    assert (round(before["macs"] / 1e6), round(after["macs"] / 1e6)) == (288, 102)


def test_pruning_leaves_the_original_alone_and_the_module_trainable():
    lower, _ = split_network(build_network("resnet8", 3, 32).eval(), 2)
    before = copy.deepcopy(lower.state_dict())
    module = build_deposit_module(lower, 0.5, 32)
    assert all(torch.equal(before[name], tensor) for name, tensor in lower.state_dict().items())
    module(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in lower.parameters())


def test_unpruned_module_is_a_full_copy():
    lower, _ = split_network(shaken(build_network("resnet8", 3, 32)), 2)
    module = build_deposit_module(lower, 0.0, 32)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(module(x), lower(x))
    assert next(module.parameters()) is not next(lower.parameters())


@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "resnet50"])
def test_pruned_module_is_rebuilt_from_its_tensors(arch):
    lower, _ = split_network(shaken(build_network(arch, 3, 32)), 2)
    module = build_deposit_module(lower, 0.4, 32)
    empty, _ = split_network(build_network(arch, 3, 32).eval(), 2)
    rebuilt = shape_like(empty, module.state_dict(), "module")
    rebuilt.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(rebuilt.eval()(x), module(x))


def relative_error(module, lower, x):
    with torch.no_grad():
        return ((module.eval()(x) - lower.eval()(x)).square().sum() / lower(x).square().sum()).item()


def test_refit_makes_up_for_channels_that_repeat_others():
    lower, _ = split_network(shaken(build_network("resnet8", 3, 32)), 2)
    for block in (lower.layer1[0], lower.layer2[0]):  # the odd channels repeat even ones, faintly: pruning takes them
        block.conv1.weight.data[1::2] = block.conv1.weight.data[::2]
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(block.bn1, name).data
            tensor[1::2] = tensor[::2] * (0.1 if name in ("weight", "bias") else 1)
        block.conv2.weight.data[:, 1::2] *= 0.1
        block.conv1.weight.data[::2] *= 3
        block.bn1.running_mean[::2] *= 3
        block.bn1.running_var[::2] *= 9
    before = copy.deepcopy(lower.state_dict())
    module = build_deposit_module(lower.train(), 0.5, 32)
    generator = torch.Generator().manual_seed(0)
    x, unseen = (torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2))
    assert module.kept["layer2.0.bn1"].tolist() == list(range(0, 32, 2))
    pruned = relative_error(module, lower, unseen)
    module.train(), lower.train()
    refit(module, lower, [x[:4], x[4:]])
    assert module.training and lower.training
    assert all(torch.equal(before[name], tensor) for name, tensor in lower.state_dict().items())
    assert relative_error(module, lower, unseen) < 1e-3 * pruned


@pytest.mark.parametrize("arch,split_at", [("resnet20", 3), ("resnet18", 3), ("resnet50", 2)])
def test_refit_brings_a_pruned_module_nearer_on_images_it_has_not_seen(arch, split_at):
    lower, _ = split_network(shaken(build_network(arch, 3, 32)), split_at)
    module = build_deposit_module(lower, 0.4, 32)
    generator = torch.Generator().manual_seed(0)
    x, unseen = (torch.randn(16, 3, 32, 32, generator=generator) for _ in range(2))
    pruned = relative_error(module, lower, unseen)
    refit(module, lower, [x])
    assert relative_error(module, lower, unseen) < 0.8 * pruned


def test_wider_than_the_full_module_is_refused():
    lower, _ = split_network(build_network("resnet8", 3, 32), 1)
    tensors = lower.state_dict()
    tensors["stem.conv1.weight"] = torch.zeros(10_000, 3, 3, 3)
    with pytest.raises(UserError, match="stem.conv1"):
        shape_like(lower, tensors, "module")


@pytest.mark.parametrize("arch", ["resnet20", "resnet18"])
def test_concat_of_untrained_unpruned_parts_is_the_original(arch):
    network = shaken(build_network(arch, 5, 32))
    lower, upper = split_network(network, 2)
    recover = RecoverNetwork(copy.deepcopy(lower), build_deposit_module(lower, 0.0, 32), upper,
                             [0, 2, 4], [1, 3], "concat", Calibration(1.0, 0.0)).eval()
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(recover(x), network(x))


Z_T = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
Z_R = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
PRESERVED, DEPOSIT = torch.tensor([0, 3]), torch.tensor([1, 2])


@pytest.mark.parametrize("rule,expected", [
    (branch, [10, 20, 30, 40]),
    (concat, [1, 20, 30, 4]),
    (scaled, [2, 20, 30, 8]),
    (calibrated, [(2 * 1 + 10) / 2, 20, 30, (2 * 4 + 40) / 2]),
    (total, [11, 22, 33, 44]),
])
def test_merge_rules_by_hand(rule, expected):
    assert rule(Z_T, Z_R, PRESERVED, DEPOSIT, Calibration(2.0, 0.5)).tolist() == [expected]


def test_evidence_by_hand():
    # T's margin: ln(e^1 + e^4) - ln(e^2 + e^3), less m = 0.5
    verdict = EVIDENCE * (math.log((math.e + math.e**4) / (math.e**2 + math.e**3)) - 0.5)
    expected = [6 + verdict, 20, 30, 24 + verdict]
    merged = evidence(Z_T, Z_R, PRESERVED, DEPOSIT, Calibration(2.0, 0.5))
    assert merged[0].tolist() == pytest.approx(expected, rel=1e-6)
    # where T is as undecided as on D_r, it is `calibrated`
    margin = preserved_margin(Z_T, PRESERVED, DEPOSIT).item()
    assert torch.allclose(evidence(Z_T, Z_R, PRESERVED, DEPOSIT, Calibration(2.0, margin)),
                          calibrated(Z_T, Z_R, PRESERVED, DEPOSIT, Calibration(2.0, margin)))


def test_released_rule_chooses_by_the_label():
    z_t, z_r, labels = Z_T.repeat(2, 1), Z_R.repeat(2, 1), torch.tensor([0, 1])
    merged = released(z_t, z_r, PRESERVED, DEPOSIT, Calibration(2.0, 0.5), labels)
    assert merged.tolist() == [[11, 22, 33, 44], [1, 20, 30, 4]]
    assert "released" not in MERGE_RULES


def test_a_block_that_pruning_does_not_know_is_named():
    with pytest.raises(UserError, match="Identity is missing in _LAST_CONV"):
        stream_writers(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(torch.nn.Identity())))


def test_a_single_preserved_class_has_no_spread_and_keeps_its_scale():
    z = torch.randn(5, 4)
    assert spread_ratio(z, 2 * z, torch.tensor([1])) == 1.0


def test_spread_ratio_by_hand():
    z_0 = torch.tensor([[0.0, 9.0, 4.0], [5.0, 9.0, 1.0]])   # preserved columns 0 and 2: deviations 2 and 2
    z_t = torch.tensor([[7.0, -3.0, 8.0], [3.0, 0.0, 4.0]])  # deviations 0.5 and 0.5
    assert spread_ratio(z_0, z_t, torch.tensor([0, 2])) == pytest.approx(4.0)


def test_pretrained_weights_fill_all_but_the_head(monkeypatch):
    import torchvision
    weights = torchvision.models.resnet18().state_dict()
    enum = torchvision.models.get_model_weights("resnet18")
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **kwargs: dict(weights))
    network = build_network("resnet18", 7, 96, pretrained=True)
    assert torch.equal(network.stem.conv1.weight, weights["conv1.weight"])
    assert torch.equal(network.layer4[1].bn2.weight, weights["layer4.1.bn2.weight"])
    assert network.head.fc.weight.shape == (7, 512)
    for arch, size, word in (("resnet18", 32, "larger --image_size"), ("resnet20", 96, "no pretrained")):
        with pytest.raises(UserError, match=word):
            build_network(arch, 7, size, pretrained=True)

    def offline(self, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(enum, "get_state_dict", offline)
    with pytest.raises(UserError, match="could not be downloaded"):
        build_network("resnet18", 7, 96, pretrained=True)
