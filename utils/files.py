"""Files that are written whole or not at all."""

import contextlib
import fcntl
import glob
import json
import os
import secrets
import time

from utils.errors import UserError
from utils.stopping import postponed


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to disk, then rename it to `path`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    beside = os.path.join(os.path.dirname(path), os.path.basename(path)[:60] + ".")
    # A name of its own: several processes may write the same file, and the last whole one is kept.
    temporary = f"{beside}{secrets.token_hex(4)}.part"
    with postponed():
        for left in glob.glob(glob.escape(beside) + "*.part"):
            with contextlib.suppress(OSError):  # another process may have removed it
                if time.time() - os.path.getmtime(left) > 3600:  # a killed process's
                    os.unlink(left)
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = path  # a write that fails does not say where
            raise


def save_json(path, content):
    """Write plain types as indented JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_json(path):
    """Read a JSON object. Raises UserError when the file is missing or holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} does not exist or is no file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def read_log(path):
    """The JSON objects of a log, a line each, without a last line that a kill has cut. Raises UserError for any other
    line that is none."""
    with open(path, "rb") as file:
        text = file.read()
    records = []
    for number, line in enumerate(text[:text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            records.append(json.loads(line))
            if not isinstance(records[-1], dict) or type(records[-1].get("epoch", 0)) is not int:
                raise ValueError
        except (ValueError, RecursionError):
            raise UserError(f"line {number} of {path} is no record of a run: mend that line, or move the file away to "
                            f"begin a new log") from None
    return records


def remove_unfinished(folder):
    """Remove what a killed process was writing into `folder`, which the caller has locked. Partitions are left: they
    are written without a lock."""
    for name in os.listdir(folder):
        if name.endswith(".part") and not name.startswith("partition"):
            os.unlink(os.path.join(folder, name))


@contextlib.contextmanager
def locked(folder, wait=False):
    """A block in which no other process works in `folder`, which is made when absent, and goes again if it stays empty.

    The lock is the operating system's, so it ends with the process. Where another process works there, it waits for
    that one, or raises UserError unless `wait`. On file systems without locks nobody is kept out.
    """
    made, handle = not os.path.exists(folder), None
    while handle is None:
        os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the process that had it has just removed it
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except (BlockingIOError, PermissionError):
                os.close(handle)
                raise UserError(f"another process works in {folder}: wait until it has ended, or choose another "
                                f"folder") from None
            except OSError:
                pass
            if not os.path.exists(folder) or not os.path.samestat(os.fstat(handle), os.stat(folder)):
                os.close(handle)
                handle = None
    try:
        yield folder
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                os.rmdir(folder)
        os.close(handle)
