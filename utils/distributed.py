"""Several devices: torchrun starts a process, called a rank, for each of them.

Every rank holds the networks and all images and trains on an equal share of every batch. DistributedDataParallel
averages the gradients, and batch norm's statistics are those of the whole batch. Rank 0 alone writes and prints.
Without torchrun there is one rank, and each function below leaves what it is given as it is.
"""

import contextlib
import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

# A rank that has failed ends the others at once; this ends them when one is stuck. Rank 0 downloads within
# this time.
_PATIENCE = datetime.timedelta(minutes=30)

rank, ranks = 0, 1
_store = None


def join():
    """Meet the other ranks, if torchrun has started any. Raises UserError when another launcher has."""
    global rank, ranks, _store
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_torchelastic_launched():
        raise UserError("WORLD_SIZE is set, but torchrun has not started this process: start the script with "
                        "torchrun --nproc_per_node=N, or unset WORLD_SIZE")
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        _store, rank, ranks = next(dist.rendezvous("env://", timeout=_PATIENCE))
        if rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


def start(kind):
    """This rank's device, "cuda" or "cpu", ready for what ranks do together. Raises UserError for a device that
    ranks cannot have."""
    if ranks == 1:
        return torch.device(kind)
    if ":" in kind:
        raise UserError(f"--device {kind} is one GPU, and torchrun gives each process its own: name --device cuda")
    backend, device = "gloo", torch.device(kind)
    if kind == "cuda":
        backend, device = "cpu:gloo,cuda:nccl", torch.device(kind, int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node is more than this machine's {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=_store, rank=rank, world_size=ranks, timeout=_PATIENCE)
    return device


def leave():
    """End what `start` began, once all is done, by all ranks together: NCCL wants it so."""
    if dist.is_initialized():
        _meet()
        dist.destroy_process_group()


def first_to_fail():
    """Whether no other rank has failed before: this one is to say why, the others end in silence."""
    return _store is None or _store.add("failed", 1) == 1


def lost_a_rank(error):
    """Whether an exception is what a rank meets when another has gone."""
    return isinstance(error, dist.DistError) or "third_party/gloo" in str(error)


def by_rank_0(function):
    """Decorates what looks at files and decides: rank 0 alone calls it, every rank gets what it returns or raises."""

    @functools.wraps(function)
    def shared(*args, **kwargs):
        if ranks == 1:
            return function(*args, **kwargs)
        both = [None, None]  # result, error
        if rank == 0:
            try:
                both[0] = function(*args, **kwargs)
            except (UserError, OSError) as error:
                both[1] = error
        dist.broadcast_object_list(both, device=torch.device("cpu"))
        if both[1] is not None:
            raise both[1]
        return both[0]

    return shared


@by_rank_0
def _meet():
    pass


@contextlib.contextmanager
def rank_0_first():
    """A block that the other ranks enter when rank 0 has left it: what it downloads, they find."""
    if rank > 0:
        _meet()
    yield
    if rank == 0:
        _meet()


def share(rows):
    """This rank's part of a batch's rows, whose number the ranks divide."""
    return rows.chunk(ranks)[rank]


def summed(tensor):
    """The sum of a tensor over the ranks, without a gradient."""
    if ranks > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def parallel(network):
    """The network as a training loop calls it: backward() averages the gradients over the ranks, and batch norm, within
    `network` itself, its statistics. `network` keeps its parameters and the names of its tensors."""
    if ranks == 1:
        return network
    if next(network.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    else:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = _SyncBatchNormOnCPU
    return DistributedDataParallel(network)


class _SyncBatchNormOnCPU(nn.BatchNorm2d):
    """What nn.SyncBatchNorm, which asks for a GPU, computes in train mode."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        wide = x.float()
        count = summed(torch.tensor(x.numel() / x.shape[1]))
        mean = _Sum.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """`summed` with a gradient, the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor):
        return summed(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return summed(gradient)
