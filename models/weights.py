"""Weights that others trained, as an original network: files of PyTorch and safetensors in the layouts in use."""

import os
import re

import safetensors.torch
import torch
import torchvision

from models.architectures import ARCHITECTURES, SMALL_IMAGE, build_network
from utils.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "tensors")  # keys under which a file keeps its weights
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile and Lightning

# Names in torchvision and timm (conv1, downsample, fc), kuangliu/pytorch-cifar (shortcut.0/1, linear) and
# akamaster/pytorch_resnet_cifar10 (linear) -> names here.
_RENAMED = ((r"^(conv1|bn1)\.", r"stem.\1."), (r"^(fc|linear)\.", "head.fc."),
            (r"\.shortcut\.([01])\.", r".downsample.\1."))
_HEAD = ("head.fc.weight", "head.fc.bias")


def read_weights(path, flag="--weights"):
    """{name: tensor} of a weights file, in the file's own names without prefixes. Nothing but plain types is unpickled.

    flag: what names the file on the command line, for errors.

    Raises UserError when the file is missing, no weights file, or holds code or no weights.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path} does not exist or is no file: name a file of weights, or imagenet")
    try:
        if path.endswith(".safetensors"):
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none fails in as many ways as it has bytes
        if "GLOBAL" in str(error):  # the pickle's word for a name to import; other bytes fail without it
            raise UserError(f"{flag} {path} holds pickled code, which is never run: save the network's "
                            f"state_dict() alone, or a .safetensors file") from None
        raise UserError(f"{flag} {path} is no weights file, or a damaged one ({type(error).__name__}): "
                        f"name one of torch.save or safetensors") from None
    while isinstance(content, dict) and (inner := [content[key] for key in WRAPPERS
                                                   if isinstance(content.get(key), dict)]):
        content = inner[0]
    tensors = {name: value for name, value in content.items()
               if isinstance(value, torch.Tensor)} if isinstance(content, dict) else {}
    while tensors and (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)):
        tensors = {name[len(prefix):]: value for name, value in tensors.items()}
    if not tensors:
        raise UserError(f"{flag} {path} holds no weights: save a state_dict, bare or under "
                        f"{', '.join(WRAPPERS[:-1])}")
    return tensors


def imagenet_weights(arch, image_size):
    """torchvision's ImageNet weights of an architecture, downloaded, in torchvision's names."""
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


def load_weights(network, arch, image_size, tensors, where, keep_head):
    """Load weights in any of the known layouts into a network of build_network.

    tensors: {name: tensor}, as `read_weights` gives them; where: the flag and file, for errors. A head for another
    number of classes is left as it is, unless keep_head: then it is refused. Raises UserError that names the first
    misfit, and the architecture that would fit, if there is one.
    """
    expected = network.state_dict()
    given = {}
    for theirs, tensor in tensors.items():
        name = theirs
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        given[name] = (theirs, tensor)
    for name in [name for name in given if name.endswith("running_mean")]:
        # Files of before PyTorch 0.4.1 lack these counters, which nothing here reads.
        counter = name.replace("running_mean", "num_batches_tracked")
        given.setdefault(counter, (counter, torch.tensor(0)))
    new_head = all(name in given and given[name][1].shape != expected[name].shape
                   and given[name][1].shape[1:] == expected[name].shape[1:] for name in _HEAD)
    misfit = _first_misfit(expected, given, skip=_HEAD if new_head else ())
    if misfit is None and new_head and keep_head:
        classes, wanted = (len(t) for t in (given[_HEAD[1]][1], expected[_HEAD[1]]))
        raise UserError(f"{where} has a head of {classes} classes, not {wanted}: train a new one with --epochs 1 or "
                        f"more")
    if misfit is not None:
        raise UserError(f"{where} does not fit --arch {arch}: {misfit}{_hint(given, image_size)}")
    state = {name: expected[name] if new_head and name in _HEAD else given[name][1].to(expected[name].dtype)
             for name in expected}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{where} holds weights that are not finite: name another file")
    network.load_state_dict(state)


def _first_misfit(expected, given, skip=()):
    """What is wrong with the first tensor that does not fit, in the file's own names; None when all do."""
    for name in expected:
        if name not in given:
            return f"it has no tensor '{re.sub('^(stem|head)[.]', '', name)}'"
        theirs, tensor = given[name]
        if name not in skip and tensor.shape != expected[name].shape:
            return f"tensor '{theirs}' is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
    extra = [theirs for name, (theirs, _) in given.items() if name not in expected]
    return f"tensor '{extra[0]}' is of no layer" if extra else None


def _hint(given, image_size):
    """The end of a misfit's message: what would fit."""
    sizes = {"": image_size, f" and images of up to {SMALL_IMAGE} pixels": SMALL_IMAGE,
             f" and images above {SMALL_IMAGE} pixels": SMALL_IMAGE + 1}
    for advice, size in sizes.items():
        for arch in ARCHITECTURES:
            with torch.device("meta"):
                state = build_network(arch, 1, size).state_dict()
            if _first_misfit(state, given, skip=_HEAD) is None:
                return f": use --arch {arch}{advice}"
    return "; no architecture here fits it"
