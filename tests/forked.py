"""A script in a process of its own, to be killed, stopped or starved."""

import contextlib
import multiprocessing
import os
import resource
import runpy
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A server that has loaded the libraries forks every process, so that a signal meets the script and not Python's start.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torchvision", "torch_pruning", "torch.utils.tensorboard", "sklearn.datasets",
                               "sklearn.model_selection"])


def _run(script, flags, out, err, most_bytes, environment, prepare):
    os.environ.update(environment)
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    if most_bytes is not None:  # a write beyond this many bytes of a file fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    if prepare is not None:
        prepare()
    sys.argv = [os.path.join(ROOT, script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Process:
    """A script with its flags. most_bytes: of a file that it may write; environment: variables to set; prepare: a
    function of a module, called before the script."""

    def __init__(self, script, *flags, most_bytes=None, environment=None, prepare=None):
        self._files = [tempfile.NamedTemporaryFile("r+") for _ in range(2)]
        names = [file.name for file in self._files]
        self._process = SERVER.Process(target=_run, args=(script, [str(flag) for flag in flags], *names, most_bytes,
                                                          environment or {}, prepare))
        self.started = time.monotonic()
        self._process.start()
        self.pid = self._process.pid

    def seconds(self):
        return time.monotonic() - self.started

    def reaches(self, condition, every=0.005):
        """Wait until the condition holds; False if the process ends before."""
        while self._process.is_alive():
            if condition():
                return True
            time.sleep(every)
        return False

    def end(self, signum=None):
        """Send a signal, if one is given, and wait: (exit status, text on stdout, lines on stderr)."""
        if signum is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signum)
        self._process.join(300)
        if self._process.is_alive():  # ranks that wait for each other, say
            self._process.kill()
            raise AssertionError("the process has hung for five minutes")
        out, err = (file.read() for file in self._files)
        for file in self._files:
            file.close()
        return self._process.exitcode, out, err.splitlines()
