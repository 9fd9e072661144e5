"""The deposit module T_r: a structurally pruned copy of the original network's lower part."""

import copy

import torch
import torch_pruning as tp
from torch import nn


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


def narrow_like(module, tensors):
    """Prune a network that holds a full T_r, in place, to the widths that its layers have in `tensors`, so that these
    can be loaded into it. What is missing or too wide is left for loading to tell."""
    for name, layer in module.named_modules():
        if f"{name}.weight" not in tensors:
            continue
        shape = tensors[f"{name}.weight"].shape
        if isinstance(layer, nn.Conv2d):
            tp.prune_conv_out_channels(layer, range(shape[0], layer.out_channels))
            tp.prune_conv_in_channels(layer, range(shape[1], layer.in_channels))
        elif isinstance(layer, nn.BatchNorm2d):
            tp.prune_batchnorm_out_channels(layer, range(shape[0], layer.num_features))
    return module


def cost(module, image_size):
    """{"parameters", "macs", "bytes"} of a lower part: parameters, multiply-accumulates for one image,
    and bytes of its tensors as stored (batch-norm statistics included)."""
    module = copy.deepcopy(module).cpu().eval()
    macs, parameters = tp.utils.count_ops_and_params(module, torch.zeros(1, 3, image_size, image_size))
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    return {"parameters": int(parameters), "macs": int(macs), "bytes": size}
