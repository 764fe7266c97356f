"""Direct tests of the noisy mechanism: is what ran the mechanism that was accounted for?

Guesses about canaries bound ε from below and are loose: half the noise can pass them. These
tests ask smaller questions and see much more. Each has a null hypothesis, "what ran is the plan",
under which its p-value is exact or conservative; it fails when p is below its level, and levels
add up to 1 % over all tests of an audit (report.py).

    noise level      Σ (z / σ)² ~ χ² with one degree of freedom per value z (units of C).
                     Fails if the noise is smaller than planned; more noise is no failure
    noise per tensor the same for every tensor, p multiplied by their number
    noise and batch  the noise of a step does not depend on how many records were drawn:
                     Σ_t (k_t − mean k) ‖z_t‖², its null simulated, two-sided
    shared noise     two noise vectors of d values have correlation c with
                     c √((d − 1) / (1 − c²)) ~ Student's t, d − 1 degrees (no mean is taken);
                     of two clients, two rounds, two steps
    clipping         a canary's gradient is far above C; what comes through, along its direction,
                     is at most C, with N(0, σ²C²) on each: mean <= C
    rate             Σ k_t ~ Bin(T N, q): exact, two-sided
    batch sizes      Σ (k_t − qN)² has the dispersion of Bin(N, q): simulated, two-sided.
                     Batches of a fixed size have none
    participation    how often each canary was drawn ~ Bin(T, q): the same. A pass over shuffled
                     records draws everyone equally often

k_t records are drawn in step t of N records and canaries. Simulated nulls are Monte Carlo tests
(Barnard 1963): (1 + how many of B are as extreme) / (B + 1) is a valid p-value for any B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2, norm, t

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXTREMES = 4  # simulated values that are as extreme as the level asks for
MOST_DRAWS = 10_000_000  # of one simulated null: beyond them, the first steps or canaries alone


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test of the plan."""

    name: str
    p_value: float
    found: str
    expected: str


def noise_level(noise: Floats, sigma: float) -> Check:
    """Test that noise values (in units of C) have a standard deviation of at least σ."""
    power = float(np.square(noise, dtype=np.float64).sum())
    low, high = sigma_interval(noise)
    return Check(
        name="noise level",
        p_value=float(chi2.cdf(power / sigma**2, noise.size)),
        found=f"σ in [{low:.3f}, {high:.3f}] (95 %), {noise.size} values",
        expected=f"σ = {sigma:.3f}",
    )


def noise_per_tensor(
    noise: Sequence[tuple[Ints, NDArray[np.floating[Any]]]], sigma: float
) -> Check:
    """Test the noise level of every tensor by itself; p is multiplied by their number.

    noise: the tensor of each of K values, and the values of all steps, (steps, K).
    """
    powers: dict[int, float] = {}
    counts: dict[int, int] = {}
    for tensors, values in noise:
        sums = np.square(values, dtype=np.float64).sum(axis=0)
        for tensor, power in zip(tensors.tolist(), sums.tolist(), strict=True):
            powers[tensor] = powers.get(tensor, 0.0) + power
            counts[tensor] = counts.get(tensor, 0) + len(values)
    sigmas = [math.sqrt(powers[k] / counts[k]) for k in powers]
    p = min(float(chi2.cdf(powers[k] / sigma**2, counts[k])) for k in powers)
    return Check(
        name="noise per tensor",
        p_value=min(1.0, len(powers) * p),
        found=f"σ from {min(sigmas):.3f} to {max(sigmas):.3f}, {len(sigmas)} tensors",
        expected=f"σ = {sigma:.3f}",
    )


