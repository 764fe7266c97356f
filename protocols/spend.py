"""Privacy spent, as data that any accountant can compose: (σ, q, steps).

    σ  noise_multiplier   standard deviation of the noise on the sum of gradients, over C
    q  sample_rate        chance that a record is in a batch (Poisson sampling)

The unit of privacy is one record: neighbouring data sets differ by adding or removing one.
One step is a Poisson-subsampled Gaussian mechanism. Sites compose spends by client/privacy.py,
devices by rdp.py; what a budget means is the same for both.

Noise that the members of a secure sum make together (secagg/noise.py) is Skellam, on whole
numbers: σ is then its standard deviation over the ℓ2 sensitivity of those, and `skellam` says
the rest. Where a whole client is the unit, neighbouring runs differ in one client's update, which
is replaced by zeros in one of them. Records and clients are never added up to one ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec

from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import Positive

Unit = Literal["record", "client"]

LARGEST_EPSILON = 100.0  # beyond it an ε says nothing: infinity is reported
LARGEST_NOISE = 1e5  # σ; more noise than this leaves nothing to learn from
SMALLEST_DELTA = 1e-50  # and steps: what can be accounted for
MOST_STEPS = 10_000_000
PRECISION = 1e-3  # a planned σ is a multiple of this, rounded up


class Skellam(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides a Skellam mechanism beside σ: sensitivities of the vector of whole numbers."""

    l1: Positive
    l2: Positive
    slack: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0  # δ per step: that l1 or l2 is exceeded


@dataclass(frozen=True, kw_only=True)
class Spend:
    """Privacy spent: `steps` Poisson-subsampled Gaussian or Skellam steps of one σ and q."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    skellam: Skellam | None = None  # None: the noise is Gaussian
    unit: Unit = "record"

    def __post_init__(self) -> None:
        if not (0 < self.noise_multiplier < math.inf):
            raise ValueError(f"expected noise_multiplier > 0, got {self.noise_multiplier}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"expected sample_rate in (0, 1], got {self.sample_rate}")
        if self.steps < 1:
            raise ValueError(f"expected steps >= 1, got {self.steps}")


History = tuple[tuple[float, float, int], ...]  # (σ, q, steps), as Opacus has it
Accountant = Callable[[Iterable[Spend], float], float]  # spends, δ -> ε


def require_one_unit(spends: Iterable[Spend]) -> None:
    """Raise PrivacyError if spends of records and of clients are to be added up."""
    if len(units := sorted({f"{spend.unit}s" for spend in spends})) > 1:
        raise PrivacyError(
            f"spends of {' and '.join(units)} were to make one epsilon: they protect different "
            "things. Compose those of one unit at a time"
        )


def merged(spends: Iterable[Spend]) -> History:
    """Return one entry per (σ, q), ascending: ε depends on the totals alone.

    Raises ValueError for a Skellam spend: (σ, q) alone does not decide it.
    """
    steps: dict[tuple[float, float], int] = {}
    for spend in spends:
        if spend.skellam is not None:
            raise ValueError("expected Gaussian spends, got one of Skellam noise")
        key = (spend.noise_multiplier, spend.sample_rate)
        steps[key] = steps.get(key, 0) + spend.steps
    return tuple((sigma, q, count) for (sigma, q), count in sorted(steps.items()))


def require_within(
    accountant: Accountant,
    spent: Sequence[Spend],
    planned: Spend,
    *,
    epsilon: float,
    delta: float,
    budget: str,
) -> None:
    """Raise PrivacyError if `planned` after `spent` would cost more than (epsilon, delta)."""
    total = accountant([*spent, planned], delta)
    if total <= epsilon:
        return
    step = replace(planned, steps=1)
    fit = repeats(accountant, spent, step, epsilon=epsilon, delta=delta, most=planned.steps)
    raise PrivacyError(
        f"{planned.steps} more steps would bring epsilon from {accountant(spent, delta):.3f} to "
        f"{total:.3f} at delta = {delta:g}, above {budget} of {epsilon:g}: "
        f"{sum(s.steps for s in spent)} steps are spent, interrupted rounds included. "
        f"No such round would still fit, {fit} of its {planned.steps} steps would. Nothing is "
        "trained"
    )


def repeats(
    accountant: Accountant,
    spent: Sequence[Spend],
    unit: Spend,
    *,
    epsilon: float,
    delta: float,
    most: int,
) -> int:
    """Return how often `unit` fits after `spent` within (epsilon, delta), at most `most`.

    By bisection over the accountant: k fit and k + 1 do not, unless k = most.
    """

    def fits(count: int) -> bool:
        more = replace(unit, steps=max(count, 1) * unit.steps)
        return accountant([*spent, more] if count else spent, delta) <= epsilon

    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    if high == most and fits(most):
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
