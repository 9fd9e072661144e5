"""Decoded images kept beside the data, so that no file is decoded twice.

A cache file is named after what it was made from and ends in a SHA-256 of its bytes: when the images change it is not
found, when it is damaged it does not match, and in both cases it is made anew.
"""

import glob
import hashlib
import os

import numpy as np

from utils.checkpoint import write_atomically

FOLDER = ".lirf_cache"
_DIGEST = 32


def source_key(files, size):
    """Names what decoded images were made from: the files' names, sizes and times, and the size they are given."""
    digest = hashlib.sha256(f"{size}\n".encode())
    for path in files:
        status = os.stat(path)
        digest.update(f"{os.path.basename(path)}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def cached(path, key, shape, make):
    """The uint8 array of `shape` that make() gives, from the file <path>.<key> where that is whole.

    Writes it when absent or damaged, and removes the caches of `path` under other keys. A folder that cannot
    be written costs the speed and nothing else.
    """
    name = f"{path}.{key}"
    try:
        with open(name, "rb") as file:
            content = file.read()
        if (len(content) == _DIGEST + int(np.prod(shape))
                and hashlib.sha256(memoryview(content)[:-_DIGEST]).digest() == content[-_DIGEST:]):
            return np.frombuffer(content, np.uint8, offset=0, count=len(content) - _DIGEST).reshape(shape)
    except OSError:
        pass
    array = make()
    data = np.ascontiguousarray(array)
    try:
        write_atomically(name, lambda file: (file.write(data), file.write(hashlib.sha256(data).digest())))
        for stale in glob.glob(f"{glob.escape(path)}.*"):
            if stale != name:
                os.unlink(stale)
    except OSError:
        pass  # a read-only or full disk
    return array
