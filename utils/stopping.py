"""Ctrl-C and SIGTERM: they stop a stage between two writes, never within one."""

import contextlib
import signal

_writing = False
_pending = None


def _stop(signum, frame):
    global _pending
    if _writing:
        _pending = signum
    else:
        raise KeyboardInterrupt(signum)


def install():
    """Let SIGINT and SIGTERM raise KeyboardInterrupt(signal number)."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)


@contextlib.contextmanager
def postponed():
    """A block that a signal does not break into: what arrives meanwhile is raised at its end."""
    global _writing, _pending
    _writing = True
    try:
        yield
    finally:
        _writing = False
    if _pending is not None:
        signum, _pending = _pending, None
        raise KeyboardInterrupt(signum)
