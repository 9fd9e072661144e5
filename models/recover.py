"""Withdraw: the recover network T~ and the rules that merge T's logits with the deposit branch's.

Below, z_T and z_Tr are logits (b, classes) of the target network and of upper(T_r(x)), and g and g-bar the filters of
the preserved and of the deposit classes. A rule is one for every input: it gets z_T, z_Tr and the ids of the deposit
classes (1-D, int64).
"""

import torch
from torch import Tensor, nn


def concat(z_t: Tensor, z_r: Tensor, deposited: Tensor) -> Tensor:
    """z_T~ = [g(z_T), g-bar(z_Tr)]: the paper's equation. Preserved columns from T, deposit columns from T_r."""
    return z_t.index_copy(1, deposited, z_r.index_select(1, deposited).to(z_t.dtype))


def total(z_t: Tensor, z_r: Tensor, deposited: Tensor) -> Tensor:
    """z_T~ = z_T + z_Tr for every input and every class."""
    return z_t + z_r


def tr_alone(z_t: Tensor, z_r: Tensor, deposited: Tensor) -> Tensor:
    """z_T~ = z_Tr: a control, not a withdrawal. What the deposit module knows of all classes without T."""
    return z_r


MERGE_RULES = {"concat": concat, "sum": total, "tr_alone": tr_alone}


def released(z_t, z_r, deposited, labels):
    """The authors' evaluation: `concat` where the true label is a deposit class, `sum` elsewhere.
    It reads the label, so it is no classifier and cannot be a network."""
    in_deposit = torch.isin(labels, deposited)[:, None]
    return torch.where(in_deposit, concat(z_t, z_r, deposited), total(z_t, z_r, deposited))


class RecoverNetwork(nn.Module):
    """T~ of two branches: images (b, 3, s, s) -> logits (b, classes), by one merge rule for all inputs.

    target: lower part of T; deposit: T_r; upper: the part that both share.
    deposit_classes: list of class ids; merge: a key of MERGE_RULES.
    """

    def __init__(self, target, deposit, upper, deposit_classes, merge):
        super().__init__()
        self.target, self.deposit, self.upper = target, deposit, upper
        self.rule = MERGE_RULES[merge]  # looked up here, so that torch.jit.script can take the network
        self.register_buffer("deposited", torch.tensor(deposit_classes), persistent=False)

    def forward(self, x):
        z_t, z_r = self.upper(self.target(x)), self.upper(self.deposit(x))
        return self.rule(z_t, z_r, self.deposited)
