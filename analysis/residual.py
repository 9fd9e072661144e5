"""What a network still knows of the deposit classes, relative to R, which was retrained without them:
rho = (A_T - A_R) / (A_0 - A_R), 1 for a network that knows what T0 knows, 0 for one that knows what R knows. Fitted on
training images, reported on test images, always beside A_T, A_R and A_0. Writes residual.json beside the network."""

import copy
import dataclasses
import functools
import itertools
import os
import statistics
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances_argmin, roc_auc_score, roc_curve
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_predict, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.recovery import as_bytes, file_size
from datasets import batches, evaluation_batches, load_images, read_partition
from models import losses
from models.architectures import split_network
from models.checkpoints import network_of, read
from models.difference import BITS, decode, encode, restored
from train_deposit import first_images
from utils.cli import add_running_args, bounded, make_parser, path, run
from utils.errors import UserError
from utils.files import load_json, save_json
from utils.metrics import count_correct, harmonic_mean, table1
from utils.run import settings_of
from utils.runtime import Runtime
from utils.tables import markdown, summary

RATES, DRAWS = (1e-3, 1e-2, 1e-1), 5  # the attacker's learning rates, and draws of images or orders
SHOT_STEPS, KEPT_STEPS = 50, 200  # of k_shot and of preserved_only
STRENGTHS = tuple(10.0**n for n in range(-4, 3))  # L2, per image
RELEARN_CAP, RELEARN_EVERY, RELEARN_SHARE = 2000, 5, 0.9


# The measures. x, y and x_test, y_test: features (n, d) with their classes (n,), of training and of test images, and
# `deposited`: the deposit classes; all NumPy. Each gives {figure: value}, the first of them the measure's A.


def split_accuracy(predicted, y, deposited):
    """{"dep", "pre"} in per cent: the share of the deposit and of the preserved classes' images that are named rightly.
    One without the other says nothing: a network that answers "deposit" to everything has Dep 100."""
    of_d = np.isin(y, deposited)
    return {name: 100 * float((predicted == y)[rows].mean()) for name, rows in (("dep", of_d), ("pre", ~of_d))}


def probe(x, y, x_test):
    """(classes (c,), their probabilities (n, c) on x_test): multinomial logistic regression on standardised features.

    L-BFGS to convergence: a probe that stops early, or at a fixed rate on features that were scaled down, calls
    underfitting forgetting. The L2 strength is the best of STRENGTHS on a held-out fifth of the training images.
    """
    def fitted(x, y, strength):
        model = LogisticRegression(C=1 / (strength * len(x)), max_iter=5000, tol=1e-5)
        return make_pipeline(StandardScaler(), model).fit(x, y)

    x_fit, x_held, y_fit, y_held = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    best = max(STRENGTHS, key=lambda strength: fitted(x_fit, y_fit, strength).score(x_held, y_held))
    model = fitted(x, y, best)
    return model.classes_, model.predict_proba(x_test)


def linear_probe(x, y, x_test, y_test, deposited):
    """Accuracy of a new last layer over all classes ("KR" of ESC, CVPR 2025; Gao et al., 2604.08271; their settings
    differ and underfit)."""
    classes, p = probe(x, y, x_test)
    return split_accuracy(classes[p.argmax(1)], y_test, deposited)


def class_means(x, y, x_test, y_test, deposited):
    """Accuracy of the nearest class mean (Euclidean): nothing is fitted, and a change of scale changes nothing."""
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in classes])
    return split_accuracy(classes[pairwise_distances_argmin(x_test, means)], y_test, deposited)


def told_from_rest(x, y, x_test, y_test, deposited):
    """AUC with which a probe tells D_r from the preserved classes. It stays high where all of D_r shares one grave."""
    _, p = probe(x, np.isin(y, deposited), x_test)
    return {"auc": float(roc_auc_score(np.isin(y_test, deposited), p[:, 1]))}


