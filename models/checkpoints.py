"""Networks from and to checkpoint files."""

from datasets.partition import Partition
from models.architectures import ARCHITECTURES, build_network, split_network
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
    return split_network(network_of(content, partition, path), number_of(content, "split_at", path))


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
    return _deposit_module(deposit["tensors"], content, partition, path), number_of(deposit, "scale", path, float)


def number_of(content, name, path, kind=int):
    value = content.get(name)
    if type(value) is not kind or not 0 < value < 1e6:
        raise damaged(path, f"its entry '{name}' is missing or out of range")
    return value


def _deposit_module(tensors, content, partition, path):
    """T_r, whose pruned widths are those of its tensors, in eval mode."""
    full = build_network(content["arch"], partition.num_classes, partition.image_size)
    lower, _ = split_network(full, number_of(content, "split_at", path))
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
                             number_of(content, "scale", path, float))
    load_into(network, content["tensors"], path)
    return network.eval(), partition
