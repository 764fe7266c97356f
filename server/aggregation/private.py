"""Client-level privacy around a rule: each client's whole update is clipped, the sum is noised.

Notation: population of N clients, each in a round's cohort with chance q; client k sends delta
Δ_k of n_k records; S clipping norm, z noise multiplier, ξ standard Gaussians.

    clip(Δ) = Δ · min(1, S / ‖Δ‖)        ‖·‖ over all tensors of the update, in float64
    w_k     = 1, or min(n_k / max_examples, 1)
    mean    = ( Σ_k w_k clip(Δ_k) + z S ξ ) / (q N)

(McMahan et al. 2018, arXiv:1710.06963, Algorithm 1, the fixed-denominator estimator: its
sensitivity does not depend on who came.) Adding or removing one client changes the sum by at
most S, so one round is a Gaussian mechanism of noise multiplier z on a Poisson sample. The rule
inside gets one delta, the noisy mean, with constants in place of counts: whatever it and a
server optimiser do with it is post-processing.

Adaptive clipping (Andrew et al. 2021, arXiv:1905.03871, section 2 and theorem 1): S follows the
quantile g of the norms, from a noised share b of the clients that are not clipped,

    b = ( Σ_k (1[‖Δ_k‖ ≤ S] − ½) + σ_b ξ ) / (q N) + ½        S ← S exp(−η (b − g))
    σ_b = max(q N / 20, z)        z_Δ = (z^−2 − (2 σ_b)^−2)^−½ in place of z for the update

The share's sum has sensitivity ½, so that share and update together cost what z alone does. Too
many within S make it smaller, too few larger: b = g is the fixed point. Clients that were drawn
and did not come count as ½.

Not hardened: a clipped norm is S up to float64 rounding (1e-15), and the noise is floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter, PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec, require_same_spec
from anabranch.server.aggregation.rule import Merged, Rule, S

Array = NDArray[np.float64]
Normal = Callable[[int], NDArray[np.floating[Any]]]  # (count,) independent standard Gaussians

RATE = 0.2  # η, the paper's value
SHARE_NOISE = 1 / 20  # σ_b over the expected cohort, the paper's value
IMPROBABLE = 40.0  # honest noise fails its check with a chance of at most e^-40


@dataclass(frozen=True, kw_only=True)
class ClientPlan:
    """Everything that decides client-level (ε, δ) of a run; neighbours differ by one client."""

    population: int  # N
    sample_rate: float  # q: chance that a client is in a round's cohort (Poisson sampling)
    rounds: int
    noise_multiplier: float  # z: noise on the sum of clipped updates, over S
    clipping_norm: float  # S, the first one if adaptive
    adaptive: bool
    target_quantile: float
    max_examples: int | None  # weights min(n_k / max_examples, 1); None: all weigh 1
    delta: float
    epsilon: float  # what the whole run costs, at most the budget

    def __post_init__(self) -> None:
        for name in ("population", "sample_rate", "rounds", "noise_multiplier", "clipping_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        if self.sample_rate > 1:
            raise ValueError(f"expected sample_rate in (0, 1], got {self.sample_rate}")

    @property
    def expected_cohort(self) -> float:
        """Return q N, the denominator of every mean."""
        return self.sample_rate * self.population

    @property
    def share_noise(self) -> float | None:
        """Return σ_b; None if clipping is fixed and no share is computed."""
        if not self.adaptive:
            return None
        return max(self.expected_cohort * SHARE_NOISE, self.noise_multiplier)

    @property
    def update_noise(self) -> float:
        """Return z_Δ: noise on the sum of updates over S; more than z if a share is noised, too."""
        if self.share_noise is None:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - (2 * self.share_noise) ** -2) ** -0.5)


@dataclass(frozen=True, kw_only=True)
class ClientPrivate(Generic[S]):
    """The state of a private rule, and what it has done so far."""

    inner: S
    clipping_norm: float  # S of the next round
    clipped_at: float | None = None  # S of the last round
    made: tuple[float, ...] = ()  # noise multiplier of every noisy round that was made
    share: float | None = None  # b of the last round; None: fixed clipping


def with_client_privacy(rule: Rule[S], plan: ClientPlan, normal: Normal) -> Rule[ClientPrivate[S]]:
    """Wrap `rule`: it merges the private mean of a round as if one client had sent it.

    `normal` draws the noise; in a real run from a key that nobody knows.

    Guarantees:
    * the sum changes by at most S if one client is added or removed; with weights, too;
    * every coordinate of the part has noise of standard deviation z_Δ S / (q N), no other one;
    * denominators, and the counts that `rule` sees, do not depend on who came: Merged says 0
      examples, 0 clients and no error. No delta at all is a round of noise;
    * one delta is held at a time, and 8 bytes per value beside it.

    Raises PrivacyError for a site that cannot train the whole part, a round beyond
    plan.rounds, noise that is not standard Gaussian, and IncompatibleAdapter for a delta of
    another spec or part.
    """

    def init(adapter: Adapter) -> tuple[ClientPrivate[S], Adapter]:
        inner, first = rule.init(adapter)
        return ClientPrivate(inner=inner, clipping_norm=plan.clipping_norm), first

    def open_round(state: ClientPrivate[S], adapter: Adapter, number: int) -> Adapter:
        _require_round(plan, state, number)
        return rule.open(state.inner, adapter, number)

    def part(spec: AdapterSpec, number: int, client: str, limit: int) -> Part:
        whole = rule.part(spec, number, client, spec.rank)
        if rule.part(spec, number, client, limit) != whole:
            raise PrivacyError(
                f"[client_privacy] clips and noises one part for all sites, and this one trains "
                f"ranks up to {limit} of {spec.rank}: lower lora.rank to {limit}, or leave the "
                "site out"
            )
        return whole

    def merge(
        state: ClientPrivate[S], adapter: Adapter, deltas: Iterable[Delta]
    ) -> tuple[ClientPrivate[S], Merged]:
        number = len(state.made) + 1
        _require_round(plan, state, number)
        whole = rule.part(adapter.spec, number, "", adapter.spec.rank)
        total = ClippedSum(adapter.spec, whole, state.clipping_norm, plan.max_examples)
        for delta in deltas:
            total.add(delta)
        mean, share, made = _noised(total, plan, normal)
        inner, merged = rule.merge(state.inner, adapter, [mean])
        after = ClientPrivate(
            inner=inner,
            clipped_at=state.clipping_norm,
            clipping_norm=_moved(state.clipping_norm, share, plan.target_quantile),
            made=(*state.made, made),
            share=share,
        )
        require_planned(plan, after.made)
        return after, replace(merged, num_examples=0, clients=0, error=None)

    return Rule(
        name=f"{rule.name}+client-privacy",
        init=init,
        merge=merge,
        open=open_round,
        part=part,
        regauges=rule.regauges,
        truncates=rule.truncates,
    )


def require_planned(plan: ClientPlan, made: Iterable[float], rounds: int | None = None) -> None:
    """Raise PrivacyError unless the noisy rounds that were made cost no more than the plan.

    made: noise multiplier of each. `rounds`, if given: how many there must be.
    """
    every = tuple(made)
    least = min(every, default=math.inf)
    if least < plan.noise_multiplier * (1 - 1e-9):
        raise PrivacyError(
            f"client-level privacy: a round was made with noise multiplier {least:g}, the plan "
            f"has {plan.noise_multiplier:g}. Publish nothing of this run"
        )
    if len(every) > plan.rounds or (rounds is not None and len(every) != rounds):
        wanted = f"at most {plan.rounds}" if rounds is None else str(rounds)
        raise PrivacyError(
            f"client-level privacy: {len(every)} noisy rounds were made, expected {wanted}. "
            "Publish nothing of this run"
        )


class ClippedSum:
    """Σ w_k clip(Δ_k), and Σ (1[‖Δ_k‖ ≤ S] − ½), of the deltas added so far."""

    def __init__(
        self, spec: AdapterSpec, part: Part, clipping_norm: float, max_examples: int | None = None
    ) -> None:
        self.spec, self.part, self.clipping_norm = spec, part, clipping_norm
        self.within = 0.0
        self.arrays = {name: np.zeros(shape) for name, shape in part.shapes(spec).items()}
        self._max_examples = max_examples

    def add(self, delta: Delta) -> None:
        """Add one client's update; IncompatibleAdapter if it is of another spec or part."""
        require_same_spec(self.spec, delta.spec)
        if delta.part != self.part:
            raise IncompatibleAdapter(f"delta is of {delta.part}, expected {self.part}")
        norm, weight = delta.norm(), 1.0
        if self._max_examples is not None:
            weight = min(delta.num_examples / self._max_examples, 1.0)
        if norm > self.clipping_norm:
            weight *= self.clipping_norm / norm
        for name, total in self.arrays.items():
            total += weight * delta.arrays[name].astype(np.float64)
        self.within += 0.5 if norm <= self.clipping_norm else -0.5


