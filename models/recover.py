"""Withdraw: the recover network T~ and the rules that merge T's logits with the deposit branch's.

Below, z_T and z_Tr are logits (b, classes) of the target network and of upper(T_r(x)), and g and g-bar
the filters of the preserved and of the deposit classes.
"""

from typing import NamedTuple

import torch
from torch import nn

from utils.losses import select


class Calibration(NamedTuple):
    """What the deposit measures of T on D_r, for the rules that need it.

    scale: s of `spread_ratio`; margin: m, the mean of `preserved_margin`.
    """

    scale: float
    margin: float

    def __str__(self):
        return f"scale s = {self.scale:.3f}, margin m = {self.margin:.3f}"


def spread_ratio(original_logits, target_logits, preserved):
    """s = spread of g(z_0) / spread of g(z_T), over images of D_r.

    Spread: root mean square, over images, of the deviation of an image's preserved logits from their
    own mean. L_kp is blind to exactly this scale; s gives it back. 1 where there is no spread, as of a single
    preserved class. Logits (n, classes) -> float.
    """
    spreads = [(z - z.mean(1, keepdim=True)).square().mean().sqrt()
               for z in (select(original_logits.double(), preserved), select(target_logits.double(), preserved))]
    return (spreads[0] / spreads[1]).item() if all(spreads) else 1.0


def preserved_margin(logits, preserved, deposit):
    """LSE(g(z)) - LSE(g-bar(z)): log odds, by a network's own word, that an image is of a preserved
    class. Logits (n, classes) -> (n, 1)."""
    return select(logits, preserved).logsumexp(1, keepdim=True) - select(logits, deposit).logsumexp(1, keepdim=True)


def branch(z_t, z_r, preserved, deposit, calibration):
    """z_T~ = z_Tr: a control, not a withdrawal. What the deposit module knows of all classes without T."""
    return z_r


def concat(z_t, z_r, preserved, deposit, calibration):
    """z_T~ = [g(z_T), g-bar(z_Tr)]: the paper's equation. Preserved columns from T, deposit columns from T_r."""
    return z_t.index_copy(1, deposit, select(z_r, deposit).to(z_t.dtype))


def scaled(z_t, z_r, preserved, deposit, calibration):
    """z_T~ = [s g(z_T), g-bar(z_Tr)]: ours. `concat` with T's preserved columns brought to T0's scale."""
    return z_r.index_copy(1, preserved, (calibration.scale * select(z_t, preserved)).to(z_r.dtype))


def calibrated(z_t, z_r, preserved, deposit, calibration):
    """z_T~ = [(s g(z_T) + g(z_Tr)) / 2, g-bar(z_Tr)]: ours. `scaled`, the preserved columns averaged with
    the deposit branch's, so that both blocks are measured with one rule."""
    merged = (calibration.scale * select(z_t, preserved) + select(z_r, preserved)) / 2
    return z_r.index_copy(1, preserved, merged.to(z_r.dtype))


# Weight of T's verdict in `evidence`: our choice, no log compares it with another.
EVIDENCE = 0.5


def evidence(z_t, z_r, preserved, deposit, calibration):
    """`calibrated`, with EVIDENCE (d - m) added to the preserved columns: ours.

    d = `preserved_margin` of z_T. T answers at random where the image is of a deposit class and for the
    preserved classes elsewhere, so d tells the two apart; less m, its mean on D_r, it is neutral there.
    """
    z = calibrated(z_t, z_r, preserved, deposit, calibration)
    verdict = EVIDENCE * (preserved_margin(z_t.float(), preserved, deposit) - calibration.margin)
    return z.index_copy(1, preserved, (select(z, preserved) + verdict).to(z.dtype))


def total(z_t, z_r, preserved, deposit, calibration):
    """z_T~ = z_T + z_Tr for every input and every class."""
    return z_t + z_r


# One rule for every input: each can be a recover network.
MERGE_RULES = {"concat": concat, "scaled": scaled, "calibrated": calibrated, "evidence": evidence, "sum": total,
               "branch": branch}


def released(z_t, z_r, preserved, deposit, calibration, labels):
    """The authors' evaluation: `concat` where the true label is a deposit class, `sum` elsewhere.
    It reads the label, so it is no classifier and cannot be a network."""
    in_deposit = torch.isin(labels, deposit)[:, None]
    return torch.where(in_deposit, concat(z_t, z_r, preserved, deposit, calibration),
                       total(z_t, z_r, preserved, deposit, calibration))


class RecoverNetwork(nn.Module):
    """T~: images (b, 3, s, s) -> logits (b, classes), by one merge rule for all inputs.

    target: lower part of T; deposit: T_r; upper: the part that both share.
    preserved_classes, deposit_classes: lists of class ids; merge: a key of MERGE_RULES;
    calibration: a Calibration.
    """

    def __init__(self, target, deposit, upper, preserved_classes, deposit_classes, merge, calibration):
        super().__init__()
        self.target, self.deposit, self.upper = target, deposit, upper
        self.merge, self.calibration = merge, calibration
        self.register_buffer("preserved", torch.tensor(preserved_classes), persistent=False)
        self.register_buffer("deposited", torch.tensor(deposit_classes), persistent=False)

    def branches(self, x):
        """(z_T, z_Tr): logits of the target network and of the deposit branch."""
        return self.upper(self.target(x)), self.upper(self.deposit(x))

    def merged(self, z_t, z_r, merge=None):
        """The recover logits under a rule of MERGE_RULES (this network's own when None)."""
        return MERGE_RULES[merge or self.merge](z_t, z_r, self.preserved, self.deposited, self.calibration)

    def forward(self, x):
        return self.merged(*self.branches(x))
