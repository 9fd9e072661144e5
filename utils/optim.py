"""SGD as the stages use it: the rate at each step, a step, the mean of the losses."""

import math

import torch

from utils import distributed
from utils.errors import UserError


class LossMeter:
    """Means of named losses over batches, weighted by their size and summed on the device.

    On the CPU a loss that is not finite stops the run at its step; on CUDA, where looking would make the
    host wait for the device at every step, at the end of its epoch.
    """

    def __init__(self, epoch):
        self.epoch, self.sums, self.count = epoch, {}, 0

    def update(self, losses, batch):
        for name, loss in losses.items():
            loss = loss.detach()
            if loss.device.type == "cpu":
                check_finite({name: loss.item()}, self.epoch)
            self.sums[name] = self.sums.get(name, 0) + loss.double() * batch
        self.count += batch

    def means(self):
        """{name: mean over the epoch's images, those of all ranks}."""
        means = distributed.summed(torch.stack(list(self.sums.values()))) / (self.count * distributed.ranks)
        return dict(zip(self.sums, means.tolist()))


def check_finite(values, epoch):
    """Raise UserError, naming the first value that is NaN or infinite."""
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name} became {value} in epoch {epoch + 1}: lower --lr or that term's weight, or set "
                            f"--clip_norm; the state after the epoch before is kept")


def learning_rate(args, step, steps_per_epoch):
    """The rate at a step of the run: linear warm-up from 0, then --schedule. Stages without these flags: cosine."""
    warmup, schedule = getattr(args, "warmup_epochs", 0), getattr(args, "schedule", "cosine")
    epoch = (step + 1) / steps_per_epoch
    if epoch < warmup:
        return args.lr * epoch / warmup
    if schedule == "cosine":
        done = (step - warmup * steps_per_epoch) / ((args.epochs - warmup) * steps_per_epoch)
        return args.lr * 0.5 * (1 + math.cos(math.pi * min(max(done, 0), 1)))
    if schedule == "step":
        return args.lr * 0.1 ** sum(step >= m * steps_per_epoch for m in args.milestones)
    return args.lr


def make_optimizer(parameters, args, nesterov=False):
    """SGD with momentum 0.9 and the flags of add_optimiser_args."""
    return torch.optim.SGD(parameters, args.lr, 0.9, weight_decay=args.weight_decay, nesterov=nesterov)


def take_step(optimizer, loss, lr, clip_norm):
    """Backward and one update at rate `lr`, the gradient's norm limited to clip_norm in each group of the
    optimizer, unless that is 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip_norm:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], clip_norm)
    optimizer.step()