def named_among(x, y, x_test, y_test, deposited):
    """Accuracy (%) of a probe among the deposit classes alone, whose chance is 1 / |D|; 100 for a single class. It
    stays high where D_r is a hole in the map that no other image shares."""
    if len(deposited) == 1:
        return {"acc": 100.0}
    classes, p = probe(x[np.isin(y, deposited)], y[np.isin(y, deposited)], x_test[np.isin(y_test, deposited)])
    return {"acc": 100 * float((classes[p.argmax(1)] == y_test[np.isin(y_test, deposited)]).mean())}


def prototype(x, y, x_test, y_test, deposited, weight, bias, k, draws=10):
    """Accuracy when D's rows of the last layer, weight (C, d) and bias (C,), become the mean of k features of the class
    (Ha et al., 2506.01318), mean over draws.

    One rule for all networks: the row has the preserved rows' mean norm, bias 0. A row of norm 1 against larger ones
    loses by its scale alone; the authors mix it into the old row by a share that differs between methods.
    """
    preserved, found = np.setdiff1d(np.arange(len(weight)), deposited), []
    norm = np.linalg.norm(weight[preserved], axis=1).mean()
    for draw in range(draws):
        rng, w, b = np.random.default_rng(draw), weight.copy(), bias.copy()
        for c in deposited:
            mean = rng.permutation(x[y == c])[:k].mean(0)
            w[c], b[c] = mean * norm / max(np.linalg.norm(mean), 1e-12), 0
        found.append(split_accuracy((x_test @ w.T + b).argmax(1), y_test, deposited))
    return {name: statistics.fmean(run[name] for run in found) for name in ("dep", "pre")}


def membership(z, y, z_test, y_test, deposited):
    """AUC and TPR (%) at 1 % FPR of telling D_r (members) from unseen images of the same classes, from logits (n, C).

    Scores: cross-entropy at the true label and the largest log-probability in D; logistic regression over ten
    stratified splits; as many of each class on either side. R gives 0.5 by construction. An attack on the population,
    so a lower bound (Hayes et al., SaTML 2025). No augmentation on either side.
    """
    scores = {}
    for member, (logits, labels) in enumerate(((z_test, y_test), (z, y))):
        log_p = torch.from_numpy(logits).double().log_softmax(1).numpy()
        table = np.stack([-log_p[np.arange(len(labels)), labels], log_p[:, deposited].max(1)], 1)
        scores[member] = {c: table[labels == c] for c in deposited}
    counts = {c: min(len(scores[0][c]), len(scores[1][c])) for c in deposited}
    x = np.concatenate([scores[member][c][:counts[c]] for member in (0, 1) for c in deposited])
    is_member = np.repeat([0, 1], sum(counts.values()))
    folds = StratifiedKFold(min(10, sum(counts.values())), shuffle=True, random_state=0)
    score = cross_val_predict(make_pipeline(StandardScaler(), LogisticRegression()), x, is_member, cv=folds,
                              method="decision_function")
    fpr, tpr, _ = roc_curve(is_member, score)
    return {"auc": float(roc_auc_score(is_member, score)), "tpr": 100 * float(tpr[fpr <= 0.01].max())}


def class_membership(z, z_retrained, preserved):
    """Accuracy (%) of telling two networks apart by their probabilities of the preserved classes, renormalised, on the
    same images of D: 50 where T answers as R does. Light form of CMIA (PMLR 306, 2026), whose code could not be had.
    Five splits by image: the two answers to an image never lie on either side of one."""
    x = np.concatenate([torch.from_numpy(logits[:, preserved]).double().softmax(1).numpy()
                        for logits in (z, z_retrained)])
    labels, groups = np.repeat([0, 1], len(z)), np.tile(np.arange(len(z)), 2)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    predicted = cross_val_predict(model, x, labels, groups=groups, cv=GroupKFold(5))
    return {"acc": 100 * float((predicted == labels).mean())}


def rho(a_t, a_r, a_0):
    """(A_T - mean A_R) / (A_0 - mean A_R), with the three and the spread of A_R, a list over runs of R.

    usable: whether A_0 - A_R exceeds twice that spread; None for one R. Below 0 is no merit: damaged features also cost
    the preserved classes, and to know less than R shows what was deposited. Judge |rho|.
    """
    mean, spread = statistics.fmean(a_r), statistics.stdev(a_r) if len(a_r) > 1 else None
    gap = a_0 - mean
    return {"rho": (a_t - mean) / gap if gap else None, "A_T": a_t, "A_R": mean, "A_0": a_0, "spread_R": spread,
            "usable": None if spread is None else gap > 2 * spread}


