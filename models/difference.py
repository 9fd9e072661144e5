"""What T has lost, as a difference of weights: Δ = lower_0 - lower_T, rounded to a few bits. Ours. It can be taken of
any part of a network: difference.pt has that of the lower part, analysis.residual measures that of the whole.

The target network that is handed out is lower_0 - Δ with Δ as rounded. So the rounding falls on T, where it matters
little, and lower_T + Δ is T0's lower part again, up to the rounding of float32, whatever the number of bits.

Of batch norm's statistics Δ holds the logarithms of the variances, and the means in units of the deviation. So it can
be added to a T that was trained further, or one from which other deposits are away. It makes no variance negative.
Where such a T has moved a mean by a small part of its deviation, T~ has moved T0's by as small a part, though T0's
deviation may be far smaller.

Δ is one string of bytes: for each floating-point tensor of the part, in the order of their names, its scales in
float32 and its rounded entries, packed. The architecture tells names and shapes, so the file holds nothing else.
"""

import math

import numpy as np
import torch

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
FINE_BITS = 16  # batch norm and a last layer: few entries, and each shifts a whole channel or class
EPSILON = 1e-5  # what batch norm adds to a variance, here too


def pack(values, bits):
    """Whole numbers (n,) of [0, 2^bits) -> uint8 (ceil(n * bits / 8),), without a gap between them."""
    shifts = torch.arange(bits - 1, -1, -1)
    return torch.from_numpy(np.packbits((values[:, None] >> shifts & 1).to(torch.uint8).numpy()))


def unpack(data, bits, count):
    """What `pack` packed: the first `count` numbers, int64."""
    digits = torch.from_numpy(np.unpackbits(data.numpy(), count=count * bits)).view(count, bits).long()
    return (digits << torch.arange(bits - 1, -1, -1)).sum(1)


def _rows(tensor):
    """A row for each scale: an output channel of a convolution, a class of a last layer, the whole of a vector."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _levels(tensor, bits):
    """(bits an entry, largest whole number m): entries are rounded to the multiples -m .. m of their row's scale. All
    but convolutions take FINE_BITS."""
    bits = bits if tensor.dim() > 2 else FINE_BITS
    return bits, 2 ** (bits - 1) - 1


def quantise(rows, largest):
    """(whole numbers of [-largest, largest], scale): rows (r, n) ~ numbers * scale (r, 1).

    Each row's scale is that of the least squared error among 16 shares of the one at which its largest entry fits:
    with few bits, to cut off the largest entries costs less than to round all others coarsely.
    """
    fitting = rows.abs().amax(1, keepdim=True) / largest
    best, scale = torch.full_like(fitting, torch.inf), fitting
    for share in torch.linspace(1, 0.25, 16):
        tried = fitting * share
        error = (_rounded(rows, tried, largest) * tried - rows).square().sum(1, keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(best, error)
    return _rounded(rows, scale, largest), scale


def _rounded(rows, scale, largest):
    return (rows / scale.clamp_min(torch.finfo(rows.dtype).tiny)).round().clamp(-largest, largest)


def _tensors(lower):
    """[(name, tensor)] of what the difference covers: all but batch norm's counters."""
    return [(name, tensor) for name, tensor in sorted(lower.items()) if tensor.is_floating_point()]


def between(original, target):
    """{name: Δ}, not rounded, float32 on the CPU. original, target: state_dicts of lower_0 and lower_T."""
    return {name: _coordinate(original, name) - _coordinate(target, name) for name, _ in _tensors(target)}


def _coordinate(state, name):
    """A tensor of a state_dict as Δ holds it."""
    tensor = state[name].to("cpu", torch.float32)
    if name.endswith("running_var"):
        return (tensor + EPSILON).log()
    if name.endswith("running_mean"):
        return tensor / (state[_variance_of(name)].to(tensor) + EPSILON).sqrt()
    return tensor


def _variance_of(mean):
    return mean.replace("running_mean", "running_var")


def encode(original, target, bits):
    """Δ as uint8 (bytes,), rounded. original, target: state_dicts of lower_0 and lower_T; bits: one of BITS."""
    parts = []
    for difference in between(original, target).values():
        width, largest = _levels(difference, bits)
        numbers, scale = quantise(_rows(difference), largest)
        parts += [scale.contiguous().view(torch.uint8).flatten(),
                  pack((numbers.flatten() + largest).to(torch.int32), width)]
    return torch.cat(parts)


def decode(data, target, bits):
    """{name: Δ} of the bytes that `encode` wrote, in the shapes of target, lower_T's state_dict. Raises ValueError
    where these shapes take more or fewer bytes."""
    found, place = {}, 0
    for name, tensor in _tensors(target):
        rows, (width, largest) = _rows(tensor), _levels(tensor, bits)
        start, middle = place, place + 4 * len(rows)
        place = middle + math.ceil(rows.numel() * width / 8)
        if place > len(data):
            break
        scale = data[start:middle].clone().view(torch.float32)[:, None]
        numbers = unpack(data[middle:place], width, rows.numel()) - largest
        found[name] = (numbers.view(rows.shape) * scale).view(tensor.shape)
    if place != len(data):
        raise ValueError(f"{len(data)} bytes are no difference of these shapes at {bits} bits")
    return found


def shifted(state, difference, sign):
    """A state_dict with Δ added (sign 1: lower_0 of lower_T) or taken away (-1: lower_T of lower_0). What Δ does not
    have, it has as it was."""
    changes = {name: sign * difference[name].to(tensor) for name, tensor in state.items() if name in difference}
    return {**state, **{name: _moved(name, state, changes) for name in changes}}


def _moved(name, state, changes):
    tensor, change = state[name], changes[name]  # where the changes are 0, this returns the tensor itself
    if name.endswith("running_var"):  # (tensor + EPSILON) exp(change) - EPSILON
        return (tensor * change.exp() + EPSILON * change.expm1()).clamp_min(0)
    if name.endswith("running_mean"):  # deviations more, then in units of the new deviation
        variance = _variance_of(name)
        return (tensor + (state[variance] + EPSILON).sqrt() * change) * (changes[variance] / 2).exp()
    return tensor + change
