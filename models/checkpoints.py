"""Networks from and to checkpoint files."""

from datasets.partition import Partition
from models.architectures import ARCHITECTURES, build_network, put_rows, split_network
from models.pruning import narrow_like
from models.recover import MERGE_RULES, RecoverNetwork
from utils.checkpoint import load_checkpoint, load_into
from utils.errors import UserError


def describe(arch, classes, partition):
    """The entries that every checkpoint of a network has: what the file fits."""
    return {"arch": arch, "classes": list(classes), "partition": partition.as_dict()}


def read(path, kind):
    """Load and check a checkpoint of a network: (its content, its Partition). Raises UserError as load_checkpoint does,
    and for what other versions of this project wrote."""
    content = load_checkpoint(path, kind)
    partition = Partition.from_dict(content["partition"], f"what {path} holds",
                                    "another version of this project wrote it, so make it anew in another --save_path")
    if content["kind"] in ("target", "recover") and "away" not in content:
        raise UserError(f"{path} was written before deposits had names: deposit again in another --save_path")
    if content["arch"] not in ARCHITECTURES:
        raise UserError(f"{path} names the architecture '{content['arch']}', which is unknown here; "
                        f"there are {', '.join(ARCHITECTURES)}")
    return content, partition


def refuse_two_branches(content, path):
    """Raise UserError when a checkpoint's network is a recover network of two branches."""
    if content.get("merge", "difference") != "difference":
        raise UserError(f"{path} is a network of two branches: withdraw again with --merge difference, which gives a "
                        f"plain one")


def network_of(content, partition, path):
    """The whole network (stem .. head) of a checkpoint that holds one, in eval mode. Raises UserError for a recover
    network of two branches."""
    refuse_two_branches(content, path)
    network = build_network(content["arch"], len(content["classes"]), partition.image_size)
    load_into(network, content["tensors"], path)
    return network.eval()


def cut(content, partition, path):
    """(lower part, upper part) of the network in a target's or recover network's checkpoint, in eval mode."""
    return split_network(network_of(content, partition, path), content["split_at"])


def read_deposit(path, target_path, content, partition, upper=None):
    """T_r of deposit.pt, in eval mode, for the target file that `read` gave as (content, partition). An `upper` part
    gets the rows of the last layer that the file holds, in place. Raises UserError for the file of another target."""
    deposit = load_checkpoint(path, "deposit")
    if deposit["target"] != content["checksum"]:
        raise UserError(f"{path} does not belong to {target_path} (another deposit wrote it): name the files of one "
                        f"deposit")
    lower, _ = _parts(content, partition)
    tensors = dict(deposit["tensors"])
    rows = tensors.pop("rows", None)
    load_into(narrow_like(lower, tensors), tensors, path)
    if upper is not None and rows is not None:
        put_rows(upper[-1].fc, partition.deposit_classes, rows, path)
    return lower.eval()


def _parts(content, partition):
    """(lower part, upper part) of a fresh network of a target's or recover network's kind."""
    network = build_network(content["arch"], partition.num_classes, partition.image_size)
    return split_network(network, content["split_at"])


def require_original(content, path, original, original_path):
    """Raise UserError unless a target or recover file stems from the T0 of an original file; content, original: what
    `read` gave of them."""
    if content["original"].split("/")[0] != original["checksum"]:
        raise UserError(f"{path} was made from another original than {original_path}: name its own")


def load_network(path):
    """The network in a checkpoint of one (all kinds but deposit, difference and state), in eval mode, ready for
    ``network(datasets.batches.normalise(images, partition.mean, partition.std))``.

    Returns (network, partition). Raises UserError as :func:`utils.checkpoint.load_checkpoint` does.
    """
    content, partition = read(path, ("original", "independent", "retrained", "target", "recover", "student"))
    merge = content.get("merge", "difference")
    if merge == "difference":
        return network_of(content, partition, path), partition
    if merge not in MERGE_RULES:
        raise UserError(f"{path} was merged by '{merge}', which is no rule any more: withdraw again")
    (target, upper), (deposit, _) = _parts(content, partition), _parts(content, partition)
    network = RecoverNetwork(target, deposit, upper, partition.deposit_classes, merge)
    load_into(narrow_like(network, content["tensors"]), content["tensors"], path)
    return network.eval(), partition
