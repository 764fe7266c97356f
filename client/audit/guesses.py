"""What correct guesses about canaries prove of ε: one run, many fair coins.

Every canary i is in or out by a fair coin S_i of its own, independent of the others. The audit
sees the mechanism's output, says "in" or "out" of r canaries, abstains on the others, and is
right v times. If the mechanism is (ε, δ)-DP with respect to adding or removing one canary, then
(Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, theorem 5.2)

    W ~ Bin(r, e^ε / (1 + e^ε))
    β = P[W >= v]                α = max over i = 1 … m of (P[W >= v − i] − β) / i
    P[at least v right]  <=  p = β + 2 m δ α

whatever the mechanism, and whatever the coins of others tell. So p is a p-value of the claim
(ε, δ), and every ε with p <= 0.05 is refuted with 95 % confidence.

Canaries have scores: the k highest are said to be in, the k lowest to be out, r = 2k. k is not
known in advance, so it is tried at SHARES of m, and p is multiplied by their number
(Bonferroni). The shares are fixed here, before any score is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import beta, binom

SHARES = (1.0, 0.5, 0.2, 0.1)  # r / m
LARGEST_EPSILON = 60.0  # e^ε / (1 + e^ε) is 1 in float64 from about 37 on


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """Canaries m, guesses r and correct guesses v."""

    canaries: int
    guessed: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.guessed <= self.canaries:
            raise ValueError(f"expected 0 <= correct <= guessed <= canaries, got {self}")


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return the chance, at most, of so many correct guesses under an (ε, δ)-DP mechanism."""
    m, r, v = guesses.canaries, guesses.guessed, guesses.correct
    if r == 0:
        return 1.0
    right = float(expit(epsilon))
    tail = float(binom.sf(v - 1, r, right))
    if delta == 0:
        return tail
    steps = np.arange(1, m + 1)
    alpha = float(((binom.sf(v - 1 - steps, r, right) - tail) / steps).max())
    return min(1.0, tail + 2 * m * delta * alpha)


def guess(scores: NDArray[np.float64], included: NDArray[np.bool_]) -> list[Guesses]:
    """Return one row for each of SHARES: the highest scores are said to be in, the lowest out.

    Equal scores are taken in the order of canaries, which says nothing of their coins. Raises
    ValueError on unlike shapes or a score that is not finite.
    """
    if scores.shape != included.shape or scores.ndim != 1:
        raise ValueError(f"{scores.shape} scores, but {included.shape} coins")
    if not np.isfinite(scores).all():
        raise ValueError("a canary's score is not finite")
    ordered = included[np.argsort(scores, kind="stable")]
    rows = []
    for share in SHARES:
        k = int(share * len(scores) / 2)
        correct = int(ordered[len(scores) - k :].sum() + (~ordered[:k]).sum())
        rows.append(Guesses(canaries=len(scores), guessed=2 * k, correct=correct))
    return rows


def refutation(rows: list[Guesses], epsilon: float, delta: float) -> float:
    """Return the p-value of the claim (ε, δ), corrected for the number of rows."""
    return min(1.0, len(rows) * min(p_value(row, epsilon, delta) for row in rows))


def best(rows: list[Guesses], epsilon: float, delta: float) -> Guesses:
    """Return the row that speaks most against the claim (ε, δ)."""
    return min(rows, key=lambda row: p_value(row, epsilon, delta))


def epsilon_lower(rows: list[Guesses], delta: float, confidence: float = 0.95) -> float:
    """Return the largest ε that the guesses refute with `confidence`, 0 if they refute none.

    `refutation` grows with ε: the answer is found by bisection, to 1e-4, from below.
    """
    level = 1 - confidence
    if refutation(rows, 0.0, delta) > level:
        return 0.0
    low, high = 0.0, LARGEST_EPSILON
    if refutation(rows, high, delta) <= level:
        return high
    while high - low > 1e-4:
        middle = (low + high) / 2
        if refutation(rows, middle, delta) <= level:
            low = middle
        else:
            high = middle
    return low


def reach(canaries: int, delta: float, confidence: float = 0.95) -> float:
    """Return the largest lower bound that so many canaries can prove: all guesses right.

    A large δ limits it, however many there are: about ln(0.05 / (8 δ)).
    """
    sizes = [2 * int(share * canaries / 2) for share in SHARES]
    rows = [Guesses(canaries=canaries, guessed=r, correct=r) for r in sizes]
    return epsilon_lower(rows, delta, confidence)


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided interval of a binomial rate (Clopper, Pearson 1934)."""
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"expected 0 <= hits <= trials and trials >= 1, got {hits} of {trials}")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - tail, hits + 1, trials - hits))
    return low, high
