"""What networks still know of the deposit classes, relative to R, which was retrained without them:
rho = (A_T - A_R) / (A_0 - A_R), 1 for a network that knows what T0 knows, 0 for one that knows what R knows. Fitted on
training images, reported on test images. A network is a file of T0's architecture, ours or of others; its figures are
kept beside it, as FILE_residual_<draw>.json, and not measured twice."""

import copy
import functools
import itertools
import os
import statistics
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from analysis import measures
from analysis.methods import print_tables, read_record
from analysis.recovery import as_bytes, file_size
from datasets import batches, evaluation_batches, first_images, load_images, read_partition
from datasets.batches import first_rows
from models.architectures import before_last_layer, build_network, split_network
from models.checkpoints import read, refuse_two_branches, require_original
from models.difference import BITS, decode, encode, shifted
from models.weights import load_weights, read_weights
from utils.checkpoint import checksum, is_ours, load_checkpoint
from utils.cli import add_running_args, bounded, make_parser, path, run
from utils.errors import UserError
from utils.files import load_json, save_json
from utils.metrics import count_correct, harmonic_mean, percent
from utils.optim import take_step
from utils.run import settings_of
from utils.runtime import Runtime

RATES, REPEATS = (1e-1, 1e-2, 1e-3), 5  # the attacker's learning rates, and how often each attack is made
SHOT_STEPS, KEPT_STEPS, CAP = (10, 50), (200,), 2000  # of k_shot and preserved_only; those at which relearn gives up
PER_CLASS = 1000  # training images for probes, prototypes, membership; at most those there are


class Known:
    """A network, T0's Known, the images that it is examined on, ImageSets of `image_sets`, and the rate at which R
    relearns, where that is known. split_at: n of the cut whose features are probed, None for the last block's; runtime:
    a Runtime, on whose device the images lie; name: what errors call the network."""

    def __init__(self, network, partition, images, split_at, runtime, original=None, relearn_rate=None,
                 name="the network"):
        self.network, self.partition, self.images, self.runtime = runtime.place(network), partition, images, runtime
        self.parts, self.original = split_network(self.network, split_at), original or self
        self.relearn_rate, self.name = relearn_rate, name
        self.features = functools.cache(self.features)

    @functools.cached_property
    def opened(self):
        """A copy for the attacks that train, in which no bias of D_r is below the least of the preserved classes': a
        masked class would get no gradient, and an attacker sees the mask. One rule for all networks."""
        network, deposited = copy.deepcopy(self.network), self.partition.deposit_classes
        with torch.no_grad():
            bias = network[-1].fc.bias
            bias[deposited] = bias[deposited].maximum(bias[self.partition.preserved_classes].min())
        return network

    @torch.no_grad()
    def features(self, split):
        """{"cut": the feature map at the cut, pooled to 2 x 2 (n, 4c), "last": what the last layer reads (n, d),
        "logits": (n, C), "y": (n,)} in float32, eval mode, no augmentation. Raises UserError for what is not finite."""
        (lower, upper), found = self.parts, {"cut": [], "last": [], "logits": [], "y": []}
        before_last = before_last_layer(upper)
        self.network.eval()
        for x, y in evaluation_batches(self.images[split]):
            f = lower(x)
            h = before_last(f)
            for name, part in zip(found, (F.adaptive_avg_pool2d(f, 2).flatten(1), h, upper[-1].fc(h), y)):
                found[name].append(part.cpu())
        found = {name: torch.cat(parts) for name, parts in found.items()}
        if not all(part.isfinite().all() for part in found.values()):
            raise UserError(f"{self.name} gives numbers that are not finite, so it has diverged: leave it out")
        return {name: part.numpy() for name, part in found.items()}

    def by(self, measure, place, *more):
        """A function of analysis.measures on features at "cut", "last" or "logits"."""
        sets = [self.features(split)[name] for split in ("train", "test") for name in (place, "y")]
        return measure(*sets, np.array(self.partition.deposit_classes), *more)

    def prototype(self, k):
        """measures.prototype with the network's own last layer."""
        return self.by(measures.prototype, "last", *(t.numpy(force=True) for t in self.network[-1].fc.parameters()), k)

    def accuracy(self, split, network=None):
        """{"dep", "pre"} of the network, or of another, on a split."""
        data = evaluation_batches(self.images[split])
        counts = count_correct(network or self.network, data, self.partition.num_classes)
        return {"dep": percent(counts, self.partition.deposit_classes),
                "pre": percent(counts, self.partition.preserved_classes)}


