"""Checkpoint files: plain types, read with weights_only, written whole or not at all.

A checkpoint is a dict of numbers, strings, lists, dicts and tensors with the entries
    format    "lirf/1"
    kind      "original", "independent", "target", "deposit", "recover", "student" or "state"
    tensors   name -> tensor
    checksum  SHA-256 over the tensors' names, types, shapes and bytes
and what its kind adds (README, "File formats").
"""

import hashlib
import json
import os
import zipfile

import torch

from utils.errors import UserError
from utils.stopping import postponed

FORMAT = "lirf/1"


def checksum(tensors):
    """SHA-256 (hex) over names, types, shapes and bytes of a dict of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cpu_tensors(state_dict):
    """A state_dict's tensors, copied to the CPU, contiguous in their plain layout and sharing no storage."""
    return {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in state_dict.items()}


def write_atomically(path, write):
    """Call write(file) on `path`.part, flush it to disk, then rename it over `path`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = path + ".part"  # a fixed name: what a kill leaves behind is overwritten by the next attempt
    with postponed():
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise


def save_json(path, content):
    """Write plain types as indented JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_json(path):
    """Read a JSON object. Raises UserError when the file is missing or is no JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def save_checkpoint(path, kind, tensors, **content):
    """Write a checkpoint atomically and return its checksum."""
    tensors = cpu_tensors(tensors)
    content = {"format": FORMAT, "kind": kind, "tensors": tensors, "checksum": checksum(tensors), **content}
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except RuntimeError as error:  # how torch.save reports a failing write, a full disk for one
        raise UserError(f"{path} could not be written ({error}): "
                        f"free some space or choose another --save_path") from None
    return content["checksum"]


def load_checkpoint(path, kind):
    """Read a checkpoint of a kind (or one of a tuple of kinds); only plain types are ever unpickled.

    Raises UserError when the file is missing, truncated, of another program, of another kind, holds
    pickled code, or has tensors that do not match its checksum.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist or is no file: run the stage that writes it, or name another")
    # torch writes zip archives; testing that first spares the many ways in which other bytes fail
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not a checkpoint of this project: write it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in as many ways as it has bytes
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{path} holds pickled code, which is never run: "
                            f"it is not a checkpoint of this project") from None
        raise UserError(f"{path} is damaged ({type(error).__name__}): write it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (no format {FORMAT})")
    if content.get("kind") not in kinds:
        raise UserError(f"{path} is a checkpoint of kind '{content.get('kind')}', not {' or '.join(kinds)}")
    tensors = content.get("tensors")
    if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()):
        raise UserError(f"{path} is damaged (its tensors are missing): write it again")
    if checksum(tensors) != content.get("checksum"):
        raise UserError(f"{path} is damaged (its tensors do not match their checksum): write it again")
    return content


def load_into(module, tensors, path):
    """module.load_state_dict(tensors), or a UserError that names the file and the first misfit."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            raise UserError(f"{path} does not fit its own description: tensor '{name}' is "
                            f"{'missing' if name not in tensors else 'unexpected'}")
        if tensors[name].shape != expected[name].shape or tensors[name].dtype != expected[name].dtype:
            raise UserError(f"{path} does not fit its own description: tensor '{name}' is "
                            f"{tensors[name].dtype} {tuple(tensors[name].shape)}, not "
                            f"{expected[name].dtype} {tuple(expected[name].shape)}")
    module.load_state_dict(tensors)
