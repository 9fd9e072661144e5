"""The deposit module T_r: a structurally pruned copy of the original network's lower part."""

import copy

import torch
import torch_pruning as tp
from torch import nn

from utils.errors import UserError


def output_writers(lower, x):
    """The convolutions of `lower` that write its output, directly or through shortcuts; x: an image (1, 3, s, s).

    Their output channels must stay, so that the upper part still fits. They are those whose channels torch-pruning
    couples with the input of a layer put behind.
    """
    behind = nn.Conv2d(lower(x).shape[1], 1, 1)
    graph = tp.DependencyGraph().build_dependency(nn.Sequential(lower, behind), x)
    return [layer for layer in lower.modules() if isinstance(layer, nn.Conv2d) and any(
        dependency.target.module is behind
        for dependency, _ in graph.get_pruning_group(layer, tp.prune_conv_out_channels, [0]))]


def build_deposit_module(lower, prune_ratio, image_size):
    """T_r at the start of the deposit: a copy of `lower` with a share of its channels removed.

    prune_ratio in [0, 1): the share of channels removed from every convolution that may be narrowed, the
    least by L2 norm first (torch-pruning's group magnitude). The width of the output is kept, so
    that the frozen upper part fits; 0 gives the authors' full copy.
    """
    module = copy.deepcopy(lower).requires_grad_(True)  # which torch-pruning follows as well
    if prune_ratio == 0:
        return module
    training = module.training
    module.eval()
    x = torch.zeros(1, 3, image_size, image_size, device=next(module.parameters()).device)
    tp.pruner.BasePruner(module, x, importance=tp.importance.GroupMagnitudeImportance(p=2),
                         pruning_ratio=prune_ratio, ignored_layers=output_writers(module, x)).step()
    module.zero_grad(set_to_none=True)
    return module.train(training)


def shape_like(module, tensors, where):
    """Narrow a full lower part's convolutions and batch norms, in place, to the widths in `tensors`.

    Lets a pruned module be rebuilt from its state_dict alone. Raises UserError, naming `where`, when a
    width is missing, zero, or larger than the full module's.
    """
    for name, child in list(module.named_modules()):
        weight = tensors.get(f"{name}.weight")
        if not isinstance(child, (nn.Conv2d, nn.BatchNorm2d)):
            continue
        full = child.weight.shape
        if weight is None or weight.dim() != len(full) or not all(
                0 < narrow <= wide for narrow, wide in zip(weight.shape, full)) or weight.shape[2:] != full[2:]:
            raise UserError(f"{where} does not fit its own description: the width of '{name}' is missing or wrong")
        child.weight = nn.Parameter(torch.empty_like(weight))
        if isinstance(child, nn.Conv2d):
            child.out_channels, child.in_channels = weight.shape[:2]
        else:
            child.num_features = weight.shape[0]
            child.bias = nn.Parameter(torch.empty_like(weight))
            child.running_mean, child.running_var = torch.empty_like(weight), torch.empty_like(weight)
    return module


def cost(module, image_size):
    """{"parameters", "macs", "bytes"} of a lower part: parameters, multiply-accumulates for one image,
    and bytes of its tensors as stored (batch-norm statistics included)."""
    module = copy.deepcopy(module).cpu().eval()
    macs, parameters = tp.utils.count_ops_and_params(module, torch.zeros(1, 3, image_size, image_size))
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    return {"parameters": int(parameters), "macs": int(macs), "bytes": size}