# Attacks that train. Each starts from a copy.


def tune(network, images, steps, lr, runtime, repeat, batch_size=32, bn_updated=False):
    """Yield (step, network in eval mode) for steps 0 .. `steps` of training a copy on an ImageSet: all parameters, SGD
    with momentum 0.9, flip and crop, float32, batch norm frozen unless bn_updated."""
    student = copy.deepcopy(network).requires_grad_(True).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr, 0.9)
    yield 0, student
    data = (batch for n in itertools.count()
            for batch in batches(images, batch_size, generator=runtime.generator(repeat, n)))
    for step, (x, y) in zip(range(1, steps + 1), data):
        student.train(bn_updated)
        take_step(optimizer, F.cross_entropy(student(x), y), lr, 0)
        yield step, student.eval()


def relearned(known, images_of, steps):
    """Dep and Pre after the last of `steps` of tuning on images_of(repeat), mean over REPEATS, then those after the
    others ("dep_10") and before the first ("dep_0").

    The attacker's rate is the best of RATES for this very network, by the harmonic mean of Dep and Pre on images
    that are set aside: a fixed one favours networks with larger weights. Where Dep stays 0 at all of them, Pre decides.
    """
    def at(rate, repeat, split):
        tuned = tune(known.opened, images_of(repeat), steps[-1], rate, known.runtime, repeat)
        return {step: known.accuracy(split, student) for step, student in tuned if step in steps}

    set_aside = {rate: at(rate, 0, "set_aside")[steps[-1]] for rate in RATES}
    rate = max(RATES, key=lambda rate: (harmonic_mean(*set_aside[rate].values()), set_aside[rate]["pre"]))
    found = [at(rate, repeat, "test") for repeat in range(REPEATS)]
    return {**{name if step == steps[-1] else f"{name}_{step}": statistics.fmean(run[step][name] for run in found)
               for step in reversed(steps) for name in ("dep", "pre")},
            **{f"{name}_0": value for name, value in known.accuracy("test", known.opened).items()}, "lr": rate}


def k_shot(known, k):
    """Relearning from k images of each class. From images of D_r alone Dep would rise because all is answered
    "deposit"; batch norm in train mode would relearn by its statistics alone."""
    return relearned(known, lambda repeat: first_images(known.images["train"], k, repeat), SHOT_STEPS)


def preserved_only(known):
    """Fine-tuning on preserved images alone: what comes back was hidden, not removed (Siddiqui et al., 2505.22310)."""
    return relearned(known, lambda repeat: known.images["preserved"], KEPT_STEPS)


def relearn(known):
    """Steps of training on all classes, batch norm updated, until Dep on test images, read every 5 steps, reaches
    90 % of T0's: mean and deviation over orders. CAP where it does not; `censored` counts those. One rate for all
    networks: of RATES that at which R is fastest, by images that are set aside and in an order of its own; without R,
    the network's own fastest. Where none of RATES arrives, the first.

    Anamnesis index (Chundawat et al., TIFS 2023): steps of T over steps of R; 1 as R, below 1 residual knowledge. On a
    nearly solved data set it is a ratio of small numbers.
    """
    level = 0.9 * known.original.accuracy("test_deposit")["dep"]  # T0 has seen the images set aside; R has not

    def steps(rate, repeat, cap, split):
        """Those after which Dep on a split is at the level; None where `cap` of them do not suffice."""
        for step, student in tune(known.opened, known.images["all"], cap, rate, known.runtime, repeat, 128, True):
            if step % 5 == 0 and known.accuracy(split, student)["dep"] >= level:
                return step
        return None

    rate, least = known.relearn_rate, CAP + 1
    if rate is None:
        rate = RATES[0]
        for candidate in RATES:  # a slower one need not be followed further than the best
            found = steps(candidate, REPEATS, min(least, CAP), "set_aside_deposit")
            if found is not None and found < least:
                rate, least = candidate, found
    reached = [steps(rate, repeat, CAP, "test_deposit") for repeat in range(REPEATS)]
    found = [CAP if step is None else step for step in reached]
    return {"steps": statistics.fmean(found), "deviation": statistics.stdev(found) if REPEATS > 1 else 0.0,
            "censored": reached.count(None), "lr": rate}


