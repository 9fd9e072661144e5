"""The deposit of LIRF in one file (Ye et al., ECCV 2022, section 3): the networks that start from T0, and the losses
that turn them into the target network T and the deposit module T_r."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

from models import losses
from models.architectures import before_last_layer, split_network
from models.pruning import build_deposit_module
from models.recover import concat
from utils.errors import UserError


class Outputs(NamedTuple):
    """What T0, T and the deposit branch say of images x of D_r: f at the cut (b, c, h, w), h that the last layer reads
    (b, d), logits z (b, classes); and of synthetic images: T0's h (n, d), logits s of T0 and T (n, classes)."""

    f_0: torch.Tensor
    f_t: torch.Tensor
    f_r: torch.Tensor
    h_0: torch.Tensor
    h_t: torch.Tensor
    z_0: torch.Tensor
    z_t: torch.Tensor
    z_r: torch.Tensor
    h_s: torch.Tensor
    s_0: torch.Tensor
    s_t: torch.Tensor


class Term(NamedTuple):
    """A term of L: the default of its weight --lambda_<name>, what --help says of it, its value, a function of the
    LIRF, its Outputs, the labels y and the random labels y_r (b,), and its sign in L: -1 where it is maximised."""

    weight: float
    help: str
    value: Callable
    sign: float = 1.0


# L = lambda_kr CE(z_T, y_r) - lambda_at L_at + lambda_kp L_kp + lambda_pt L_pt + lambda_re L_re, and what is ours. The
# paper's L_kr is the first two. This is the one place to add a loss: its flag, its logs and its gradient follow.
TERMS = {
    "kr": Term(1.0, "CE(z_T, y_r) of L_kr: T answers D_r at random (the paper gives it no weight)",
               lambda lirf, out, y, y_r: losses.knowledge_removal(out.z_t, y_r)),
    "at": Term(100.0, "L_at of L_kr, maximised: T's attention maps leave T0's",
               lambda lirf, out, y, y_r: losses.attention_transfer(out.f_t, out.f_0), sign=-1.0),
    "kp": Term(5.0, "L_kp: T keeps T0's answers on the preserved classes",
               lambda lirf, out, y, y_r: losses.knowledge_preserving(
                   out.z_t, out.z_0, lirf.preserved, lirf.args.temperature)),
    "pt": Term(1.0, "L_pt: T_r takes T0's answers on the deposit classes",
               lambda lirf, out, y, y_r: losses.partial_transfer(
                   out.z_r, out.z_0, lirf.transferred, lirf.args.temperature)),
    "re": Term(0.01, "L_re: T_r is easy to withdraw",
               lambda lirf, out, y, y_r: losses.recoverability(lirf.withdrawn(out), y)),
    "ft": Term(0.0, "L_ft, ours: T_r matches the features of T0's lower part",
               lambda lirf, out, y, y_r: losses.feature_transfer(out.f_r, out.f_0)),
    "mt": Term(0.0, "L_mt, of DELETE: T answers as T0 does without the deposit classes, on D_r and, where --lambda_ur "
               "is above 0, on synthetic images",
               lambda lirf, out, y, y_r: losses.masked_target(
                   torch.cat([out.z_t, out.s_t]), torch.cat([out.z_0, out.s_0]), lirf.deposited)),
    "ll": Term(0.0, "L_ll, ours: T's logits on D_r are T0's with those of the deposit classes lowered",
               lambda lirf, out, y, y_r: losses.lowered_logits(out.z_t, out.z_0, lirf.deposited)),
    "ur": Term(0.0, "L_ur, ours: T's features on D_r lose what the preserved classes' rows of the last layer do not "
               "read; with a weight, synthetic images of models/synthesis.py are made",
               lambda lirf, out, y, y_r: losses.unread_features(
                   out.h_t, out.h_0, out.h_s, lirf.upper[-1].fc.weight[lirf.preserved])),
}


