"""Files that are written whole or not at all."""

import contextlib
import errno
import glob
import json
import os
import tempfile
import time

from utils.errors import UserError
from utils.stopping import postponed


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to disk, then rename it to `path`."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    prefix = os.path.basename(path)[:60] + "."
    with postponed():
        for left in glob.glob(os.path.join(glob.escape(folder), glob.escape(prefix) + "*.part")):
            with contextlib.suppress(OSError):  # another process may have removed it
                if time.time() - os.path.getmtime(left) > 3600:  # a killed process's
                    os.unlink(left)
        # A name of its own: several processes may write the same file, and the last whole one is kept.
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=".part")
        try:
            with open(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets nobody else read
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = path  # a write that fails does not say where
            raise


def _umask():
    current = os.umask(0)
    os.umask(current)
    return current


def save_json(path, content):
    """Write plain types as indented JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_json(path):
    """Read a JSON object. Raises UserError when the file is missing or holds none."""
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


def read_log(path):
    """The JSON objects of a log, a line each, without a last line that a kill has cut. Raises UserError, with the
    line's number, for any other line that is none."""
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
def locked(folder, patience=0.0):
    """A block in which no other process works in `folder`, which is made when absent, and goes again if it stays empty.

    The lock is the operating system's, so it ends with the process, however that ends. Waits up to `patience` seconds
    for another process; raises UserError when that still works there. File systems without locks are not locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    made = not os.path.exists(folder)
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break
                if time.monotonic() >= deadline:
                    raise UserError(f"another process works in {folder}: wait until it has ended, or choose another "
                                    f"folder") from None
                time.sleep(0.05)
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                os.rmdir(folder)
        os.close(handle)