# Attacks that train. Each starts from a copy.


def open_rows(head, partition):
    """Lift the biases of D to the least of the preserved classes': a masked class would get no gradient, and an
    attacker sees the mask. One rule for all networks."""
    with torch.no_grad():
        lowest = head.bias[partition.preserved_classes].min()
        head.bias[partition.deposit_classes] = head.bias[partition.deposit_classes].maximum(lowest)


def tune(network, images, steps, lr, runtime, draw, batch_size=32, bn_updated=False):
    """Yield (step, network in eval mode) for steps 0 .. `steps` of training a copy on an ImageSet: all parameters, SGD
    with momentum 0.9, flip and crop, batch norm frozen unless bn_updated."""
    student = copy.deepcopy(network).requires_grad_(True).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr, 0.9)
    yield 0, student
    data = (batch for n in itertools.count()
            for batch in batches(images, batch_size, runtime.device, generator=runtime.generator(draw, n)))
    for step, (x, y) in zip(range(1, steps + 1), data):
        student.train(bn_updated)
        with runtime.autocast():
            z = student(x)
        optimizer.zero_grad()
        F.cross_entropy(z.float(), y).backward()
        optimizer.step()
        yield step, student.eval()


def relearned(known, images_of, steps, also=()):
    """Dep and Pre after `steps` of tuning on images_of(draw), mean over DRAWS, at the steps `also` ("dep_10") and
    before the first ("dep_0").

    The attacker's rate is the best of RATES for this very network, by the harmonic mean of Dep and Pre on held-out
    images: a fixed one favours networks with larger weights.
    """
    def at(rate, draw, split, wanted):
        return {step: known.accuracy(student, split) for step, student in
                tune(known.opened, images_of(draw), steps, rate, known.runtime, draw) if step in wanted}

    def value(rate):
        return harmonic_mean(*at(rate, 0, "held_out", [steps])[steps].values())

    rate = max(RATES, key=value)
    found = [at(rate, draw, "test", [*also, steps]) for draw in range(DRAWS)]
    return {**{name if step == steps else f"{name}_{step}": statistics.fmean(run[step][name] for run in found)
               for step in (steps, *also) for name in ("dep", "pre")},
            **{f"{name}_0": value for name, value in known.at_start.items()}, "lr": rate}


def k_shot(known, k):
    """Relearning from k images of each class, SHOT_STEPS steps. From images of D alone Dep would rise because all is
    answered "deposit"; batch norm in train mode would relearn by its statistics alone."""
    return relearned(known, lambda draw: first_images(known.images["train"], k, draw), SHOT_STEPS, also=(10,))


def preserved_only(known):
    """KEPT_STEPS steps of fine-tuning on preserved images alone: what comes back was hidden, not removed (Siddiqui et
    al., 2505.22310)."""
    images = known.images["train"]
    kept = ~torch.isin(images.labels, torch.tensor(known.partition.deposit_classes, device=images.labels.device))
    return relearned(known, lambda draw: images[kept.nonzero()[:, 0]], KEPT_STEPS)


def relearn_steps(known, level, rate, draws=DRAWS):
    """Steps of training on all classes, batch norm updated, until Dep on held-out images, read every 5 steps, reaches
    `level` per cent; mean and deviation over orders. RELEARN_CAP where it does not; `censored` counts those.

    Anamnesis index (Chundawat et al., TIFS 2023): steps of T over steps of R; 1 as R, below 1 residual knowledge. On a
    nearly solved data set it is a ratio of small numbers.
    """
    found = []
    for draw in range(draws):
        for step, student in tune(known.opened, known.images["all"], RELEARN_CAP, rate, known.runtime, draw, 128, True):
            if step % RELEARN_EVERY == 0 and known.accuracy(student, "held_out_deposit")["dep"] >= level:
                break
        else:
            step = None
        found.append(step)
    steps = summary([RELEARN_CAP if step is None else step for step in found])
    return {"steps": steps["mean"], "deviation": steps["deviation"], "censored": found.count(None), "lr": rate}


