"""The deposit module T_r: a structurally pruned copy of the original network's lower part."""

import contextlib
import copy

import torch
import torch.nn.functional as F
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
    that the frozen upper part fits; 0 gives the authors' full copy. The result's attribute `kept` maps the name of
    each batch norm to the channels of `lower` that are left in it, for `refit`.
    """
    module = copy.deepcopy(lower)
    names = {norm: name for name, norm in module.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    module.kept = {name: torch.arange(norm.num_features) for norm, name in names.items()}
    if prune_ratio == 0:
        return module
    # torch-pruning follows the gradient graph on the module's own device and needs trainable weights
    trainable = {name: p.requires_grad for name, p in module.named_parameters()}
    training = module.training
    module.requires_grad_(True).eval()
    device = next(module.parameters()).device
    pruner = tp.pruner.BasePruner(
        module, torch.zeros(1, 3, image_size, image_size, device=device),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=prune_ratio, ignored_layers=stream_writers(module),
    )
    for group in pruner.step(interactive=True):
        for dependency, removed in group:
            name = names.get(dependency.target.module)
            if name is not None:
                left = torch.ones(len(module.kept[name]), dtype=torch.bool)
                left[list(removed)] = False
                module.kept[name] = module.kept[name][left]
        group.prune()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[name])
        parameter.grad = None
    return module.train(training)


# Share of the mean squared input that holds a solution to the pruned weights: enough to make it unique where inputs are
# always zero or always alike, too little to be seen elsewhere.
_RIDGE = 1e-4


def _blocks(lower):
    """[(name, module)] of the stem and of every residual block, in the order in which they run."""
    return [("stem", lower.stem)] + [(f"{layer}.{name}", block) for layer, blocks in list(lower.named_children())[1:]
                                     for name, block in blocks.named_children()]


def _normed(block):
    """[(name of the batch norm, convolution, batch norm)]: every convolution here is followed by one."""
    layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]
    return [(name, conv, norm) for (_, conv), (name, norm) in zip(layers[::2], layers[1::2])]


def _seen_by(layer, block, x):
    """(input, output) of `layer` when `block`, which holds it, runs on x."""
    seen = []
    hook = layer.register_forward_hook(lambda layer, inputs, output: seen.extend((inputs[0], output)))
    try:
        block(x)
    finally:
        hook.remove()
    return seen


@torch.no_grad()
def refit(module, lower, images, autocast=contextlib.nullcontext):
    """Give T_r, as build_deposit_module has pruned it, the weights with which it comes nearest to `lower` without a
    gradient step: ours, after the reconstruction of feature maps in channel pruning (He et al., ICCV 2017).

    Convolution by convolution in the order in which they run, the weights become the least-squares solution that gives
    T0's output in the channels that are left, from what the layers before it, pruned and refitted, hand on; what is
    constant goes into the running mean of the batch norm behind. images: list of batches (b, 3, s, s) of D_r.
    Changes `module` in place; both are in eval mode meanwhile.
    """
    modes = {part: part.training for part in (module, lower)}
    for part in modes:
        part.eval()
    streams = [(x, x) for x in images]  # what T0's and T_r's next block reads
    for (name, full_block), (_, block) in zip(_blocks(lower), _blocks(module)):
        for (norm_name, full, _), (_, conv, norm) in zip(_normed(full_block), _normed(block)):
            kept = module.kept[f"{name}.{norm_name}"].to(conv.weight.device)
            gram, cross = 0, 0
            for x_0, x in streams:
                with autocast():
                    _, wanted = _seen_by(full, full_block, x_0)
                    given, _ = _seen_by(conv, block, x)
                with torch.autocast(x.device.type, enabled=False):
                    rows = F.unfold(given.float(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
                    rows = F.pad(rows.transpose(1, 2).flatten(0, 1), (0, 1), value=1.0)  # and a constant
                    outputs = wanted[:, kept].float().flatten(2).transpose(1, 2).flatten(0, 1)
                    gram, cross = gram + (rows.T @ rows).double(), cross + (rows.T @ outputs).double()
            pruned = F.pad(conv.weight.double().flatten(1), (0, 1)).T
            ridge = torch.full_like(gram.diagonal(), _RIDGE * gram.diagonal()[:-1].mean().clamp_min(1e-12).item())
            solution = torch.linalg.solve(gram + ridge.diag(), cross + ridge[:, None] * pruned).T
            conv.weight.copy_(solution[:, :-1].reshape(conv.weight.shape))
            norm.running_mean.sub_(solution[:, -1])
        with autocast():
            streams = [(full_block(x_0), block(x)) for x_0, x in streams]
    for part, mode in modes.items():
        part.train(mode)


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