# What a network gives back and keeps.


def recovery(known):
    """The smallest difference T0 - T over the whole network, compressed, that gives T0 back: of BITS the fewest with
    which T~ names at most 0.1 points fewer of the drawn images of D_r than T0, which a depositor can tell without a
    test image. Bytes are those of the file, None where no number of bits suffices; parameters: those of tensors in
    which T differs; Dep and Pre: of T~."""
    target, whole = ({name: tensor.cpu() for name, tensor in network.state_dict().items()}
                     for network in (known.network, known.original.network))
    recovered, goal = copy.deepcopy(known.network), known.original.accuracy("deposit")["dep"] - 0.1
    found = {"bytes": None, "bits": None}
    for bits in BITS:
        data = encode(whole, target, bits)
        recovered.load_state_dict(shifted(target, decode(data, target, bits), 1))
        if known.accuracy("deposit", recovered)["dep"] >= goal:
            found = {"bytes": file_size({"difference": as_bytes(zlib.compress(data.numpy().tobytes(), 9))}),
                     "bits": bits}
            break
    changed = sum(p.numel() for name, p in known.network.named_parameters() if not target[name].equal(whole[name]))
    return {**found, "parameters": changed, **known.accuracy("test", recovered)}


class Measure(NamedTuple):
    """What is measured of a Known."""

    figures: Callable  # of the Known: {figure: value}
    least: int = 0  # images a class that it needs
    rho: bool = True  # whether rho is taken of its first figure


# This is the one place to add a measure. Four hold out an image of each class to choose their strength. T0 with a
# prototype's row, of the preserved rows' norm, names few preserved images: a rho of its Dep would say little.
MEASURES = {
    "answers": Measure(lambda known: known.accuracy("test")),
    "probe": Measure(lambda known: known.by(measures.linear_probe, "last"), least=2),
    "probe_cut": Measure(lambda known: known.by(measures.linear_probe, "cut"), least=2),
    "means": Measure(lambda known: known.by(measures.class_means, "last")),
    "means_cut": Measure(lambda known: known.by(measures.class_means, "cut")),
    "told": Measure(lambda known: known.by(measures.told_from_rest, "last"), least=2),
    "named": Measure(lambda known: known.by(measures.named_among, "last"), least=2),
    "prototype_1": Measure(lambda known: known.prototype(1), least=1, rho=False),
    "prototype_5": Measure(lambda known: known.prototype(5), least=5, rho=False),
    "prototype_25": Measure(lambda known: known.prototype(25), least=25, rho=False),
    "membership": Measure(lambda known: known.by(measures.membership, "logits")),
    "preserved_only": Measure(preserved_only),
    "k_shot_1": Measure(lambda known: k_shot(known, 1), least=1),
    "k_shot_5": Measure(lambda known: k_shot(known, 5), least=5),
    "k_shot_25": Measure(lambda known: k_shot(known, 25), least=25),
    "relearn": Measure(relearn, rho=False),
    "recovery": Measure(recovery, rho=False),
}


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--networks", type=path, nargs="+", required=True,
                        help="T: target.pt, say, or a network made elsewhere, of T0's architecture, in any file that "
                             "train_scratch.py --weights reads")
    parser.add_argument("--original", type=path, required=True, help="T0")
    parser.add_argument("--retrained", type=path, nargs="*", default=[],
                        help="R, of train_scratch.py --subset retrain, or the .json file of its measures, beside its "
                             "partition.json, where R is no longer there; several, of other seeds, give a spread")
    parser.add_argument("--partition", type=path, default=None,
                        help="manifest with the deposit classes; unset: R's or, without R, T0's")
    parser.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    parser.add_argument("--eval_split", choices=["test", "val"], default="test",
                        help="images that the measures report on; val: those that the partition holds out")
    parser.add_argument("--measures", nargs="+", choices=list(MEASURES), metavar="MEASURE", default=list(MEASURES),
                        help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--split_at", type=bounded(int), default=None,
                        help="n of the cut at which features are probed; unset: after the last block")
    add_running_args(parser, seed="draws the images; seed of the attacks that train", precision=False)
    return parser


