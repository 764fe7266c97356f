"""Figures of merit of a classifier, in numpy.

Notation: n records, k labels; logits z of shape (n, k), labels y of shape (n,) in [0, k);
p = softmax(z); prediction = argmax z, the lowest index among equals.

    accuracy   share of y = prediction
    macro_f1   mean of F1 = 2 TP / (2 TP + FP + FN) over the labels in truth or prediction
    auroc      P(score of a positive > score of a negative) + P(equal) / 2; two labels: of
               label 1; more: mean, one label against the rest, over labels that are in the
               truth. Score: log-odds, which order records as p does and never saturate
    ece        expected calibration error, 15 equal bins of confidence (Guo et al. 2017)
    loss       cross-entropy in nats, not weighted
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ECE_BINS = 15  # M in Guo et al. 2017, §5


def softmax(logits: ArrayLike) -> Floats:
    """Return exp(z) / Σ exp(z) along the last axis, in float64; finite for all finite z."""
    z = np.asarray(logits, np.float64)
    powers = np.exp(z - z.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def evaluate(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return accuracy, macro_f1, auroc, ece and loss of logits (n, k) against labels (n,).

    `auroc` is left out when all records have one label, for then it is not defined; every
    figure that is there is finite. Raises ValueError on wrong shapes, values or labels.
    """
    z, y = _checked(logits, labels)
    predicted = z.argmax(axis=1).astype(np.int64)
    figures = {
        "accuracy": float(np.mean(predicted == y)),
        "macro_f1": macro_f1(confusion(predicted, y, z.shape[1])),
        "ece": calibration_error(softmax(z), y),
        "loss": cross_entropy(z, y),
    }
    area = macro_auroc(z, y)
    return figures if area is None else {**figures, "auroc": area}


def confusion(predicted: ArrayLike, labels: ArrayLike, num_labels: int) -> Ints:
    """Return counts (num_labels, num_labels): row = truth, column = prediction."""
    p, y = _indices(predicted, num_labels), _indices(labels, num_labels)
    if p.shape != y.shape:
        raise ValueError(f"{len(p)} predictions, but {len(y)} labels")
    counts = np.bincount(y * num_labels + p, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels).astype(np.int64)


def macro_f1(counts: Ints) -> float:
    """Return the mean F1 over the labels with a record or a prediction in a confusion matrix."""
    both = counts.sum(axis=0) + counts.sum(axis=1)  # 2 TP + FP + FN
    present = both > 0
    return float(np.mean(2 * np.diag(counts)[present] / both[present]))


def auroc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Return the area under the ROC curve, or None unless both classes are there.

    Equals U / (positives · negatives) with U of Mann and Whitney (1947): ties count half.
    """
    s, is_positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    positives = int(is_positive.sum())
    negatives = is_positive.size - positives
    if positives == 0 or negatives == 0:
        return None
    _, group, sizes = np.unique(s, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2  # of each group of equal scores, from 1
    u = float(mean_rank[group][is_positive].sum()) - positives * (positives + 1) / 2
    return u / (positives * negatives)


def macro_auroc(logits: Floats, labels: Ints) -> float | None:
    """Return the AUROC of label 1 of two, or the mean over labels, one against the rest."""
    num_labels = logits.shape[1]
    chosen = (1,) if num_labels == 2 else range(num_labels)
    areas = [auroc(_log_odds(logits, label), labels == label) for label in chosen]
    defined = [area for area in areas if area is not None]
    return float(np.mean(defined)) if defined else None


def calibration_error(probabilities: Floats, labels: Ints, bins: int = ECE_BINS) -> float:
    """Return Σ_m |B_m|/n · |accuracy(B_m) − confidence(B_m)|, Guo et al. 2017, eq. 3.

    B_m holds the records whose confidence (the largest p) is in ((m − 1)/bins, m/bins].
    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    confidence = probabilities.max(axis=1)
    hit = probabilities.argmax(axis=1) == labels
    inner_edges = np.arange(1, bins) / bins
    bin_of = np.digitize(confidence, inner_edges, right=True)
    gap = np.bincount(bin_of, weights=hit - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def cross_entropy(logits: Floats, labels: Ints) -> float:
    """Return the mean of −log p[y], in nats."""
    return float(np.mean(_log_sum_exp(logits) - logits[np.arange(len(labels)), labels]))


def _log_sum_exp(z: Floats) -> Floats:
    top = z.max(axis=1)
    return top + np.log(np.exp(z - top[:, None]).sum(axis=1))  # type: ignore[no-any-return]


def _log_odds(logits: Floats, label: int) -> Floats:
    """Return log(p / (1 − p)) of one label, shape (n,)."""
    return logits[:, label] - _log_sum_exp(np.delete(logits, label, axis=1))


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[Floats, Ints]:
    z = np.asarray(logits, np.float64)
    if z.ndim != 2 or z.shape[0] < 1 or z.shape[1] < 2:
        raise ValueError(f"expected logits of shape (n >= 1, k >= 2), got {z.shape}")
    if not np.isfinite(z).all():
        raise ValueError("logits are NaN or infinite: the model has diverged")
    y = _indices(labels, z.shape[1])
    if len(y) != len(z):
        raise ValueError(f"{len(z)} rows of logits, but {len(y)} labels")
    return z, y


def _indices(values: ArrayLike, num_labels: int) -> Ints:
    y = np.asarray(values)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"expected integers of shape (n,), got {y.dtype} of shape {y.shape}")
    if y.size and not (y.min() >= 0 and y.max() < num_labels):
        raise ValueError(f"expected values in [0, {num_labels}), got {y.min()} to {y.max()}")
    return y.astype(np.int64)
