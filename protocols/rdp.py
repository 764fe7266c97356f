"""Rényi accounting of private training, for devices: numpy alone, and an upper bound.

One step is a Poisson-subsampled Gaussian mechanism (spend.py). With M its output with a record
and M' without, both divergences between them are at most D_α (Mironov, Talwar, Zhang 2019,
arXiv:1908.10530, theorems 4 and 5); for whole orders α >= 2, eq. 7 there,

    (α − 1) D_α = ln A_α,    A_α = Σ_k C(α, k) (1 − q)^(α−k) q^k e^(k (k−1) / 2σ²)    k = 0 … α

What is summed here is A_α − 1: the binomial weights add up to 1 and the exponents of k = 0 and 1
are 0, so

    A_α − 1 = Σ_{k >= 2} C(α, k) (1 − q)^(α−k) q^k (e^(k (k−1) / 2σ²) − 1)

has no term below 0 and loses no digits to cancellation, however small q is. ln A_α is convex in
α (it is a cumulant generating function) and ln A_1 = 0, so between whole orders the chord is an
upper bound (Wang, Balle, Kasiviswanathan 2019, arXiv:1808.00087, corollary 10). A full batch,
q = 1, has D_α = α / 2σ² at every order. Divergences of steps add up; then

    ε = min_α  D_α + ln(1 − 1/α) − (ln δ + ln α) / (α − 1)

(Canonne, Kamath, Steinke 2020, arXiv:2004.00010, proposition 12; Balle et al. 2020,
arXiv:1905.09982, theorem 21). The bound holds for any α: that the orders below are finitely many
costs tightness alone. It is never below what the PRV accountant of the sites finds.

Skellam noise of variance v on whole numbers of sensitivities D1 and D2 (Agarwal, Kairouz, Liu
2021, arXiv:2110.04995): for whole orders α, and here only where D2 <= v,

    ε(α) <= α D2² / 2v + min( ((2α − 1) D2² + 6 D1) / 4v², 3 D1 / 2v )

Under Poisson sampling k (k − 1) / 2σ² in A_α becomes (k − 1) ε(k): expanding the α-th power of
1 − q + q p₁ / p₀ is exact for whole orders whatever the mechanism. (The general bound of Zhu and
Wang 2019 has a factor 3 where nothing more is known.) The divergence the other way round is not
larger: x -> a + b − x exchanges noise around a with noise around b, which is all that theorem 5 of
Mironov, Talwar and Zhang asks of a mechanism. Between whole orders, again the chord.

A mechanism that differs from the one accounted for by τ in total variation, and outside of an
event of chance β is as accounted for: δ = δ' + β + (1 + e^ε) τ. β is the `slack` of a spend,
τ = 2⁻¹¹⁰ per step (SAMPLING) is charged for drawing Skellam noise: at most 2⁴⁰ values of all
members of a step, each within 2⁻¹⁵⁰ (secagg/skellam.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spend import (
    LARGEST_EPSILON,
    LARGEST_NOISE,
    PRECISION,
    History,
    Skellam,
    Spend,
    merged,
    repeats,
    require_one_unit,
    require_within,
)

Floats = NDArray[np.float64]
Noised = tuple[tuple[float, float, Skellam, int], ...]  # (σ, q, sensitivities, steps)

WHOLE_ORDERS = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 768, 1024)
ORDERS: Floats = np.array(
    sorted({1 + x / 10 for x in range(1, 190)} | {float(order) for order in WHOLE_ORDERS})
)
WHOLE: Floats = np.arange(2.0, WHOLE_ORDERS[-1] + 1)
ROUNDING = 1e-9  # relative, added to ε: float64 sums of logarithms are exact to about 10⁻¹¹

SAMPLING = 2.0**-110  # τ of one Skellam step
SAMPLED = 2.0**-20  # share of δ that is kept for (1 + e^ε) τ

TINY = 1e-300  # least 1 / 2σ² that is computed with: rounded up, floats end at 1e-308


def epsilon_of(spends: Iterable[Spend], delta: float) -> float:
    """Return ε such that all `spends` together are (ε, delta)-DP: an upper bound.

    The order of spends and their division into trainings do not matter. Nothing spent is 0;
    beyond LARGEST_EPSILON the result is infinity. Raises PrivacyError for a delta outside
    (0, 1), and for spends of records and of clients at once.
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"expected delta in (0, 1), got {delta}")
    every = list(spends)
    require_one_unit(every)
    gaussian = merged(spend for spend in every if spend.skellam is None)
    steps: dict[tuple[float, float, Skellam], int] = {}
    for spend in every:
        if spend.skellam is not None:
            key = (spend.noise_multiplier, spend.sample_rate, spend.skellam)
            steps[key] = steps.get(key, 0) + spend.steps
    return _epsilon(gaussian, delta, tuple((*key, count) for key, count in steps.items()))