class Known:
    """A network, the images that it is examined on and what was computed of it, once a split.

    images: ImageSets, of `image_sets`; level, rate: of relearn_steps.
    """

    def __init__(self, network, partition, images, split_at, runtime):
        self.network, self.partition, self.images, self.runtime = runtime.place(network), partition, images, runtime
        self.parts = split_network(self.network, split_at)
        self.deposited = np.array(partition.deposit_classes)
        self.level = self.rate = None

    @functools.cached_property
    def opened(self):
        """A copy for the attacks that train."""
        network = copy.deepcopy(self.network)
        open_rows(network.head.fc, self.partition)
        return network

    @functools.cached_property
    def at_start(self):
        return self.accuracy(self.opened, "test")

    @functools.cache
    @torch.no_grad()
    def features(self, split):
        """{"cut": the feature map at the cut, pooled to 2 x 2 (n, 4c), "last": what the last layer reads (n, d),
        "logits": (n, C), "y": (n,)} in float32, eval mode, no augmentation."""
        (lower, upper), found = self.parts, {"cut": [], "last": [], "logits": [], "y": []}
        self.network.eval()
        for x, y in evaluation_batches(self.images[split], self.runtime.device):
            f = lower(x)
            h = torch.nn.Sequential(*upper[:-1], *upper[-1][:-1])(f)
            for name, part in zip(found, (F.adaptive_avg_pool2d(f, 2).flatten(1), h, upper[-1].fc(h), y)):
                found[name].append(part.cpu())
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}

    def data(self, place):
        """(x, y, x_test, y_test, deposited) of the measures, for features at "cut", "last" or "logits"."""
        train, test = self.features("train"), self.features("test")
        return train[place], train["y"], test[place], test["y"], self.deposited

    @property
    def head(self):
        return [t.detach().cpu().numpy() for t in (self.network.head.fc.weight, self.network.head.fc.bias)]

    def accuracy(self, network, split):
        """{"dep", "pre"} of a network on a split."""
        data = evaluation_batches(self.images[split], self.runtime.device)
        figures = table1(count_correct(network, data, self.partition.num_classes), self.partition)
        return {"dep": figures["dep_acc"], "pre": figures["pre_acc"]}


def relearn(known):
    """relearn_steps at the rate that serves R best: chosen when it is R's turn, given for the others."""
    rate = known.rate or min(RATES, key=lambda rate: relearn_steps(known, known.level, rate, draws=1)["steps"])
    return relearn_steps(known, known.level, rate)


# This is the one place to add a measure: it gets a Known and gives {figure: value}; rho is taken of the first figure.
MEASURES = {
    "probe": lambda known: linear_probe(*known.data("last")),
    "probe_cut": lambda known: linear_probe(*known.data("cut")),
    "means": lambda known: class_means(*known.data("last")),
    "means_cut": lambda known: class_means(*known.data("cut")),
    "told": lambda known: told_from_rest(*known.data("last")),
    "named": lambda known: named_among(*known.data("last")),
    "prototype_1": lambda known: prototype(*known.data("last"), *known.head, 1),
    "prototype_5": lambda known: prototype(*known.data("last"), *known.head, 5),
    "prototype_25": lambda known: prototype(*known.data("last"), *known.head, 25),
    "membership": lambda known: membership(*known.data("logits")),
    "preserved_only": preserved_only,
    "k_shot_1": lambda known: k_shot(known, 1),
    "k_shot_5": lambda known: k_shot(known, 5),
    "k_shot_25": lambda known: k_shot(known, 25),
    "relearn": relearn,
}


