"""Recovery against bytes: what must be kept beside T to get the deposit classes back, and how well it gives T0 back.

For finished runs it measures ways to keep the same knowledge in one pass: the difference of the weights at several
numbers of bits, kept sparse or at low rank, the deposit module T_r at 8 bits, T0's own lower part and, as a
reference that breaks the constraint, a few images of D_r on which T is fine-tuned. Bytes are those of whole files,
up to a few that name the deposit."""

import copy
import io
import itertools
import os
import tempfile
import zlib

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from datasets import batches, evaluation_batches, first_images, load_images
from datasets.batches import pixels_of
from models import losses
from models.architectures import join_network, split_network
from models.checkpoints import cut, network_of, read, read_deposit, require_original
from models.difference import between, decode, encode, quantise, shifted
from models.recover import RecoverNetwork
from utils.checkpoint import save_checkpoint
from utils.cli import add_running_args, make_parser, path, prefix, run
from utils.errors import UserError
from utils.files import load_json, save_json
from utils.metrics import evaluate, metrics_path, percent, table1
from utils.optim import take_step
from utils.runtime import Runtime
from utils.tables import above, markdown, print_table, summary

BITS, SHARES, IMAGES = (16, 8, 6, 4, 3, 2), (0.25, 0.1, 0.05), (1, 5, 25, 125)
STEPS, RATE = 50, 3e-3  # of fine-tuning on kept images


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=path, nargs="+", required=True,
                        help="folders of finished deposits, a draw each")
    parser.add_argument("--original", type=path, required=True, help="T0 of all of them")
    parser.add_argument("--pruned", type=path, nargs="*", default=[],
                        help="metrics.json (held-out images: metrics_val.json) of deposits whose T_r, as it is, is "
                             "a point: those of --runs and of other pruning ratios")
    parser.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    parser.add_argument("--eval_split", choices=["test", "val"], default="test", help="images to measure on")
    parser.add_argument("--out", type=prefix, default=os.path.join("checkpoints", "recovery"),
                        help="files without their ending: gets .json, .md and .png")
    add_running_args(parser, seed="draws the images that are kept, their order and augmentation", precision=False)
    return parser


def file_size(tensors):
    """Bytes of a checkpoint file that holds these tensors and names its target."""
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, "kept.pt")
        save_checkpoint(name, "difference", tensors, bits=4, target="0" * 64)
        return os.path.getsize(name)


def as_bytes(*arrays):
    """One uint8 tensor of the bytes of arrays and byte strings."""
    parts = [part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes() for part in arrays]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def split_entries(original, target):
    """({name: Δ} of the convolutions, the bytes that the difference takes for all else, {name: Δ rounded} of that)."""
    vectors = {name: t for name, t in target.items() if t.is_floating_point() and t.dim() < 2}
    data = encode(original, vectors, 16)
    matrices = {name: d for name, d in between(original, target).items() if d.dim() > 1}
    return matrices, data, decode(data, vectors, 16)


def sparse(original, target, share):
    """(bytes, {name: Δ}) of the largest `share` of Δ's entries, 8 bits each, their places as a compressed bitmap."""
    matrices, data, found = split_entries(original, target)
    sizes = torch.cat([d.abs().flatten() for d in matrices.values()])
    least = sizes.kthvalue(int(len(sizes) * (1 - share))).values
    parts = [data.numpy()]
    for name, d in matrices.items():
        kept = d.abs() > least
        numbers, scale = quantise(torch.where(kept, d, 0).flatten(1), 127)
        parts += [zlib.compress(np.packbits(kept.numpy()).tobytes(), 9), scale.numpy(),
                  numbers.view(d.shape)[kept].to(torch.int8).numpy()]
        found[name] = (numbers * scale).view(d.shape)
    return file_size({"kept": as_bytes(*parts)}), found


def low_rank(original, target, share):
    """(bytes, {name: Δ}) of the best approximation of each convolution's Δ, as out x (in * k^2), at `share` of its
    rank, factors in 16 bits."""
    matrices, data, found = split_entries(original, target)
    parts = [data.numpy()]
    for name, d in matrices.items():
        u, s, v = torch.linalg.svd(d.flatten(1), full_matrices=False)
        rank = max(1, round(share * len(s)))
        left, right = (u[:, :rank] * s[:rank]).half(), v[:rank].half()
        parts += [left.numpy(), right.numpy()]
        found[name] = (left.float() @ right.float()).view(d.shape)
    return file_size({"kept": as_bytes(*parts)}), found


