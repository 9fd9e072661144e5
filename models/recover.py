"""Withdraw: the recover network T~ and the rules that merge T's logits with the deposit branch's.

Below, z_T and z_Tr are logits (b, classes) of the target network and of upper(T_r(x)), g and g-bar
the filters of the preserved and of the deposit classes, and scale the number s of `spread_ratio`.
"""

import torch
from torch import nn

from utils.losses import select


def concat(z_t, z_r, preserved, deposit, scale):
    """z_T~ = [g(z_T), g-bar(z_Tr)]: the paper's equation. Preserved columns from T, deposit columns from T_r."""
    return z_t.index_copy(1, deposit, select(z_r, deposit).to(z_t.dtype))


def calibrated(z_t, z_r, preserved, deposit, scale):
    """z_T~ = [(s g(z_T) + g(z_Tr)) / 2, g-bar(z_Tr)]: ours. T's preserved columns are brought to T0's scale
    and averaged with the deposit branch's, so that both blocks are measured with one rule."""
    merged = (scale * select(z_t, preserved) + select(z_r, preserved)) / 2
    return z_r.index_copy(1, preserved, merged.to(z_r.dtype))


def total(z_t, z_r, preserved, deposit, scale):
    """z_T~ = z_T + z_Tr for every input and every class."""
    return z_t + z_r


# One rule for every input: each can be a recover network.
MERGE_RULES = {"concat": concat, "calibrated": calibrated, "sum": total}


def released(z_t, z_r, preserved, deposit, scale, labels):
    """The authors' evaluation: `concat` where the true label is a deposit class, `sum` elsewhere.
    It reads the label, so it is no classifier and cannot be a network."""
    in_deposit = torch.isin(labels, deposit)[:, None]
    return torch.where(in_deposit, concat(z_t, z_r, preserved, deposit, scale),
                       total(z_t, z_r, preserved, deposit, scale))


def spread_ratio(original_logits, target_logits, preserved):
    """s = spread of g(z_0) / spread of g(z_T), over images of D_r.

    Spread: root mean square, over images, of the deviation of an image's preserved logits from their
    own mean. L_kp is blind to exactly this scale; s gives it back. Logits (n, classes) -> float.
    """
    spreads = [(z - z.mean(1, keepdim=True)).square().mean().sqrt()
               for z in (select(original_logits.double(), preserved), select(target_logits.double(), preserved))]
    return (spreads[0] / spreads[1].clamp_min(1e-12)).item()


class RecoverNetwork(nn.Module):
    """T~: images (b, 3, s, s) -> logits (b, classes), by one merge rule for all inputs.

    target: lower part of T; deposit: T_r; upper: the part that both share.
    preserved_classes, deposit_classes: lists of class ids; merge: a key of MERGE_RULES; scale: s.
    """

    def __init__(self, target, deposit, upper, preserved_classes, deposit_classes, merge, scale):
        super().__init__()
        self.target, self.deposit, self.upper = target, deposit, upper
        self.merge, self.scale = merge, scale
        self.register_buffer("preserved", torch.tensor(preserved_classes), persistent=False)
        self.register_buffer("deposited", torch.tensor(deposit_classes), persistent=False)

    def branches(self, x):
        """(z_T, z_Tr): logits of the target network and of the deposit branch."""
        return self.upper(self.target(x)), self.upper(self.deposit(x))

    def merged(self, z_t, z_r, merge=None):
        """The recover logits under a rule of MERGE_RULES (this network's own when None)."""
        return MERGE_RULES[merge or self.merge](z_t, z_r, self.preserved, self.deposited, self.scale)

    def forward(self, x):
        return self.merged(*self.branches(x))