def recovery(known, original, retrained):
    """The smallest difference T0 - T, compressed, that gives T0 back: of BITS the fewest with which T~ names at most
    0.1 points fewer of the drawn images of D_r than T0, which a depositor can tell without a test image. Bytes are
    those of the file; Pre and Dep of T~ are on test images."""
    names = {name: {key: t.cpu() for key, t in k.network.state_dict().items()}
             for name, k in (("target", known), ("original", original))}
    if [t.shape for t in names["target"].values()] != [t.shape for t in names["original"].values()]:
        raise UserError("a network of another architecture than T0 has no difference: leave recovery out of "
                        "--measures")
    recovered, goal = copy.deepcopy(known.network), original.accuracy(original.network, "deposit")["dep"]
    for bits in BITS:
        data = encode(names["original"], names["target"], bits)
        recovered.load_state_dict(restored(names["target"], decode(data, names["target"], bits)))
        if known.accuracy(recovered, "deposit")["dep"] >= goal - 0.1:
            break
    size = file_size({"difference": as_bytes(zlib.compress(data.numpy().tobytes(), 9))})
    return {"bytes": size, "bits": bits, **known.accuracy(recovered, "test")}


def drift(known, original, retrained):
    """Of held-out images of D_r: Dep of T, and the mean KL(g(z_0) || g(z_T)) of the preserved columns. By these a
    setting can be chosen in which no preserved image has a say."""
    z, z_0 = (torch.from_numpy(k.features("held_out_deposit")["logits"]) for k in (known, original))
    kl = losses.knowledge_preserving(z, z_0, torch.tensor(known.partition.preserved_classes), 1.0)
    return {"kl": kl.item(), "held_out_dep": known.accuracy(known.network, "held_out_deposit")["dep"]}


def against_retrained(known, original, retrained):
    """class_membership of T against each R, mean, and of the first R against the second, if there is one."""
    rows = np.isin(known.features("test")["y"], known.deposited)
    of_t, *of_r = (k.features("test")["logits"][rows] for k in (known, *retrained))
    preserved = known.partition.preserved_classes
    figures = {"acc": statistics.fmean(class_membership(of_t, z, preserved)["acc"] for z in of_r)}
    if len(of_r) > 1:
        figures["between_retrained"] = class_membership(*of_r[:2], preserved)["acc"]
    return figures


# Measures of T beside T0 and the networks R, which have no rho.
COMPARISONS = {"recovery": recovery, "drift": drift, "class_membership": against_retrained}
NEED_RETRAINED = ("relearn", "class_membership")
KINDS = ("original", "retrained", "target", "recover", "student")


def get_args_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--network", type=path, required=True, help="T: target.pt, say; its folder gets residual.json")
    parser.add_argument("--original", type=path, required=True, help="T0")
    parser.add_argument("--retrained", type=path, nargs="*", default=[],
                        help="R, of train_scratch.py --subset retrain; several, of other seeds, give its spread. Their "
                             "figures and T0's are kept beside them and not measured twice")
    parser.add_argument("--partition", type=path, default=None,
                        help="manifest with the deposit classes; unset: the one in T's file")
    parser.add_argument("--data_dir", type=path, default="data", help="folder that holds the data set")
    parser.add_argument("--measures", nargs="+", choices=[*MEASURES, *COMPARISONS], metavar="MEASURE",
                        default=[*MEASURES, *COMPARISONS], help=f"of {', '.join([*MEASURES, *COMPARISONS])}")
    parser.add_argument("--images_per_class", type=bounded(int, 5), default=1000,
                        help="training images a class for probes, prototypes, membership; at most those there are")
    parser.add_argument("--split_at", type=bounded(int), default=None, help="n of the cut; unset: T's, or 3")
    add_running_args(parser, seed="draws the images; seed of the attacks that train")
    return parser