def _noised(
    total: ClippedSum, plan: ClientPlan, normal: Normal
) -> tuple[Delta, float | None, float]:
    """Return the private mean, the private share within S, and the noise multiplier of both."""
    std = plan.update_noise * total.clipping_norm
    noise = std * _gaussians(normal, sum(array.size for array in total.arrays.values()))
    arrays, start = {}, 0
    with np.errstate(over="ignore", under="ignore"):  # Delta refuses what became infinite
        for name, array in total.arrays.items():
            part = noise[start : start + array.size].reshape(array.shape)
            arrays[name] = ((array + part) / plan.expected_cohort).astype(np.float32)
            start += array.size
    # One record and no steps: constants, so that no rule can weigh by who came.
    mean = Delta(total.spec, arrays, 1, part=total.part)
    made = std / total.clipping_norm
    if plan.share_noise is None:
        return mean, None, made
    within = total.within + plan.share_noise * float(_gaussians(normal, 1)[0])
    share = within / plan.expected_cohort + 0.5
    return mean, share, float((made**-2 + (2 * plan.share_noise) ** -2) ** -0.5)


def _moved(clipping_norm: float, share: float | None, target: float) -> float:
    """Return S after a round: the fixed point is share = target."""
    if share is None:
        return clipping_norm
    return clipping_norm * math.exp(-RATE * (share - target))


