"""Cutting a network changes nothing; pruning makes the deposit module small and keeps its output; merge rules by hand;
what load_network gives."""

import copy
import io

import numpy as np
import pytest
import torch

from models.architectures import ARCHITECTURES, build_network, split_network
from models.checkpoints import load_network
from models.pruning import build_deposit_module, cost, narrow_like
from models.recover import MERGE_RULES, RecoverNetwork, concat, released, total, tr_alone
from utils.checkpoint import checksum
from utils.tables import WITHDRAWALS


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lower_then_upper_is_the_uncut_network(arch):
    network, x = shaken(build_network(arch, 3, 32)), torch.randn(2, 3, 32, 32)
    whole = network(x)
    for split_at in range(1, len(network) - 1):
        lower, upper = split_network(network, split_at)
        assert torch.equal(upper(lower(x)), whole)
        assert {*lower.state_dict(), *upper.state_dict()} == {*network.state_dict()}
    assert len(split_network(network)[1]) == 1  # by default the head alone


# pruning

PRUNED = ("cnn", "resnet8", "resnet18", "resnet50")  # the others have the same blocks


@pytest.mark.parametrize("arch", PRUNED)
def test_a_pruned_module_is_smaller_fits_the_upper_part_and_is_rebuilt_from_its_tensors(arch):
    network, other, x = shaken(build_network(arch, 3, 32)), build_network(arch, 3, 32).eval(), torch.randn(1, 3, 32, 32)
    for split_at in range(1, len(network) - 1):
        lower, upper = split_network(network, split_at)
        module = build_deposit_module(lower, 0.5, 32)
        assert module(x).shape == lower(x).shape and upper(module(x)).shape == (1, 3)
        before, after = cost(lower, 32), cost(module, 32)
        assert all(after[unit] < before[unit] for unit in before)
        # stems and the layers that write the output stay whole: at split 1 that is all of the stream
        assert after["parameters"] <= 0.72 * before["parameters"]
        rebuilt = narrow_like(copy.deepcopy(split_network(other, split_at)[0]), module.state_dict())
        rebuilt.load_state_dict(module.state_dict())
        assert torch.equal(rebuilt.eval()(x), module(x))


def test_pruning_of_the_released_split_matches_the_known_figures():
    lower, _ = split_network(build_network("resnet18", 10, 32), 2)
    before, after = cost(lower, 32), cost(build_deposit_module(lower, 0.5, 32), 32)
    assert (before["parameters"], after["parameters"]) == (675_392, 282_784)
    assert (round(before["macs"] / 1e6), round(after["macs"] / 1e6)) == (288, 102)


def test_pruning_depends_on_the_weights_alone_leaves_them_and_is_trainable():
    lower, _ = split_network(build_network("resnet8", 3, 32).eval(), 2)
    before, sums = copy.deepcopy(lower.state_dict()), set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        module = build_deposit_module(lower, 0.5, 32)
        sums.add(checksum({"tensors": module.state_dict()}))
    assert len(sums) == 1 and all(torch.equal(before[name], tensor) for name, tensor in lower.state_dict().items())
    module(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in lower.parameters())


# merge rules

Z_T = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
Z_R = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
DEPOSIT = torch.tensor([1, 2])


@pytest.mark.parametrize("rule,expected", [
    (tr_alone, [10, 20, 30, 40]), (concat, [1, 20, 30, 4]), (total, [11, 22, 33, 44]),
])
def test_merge_rules_by_hand(rule, expected):
    assert rule(Z_T, Z_R, DEPOSIT).tolist() == [expected] and rule in MERGE_RULES.values()


def test_the_released_rule_chooses_by_the_label_and_is_no_rule_of_a_network():
    merged = released(Z_T.repeat(2, 1), Z_R.repeat(2, 1), DEPOSIT, torch.tensor([0, 1]))
    assert merged.tolist() == [[11, 22, 33, 44], [1, 20, 30, 4]] and "released" not in MERGE_RULES
    assert WITHDRAWALS.keys() == {*MERGE_RULES, "difference", "released"}


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_recover_network_can_be_scripted_saved_and_loaded_without_this_code(chain):
    network, _ = load_network(str(chain[0] / "recover.pt"))
    assert isinstance(network, RecoverNetwork)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(torch.jit.load(file)(x), network(x))
