"""Files that are written whole or not at all: Ctrl-C and SIGTERM stop a stage between two writes, never within one."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import signal

from utils.errors import UserError

_held = None  # signals that came during a write; None when there is none


def _stop(signum, frame):
    if _held is None:
        raise KeyboardInterrupt(signum)
    _held.append(signum)


def stop_between_writes():
    """Let SIGINT and SIGTERM raise KeyboardInterrupt(signal number)."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)


@contextlib.contextmanager
def postponed():
    """A block that a signal does not break into: what arrives meanwhile is raised at its end."""
    global _held
    _held = []
    try:
        yield
    finally:
        _held, came = None, _held
    if came:
        raise KeyboardInterrupt(came[0])


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to disk, then rename it to `path`. Raises UserError
    when that is a folder."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: name a file in it")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    # A name of its own: several processes may write the same file, and the last whole one is kept.
    temporary = f"{path}.{secrets.token_hex(4)}.part"
    with postponed():
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
    """Read a JSON object. Raises UserError when the file is damaged or holds none."""
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
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


def read_head(path):
    """The first record of a log, which holds the run's settings. Raises UserError as read_log does, and where there is
    none."""
    records = read_log(path)
    if not records:
        raise UserError(f"{path} holds no record of a run: copy or make that run again")
    return records[0]


@contextlib.contextmanager
def locked(folder):
    """A block in which no other process works in `folder`, which is made when absent, and goes again if it stays empty.
    Half-written checkpoints, logs and metrics of a killed process go. Other files are written without a lock.

    The lock is the operating system's, so it ends with the process. Raises UserError where another process works there.
    On file systems without locks nobody is kept out.
    """
    made = not os.path.exists(folder)
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works in {folder}: wait until it has ended, or choose another "
                            f"folder") from None
        except OSError:
            pass
        for name in os.listdir(folder):
            if re.search(r"(\.pt|_log\.jsonl|^metrics\w*\.json)\.[0-9a-f]{8}\.part$", name):
                os.unlink(os.path.join(folder, name))
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                os.rmdir(folder)
        os.close(handle)