class LIRF(torch.nn.Module):
    """T0 (frozen), lower_T and T_r, which start from its lower part, and the upper part that all share.

    original: T0, nn.Sequential of models.architectures, which is frozen in place and whose parts are shared, not
    copied; partition: its Partition; args: of train_deposit.py.
    """

    def __init__(self, original, partition, args):
        super().__init__()
        self.args = args
        self.original_lower, self.upper = split_network(original.requires_grad_(False), args.split_at)
        blocks = len(self.original_lower) - 1  # beside the stem
        if args.trained_blocks is not None and args.trained_blocks > blocks:
            raise UserError(f"--trained_blocks {args.trained_blocks} is more than the {blocks} of the lower part: give "
                            f"fewer, or raise --split_at")
        if args.lambda_ur and len(partition.preserved_classes) >= self.upper[-1].fc.in_features:
            raise UserError(f"--lambda_ur: the rows of {len(partition.preserved_classes)} preserved classes read every "
                            f"direction of {self.upper[-1].fc.in_features} features, so L_ur is 0: set it to 0")
        self.target = copy.deepcopy(self.original_lower)
        # The blocks of lower_T before those that are trained stay T0's, and so do their batch-norm statistics.
        self.kept = len(self.target) - (args.trained_blocks or len(self.target))
        self.target[self.kept:].requires_grad_(True)
        self.deposit = build_deposit_module(self.original_lower, args.prune_ratio, partition.image_size)
        every, preserved, deposited = (torch.tensor(partition.classes(subset))
                                       for subset in ("all", "preservation", "deposit"))
        self.register_buffer("preserved", preserved)
        self.register_buffer("deposited", deposited)
        self.register_buffer("transferred", deposited if args.pt_classes == "deposit" else every)
        self.register_buffer("random_answers", preserved if args.random_label == "preserved" else every)

    def trained(self):
        """{name: module} of what the deposit changes."""
        return {"target": self.target, "deposit": self.deposit}

    def train(self, mode=True):
        # T0 and the upper part stay in eval mode whatever their parent does, and with --bn_stats frozen batch norm is
        # the whole difference between the modes.
        super().train(False)
        for name, module in self.trained().items():
            module.train(mode and self.args.bn_stats in ("updated", name))
        self.target[:self.kept].eval()
        self.training = mode
        return self

    def forward(self, x, synthetic=None):
        """Outputs for images x (b, 3, s, s) of D_r and, if there are any, for synthetic ones."""
        n, images = len(x), x if synthetic is None else torch.cat([x, synthetic])
        read, fc = before_last_layer(self.upper), self.upper[-1].fc
        with torch.no_grad():
            f_0 = self.original_lower(images)
            h_0 = read(f_0)
            z_0 = fc(h_0)
        f_t, f_r = self.target(images), self.deposit(x)
        h_t = read(torch.cat([f_t, f_r]))
        z_t, z_r = fc(h_t).split([len(images), n])
        return Outputs(f_0=f_0[:n], f_t=f_t[:n], f_r=f_r, h_0=h_0[:n], h_t=h_t[:n], z_0=z_0[:n], z_t=z_t[:n], z_r=z_r,
                       h_s=h_0[n:], s_0=z_0[n:], s_t=z_t[n:])

    def random_labels(self, y, generator):
        """y_r of L_kr for the labels y (n,), drawn as --random_label says."""
        return losses.draw_random_labels(y, self.random_answers, self.args.random_label == "wrong", generator)

    def withdrawn(self, out):
        """z_T~ of L_re, the paper's equation. Its gradient reaches T only with --re_target attached."""
        z_t = out.z_t if self.args.re_target == "attached" else out.z_t.detach()
        return concat(z_t, out.z_r, self.deposited)

    def losses(self, out, y, y_r):
        """The named terms of L and their weighted sum "loss", which is minimised. y, y_r: labels and random labels."""
        terms = {f"l_{name}": term.value(self, out, y, y_r) for name, term in TERMS.items()}
        terms["loss"] = sum(term.sign * getattr(self.args, f"lambda_{name}") * terms[f"l_{name}"]
                            for name, term in TERMS.items())
        return terms
