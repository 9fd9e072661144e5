"""Measures of what features or logits tell of the deposit classes, after baselines of others, and rho, which compares
them with R, retrained without these classes.

x, y and x_test, y_test are features (n, d) with their classes (n,), of training and of test images; `deposited` are the
deposit classes; all NumPy. Each measure gives {figure: value}, the first of them the measure's A.
"""

import statistics
import warnings

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import pairwise_distances_argmin, roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from utils.errors import UserError

STRENGTHS = 10.0 ** np.arange(-4, 3)  # of L2, per image


def split_accuracy(predicted, y, deposited):
    """{"dep", "pre"} in per cent: the share of the deposit and of the preserved classes' images that are named rightly.
    One without the other says nothing: a network that answers "deposit" to everything has Dep 100."""
    of_d = np.isin(y, deposited)
    return {name: 100 * float((predicted == y)[rows].mean()) for name, rows in (("dep", of_d), ("pre", ~of_d))}


def probe(x, y):
    """Multinomial logistic regression on standardised features, fitted; its L2 strength is the best of STRENGTHS on a
    held-out fifth of the training images, at least one of each class, so every class needs two images.

    L-BFGS to convergence: a probe that stops early, or at a fixed rate on features that were scaled down, calls
    underfitting forgetting.
    """
    held_out = StratifiedShuffleSplit(1, test_size=max(len(x) // 5, len(np.unique(y))), random_state=0)
    strengths = 1 / (STRENGTHS * len(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of defaults that change in later versions
        model = LogisticRegressionCV(Cs=strengths, cv=held_out, scoring="accuracy", max_iter=5000, tol=1e-5)
        return make_pipeline(StandardScaler(), model).fit(x, y)


def linear_probe(x, y, x_test, y_test, deposited):
    """Accuracy of a new last layer over all classes ("KR" of ESC, CVPR 2025; Gao et al., 2604.08271; their settings
    differ and underfit)."""
    return split_accuracy(probe(x, y).predict(x_test), y_test, deposited)


def class_means(x, y, x_test, y_test, deposited):
    """Accuracy of the nearest class mean (Euclidean): nothing is fitted, and a change of scale changes nothing."""
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in classes])
    return split_accuracy(classes[pairwise_distances_argmin(x_test, means)], y_test, deposited)


def told_from_rest(x, y, x_test, y_test, deposited):
    """AUC with which a probe tells D_r from the preserved classes. It stays high where all of D_r shares one grave."""
    score = probe(x, np.isin(y, deposited)).decision_function(x_test)
    return {"auc": float(roc_auc_score(np.isin(y_test, deposited), score))}


def named_among(x, y, x_test, y_test, deposited):
    """Accuracy (%) of a probe among the deposit classes alone, whose chance is 1 / |D_r|; 100 for a single class. It
    stays high where each class of D_r keeps a place of its own, whatever else lies there."""
    if len(deposited) == 1:
        return {"acc": 100.0}
    of_d, test_of_d = np.isin(y, deposited), np.isin(y_test, deposited)
    return {"acc": 100 * float(probe(x[of_d], y[of_d]).score(x_test[test_of_d], y_test[test_of_d]))}


def prototype(x, y, x_test, y_test, deposited, weight, bias, k):
    """Accuracy when D_r's rows of the last layer, weight (C, d) and bias (C,), become the mean of k features of the
    class (Ha et al., 2506.01318), mean over ten draws.

    One rule for all networks: the row has the preserved rows' mean norm, bias 0. A row of norm 1 against larger ones
    loses by its scale alone; the authors mix it into the old row by a share that differs between methods.
    """
    found, norm = [], np.linalg.norm(np.delete(weight, deposited, 0), axis=1).mean()
    for draw in range(10):
        rng, w, b = np.random.default_rng(draw), weight.copy(), bias.copy()
        for c in deposited:
            mean = rng.permutation(x[y == c])[:k].mean(0)
            w[c], b[c] = mean * norm / max(np.linalg.norm(mean), 1e-12), 0
        found.append(split_accuracy((x_test @ w.T + b).argmax(1), y_test, deposited))
    return {name: statistics.fmean(run[name] for run in found) for name in ("dep", "pre")}


def membership(z, y, z_test, y_test, deposited):
    """AUC and TPR (%) at 1 % FPR of telling D_r (members) from unseen images of the same classes, from logits (n, C).

    Scores: cross-entropy at the true label and the largest log-probability in D_r; logistic regression over ten
    stratified splits; as many of each class on either side. R gives about 0.5. An attack on the population, so a lower
    bound (Hayes et al., SaTML 2025). No augmentation on either side.
    Raises UserError for fewer than two test images.
    """
    scores = []
    for logits, labels in ((z_test, y_test), (z, y)):
        log_p = torch.from_numpy(logits).double().log_softmax(1).numpy()
        table = np.stack([-log_p[np.arange(len(labels)), labels], log_p[:, deposited].max(1)], 1)
        scores.append([table[labels == c] for c in deposited])
    counts = [min(len(unseen), len(members)) for unseen, members in zip(*scores)]
    if sum(counts) < 2:
        raise UserError("membership needs two test images of the deposit classes: leave it out of --measures")
    x = np.concatenate([of_class[:count] for side in scores for of_class, count in zip(side, counts)])
    is_member = np.repeat([0, 1], sum(counts))
    folds = StratifiedKFold(min(10, sum(counts)), shuffle=True, random_state=0)
    score = cross_val_predict(make_pipeline(StandardScaler(), LogisticRegression()), x, is_member, cv=folds,
                              method="decision_function")
    fpr, tpr, _ = roc_curve(is_member, score)
    return {"auc": float(roc_auc_score(is_member, score)), "tpr": 100 * float(tpr[fpr <= 0.01].max())}


def rho(a_t, a_r, a_0):
    """(A_T - mean A_R) / (A_0 - mean A_R), with the three and the spread of A_R, a list over runs of R.

    usable: whether A_0 - A_R exceeds twice that spread; None for one R. Below 0 is no merit: damaged features also cost
    the preserved classes, and to know less than R shows what was deposited. Judge |rho|.
    """
    mean, spread = statistics.fmean(a_r), statistics.stdev(a_r) if len(a_r) > 1 else None
    gap = a_0 - mean
    return {"rho": (a_t - mean) / gap if gap else None, "A_T": a_t, "A_R": mean, "A_0": a_0, "spread_R": spread,
            "usable": None if spread is None else gap > 2 * spread}
