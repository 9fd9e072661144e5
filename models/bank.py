"""The bank: deposits that are away from a target network, each a difference, perhaps with rows of the last layer, that
can be given back in any order.

Every deposit starts from T0. Whoever has not kept T0 rebuilds it from the target network and the bank: T0 is that
network with all of these given back.
"""

import copy
import glob
import os
from typing import NamedTuple

from torch import nn

from models.architectures import put_rows, split_network
from models.checkpoints import network_of, read
from models.difference import decode, shifted
from utils.checkpoint import load_checkpoint
from utils.errors import UserError


class Original(NamedTuple):
    """T0 as a deposit starts from it, and the deposits that are away already."""

    network: nn.Sequential
    split_at: int
    arch: str
    counts: dict  # of T0: {split: {"correct", "total"}}
    identity: str  # equal for deposits that belong together: checksum of T0's file, and the cut
    target: dict | None  # state_dict of T of the earlier deposits, if there are any
    away: dict  # {id: classes} of these

    def with_gone(self, partition):
        """The partition whose deposit classes are all that are away once `partition`'s are."""
        return partition.with_deposit(sorted({*classes_of(self.away), *partition.deposit_classes}))


def classes_of(away):
    """All classes of the deposits {id: classes} that are away, deposit after deposit."""
    return [c for classes in away.values() for c in classes]


def open_original(path, split_at=None):
    """(Original, its Partition) of original.pt; or of target.pt, or a recover.pt of --merge difference, with the
    differences of the deposits that are away from it, which lie in folders beside its own. split_at: the cut; None:
    after the last block. Raises UserError when a difference is missing, or the cut is impossible or another."""
    content, partition = read(path, ("original", "target", "recover"))
    network, target, away = network_of(content, partition, path), None, {}
    lower, upper = split_network(network, split_at)
    split_at = len(lower) - 1
    identity = f"{content['checksum']}/{split_at}"
    if content["kind"] != "original":
        identity, away = content["original"], dict(content["away"])
        if content["split_at"] != split_at:
            raise UserError(f"{path} is cut after block {content['split_at']}: deposits of one bank share "
                            f"--split_at")
        target, left = copy.deepcopy(network.state_dict()), dict(away)
        beside = os.path.join(glob.escape(os.path.dirname(os.path.abspath(path))), "..", "*", "difference.pt")
        unread = []
        for difference in sorted(glob.glob(beside)):
            if not left:
                break
            try:
                if load_checkpoint(difference, "difference").get("id") in left:
                    give_back(difference, path, content, left, lower, upper)
            except UserError as error:  # it may be of another bank
                unread.append(f" ({error})")
        if left:
            names = ", ".join(partition.class_names[c] for c in classes_of(left))
            raise UserError(f"the difference.pt of {names} is in no folder beside that of {path}: put it there, so "
                            f"that T0 can be rebuilt{''.join(unread)}")
    return Original(network, split_at, content["arch"], content["counts"], identity, target, away), partition


def read_difference(path, target_path, content, away, lower):
    """(id of the deposit, {name: Δ}, rows of the last layer or None) of difference.pt.

    content: of the target file from which the deposit is away; away: {id: classes} of what is away from it; lower: a
    lower part of its kind. Raises UserError when the deposit is of another T0 or cut, or not away.
    """
    difference = load_checkpoint(path, "difference")
    if difference.get("original") != content["original"] or difference.get("id") not in away:
        raise UserError(f"{path} does not belong to {target_path}: it is of another original or cut, or not away from "
                        f"this network")
    if difference.get("means") != "in deviations":
        raise UserError(f"{path} was written when batch norm's means were not yet kept in deviations: deposit again in "
                        f"another --save_path, or withdraw by T_r with this file moved away")
    tensors = difference["tensors"]
    try:
        decoded = decode(tensors["difference"], lower.state_dict(), difference["bits"])
    except ValueError as error:
        raise UserError(f"{path} does not fit its own description: {error}") from None
    return difference["id"], decoded, tensors.get("rows")


def give_back(path, target_path, content, away, lower, upper):
    """Add the difference in a file to `lower` and give `upper` the rows of the last layer that the file holds, both in
    place, and take its deposit off `away`; see read_difference."""
    deposit_id, difference, rows = read_difference(path, target_path, content, away, lower)
    if rows is not None:  # first, as the file may be refused here
        put_rows(upper[-1].fc, away[deposit_id], rows, path)
    lower.load_state_dict(shifted(lower.state_dict(), difference, 1))
    del away[deposit_id]
