"""The deposit module T_r: a structurally pruned copy of the original network's lower part."""

import copy

import torch
import torch_pruning as tp
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.resnet import CifarBlock
from utils.errors import UserError

# the convolution that writes the output of each kind of residual block
_LAST_CONV = {BasicBlock: "conv2", Bottleneck: "conv3", CifarBlock: "conv2"}


def stream_writers(lower):
    """The convolutions whose output channels the upper part reads through shortcuts, and so must stay.

    From the last block backwards: what each block adds to the stream, up to the convolution on a
    shortcut that starts the stream anew, or the stem.
    """
    writers = []
    for layer in reversed(lower[1:]):
        for block in reversed(layer):
            if type(block) not in _LAST_CONV:
                raise UserError(f"{type(block).__name__} is missing in _LAST_CONV of models/deposit.py: name the "
                                f"convolution that ends it, or do not prune (--prune_ratio 0)")
            writers.append(getattr(block, _LAST_CONV[type(block)]))
            if getattr(block, "downsample", None) is not None:
                return writers + [block.downsample[0]]
    return writers + [lower.stem.conv1]


def build_deposit_module(lower, prune_ratio, image_size):
    """T_r at the start of the deposit: a copy of `lower` with a share of its channels removed.

    prune_ratio in [0, 1): the share of channels removed from every convolution that may be narrowed, the
    least by L2 norm first (torch-pruning's group magnitude). The width of the output is kept, so
    that the frozen upper part fits; 0 gives the authors' full copy.
    """
    module = copy.deepcopy(lower)
    if prune_ratio == 0:
        return module
    # torch-pruning follows the gradient graph on the module's own device and needs trainable weights
    trainable = {name: p.requires_grad for name, p in module.named_parameters()}
    training = module.training
    module.requires_grad_(True).eval()
    device = next(module.parameters()).device
    tp.pruner.BasePruner(
        module, torch.zeros(1, 3, image_size, image_size, device=device),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=prune_ratio, ignored_layers=stream_writers(module),
    ).step()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[name])
        parameter.grad = None
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