def rounded_module(module, bits):
    """(bytes, the module with its weights rounded as the difference's are)."""
    state = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    nothing = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    data = encode(state, nothing, bits)
    module = copy.deepcopy(module)
    module.load_state_dict({**state, **shifted(nothing, decode(data, nothing, bits), 1)})
    return file_size({"kept": data}), module


def finetuned(lower, upper, images, preserved, runtime):
    """lower_T trained on a few images of D_r, with KD to T on the preserved columns and batch norm frozen."""
    student = copy.deepcopy(lower).requires_grad_(True).eval()
    optimizer = torch.optim.SGD(student.parameters(), RATE, 0.9)
    for step in range(STEPS):
        x, y = next(iter(batches(images, 32, generator=runtime.generator(step))))
        with torch.no_grad():
            z_t = upper(lower(x))
        z = upper(student(x))
        loss = torch.nn.functional.cross_entropy(z, y) + losses.knowledge_preserving(z, z_t, preserved, 4.0)
        take_step(optimizer, loss, RATE, 5.0)
    return student.requires_grad_(False)


def png_bytes(images):
    """Bytes of the images of an ImageSet as PNG files."""
    total = 0
    for pixels in pixels_of(images.images, torch.arange(len(images))).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png", optimize=True)
        total += buffer.tell()
    return total


def read_target(folder, original, original_path):
    """(path of target.pt, its content, its Partition) of a deposit of T0, whose file holds `original`. Raises UserError
    for one of another T0 or whose forms cannot all be made."""
    target_path = os.path.join(folder, "target.pt")
    content, partition = read(target_path, "target")
    require_original(content, target_path, original, original_path)
    if len(content["away"]) > 1:
        raise UserError(f"{folder} is one of several deposits of a network: name a deposit that stands alone")
    if content["settings"].get("last_layer", "shared") != "shared":
        raise UserError(f"{folder}: T's last layer is not T0's, which all forms here need: name a deposit of "
                        f"--last_layer shared")
    return target_path, content, partition


def points_of(target_path, content, partition, original, args, runtime):
    """{form: {"bytes", "above", "h_mean"}} of one deposit, as read_target gives it, of the network `original`. above:
    Avg Acc of T~ less that of T0, for the T of the file. h_mean: H Mean of the T that is T0 less what is kept, from
    which the form gives T0 back exactly."""
    lower, upper = cut(content, partition, target_path)
    deposit_path = os.path.join(os.path.dirname(target_path), "deposit.pt")
    deposit = read_deposit(deposit_path, target_path, content, partition)
    lower_0, _ = split_network(original, content["split_at"])
    target, whole = lower.state_dict(), lower_0.state_dict()
    sizes, lowers, targets = {}, {}, {}

    def add(form, size, difference):
        sizes[form], lowers[form], targets[form] = size, copy.deepcopy(lower), copy.deepcopy(lower)
        lowers[form].load_state_dict(shifted(target, difference, 1))
        targets[form].load_state_dict(shifted(whole, difference, -1))

    for bits in BITS:
        data = encode(whole, target, bits)
        add(f"difference, {bits} bits", file_size({"difference": data}), decode(data, target, bits))
    for share in SHARES:
        add(f"difference, largest {share:.0%}", *sparse(whole, target, share))
        add(f"difference, rank {share:.0%}", *low_rank(whole, target, share))
    sizes["T0 whole, 32 bits"], lowers["T0 whole, 32 bits"] = file_size(original.state_dict()), lower_0
    for bits in (16, 8, 4):  # T has T0's upper part, so this is all that T0 needs
        form = f"lower part of T0, {bits} bits"
        sizes[form], lowers[form] = rounded_module(lower_0, bits)
    sizes["T_r rounded, 8 bits"], rounded_deposit = rounded_module(deposit, 8)
    networks = {"T0": original, **{form: join_network(part, upper) for form, part in lowers.items()},
                **{f"T, {form}": join_network(part, upper) for form, part in targets.items()},
                "T_r rounded, 8 bits": RecoverNetwork(lower, rounded_deposit, upper, partition.deposit_classes,
                                                      "concat")}
    for network in networks.values():
        runtime.place(network).requires_grad_(False)
    images = load_images(partition, args.data_dir, "train", partition.deposit_classes)
    preserved = torch.tensor(partition.preserved_classes, device=runtime.device)
    fewest = images.labels.unique(return_counts=True)[1].min()
    for count in (count for count in IMAGES if count <= fewest):
        kept = first_images(images, count, args.seed)
        form = f"{count} images a class (trains)"
        sizes[form] = png_bytes(kept)
        networks[form] = join_network(finetuned(lower, upper, kept.to(runtime.device), preserved, runtime), upper)
    shown = load_images(partition, args.data_dir, args.eval_split, partition.classes("all")).to(runtime.device)
    counts = evaluate(lambda x, y: {name: network(x) for name, network in networks.items()}, evaluation_batches(shown),
                      partition.num_classes)
    reference = percent(counts["T0"])
    h_mean = {form: table1(counts[f"T, {form}"], partition, counts["T0"])["h_mean"] for form in targets}
    return {form: {"bytes": sizes[form], "above": percent(counts[form]) - reference, "h_mean": h_mean.get(form)}
            for form in sizes}


