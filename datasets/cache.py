"""Decoded images kept beside the data, so that no file is decoded twice.

A cache file ends in a SHA-256 of its name, of the key of what it was made from, and of its bytes: when the images
change, or it is damaged or renamed, it does not match and is made anew. It is written whole or not at all. A process
that has mapped it keeps what it mapped when another process replaces it.
"""

import contextlib
import hashlib
import os

import numpy as np

from utils.files import write_atomically

FOLDER = ".lirf_cache"
_RULES = "2"  # of decoding: to be raised when the same file would give other pixels
_DIGEST = 32


def cached(path, key, make, else_hold=True):
    """The uint8 values (1-D) of the arrays that make() lists, one after the other, mapped from the file `path`.

    key: text that tells what they are made from. Writes that file when it is absent, damaged or of another key. Where
    it cannot be written, the values are held in memory instead, or None is returned unless `else_hold`.
    """
    values = _mapped(path, key)
    if values is None:
        arrays = [np.ascontiguousarray(array).view(np.uint8).reshape(-1) for array in make()]
        with contextlib.suppress(OSError):  # a read-only or full disk
            write_atomically(path, lambda file: _write(file, arrays, _digest_of(path, key)))
            values = _mapped(path, key)
        if values is None and else_hold:
            return np.concatenate(arrays)
    return values


def _digest_of(path, key):
    return hashlib.sha256(f"{_RULES}|{key}|".encode() + os.fsencode(os.path.basename(path)))


def _write(file, arrays, digest):
    for array in arrays:
        file.write(array)
        digest.update(array)
    file.write(digest.digest())


def _mapped(path, key):
    """What a cache file holds, or None unless it ends in the digest of its name, its key and what comes before."""
    try:
        values = np.asarray(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError):  # there is none, or an empty one
        return None
    digest = _digest_of(path, key)
    digest.update(values[:-_DIGEST])
    return values[:-_DIGEST] if values[-_DIGEST:].tobytes() == digest.digest() else None
