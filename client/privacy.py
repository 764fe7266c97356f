"""What a private training run promises, computed before it starts, and what runs have cost.

    σ  noise_multiplier   standard deviation of the noise on the sum of gradients, over C
    C  clipping_norm      L2 bound on one record's gradient
    q  sample_rate        chance that a record is in a batch (Poisson sampling)
    T  steps

The unit of privacy is one record: neighbouring data sets differ by adding or removing one.
One step is a Poisson-subsampled Gaussian mechanism. Steps compose by the numbers (σ, q, T)
alone, over rounds and over runs; ε comes from Opacus' PRV accountant (Gopi, Lee, Wutschitz
2021, arXiv:2106.02848), whose upper bound is taken. Full batches (q = 1) go the same way:
the accountant's limit q → 1 is the Gaussian mechanism, whose exact composition a test compares.

As soon as Skellam noise (protocols/secagg/noise.py) is among what was spent, all of it is composed
by its Rényi divergences (protocols/rdp.py), an upper bound: PRV has no law of that noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from anabranch.protocols import rdp
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.secagg.noise import DistributedNoise
from anabranch.protocols.spend import (
    LARGEST_EPSILON,
    LARGEST_NOISE,
    MOST_STEPS,
    PRECISION,
    SMALLEST_DELTA,
    History,
    Spend,
    merged,
    repeats,
    require_one_unit,
    require_within,
)
from anabranch.protocols.tables import Clipping, Privacy, Training

__all__ = [  # with what spend.py has for sites and devices alike
    "LARGEST_EPSILON",
    "DpPlan",
    "Spend",
    "epsilon_bounds",
    "epsilon_of",
    "least_noise",
    "merged",
    "plan_for",
    "plan_together",
    "repeats_within",
    "require_budget",
    "sampling_rate",
]

CACHED = 1 << 14  # results; a simulated population has a plan for every number of records


@dataclass(frozen=True, kw_only=True)
class DpPlan:
    """Everything that decides (ε, δ) of a run, and nothing that does not (no seed, no device)."""

    noise_multiplier: float
    clipping: Clipping
    clipping_norm: float
    sample_rate: float
    steps: int  # of the whole run
    delta: float
    epsilon: float  # what the whole run costs, at most the budget
    target_quantile: float = 0.5  # adaptive clipping alone
    together: DistributedNoise | None = None  # noise of all members of a secure sum; None: its own

    def __post_init__(self) -> None:
        self.spend(self.steps)
        for name in ("clipping_norm", "delta", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")

    def spend(self, steps: int) -> Spend:
        """Return what `steps` steps of this plan spend."""
        if self.together is not None:
            return self.together.spend(steps, self.sample_rate)
        return Spend(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps
        )


def plan_for(privacy: Privacy, training: Training, rounds: int, num_examples: int) -> DpPlan:
    """Return the plan with the least noise that keeps the whole run within the budget.

    q = min(1, batch_size / num_examples), T = rounds × local_steps, δ = 1 / (10 num_examples)
    unless given. The same arguments give the same plan. Raises PrivacyError if δ >= 1/n,
    local_steps is missing, or no noise multiplier up to LARGEST_NOISE reaches ε.
    """
    if num_examples < 1:
        raise PrivacyError("0 records: nothing can be trained on privately")
    if training.local_steps is None:
        raise PrivacyError(
            "training.local_steps is missing: the number of noisy steps per round decides "
            "epsilon and must be fixed in advance"
        )
    delta = 1 / (10 * num_examples) if privacy.delta is None else privacy.delta
    if delta >= 1 / num_examples:
        raise PrivacyError(
            f"privacy.delta = {delta:g} is not below 1/n = {1 / num_examples:g} of this site's "
            f"{num_examples} records: it would allow releasing whole records. Set it to at most "
            f"{1 / (10 * num_examples):g}, or leave it out"
        )
    sample_rate = sampling_rate(training.batch_size, num_examples)
    steps = rounds * training.local_steps
    if delta < SMALLEST_DELTA or steps > MOST_STEPS:
        raise PrivacyError(
            f"delta = {delta:g} and {steps} steps: expected delta of at least {SMALLEST_DELTA:g} "
            f"and at most {MOST_STEPS} steps in all rounds, which is what can be accounted for"
        )
    noise_multiplier = least_noise(privacy.epsilon, delta, sample_rate, steps)
    spend = Spend(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    return DpPlan(
        noise_multiplier=noise_multiplier,
        clipping=privacy.clipping,
        clipping_norm=privacy.clipping_norm,
        target_quantile=privacy.target_quantile,
        sample_rate=sample_rate,
        steps=steps,
        delta=delta,
        epsilon=epsilon_of([spend], delta),
    )


def plan_together(noise: DistributedNoise, privacy: Privacy, batch: int, records: int) -> DpPlan:
    """Return the plan of a site with so many records, in a run whose sums are noised by members.

    The noise is agreed on; the rate is the site's own, so it spends no more than was planned.
    Raises PrivacyError for a site with too few records: its rate, or the run's δ, is too large.
    """
    rate = sampling_rate(batch, max(records, 1))
    if records < 1 or rate > noise.sample_rate or noise.delta >= 1 / records:
        raise PrivacyError(
            f"{records} training records: the noise of this run is planned for sites that draw "
            f"a record with chance {noise.sample_rate:.4f} at most, and delta = {noise.delta:g} "
            "below 1/n. This site takes no part; lower data.min_rows or privacy.delta for all"
        )
    return DpPlan(
        noise_multiplier=noise.noise_multiplier,
        clipping=privacy.clipping,
        clipping_norm=privacy.clipping_norm,
        sample_rate=rate,
        steps=noise.rounds,
        delta=noise.delta,
        epsilon=epsilon_of([noise.spend(noise.rounds, rate)], noise.delta),
        together=noise,
    )


def sampling_rate(batch_size: int, num_examples: int) -> float:
    """Return q for an expected batch of `batch_size` of `num_examples` records."""
    return min(1.0, batch_size / num_examples)


def epsilon_of(spends: Iterable[Spend], delta: float) -> float:
    """Return ε such that all `spends` together are (ε, delta)-DP: an upper bound.

    The order of spends and their division into rounds do not matter. Nothing spent is 0;
    beyond LARGEST_EPSILON the result is infinity. Raises PrivacyError if the accountant
    cannot bound it, or spends of records and of clients were given at once.
    """
    return epsilon_bounds(spends, delta)[1]


@functools.lru_cache(maxsize=CACHED)
def _bounds(history: History, delta: float) -> tuple[float, float]:
    """Return the accountant's lower and upper bound on ε."""
    if not history:
        return 0.0, 0.0
    from anabranch.client.accountant import bounds  # here and not above: Opacus takes a second

    return bounds(history, delta)


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
    """Return how often `unit` fits after `spent` within (epsilon, delta), at most `most`.

    By bisection over the accountant: k fit and k + 1 do not, unless k = most.
    """
    return repeats(epsilon_of, spent, unit, epsilon=epsilon, delta=delta, most=most)


