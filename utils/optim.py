"""SGD as the stages use it: the rate at each step, a step, the mean of the losses."""

import math

import torch

from utils import distributed


class LossMeter:
    """Means of named losses over batches, weighted by their size and summed on the device: looking at each would make
    the host wait for a GPU at every step."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def update(self, losses, batch):
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach().double() * batch
        self.count += batch

    def means(self):
        """{name: mean over the epoch's images, those of all ranks}."""
        means = distributed.summed(torch.stack(list(self.sums.values()))) / (self.count * distributed.ranks)
        return dict(zip(self.sums, means.tolist()))


def learning_rate(args, step, steps_per_epoch):
    """The rate at a step of the run: linear warm-up from 0, then --schedule. Stages without these flags: cosine."""
    warmup, schedule = getattr(args, "warmup_epochs", 0), getattr(args, "schedule", "cosine")
    epoch = (step + 1) / steps_per_epoch
    if epoch < warmup:
        return args.lr * epoch / warmup
    if schedule == "step":
        return args.lr * 0.1 ** sum(step >= m * steps_per_epoch for m in args.milestones)
    done = (step - warmup * steps_per_epoch) / ((args.epochs - warmup) * steps_per_epoch)
    return args.lr * 0.5 * (1 + math.cos(math.pi * min(max(done, 0), 1)))


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