def pruned_points(paths, split):
    """{form: [{"bytes", "above"}]} of the T_r of other deposits, metrics files <preset>_<ratio>/seed<k>/<file>. Raises
    UserError where one is not of the split."""
    forms = {}
    for name in map(os.path.abspath, paths):
        metrics, deposit = load_json(name), name.split(os.sep)[-3].replace("_", ", pruned ")
        if "concat" not in metrics.get("recover", {}):
            raise UserError(f"{name} has no withdrawal by concat: run withdraw.py of that deposit")
        if os.path.basename(name) != metrics_path("", split):
            raise UserError(f"{name} is not of --eval_split {split}: name each deposit's {metrics_path('', split)}")
        size = os.path.getsize(os.path.join(os.path.dirname(name), "deposit.pt"))
        forms.setdefault(f"T_r of {deposit}", []).append({"bytes": size, "above": above(metrics, "concat")})
    return forms


def plot(rows, out):
    """Bytes against recovery, a line a family of forms."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_yscale("symlog", linthresh=1)  # before the points: their margins are of the scale at that time
    families = {}
    for form, row in rows.items():
        family = "images kept (trains)" if "images" in form else form.split(",")[0]
        if "largest" in form or "rank" in form:
            family = "difference, " + form.split(", ")[1].split()[0]
        families.setdefault(family, []).append((row["KB"]["mean"], row["Avg - Original"]["mean"]))
    for marker, (family, points) in zip(itertools.cycle("osD^vPX*h<>"), families.items()):
        x, y = zip(*sorted(points))
        axes.plot(x, y, marker=marker, label=family, linestyle="--" if "trains" in family else "-")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="kept beside T (KB, whole file)", ylabel="Avg Acc of T~ minus that of T0 (points)")
    axes.legend(fontsize=8)
    figure.savefig(f"{out}.png", dpi=150)
    plt.close(figure)


def recovery_rows(result):
    """{form: {column: summary}}, few bytes first, of what `main` writes: "points", {form: point} of each draw, and
    "pruned"."""
    points, forms = result["points"], dict(result["pruned"])
    for form in points[0]:
        if all(form in of_draw for of_draw in points):
            forms[form] = [of_draw[form] for of_draw in points]
    rows = {form: {"KB": summary([point["bytes"] / 1000 for point in of_form]),
                   "Avg - Original": summary([point["above"] for point in of_form]),
                   "H Mean of T if exact": summary([point.get("h_mean") for point in of_form])}
            for form, of_form in forms.items()}
    return dict(sorted(rows.items(), key=lambda row: row[1]["KB"]["mean"]))


def main(args):
    runtime = Runtime.of(args)
    content, partition = read(args.original, "original")
    original = network_of(content, partition, args.original)
    targets = [read_target(folder, content, args.original) for folder in args.runs]
    pruned = pruned_points(args.pruned, args.eval_split)
    points = [points_of(*target, copy.deepcopy(original), args, runtime) for target in targets]
    result = {**runtime.describe(), "split": args.eval_split, "points": points, "pruned": pruned}
    save_json(f"{args.out}.json", result)
    rows = recovery_rows(result)
    plot(rows, args.out)
    print_table(markdown(rows, "kept beside T"), f"{args.out}.md")


if __name__ == "__main__":
    run(main, get_args_parser())
