"""Files of a data set: which there are, what they hold, and folders that several processes share."""

import contextlib
import hashlib
import os
import shutil

from utils.files import locked

SPLITS = ("train", "test")  # of the data as they are stored


def hidden(name):
    """Whether a file or folder is one that a system keeps for itself: .DS_Store, ._x, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def printable(name):
    """The name of a file as text; bytes that are not UTF-8 become escapes, which every format and console can hold."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def files_below(folder, above=()):
    """Paths of the files in a folder and in its sub-folders, links followed, none of them hidden."""
    here = os.path.realpath(folder)
    if here in above:  # a link back to where it lies in would never end
        return []
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not hidden(entry.name):
                found += files_below(entry.path, (*above, here)) if entry.is_dir() else [entry.path]
    return found


def list_hash(files, names):
    """SHA-256 (hex) of a sample list: the files' names, sizes and bytes. names: one a file, as in the file system."""
    digest = hashlib.sha256()
    for path, name in zip(files, names):
        with open(path, "rb") as file:
            content = file.read()
        digest.update(os.fsencode(name) + f"|{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@contextlib.contextmanager
def workspace(path):
    """A folder that is this process's alone for the length of a block, empty at first and removed at the end.

    Others who want the same one wait. What a killed process left there goes.
    """
    with locked(path, wait=True):
        for entry in os.scandir(path):
            shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
