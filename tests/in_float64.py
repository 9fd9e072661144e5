"""in_float64.py EPOCH SCRIPT FLAGS: a stage script in float64, where sums taken in another order stay alike to the end.
Rank 1, where there is one, is killed at the end of EPOCH (counted from 1), if there is such an epoch."""

import os
import runpy
import signal
import sys

import torch

sys.path.insert(0, os.path.dirname(sys.argv[2]))
from utils import distributed
from utils.run import TrainingRun

last = int(sys.argv[1])
sys.argv = sys.argv[2:]
end_epoch = TrainingRun.end_epoch


def end_or_die(self, epoch, figures):
    if epoch + 1 == last and distributed.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    end_epoch(self, epoch, figures)


TrainingRun.end_epoch = end_or_die
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
runpy.run_path(sys.argv[0], run_name="__main__")
