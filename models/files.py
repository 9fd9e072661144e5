"""Networks from and to checkpoint files."""

import math

from datasets.partition import Partition
from models.deposit import shape_like
from models.recover import MERGE_RULES, Calibration, RecoverNetwork
from models.resnet import ARCHITECTURES, build_network, split_network
from utils.checkpoint import load_checkpoint, load_into
from utils.errors import UserError


def describe(arch, classes, partition, **more):
    """The entries that every checkpoint of a network has: what the file fits."""
    return {"arch": arch, "classes": list(classes), "partition": partition.as_dict(), **more}


def read(path, kind):
    """Load and check a checkpoint of a network: (its content, its Partition)."""
    content = load_checkpoint(path, kind)
    partition = Partition.from_dict(content.get("partition") or {}, path)
    classes = content.get("classes")
    if not isinstance(classes, list) or not classes or classes != [
            c for c in range(partition.num_classes) if c in classes]:
        raise UserError(f"{path} is damaged (its classes do not fit its partition): write it again")
    if content.get("arch") not in list(ARCHITECTURES):  # a list: of a hostile file it may be of any type
        raise UserError(f"{path} names the architecture '{content.get('arch')}', which is unknown here; "
                        f"there are {', '.join(ARCHITECTURES)}")
    return content, partition


def network_of(content, partition, path):
    """The whole network (stem .. head) of an original, independent or target checkpoint, in eval mode."""
    network = build_network(content["arch"], len(content["classes"]), partition.image_size)
    load_into(network, content["tensors"], path)
    return network.eval()


def deposit_module_of(content, partition, path):
    """The deposit module T_r of a deposit checkpoint, in eval mode."""
    module = _empty_lower(content, partition, path)
    load_into(shape_like(module, content["tensors"], path), content["tensors"], path)
    return module.eval()


def counts_of(content, path):
    """{split: {"correct", "total"}} of an original, independent or student checkpoint: its answers, a number a
    class."""
    counts = content.get("counts")
    try:
        if not {"test"} <= counts.keys() <= {"test", "val"}:  # they become names of files
            raise ValueError
        for of_split in counts.values():
            for row in (of_split["correct"], of_split["total"]):
                if len(row) != len(content["classes"]) or not all(type(n) is int and 0 <= n <= 10**8 for n in row):
                    raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged (its test counts do not fit its classes): write it again") from None
    return counts


def calibration_of(content, path):
    """The Calibration in a deposit or recover checkpoint."""
    numbers = content.get("calibration")
    try:
        calibration = Calibration(**numbers)
        if not all(isinstance(n, float) and math.isfinite(n) for n in calibration) or calibration.scale <= 0:
            raise TypeError
    except TypeError:
        raise UserError(f"{path} is damaged (its calibration is no pair of numbers): write it again") from None
    return calibration


def load_network(path):
    """The network in an original, independent, target or recover checkpoint, in eval mode, ready for
    ``network(datasets.batches.normalise(images, partition.mean, partition.std))``.

    Returns (network, partition). Raises UserError as :func:`utils.checkpoint.load_checkpoint` does.
    """
    content, partition = read(path, ("original", "independent", "target", "recover"))
    if content["kind"] != "recover":
        return network_of(content, partition, path), partition
    if content.get("merge") not in list(MERGE_RULES):
        raise UserError(f"{path} is damaged (its merge rule is unknown): write it again")
    full = build_network(content["arch"], partition.num_classes, partition.image_size)
    target, upper = split_network(full, split_of(content, path))
    part = {name[len("deposit."):]: t for name, t in content["tensors"].items() if name.startswith("deposit.")}
    deposit = shape_like(_empty_lower(content, partition, path), part, path)
    network = RecoverNetwork(target, deposit, upper, partition.preserved_classes, partition.deposit_classes,
                             content["merge"], calibration_of(content, path))
    load_into(network, content["tensors"], path)
    return network.eval(), partition


def split_of(content, path):
    """n, the block after which the network in a target, deposit or recover checkpoint was cut."""
    split_at = content.get("split_at")
    if type(split_at) is not int:
        raise UserError(f"{path} is damaged (its split point is missing): write it again")
    return split_at


def _empty_lower(content, partition, path):
    full = build_network(content["arch"], partition.num_classes, partition.image_size)
    return split_network(full, split_of(content, path))[0]