def least_noise(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    skellam: Skellam | None = None,
) -> float:
    """Return the least σ, a multiple of PRECISION, that keeps `steps` steps within (ε, δ).

    Of Skellam noise with these sensitivities, if they are given. Raises PrivacyError if no σ up
    to LARGEST_NOISE does, ValueError for a rate or steps that are no Spend's.
    """
    target = min(epsilon, LARGEST_EPSILON)

    def fits(multiple: int) -> bool:
        spend = Spend(
            noise_multiplier=multiple * PRECISION,
            sample_rate=sample_rate,
            steps=steps,
            skellam=skellam,
        )
        return epsilon_of([spend], delta) <= target

    low, high = 0, 1024
    while not fits(high):
        low, high = high, 2 * high
        if high * PRECISION > LARGEST_NOISE:
            raise PrivacyError(
                f"privacy.epsilon = {epsilon:g} at delta = {delta:g} cannot be reached with "
                f"{steps} steps at sample rate {sample_rate:.4f}: take a larger epsilon, fewer "
                "rounds or local_steps, or a smaller batch_size"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * PRECISION


def require_budget(
    spent: Sequence[Spend],
    planned: Spend,
    *,
    epsilon: float,
    delta: float,
    budget: str = "the budget",
) -> None:
    """Raise PrivacyError if `planned` after `spent` would cost more than (epsilon, delta)."""
    require_within(epsilon_of, spent, planned, epsilon=epsilon, delta=delta, budget=budget)


def repeats_within(
    spent: Sequence[Spend], unit: Spend, *, epsilon: float, delta: float, most: int = 100_000
) -> int:
    """Return how often `unit` fits after `spent` within (epsilon, delta), at most `most`."""
    return repeats(epsilon_of, spent, unit, epsilon=epsilon, delta=delta, most=most)


def divergences(noise_multiplier: float, sample_rate: float) -> Floats:
    """Return the Rényi divergence of one step at ORDERS; between WHOLE_ORDERS, what is above it."""
    return _cumulants(noise_multiplier, sample_rate) / (ORDERS - 1)


def converted(orders: Floats, divergence: Floats, delta: float) -> float:
    """Return the least ε at `delta` that follows from Rényi divergences at `orders`; at least 0."""
    bounds = divergence + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(bounds.min()))


@functools.lru_cache(maxsize=1024)
def _epsilon(history: History, delta: float, noised: Noised = ()) -> float:
    if not history and not noised:
        return 0.0
    total = np.zeros_like(ORDERS)
    for sigma, q, steps in history:
        total += steps * _cumulants(sigma, q)
    left = delta
    for sigma, q, skellam, steps in noised:
        total += steps * _skellam_cumulants(sigma, q, skellam.l1, skellam.l2)
        left -= steps * skellam.slack
    if left <= 0:
        return math.inf
    if noised:
        left *= 1 - SAMPLED
    epsilon = converted(ORDERS, total / (ORDERS - 1), left) * (1 + ROUNDING)
    drawn = sum(entry[3] for entry in noised) * SAMPLING
    if epsilon > LARGEST_EPSILON or (1 + math.exp(epsilon)) * drawn > SAMPLED * delta:
        return math.inf
    return epsilon


@functools.lru_cache(maxsize=1024)
def _cumulants(sigma: float, q: float) -> Floats:
    """Return ln A_α of one step at ORDERS, or what is above it; infinity where floats end."""
    with np.errstate(over="ignore"):
        half = np.maximum(0.5 / np.float64(sigma) / np.float64(sigma), TINY)  # 1 / 2σ²
        if q == 1.0:
            return np.asarray(ORDERS * (ORDERS - 1) * half, np.float64)
        return _between([_cumulant(n, WHOLE[: n - 1] * (WHOLE[: n - 1] - 1) * half, q)
                         for n in WHOLE_ORDERS])  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _skellam_cumulants(sigma: float, q: float, l1: float, l2: float) -> Floats:
    """Return what is above ln A_α of one step of Skellam noise, at ORDERS; D2 > v: infinity."""
    with np.errstate(over="ignore"):
        exponents = (WHOLE - 1) * skellam_divergences(sigma, l1, l2)
        if q == 1.0:
            return _between([float(exponents[order - 2]) for order in WHOLE_ORDERS])
        return _between([_cumulant(n, exponents[: n - 1], q) for n in WHOLE_ORDERS])


def skellam_divergences(sigma: float, l1: float, l2: float) -> Floats:
    """Return ε(α) of one full-batch step of Skellam noise at α = 2 … 1024; D2 > v: infinity."""
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        square = np.float64(sigma) * np.float64(sigma)  # v / D2²
        variance = square * l2 * l2
        if not l2 <= variance:
            return np.full_like(WHOLE, np.inf)
        first = ((2 * WHOLE - 1) / square / 4 + 6 * l1 / variance / 4) / variance
        return np.asarray(
            WHOLE * np.maximum(0.5 / square, TINY) + np.minimum(first, 3 * l1 / variance / 2)
        )


def _between(whole: Sequence[float]) -> Floats:
    """Return the chords between values at WHOLE_ORDERS, at ORDERS; at order 1 it is 0."""
    # A chord to an infinite value is nan: it is no bound.
    found = np.interp(ORDERS, [1, *WHOLE_ORDERS], [0.0, *whole])
    return np.asarray(np.nan_to_num(found, nan=np.inf, posinf=np.inf), np.float64)


def _cumulant(order: int, exponent: Floats, q: float) -> float:
    """Return ln A_α at a whole order; `exponent` is (k − 1) ε(k) for k = 2 … order."""
    k = WHOLE[: order - 1]
    # ln(e^x − 1) = x + ln(1 − e^(−x))
    logs = (
        _log_binomials(order)
        + (order - k) * math.log1p(-q)
        + k * math.log(q)
        + exponent
        + np.log(-np.expm1(-exponent))
    )
    top = float(logs.max())
    if not math.isfinite(top):
        return math.inf if top > 0 else 0.0
    return float(np.logaddexp(0.0, top + math.log(float(np.exp(logs - top).sum()))))


@functools.cache
def _log_binomials(order: int) -> Floats:
    """Return ln C(order, k) for k = 2 … order, by whole numbers."""
    return np.array([math.log(math.comb(order, k)) for k in range(2, order + 1)])
