"""Weights that others trained, as an original network: files of PyTorch and safetensors in the layouts in use."""

import re

import torch
import torchvision

from models.architectures import ARCHITECTURES, SMALL_IMAGE, build_network
from utils.checkpoint import load_plain
from utils.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "tensors")  # keys under which a file keeps its weights
PREFIXES = r"^((module|_orig_mod|model)\.)+"  # of DataParallel, torch.compile and Lightning

# Names in torchvision and timm (conv1, downsample, fc), kuangliu/pytorch-cifar (shortcut.0/1, linear) and
# akamaster/pytorch_resnet_cifar10 (linear) -> names here.
_RENAMED = ((r"^(conv1|bn1)\.", r"stem.\1."), (r"^(fc|linear)\.", "head.fc."),
            (r"\.shortcut\.([01])\.", r".downsample.\1."))
_HEAD = ("head.fc.weight", "head.fc.bias")


def read_weights(path):
    """{name: tensor} of a weights file, in the file's own names without prefixes.

    Raises UserError when the file is missing, no weights file, or holds code or no weights.
    """
    content = load_plain(path, "weights file", "name a state_dict() of torch.save or safetensors")
    while isinstance(content, dict) and (inner := [content[key] for key in WRAPPERS
                                                   if isinstance(content.get(key), dict)]):
        content = inner[0]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {re.sub(PREFIXES, "", name): value for name, value in named
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights: save a state_dict, bare or under {', '.join(WRAPPERS[:-1])}")
    return tensors


def imagenet_weights(arch, image_size):
    """torchvision's ImageNet weights of an architecture, downloaded, in torchvision's names. Raises UserError where
    there are none, or no network."""
    if image_size <= SMALL_IMAGE:
        raise UserError(f"--weights imagenet fits the ImageNet stem, which images above {SMALL_IMAGE} pixels get: "
                        f"partition with a larger --image_size")
    try:
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        return weights.get_state_dict(progress=False, check_hash=True)
    except ValueError:
        raise UserError(f"--weights imagenet: there are none of {arch}: use --arch resnet18, resnet34 or "
                        f"resnet50") from None
    except (OSError, RuntimeError) as error:  # no network, or a damaged file
        raise UserError(f"--weights imagenet could not be downloaded ({error}): put {weights.url} into "
                        f"{torch.hub.get_dir()}/checkpoints, or leave it out") from None


def load_weights(network, arch, image_size, tensors, where, keep_head, flags=True):
    """Load weights in any of the known layouts into a network of build_network.

    tensors: {name: tensor}, as `read_weights` gives them; where: the flag and file, for errors; flags: whether the
    caller has --arch and --epochs, so that these are advised. A head for another number of classes is left as it is,
    unless keep_head: then it is refused. Raises UserError that names the first misfit, and the architecture that would
    fit, if there is one.
    """
    expected, given = network.state_dict(), {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        given[name] = tensor
    for name in [name for name in given if name.endswith("running_mean")]:
        # Files of before PyTorch 0.4.1 lack these counters, which nothing here reads.
        given.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    misfit = _first_misfit(expected, given)
    if misfit is not None:
        raise UserError(f"{where} does not fit {'--arch ' if flags else ''}{arch}: {misfit}"
                        + _hint(given, image_size, "use --arch" if flags else "it would fit"))
    if any(given[name].shape != expected[name].shape for name in _HEAD):
        classes, wanted = (len(state["head.fc.bias"]) for state in (given, expected))
        if keep_head:
            advice = "train a new one with --epochs 1 or more" if flags else "name a network of as many classes"
            raise UserError(f"{where} has a head of {classes} classes, not {wanted}: {advice}")
        given.update({name: expected[name] for name in _HEAD})
    if not all(tensor.isfinite().all() for tensor in given.values()):
        raise UserError(f"{where} holds weights that are not finite: name another file")
    network.load_state_dict(given)


def _first_misfit(expected, given):
    """What is wrong with the first tensor that does not fit, but for the head's number of classes; None when all do."""
    for name in expected:
        if name not in given:
            return f"it has no tensor '{name}'"
        rows = name in _HEAD  # their number is that of the classes
        if given[name].dim() != expected[name].dim() or given[name].shape[rows:] != expected[name].shape[rows:]:
            return f"tensor '{name}' is {tuple(given[name].shape)}, not {tuple(expected[name].shape)}"
    extra = [name for name in given if name not in expected]
    return f"tensor '{extra[0]}' is of no layer" if extra else None


def _hint(given, image_size, verb):
    """The end of a misfit's message: what would fit."""
    sizes = {"": image_size, f" and images of up to {SMALL_IMAGE} pixels": SMALL_IMAGE,
             f" and images above {SMALL_IMAGE} pixels": SMALL_IMAGE + 1}
    for advice, size in sizes.items():
        for arch in ARCHITECTURES:
            with torch.device("meta"):
                state = build_network(arch, 1, size).state_dict()
            if _first_misfit(state, given) is None:
                return f": {verb} {arch}{advice}"
    return "; no architecture here fits it"