def image_sets(partition, args, device):
    """The ImageSets of a Known. set_aside: up to 100 training images a class, which no measure fits on; all: the other
    training images; train: up to PER_CLASS of them a class, of which deposit and preserved are the two parts; test:
    those of --eval_split; test_deposit: up to 100 of these a class of D_r; set_aside_deposit: D_r's part of
    set_aside."""
    every = load_images(partition, args.data_dir, "train", partition.classes("all"))
    fewest = every.labels.bincount().min().item()
    if fewest < 2:
        raise UserError("a class has a single training image: name data with two or more in each")
    held = max(1, min(100, fewest // 5))
    count = min(PER_CLASS, fewest - held)
    rows = first_rows(every.labels, count + held, args.seed).view(-1, count + held)  # a row a class
    others = torch.isin(torch.arange(len(every)), rows[:, count:].flatten(), invert=True)
    sets = {"all": every[others.nonzero()[:, 0]], "train": every[rows[:, :count].flatten()],
            "set_aside": every[rows[:, count:].flatten()],
            "test": load_images(partition, args.data_dir, args.eval_split, partition.classes("all"))}
    for name, whole, classes in (("deposit", sets["train"], partition.deposit_classes),
                                 ("preserved", sets["train"], partition.preserved_classes),
                                 ("set_aside_deposit", sets["set_aside"], partition.deposit_classes),
                                 ("test_deposit", first_images(sets["test"], 100, args.seed),
                                  partition.deposit_classes)):
        sets[name] = whole[torch.isin(whole.labels, torch.tensor(classes)).nonzero()[:, 0]]
    return {name: image_set.to(device) for name, image_set in sets.items()}


def require_settings(found, file, wanted):
    """Raise UserError when the measures of a file were made at the settings `found`, not at those `wanted`."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(f"{file} was measured with {name} {found.get(name)}, not {value}: measure likewise, or "
                            f"move that file away")


def kept(file, settings, of_original, partition):
    """What `measured` kept of an R that is not at hand, with its partition.json beside it, whose images may be stored
    otherwise. Raises UserError for other settings, another draw or T0."""
    record = read_record(file)
    if record["original"] != of_original:
        raise UserError(f"{file} was measured beside another T0: name R's of this one")
    manifest = os.path.join(os.path.dirname(file), "partition.json")
    if not read_partition(manifest).same_draw(partition):
        raise UserError(f"{file} is of other deposit classes or data: name a partition.json of its draw by --partition")
    require_settings(record["settings"], file, {**settings, "partition": record["settings"].get("partition")})
    return record


def measured(known, wanted, file, identity):
    """{**identity, "measures": {measure: figures}}, those of `wanted` added one by one to what `file` holds of the same
    identity (checksums of the networks, the settings), so that a killed run goes on and T0 and R are measured once. Of
    another network it begins anew. Raises UserError when it holds measures of the same one beside another T0, or at
    other settings."""
    record = load_json(file) if os.path.exists(file) else {}
    if record.get("network") != identity["network"]:
        record = {**identity, "measures": {}}
    if record["original"] != identity["original"]:
        raise UserError(f"{file} was measured beside another T0: name that one by --original, or move that file away")
    require_settings(record["settings"], file, identity["settings"])
    record = with_others({**record, **identity}, file, known.relearn_rate)
    for name in wanted:
        if name not in record["measures"]:
            record["measures"][name] = figures = MEASURES[name].figures(known)
            record = with_others(record, file, known.relearn_rate)
            save_json(file, record)
            print(f"{file}: {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()
                                                  if value is not None), flush=True)
    return record


def with_others(record, file, relearn_rate):
    """A record with the measures that another process has added to its file since, but without steps of relearning at
    another rate than R's, where that is known."""
    beside = load_json(file) if os.path.exists(file) else {}
    same = all(beside.get(name) == record[name] for name in ("network", "original", "settings"))
    found = {**(beside["measures"] if same else {}), **record["measures"]}
    return {**record, "measures": {name: figures for name, figures in found.items()
                                   if name != "relearn" or relearn_rate in (None, figures["lr"])}}


def partition_of(args):
    """(Partition whose deposit classes T has forgotten, content of T0's file)."""
    content, partition = read(args.original, "original")
    manifests = {args.partition: read_partition(args.partition)} if args.partition else {}
    manifests.update({file: read(file, "retrained")[1] for file in args.retrained if not file.endswith(".json")})
    draws = [partition.other_draw(other, file, args.original) for file, other in manifests.items()] or [partition]
    if len({draw.hash for draw in draws}) > 1:
        raise UserError(f"{', '.join(manifests)} are of different deposit classes: name files of one draw")
    return draws[0], content


def refuse_other_draw(file, partition, original, original_path):
    """Raise UserError when `file` is a network of ours that has forgotten other classes, has two branches, or is made
    of another T0 than that whose file holds `original`."""
    if not is_ours(file):
        return
    content = load_checkpoint(file, ("original", "independent", "retrained", "target", "recover", "student"))
    refuse_two_branches(content, file)
    if "original" in content:
        require_original(content, file, original, original_path)
    if content["kind"] in ("retrained", "target", "recover") and content["partition"]["hash"] != partition.hash:
        raise UserError(f"{file} has forgotten other classes than are measured: name R of its draw by --retrained, or "
                        f"its partition.json by --partition")


def compared(of_t, of_0, of_r):
    """{measure: rho} of the figures of T, T0 and each R, for the measures that all have."""
    found = {}
    for name, measure in MEASURES.items():
        if measure.rho and of_r and all(name in figures for figures in (of_t, of_0, *of_r)):
            a_t, a_0, *a_r = (next(iter(figures[name].values())) for figures in (of_t, of_0, *of_r))
            found[name] = measures.rho(a_t, a_r, a_0)
    return found


def main(args):
    runtime = Runtime.of(args)
    partition, content = partition_of(args)
    arch = content["arch"]
    for file in args.networks:
        refuse_other_draw(file, partition, content, args.original)
    settings = settings_of(args, leave_out=("networks", "original", "retrained", "measures"),
                           partition=partition.hash)
    images, records, rate = image_sets(partition, args, runtime.device), {}, None
    few = images["train"].labels.bincount().min().item()
    wanted = [name for name in args.measures if MEASURES[name].least <= few]
    if wanted != args.measures:
        print(f"left out, as a class has {few} images for it: {', '.join(sorted({*args.measures} - {*wanted}))}")
    files = {file: f"{os.path.splitext(file)[0]}_residual_{partition.hash[:8]}.json"
             for file in (*args.retrained, args.original, *args.networks) if not file.endswith(".json")}
    if len({os.path.abspath(out) for out in files.values()}) < len({os.path.abspath(file) for file in files}):
        raise UserError("two of the networks differ in their ending alone, so their measures would lie in one file: "
                        "rename one")

    def known_of(file, original=None):
        network = build_network(arch, partition.num_classes, partition.image_size)
        tensors = read_weights(file)
        load_weights(network, arch, partition.image_size, tensors, f"network {file}", keep_head=True, flags=False)
        known = Known(network.eval(), partition, images, args.split_at, runtime, original, rate, file)
        return known, checksum({"tensors": tensors})

    original, of_original = known_of(args.original)
    for file in (*args.retrained, args.original, *args.networks):  # R first: it sets the rate of `relearn`
        if file not in files:
            records[file] = kept(file, settings, of_original, partition)
        else:
            known, of_network = known_of(file, original)
            identity = {"settings": settings, "original": of_original, "network": of_network}
            records[file] = measured(known, wanted, files[file], identity)
        if file in args.retrained and rate is None and "relearn" in wanted:
            rate = records[file]["measures"].get("relearn", {}).get("lr")
    if len({records[file]["network"] for file in args.retrained}) < len(args.retrained):
        raise UserError("--retrained names one network twice, which would give R no spread: name each once")
    records |= {file: with_others(records[file], out, rate) for file, out in files.items()}
    of_0, *of_r = (records[file]["measures"] for file in (args.original, *args.retrained))
    for file in args.networks:  # a call that names no R keeps that of the call before
        of_rs = of_r or records[file].get("reference", {}).get("retrained", [])
        records[file] |= {"reference": {"original": of_0, "retrained": of_rs},
                          "rho": compared(records[file]["measures"], of_0, of_rs)}
        save_json(files[file], records[file])
    print_tables({file: [records[file]] for file in args.networks})


if __name__ == "__main__":
    run(main, get_args_parser())
