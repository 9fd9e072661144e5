"""Networks from and to checkpoint files."""

from datasets.partition import Partition
from models.architectures import ARCHITECTURES, build_network, split_network
from models.difference import BITS, decode, shifted
from models.pruning import shape_like
from models.recover import MERGE_RULES, RecoverNetwork
from utils.checkpoint import load_checkpoint, load_into
from utils.errors import UserError


def describe(arch, classes, partition, **more):
    """The entries that every checkpoint of a network has: what the file fits."""
    return {"arch": arch, "classes": list(classes), "partition": partition.as_dict(), **more}


def damaged(path, reason):
    """The UserError of a file that does not hold what its stage writes."""
    return UserError(f"{path} is damaged ({reason}): write it again")


def read(path, kind):
    """Load and check a checkpoint of a network: (its content, its Partition)."""
    content = load_checkpoint(path, kind)
    partition = Partition.from_dict(content.get("partition") or {}, path)
    classes = content.get("classes")
    if not isinstance(classes, list) or not classes or classes != [
            c for c in range(partition.num_classes) if c in classes]:
        raise damaged(path, "its classes do not fit its partition")
    if content.get("arch") not in list(ARCHITECTURES):  # a list, since a hostile file may hold an unhashable value
        raise UserError(f"{path} names the architecture '{content.get('arch')}', which is unknown here; "
                        f"there are {', '.join(ARCHITECTURES)}")
    return content, partition


def network_of(content, partition, path):
    """The whole network (stem .. head) of a checkpoint that holds one, in eval mode."""
    network = build_network(content["arch"], len(content["classes"]), partition.image_size)
    load_into(network, content["tensors"], path)
    return network.eval()


def cut(content, partition, path):
    """(lower part, upper part) of the network in a target checkpoint, in eval mode."""
    return split_network(network_of(content, partition, path), _number(content, "split_at", path))


def counts_of(content, path):
    """{split: {"correct", "total"}} of an original, independent or student checkpoint: its answers, a number a
    class."""
    counts = content.get("counts")
    try:
        if not {"test"} <= counts.keys() <= {"test", "val"}:  # these become names of files
            raise ValueError
        for of_split in counts.values():
            for row in (of_split["correct"], of_split["total"]):
                if len(row) != len(content["classes"]) or not all(type(n) is int and 0 <= n <= 10**8 for n in row):
                    raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise damaged(path, "its test counts do not fit its classes") from None
    return counts


def read_deposit(path, target_path, content, partition):
    """(T_r in eval mode, s) of deposit.pt, for the target file that `read` gave as (content, partition)."""
    deposit = load_checkpoint(path, "deposit")
    if deposit.get("target") != content["checksum"]:
        raise UserError(f"{path} does not belong to {target_path} (another deposit wrote it): name the files of one "
                        f"deposit")
    return _deposit_module(deposit["tensors"], content, partition, path), _number(deposit, "scale", path, float)


def away_of(content, partition, path):
    """{id of a deposit: its classes} of the deposits that are away from a target network."""
    away = content.get("away")
    try:
        classes = [c for of_deposit in away.values() for c in of_deposit]
        if sorted(classes) != partition.deposit_classes:
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise damaged(path, "its list of deposits does not fit its partition") from None
    return away


def read_difference(path, target_path, content, away, lower):
    """(id of the deposit, {name: D}) of difference.pt.

    content: of the target file from which the deposit is away; away: {id: classes} of what is away from it; lower: a
    lower part of its kind. Raises UserError when the deposit is of another T0 or cut, or not away.
    """
    difference = load_checkpoint(path, "difference")
    bits, data, name = difference.get("bits"), difference["tensors"].get("difference"), difference.get("id")
    if difference.get("original") != content.get("original") or name not in away:
        raise UserError(f"{path} does not belong to {target_path}: it is of another original or cut, or not away from "
                        f"this network")
    try:
        if bits not in BITS or len(difference["tensors"]) != 1:
            raise ValueError("its bits or its tensors are not those of a difference")
        return name, decode(data, lower.state_dict(), bits)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged(path, str(error)) from None


def give_back(path, target_path, content, away, lower):
    """Add the difference in a file to `lower`, in place, and take its deposit off `away`; see read_difference."""
    name, difference = read_difference(path, target_path, content, away, lower)
    lower.load_state_dict(shifted(lower.state_dict(), difference, 1))
    del away[name]


def _number(content, name, path, kind=int):
    value = content.get(name)
    if type(value) is not kind or not 0 < value < 1e6:
        raise damaged(path, f"its entry '{name}' is missing or out of range")
    return value


def _deposit_module(tensors, content, partition, path):
    """T_r, whose pruned widths are those of its tensors, in eval mode."""
    full = build_network(content["arch"], partition.num_classes, partition.image_size)
    lower, _ = split_network(full, _number(content, "split_at", path))
    load_into(shape_like(lower, tensors, path), tensors, path)
    return lower.eval()


def load_network(path):
    """The network in a checkpoint of one (all kinds but deposit, difference and state), in eval mode, ready for
    ``network(datasets.batches.normalise(images, partition.mean, partition.std))``.

    Returns (network, partition). Raises UserError as :func:`utils.checkpoint.load_checkpoint` does.
    """
    content, partition = read(path, ("original", "independent", "retrained", "target", "recover", "student"))
    merge = content.get("merge", "difference")
    if merge == "difference":
        return network_of(content, partition, path), partition
    if merge not in list(MERGE_RULES):
        raise damaged(path, "its merge rule is unknown")
    parts = {"target": {}, "deposit": {}, "upper": {}}
    for name, tensor in content["tensors"].items():
        branch, _, rest = name.partition(".")
        parts.setdefault(branch, {})[rest] = tensor
    deposit = _deposit_module(parts["deposit"], content, partition, path)
    lower, upper = split_network(build_network(content["arch"], partition.num_classes, partition.image_size),
                                 content["split_at"])
    network = RecoverNetwork(lower, deposit, upper, partition.preserved_classes, partition.deposit_classes, merge,
                             _number(content, "scale", path, float))
    load_into(network, content["tensors"], path)
    return network.eval(), partition