def epsilon_bounds(spends: Iterable[Spend], delta: float) -> tuple[float, float]:
    """Return (low, high) between which the accountant guarantees the true ε to lie.

    `high` is what epsilon_of gives. Beyond LARGEST_EPSILON nothing is computed: both are
    infinity. With Skellam noise among them there is no bound from below: `low` is 0.
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"expected delta in (0, 1), got {delta}")
    every = list(spends)
    if any(spend.skellam is not None for spend in every):
        return 0.0, rdp.epsilon_of(every, delta)
    require_one_unit(every)
    return _bounds(merged(every), delta)


@functools.lru_cache(maxsize=CACHED)
def least_noise(target: float, delta: float, sample_rate: float, steps: int) -> float:
    """Return the least σ, to PRECISION, with ε <= target: bracketed, then Brent's method.

    Raises PrivacyError if no σ up to LARGEST_NOISE keeps `steps` steps within (target, delta).
    """

    def cost(sigma: float) -> float:
        spend = Spend(noise_multiplier=sigma, sample_rate=sample_rate, steps=steps)
        return epsilon_of([spend], delta)

    def excess(log_sigma: float) -> float:  # ε falls almost like a power of σ
        return math.log(min(cost(math.exp(log_sigma)), 2 * LARGEST_EPSILON) / target)

    target = min(target, LARGEST_EPSILON)
    high = 1.0
    while cost(high) > target:
        high *= 2
        if high > LARGEST_NOISE:
            raise PrivacyError(
                f"privacy.epsilon = {target:g} at delta = {delta:g} cannot be reached with "
                f"{steps} steps at sample rate {sample_rate:.4f}: take a larger epsilon, fewer "
                "rounds or local_steps, or a smaller batch_size"
            )
    low = high / 2
    while cost(low) <= target:
        low /= 2
    from scipy.optimize import brentq  # here and not above: a quarter of a second

    root = math.exp(brentq(excess, math.log(low), math.log(high), xtol=PRECISION / 4))
    grid = math.ceil(root / PRECISION)
    while cost(grid * PRECISION) > target:
        grid += 1
    return grid * PRECISION
