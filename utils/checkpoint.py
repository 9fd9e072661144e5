"""Checkpoint files: plain types, read with weights_only.

A checkpoint is a dict of numbers, strings, lists, dicts and tensors with the entries
    format    "lirf/2"
    kind      "original", "independent", "retrained", "target", "deposit", "difference", "recover",
              "student" or "state"
    tensors   name -> tensor
    checksum  SHA-256 over all else: the tensors' names, types, shapes and bytes, and the other entries as JSON
and what its kind adds (checkpoints/README.md). A checksum tells damage; whoever can write a file can forge it.
"""

import hashlib
import json
import os
import textwrap

import safetensors.torch
import torch

from utils.errors import UserError
from utils.files import write_atomically

FORMAT = "lirf/2"


def checksum(content):
    """SHA-256 (hex) over a dict but its entry "checksum": names, types, shapes and bytes of the dict "tensors", and
    everything else, plain types, as JSON."""
    tensors = content["tensors"]
    described = {name: value for name, value in content.items() if name not in ("tensors", "checksum")}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path, kind, tensors, **content):
    """Write a checkpoint atomically and return its checksum. Raises UserError where the disk is full."""
    tensors = {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)  # sharing no storage
               for name, tensor in tensors.items()}
    content = {"format": FORMAT, "kind": kind, "tensors": tensors, **content}
    content["checksum"] = checksum(content)
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except RuntimeError:  # how torch.save reports a failing write, a full disk for one
        raise UserError(f"{path} could not be written: free some space or choose another --save_path") from None
    return content["checksum"]


def load_plain(path, kind, advice):
    """What a file of torch.save or safetensors holds; only plain types are ever unpickled.

    kind, advice: what the file should be, and what to do where it is not, for the UserError that then is raised.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist or is no file: {advice}")
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        # the pickle's word for a name to import; other bytes fail without it
        fault = "holds pickled code, which is never run" if "GLOBAL" in str(error) else f"is damaged or no {kind}"
        raise UserError(f"{path} {fault} ({type(error).__name__}): {advice}") from None


def is_ours(path):
    """Whether a weights file is a checkpoint of this project, sound or damaged. Raises UserError when it is no weights
    file."""
    content = load_plain(path, "weights file", "name a state_dict() of torch.save or safetensors")
    return isinstance(content, dict) and content.get("format") == FORMAT


def load_checkpoint(path, kind):
    """Read a checkpoint of a kind (or one of a tuple of kinds).

    Raises UserError when the file is missing, damaged, of another program, of another kind, holds pickled code, or does
    not match its checksum.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    advice = "run the stage that writes it (remove a damaged file first), or name another"
    if "original" in kinds:
        advice += "; weights of others become one by train_scratch.py --weights FILE --epochs 0"
    content = load_plain(path, "checkpoint of this project", advice)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this project (no format {FORMAT}): {advice}")
    try:
        sound = checksum(content) == content["checksum"]
    except Exception:  # a damaged archive may hold anything
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged (it does not match its checksum): remove it, then run its stage again")
    if content["kind"] not in kinds:
        raise UserError(f"{path} is a checkpoint of kind '{content['kind']}', not {' or '.join(kinds)}")
    return content


def load_into(module, tensors, path):
    """module.load_state_dict(tensors), or a UserError that names the file and the misfit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        misfit = textwrap.shorten(str(error).partition(":")[2], 200)
        raise UserError(f"{path} does not fit its own description: {misfit}") from None
