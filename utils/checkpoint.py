"""Checkpoint files: plain types, read with weights_only, written whole or not at all.

A checkpoint is a dict of numbers, strings, lists, dicts and tensors with the entries
    format    "lirf/2"
    kind      "original", "independent", "target", "deposit", "recover", "student" or "state"
    tensors   name -> tensor
    checksum  SHA-256 over all else: the tensors' names, types, shapes and bytes, and the other entries as JSON
and what its kind adds (README, "File formats"). A checksum tells damage; whoever can write a file can forge it.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import uuid
import zipfile

import torch

from utils.errors import UserError
from utils.stopping import postponed

FORMAT = "lirf/2"


def checksum(content):
    """SHA-256 (hex) over a dict but its entry "checksum": names, types, shapes and bytes of the dict "tensors", if it
    has one, and everything else, plain types, as JSON."""
    tensors = content.get("tensors", {})
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


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to disk, then rename it to `path`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with postponed():
        try:
            with _own_temporary(path) as file:
                try:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                except BaseException:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(file.name)
                    raise
        except OSError as error:
            error.filename = error.filename or path  # a write that fails does not say where
            raise


def _own_temporary(path):
    """`path`.part, empty and open for writing, or `path`.1.part, ... while other processes write those.

    The lock on it is the operating system's and ends with its process, so that what a kill leaves behind is taken over
    by the next attempt.
    """
    for number in itertools.count():
        name = f"{path}.{number}.part" if number else f"{path}.part"
        file = open(name, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):  # else its writer has just renamed it
                if os.path.getsize(name):
                    file.truncate()
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:  # a disk without locks: a name that no other process has, which a kill leaves behind
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            return open(f"{path}.{uuid.uuid4().hex}.part", "xb")
        file.close()


def sealed(content):
    """A dict with its checksum in it."""
    return {**content, "checksum": checksum(content)}


def save_json(path, content):
    """Write plain types as indented JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_json(path):
    """Read a JSON object. Raises UserError when the file is missing, is no JSON object, or does not match the checksum
    that it holds."""
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
    if "checksum" in content and ("tensors" in content or content != sealed(content)):
        raise UserError(f"{path} was changed after it was written: write it again")
    return content


def save_checkpoint(path, kind, tensors, **content):
    """Write a checkpoint atomically and return its checksum."""
    content = sealed({"format": FORMAT, "kind": kind, "tensors": cpu_tensors(tensors), **content})
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
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist or is no file: run the stage that writes it, or name another")
    # torch writes zip archives; testing that first spares the many ways in which other bytes fail
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not a checkpoint of this project: write it again")
    try:
        _require_plain_archive(path)
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
    try:
        # a stride of 0 lets a few bytes stand for a tensor of terabytes, which the checksum would lay out
        if sum(t.numel() * t.element_size() for t in tensors.values()) > os.path.getsize(path):
            raise ValueError
        found = checksum(content)
    except (RuntimeError, TypeError, ValueError, RecursionError):  # tensors without storage, no plain types
        raise UserError(f"{path} is damaged (it holds what no stage writes): write it again") from None
    if found != content.get("checksum"):
        raise UserError(f"{path} is damaged (it does not match its checksum): write it again")
    return content


def _require_plain_archive(path):
    """Raise unless the members of a zip archive lie in it as they are, whatever sizes it declares."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(
            member.file_size for member in members) > os.path.getsize(path):
        raise ValueError


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
