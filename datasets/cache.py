"""Decoded images kept beside the data, so that no file is decoded twice.

A cache file is named after what it was made from and ends in a SHA-256 of its name and bytes: when the images change it
is not found, when it is damaged or renamed it does not match, and in both cases it is made anew. It is written whole or
not at all.
"""

import glob
import hashlib
import os

import numpy as np

from utils.files import write_atomically

FOLDER = ".lirf_cache"
_DIGEST, _CHUNK = 32, 1 << 24


def source_key(files, size):
    """Names what decoded images were made from: the files' names, sizes and times, and the size they are given."""
    digest = hashlib.sha256(f"{size}\n".encode())
    for path in files:
        status = os.stat(path)
        digest.update(f"{os.path.basename(path)}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def list_hash(files):
    """SHA-256 (hex) of a sample list: the files' names, sizes and bytes."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            content = file.read()
        digest.update(f"{os.path.basename(path)}|{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def cached(path, key, make, else_hold=True):
    """The uint8 values (1-D) of the arrays that make() lists, one after the other, mapped from the file <path>.<key>.

    Writes that file when it is absent or damaged, and removes the caches of `path` under other keys. Where it cannot
    be written, the values are held in memory instead, or None is returned unless `else_hold`.
    """
    name = f"{path}.{key}"
    if not _whole(name):
        arrays = [np.ascontiguousarray(array).view(np.uint8).reshape(-1) for array in make()]
        try:
            write_atomically(name, lambda file: _write(file, arrays, name))
        except OSError:  # a read-only or full disk
            return np.concatenate(arrays) if else_hold else None
        for stale in glob.glob(f"{glob.escape(path)}.*"):
            if stale != name:
                os.unlink(stale)
    return np.asarray(np.memmap(name, np.uint8, "r"))[:-_DIGEST]


def _digest_of(name):
    return hashlib.sha256(os.path.basename(name).encode())


def _write(file, arrays, name):
    digest = _digest_of(name)
    for array in arrays:
        file.write(array)
        digest.update(array)
    file.write(digest.digest())


def _whole(name):
    """Whether a cache file is there and ends in the SHA-256 of its name and of what comes before."""
    try:
        left, digest = os.path.getsize(name) - _DIGEST, _digest_of(name)
        with open(name, "rb") as file:
            while left > 0:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    return False
                digest.update(chunk)
                left -= len(chunk)
            return left == 0 and file.read() == digest.digest()
    except OSError:
        return False