def sigma_interval(noise: Floats, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided interval of the noise's standard deviation, in units of C."""
    power, tail = float(np.square(noise, dtype=np.float64).sum()), (1 - confidence) / 2
    low = power / float(chi2.ppf(1 - tail, noise.size))
    return math.sqrt(low), math.sqrt(power / float(chi2.ppf(tail, noise.size)))


def noise_and_batch(
    powers: Floats,
    sizes: Ints,
    drawn: Ints,
    runs: Ints,
    rng: np.random.Generator,
    level: float,
) -> Check:
    """Test that noise does not follow the batch.

    Per step: its noise power ‖z‖² over `sizes` values, the records drawn, and the replay it is of.
    p-values below `level` can be reached.
    """
    count, most = simulated(level)
    powers, sizes, drawn, runs = powers[:most], sizes[:most], drawn[:most], runs[:most]
    centred = drawn - _means(drawn, runs)

    def statistic(power: Floats) -> Floats:
        ratios: Floats = (power / sizes) @ centred / power.sum(axis=-1)
        return ratios

    null = statistic(rng.chisquare(sizes, (count, len(sizes))))
    found = float(statistic(powers)) if powers.any() else 0.0
    spread = float(null.std()) or 1.0
    return Check(
        name="noise and batch",
        p_value=two_sided(found, null),
        found=f"slope {found / spread:+.1f} standard errors",
        expected="no slope",
    )


def shared_noise(name: str, pairs: Sequence[tuple[Floats, Floats]]) -> Check:
    """Test that the two vectors of every pair are independent; pairs share no vector."""
    first = np.concatenate([np.ravel(a) for a, _ in pairs])
    second = np.concatenate([np.ravel(b) for _, b in pairs])
    size = math.sqrt(float(first @ first)) * math.sqrt(float(second @ second))
    if size == 0:  # there is no noise: that is for noise_level to say
        rho, p = 0.0, 1.0
    else:
        rho = min(1.0, max(-1.0, float(first @ second) / size))
        freedom = len(first) - 1
        statistic = abs(rho) * math.sqrt(freedom / max(1 - rho**2, 1e-300))
        p = float(2 * t.sf(statistic, freedom))
    return Check(
        name=f"noise shared across {name}",
        p_value=p,
        found=f"correlation {rho:+.4f}, {len(first)} values",
        expected="0",
    )


def clipping(contributions: Floats, sigma: float) -> Check:
    """Test that canaries come through with at most C, on average, along their directions."""
    mean, error = float(contributions.mean()), sigma / math.sqrt(len(contributions))
    return Check(
        name="clipping",
        p_value=float(norm.sf((mean - 1 - 1e-6) / error)),
        found=f"{mean:.3f} ± {error:.3f} of C, {len(contributions)} draws",
        expected="at most 1",
    )


def sampling_rate(drawn: Ints, populations: Ints, rate: float) -> Check:
    """Test that records are drawn at rate q: Σ k_t of Σ N_t chances."""
    hits, trials = int(drawn.sum()), int(populations.sum())
    p = binomtest(hits, trials, rate).pvalue if rate < 1 else float((drawn == populations).all())
    return Check(
        name="sampling rate",
        p_value=float(p),
        found=f"q = {hits / trials:.5f}, {trials} chances",
        expected=f"q = {rate:.5f}",
    )


def dispersion(
    name: str,
    counts: Ints,
    trials: Ints,
    rate: float,
    rng: np.random.Generator,
    level: float,
) -> Check:
    """Test that counts vary like Bin(trials, q), neither less nor more; `level` as above."""
    simulations, most = simulated(level)
    counts, trials = counts[:most], trials[:most]
    variance = trials * rate * (1 - rate)

    def statistic(of: Ints) -> Floats:
        spread: Floats = (np.square(of - trials * rate) / np.maximum(variance, 1e-12)).mean(axis=-1)
        return spread

    found = float(statistic(counts))
    if rate < 1:
        p = two_sided(found, statistic(rng.binomial(trials, rate, (simulations, len(trials)))))
    else:
        p = float((counts == trials).all())
    return Check(
        name=name,
        p_value=p,
        found=f"variance {found:.3f} of the binomial's, {len(counts)} counts",
        expected="1",
    )


def steps_taken(found: int, planned: int) -> Check:
    """Check, without chance, that as many noisy steps were seen as were accounted for."""
    return Check(
        name="steps",
        p_value=float(found == planned),
        found=f"{found} noisy steps",
        expected=f"{planned}",
    )


def simulated(level: float) -> tuple[int, int]:
    """Return B for p-values down to `level`, and for how many values each null is simulated."""
    count = math.ceil(2 * EXTREMES / level)
    return count, max(50, MOST_DRAWS // count)


def two_sided(found: float, null: Floats) -> float:
    """Return the Monte Carlo p-value of `found` among values simulated under the null."""
    below, above = int((null <= found).sum()), int((null >= found).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (len(null) + 1))


def _means(values: Ints, groups: Ints) -> Floats:
    """Return, for every value, the mean of its group."""
    _, at, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means: Floats = np.bincount(at, weights=values) / counts
    return means[at]