def image_sets(partition, args, device):
    """The ImageSets of a Known. held_out: the partition's validation images or, where it has none, training images that
    no measure fits on; up to 100 a class."""
    every = load_images(partition, args.data_dir, "train", partition.classes("all"))
    fewest = every.labels.bincount().min().item()
    held = min(100, fewest // 5)
    count = min(args.images_per_class, fewest - held)
    numbered = dataclasses.replace(every, images=torch.arange(len(every)))
    rows = first_images(numbered, count + held, args.seed).images.view(-1, count + held)  # a row a class
    others = torch.isin(numbered.images, rows[:, count:].flatten(), invert=True)
    sets = {"all": every[others.nonzero()[:, 0]], "train": every[rows[:, :count].flatten()],
            "held_out": every[rows[:, count:].flatten()],
            "test": load_images(partition, args.data_dir, "test", partition.classes("all"))}
    if partition.val_fraction:
        held_out = load_images(partition, args.data_dir, "val", partition.classes("all"))
        sets["held_out"] = first_images(held_out, min(100, held_out.labels.bincount().min().item()), args.seed)
    for name, whole in (("deposit", "train"), ("held_out_deposit", "held_out")):
        of_d = torch.isin(sets[whole].labels, torch.tensor(partition.deposit_classes))
        sets[name] = sets[whole][of_d.nonzero()[:, 0]]
    return {name: image_set.to(device) for name, image_set in sets.items()}


def measured(known, functions, wanted, file, identity):
    """{measure: figures}, those of `wanted` added one by one to what `file` holds of the same identity (the network's
    checksum, the settings), so that a killed run goes on and T0 and R are measured once."""
    record = load_json(file) if os.path.exists(file) else {}
    if any(record.get(name) != value for name, value in identity.items()):
        record = {**identity, "measures": {}}
    for name in wanted:
        if name in functions and name not in record["measures"]:
            record["measures"][name] = figures = functions[name](known)
            save_json(file, record)
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if value is not None),
                  flush=True)
    return record["measures"]


def compared(measures, original, retrained):
    """{measure: rho} of the figures of T, T0 and each R, for the measures that all have."""
    found = {}
    for name in MEASURES:
        if name != "relearn" and all(name in figures for figures in (measures, original, *retrained)):
            a_t, a_0, *a_r = (next(iter(figures[name].values())) for figures in (measures, original, *retrained))
            found[name] = rho(a_t, a_r, a_0)
    return found


def main(args):
    runtime = Runtime.of(args)
    content, partition = read(args.network, KINDS)
    if args.partition:
        partition = partition.other_draw(read_partition(args.partition), args.partition, args.network)
    split_at = args.split_at or content.get("split_at", 3)
    settings = settings_of(args, leave_out=("network", "original", "retrained", "partition", "data_dir", "device",
                                            "precision", "measures", "split_at"),
                           partition=partition.hash, split_at=split_at, precision=runtime.precision)
    images, found = image_sets(partition, args, runtime.device), []
    for file in (args.network, args.original, *args.retrained):
        content, own = read(file, KINDS)
        own.other_draw(partition, args.network, file)
        if file in args.retrained and own.hash != partition.hash:
            raise UserError(f"{file} was retrained without other classes than those that {args.network} deposits")
        found.append((Known(network_of(content, own, file), partition, images, split_at, runtime), content["checksum"]))
    (known, checksum), (original, of_original), *retrained = found
    known.level = RELEARN_SHARE * original.accuracy(original.network, "held_out_deposit")["dep"]
    wanted = [name for name in args.measures if args.retrained or name not in NEED_RETRAINED]
    identity = {"settings": settings, "original": of_original}

    references, out = [], os.path.join(os.path.dirname(args.network), "residual.json")
    for file, (k, its_checksum) in zip((*args.retrained, args.original), (*retrained, found[1])):
        k.level, k.rate = known.level, known.rate
        beside = f"{os.path.splitext(file)[0]}_residual_{partition.hash[:8]}.json"
        references.append(measured(k, MEASURES, wanted, beside, {"network": its_checksum, **identity}))
        known.rate = references[0].get("relearn", {}).get("lr")  # chosen on the first R
    functions = {name: functools.partial(function, original=original, retrained=[k for k, _ in retrained])
                 for name, function in COMPARISONS.items()}
    identity.update(network=checksum, retrained=[c for _, c in retrained])
    measures = measured(known, {**MEASURES, **functions}, wanted, out, identity)
    reference = {"original": references[-1], "retrained": references[:-1]}
    rhos = compared(measures, **reference) if retrained else {}
    save_json(out, {**identity, "measures": measures, "reference": reference, "rho": rhos})
    print(markdown({name: {"Pre beside it": summary([measures[name].get("pre")]),
                           **{column: summary([value[column]]) for column in ("A_T", "A_R", "A_0", "rho")}}
                    for name, value in rhos.items()}, "measure"), end="")


if __name__ == "__main__":
    run(main, get_args_parser())