def _gaussians(normal: Normal, count: int) -> Array:
    """Return `count` draws, or raise PrivacyError if they are too small to be standard Gaussian.

    Σ ξ² of n standard Gaussians is at most n − 2 √(n x) with a chance of e^−x (Laurent and
    Massart 2000, lemma 1): noise that is off is always found, noise halved from 285 values on.
    """
    noise = np.asarray(normal(count), np.float64)
    square = float(noise @ noise) if noise.shape == (count,) else math.nan
    least = max(0.0, count - 2 * math.sqrt(count * IMPROBABLE))
    if not (math.isfinite(square) and square > least):
        raise PrivacyError(
            f"client-level privacy: {count} noise values of sum of squares {square:g} are no "
            f"standard Gaussians, which have {count} on average. Nothing of this round is kept"
        )
    return noise


def _require_round(plan: ClientPlan, state: ClientPrivate[Any], number: int) -> None:
    if number != len(state.made) + 1:
        raise PrivacyError(
            f"client-level privacy: round {number} after {len(state.made)} noisy rounds: every "
            "round is counted once, in turn"
        )
    if number > plan.rounds:
        raise PrivacyError(
            f"client-level privacy: round {number} is beyond the {plan.rounds} that the plan "
            f"accounts for at epsilon = {plan.epsilon:.3f}: plan more rounds in advance"
        )
