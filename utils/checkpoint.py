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
import zipfile

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


def cpu_tensors(state_dict):
    """A state_dict's tensors, copied to the CPU, contiguous in their plain layout and sharing no storage."""
    return {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in state_dict.items()}


def save_checkpoint(path, kind, tensors, **content):
    """Write a checkpoint atomically and return its checksum."""
    content = {"format": FORMAT, "kind": kind, "tensors": cpu_tensors(tensors), **content}
    content["checksum"] = checksum(content)
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except RuntimeError:  # how torch.save reports a failing write, a full disk for one
        raise UserError(f"{path} could not be written: free some space or choose another --save_path") from None
    return content["checksum"]


def load_checkpoint(path, kind):
    """Read a checkpoint of a kind (or one of a tuple of kinds); only plain types are ever unpickled.

    Raises UserError when the file is missing, truncated, of another program, of another kind, holds
    pickled code, or does not match its checksum.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    hint = ""
    if "original" in kinds:
        hint = "; weights of others become one by train_scratch.py --weights FILE --epochs 0"
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist or is no file: run the stage that writes it, or name another")
    # torch writes zip archives; testing that first spares the many ways in which other bytes fail
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not a checkpoint of this project: write it again{hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in as many ways as it has bytes
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{path} holds pickled code, which is never run: "
                            f"it is not a checkpoint of this project{hint}") from None
        raise UserError(f"{path} is damaged ({type(error).__name__}): write it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (no format {FORMAT}){hint}")
    try:
        sound = checksum(content) == content["checksum"]
    except Exception:  # a damaged archive may hold anything
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged (it does not match its checksum): write it again")
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
