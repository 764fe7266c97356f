"""Can one tell who was trained on? Calibrated loss of members against non-members.

    score(x) = ℓ(x; starting adapter) − ℓ(x; final adapter)        ℓ cross-entropy of x's label

The base model is the reference: a record that it finds easy gets no credit for that (LoRA-Leak
shows the base to be a strong reference). Members are training records, non-members records that
were held out.

    AUC            chance that a member scores above a non-member
    TPR at 1 % FPR share of members above the score that 1 % of the non-members exceed; exact
                   binomial interval (Clopper, Pearson) over members. Needs 100 non-members

A bound on ε. Of a random split, pair members with non-members of the same label: given the two
of a pair, a fair coin decided which was trained on, independently over pairs. Flipping it removes
one record and adds another, against which an (ε, δ)-DP run is (2ε, (1 + e^ε) δ)-DP (group
privacy). So "the higher score is the member" is a guess as in guesses.py, over pairs, and ε is at
least half of what it proves. The most different pairs are guessed first. This takes a split that
was random: anabranch's own is a keyed hash of each record (client/data/records.py). For records
from elsewhere it is an assumption, that they could as well have been trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from anabranch.client.audit.guesses import SHARES, Guesses, clopper_pearson, refutation
from anabranch.client.tuning.metrics import auroc

Floats = NDArray[np.float64]

FALSE_POSITIVES = 0.01
STEP = 0.01  # of ε, in the search for the bound
LARGEST = 20.0


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What the test found; `tpr` and its interval are None with too few non-members."""

    members: int
    non_members: int
    auc: float
    tpr: float | None
    tpr_low: float | None
    tpr_high: float | None
    pairs: tuple[Guesses, ...]  # one for each of SHARES


def losses(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Floats:
    """Return the cross-entropy of every record, (n,)."""
    z = torch.from_numpy(logits).double()
    values: Floats = functional.cross_entropy(z, torch.from_numpy(labels), reduction="none").numpy()
    return values


def compare(
    members: tuple[Floats, NDArray[np.int64]],
    others: tuple[Floats, NDArray[np.int64]],
    rng: np.random.Generator,
) -> Membership:
    """Return the test's figures for (scores, labels) of members and of non-members.

    Raises ValueError if one of the two is empty.
    """
    (inside, _), (outside, _) = members, others
    if not len(inside) or not len(outside):
        raise ValueError("expected members and non-members")
    auc = auroc(
        np.concatenate([inside, outside]), np.arange(len(inside) + len(outside)) < len(inside)
    )
    assert auc is not None  # both classes are there
    low = high = tpr = None
    if len(outside) * FALSE_POSITIVES >= 1:
        allowed = int(len(outside) * FALSE_POSITIVES)
        threshold = np.sort(outside)[len(outside) - allowed - 1]
        hits = int((inside > threshold).sum())
        tpr, (low, high) = hits / len(inside), clopper_pearson(hits, len(inside))
    return Membership(
        members=len(inside),
        non_members=len(outside),
        auc=auc,
        tpr=tpr,
        tpr_low=low,
        tpr_high=high,
        pairs=_guess_pairs(_gaps(members, others, rng)),
    )


def membership_p_value(pairs: tuple[Guesses, ...], epsilon: float, delta: float) -> float:
    """Return the p-value of the claim (ε, δ), by group privacy of two."""
    if not pairs or pairs[0].canaries == 0:
        return 1.0
    return refutation(list(pairs), 2 * epsilon, min(1.0, (1 + np.exp(epsilon)) * delta))


def membership_epsilon(pairs: tuple[Guesses, ...], delta: float, confidence: float = 0.95) -> float:
    """Return the largest ε on a grid of STEP that the pairs refute with `confidence`, or 0."""
    bound = 0.0
    for epsilon in np.arange(0.0, LARGEST, STEP):
        if membership_p_value(pairs, float(epsilon), delta) > 1 - confidence:
            break
        bound = float(epsilon)
    return bound


def _gaps(
    members: tuple[Floats, NDArray[np.int64]],
    others: tuple[Floats, NDArray[np.int64]],
    rng: np.random.Generator,
) -> Floats:
    """Return score of the member − score of the non-member of random pairs of one label."""
    gaps = []
    for label in np.unique(others[1]):
        inside = rng.permutation(members[0][members[1] == label])
        outside = rng.permutation(others[0][others[1] == label])
        count = min(len(inside), len(outside))
        gaps.append(inside[:count] - outside[:count])
    return np.concatenate([*gaps, np.zeros(0)])


def _guess_pairs(gaps: Floats) -> tuple[Guesses, ...]:
    """Guess the pairs of the largest |gap| first; equal scores are guessed wrong."""
    ordered = gaps[np.argsort(-np.abs(gaps), kind="stable")]
    rows = []
    for share in SHARES:
        r = int(share * len(gaps))
        rows.append(Guesses(canaries=len(gaps), guessed=r, correct=int((ordered[:r] > 0).sum())))
    return tuple(rows)
