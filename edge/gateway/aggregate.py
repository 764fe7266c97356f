"""One delta out of many, one at a time: the linear rules, below a coordinator.

Notation: device k of m sends delta d_k of n_k records; S a clipping norm, σ the noise multiplier,
N the population, q the chance that a device is in a round, ξ standard Gaussians.

    clip(d) = d · min(1, S / ‖d‖)            ‖·‖ over all tensors, in float64; S = ∞: d itself
    mean    = Σ_k w_k clip(d_k) / Σ_k w_k     w_k = n_k ("examples") or 1 ("uniform")
    private = ( Σ_k clip(d_k) + σ S ξ ) / (q N)

The private mean is that of McMahan et al. 2018 (arXiv:1710.06963, Algorithm 1, fixed
denominator): adding or removing a device changes the sum by at most S, so a round is one Gaussian
mechanism of noise multiplier σ on a Poisson sample of rate q. The count of devices is not used.

A coordinator's rule that is linear in its clients' deltas of one part (FedAvg, and those that
train one factor a round) takes such a mean for a client's delta: with weights by examples, the
mean of means is the mean over all devices. Rules that multiply factors or sort values do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.gateway.config import ClientPrivacy
from anabranch.protocols.adapter import Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter, PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec, require_same_spec
from anabranch.protocols.tables import SEPARABLE

Normal = Callable[[int], NDArray[np.floating[Any]]]  # (count,) independent standard Gaussians
IMPROBABLE = 40.0  # honest noise fails its check with a chance of at most e^-40


def require_linear(config: RunConfig) -> None:
    """Raise ConfigError for a run in which a mean of deltas is no delta of one client."""
    federation, method = config.federation, config.method
    if method not in SEPARABLE:
        raise ConfigError(
            f'federation.method = "{method}": a gateway sums its devices\' deltas, and this rule '
            f"is not linear in them. Take one of {', '.join(sorted(SEPARABLE))}"
        )
    if config.kept is not None:
        raise ConfigError(
            "a gateway's devices keep no tensors of their own between rounds: fedsa and "
            'personal.head = "local" need sites'
        )
    if config.personal.rank:
        raise ConfigError("personal.rank: devices train no second adapter; set it to 0")
    if federation.normalize_steps:
        raise ConfigError(
            "federation.normalize_steps: a gateway's delta is a mean over devices and has no "
            "steps of its own; leave it out"
        )
    if config.privacy is not None and config.privacy.noise == "distributed":
        raise ConfigError(
            'privacy.noise = "distributed": a gateway\'s devices noise their own steps and make no '
            'noise with other members of the run; leave it "local"'
        )
    if config.uplink.error_feedback:
        raise ConfigError(
            "uplink.error_feedback: a gateway keeps no memory of what its codec left out; leave "
            "it out"
        )


class Total:
    """Σ w_k clip(d_k) of the deltas added so far: 8 bytes per value, however many come."""

    def __init__(self, spec: AdapterSpec, part: Part, clipping_norm: float | None = None) -> None:
        self.spec, self.part = spec, part
        self.weight, self.examples, self.clients = 0.0, 0, 0
        self.arrays = {name: np.zeros(shape) for name, shape in part.shapes(spec).items()}
        self._norm = math.inf if clipping_norm is None else clipping_norm
        self._steps = 0.0

    def add(self, delta: Delta, weight: float) -> None:
        """Add one device's delta; IncompatibleAdapter if it is of another spec or part."""
        require_same_spec(self.spec, delta.spec)
        if delta.part != self.part:
            raise IncompatibleAdapter(f"delta is of {delta.part}, expected {self.part}")
        norm = delta.norm()
        factor = weight * (self._norm / norm if norm > self._norm else 1.0)
        for name, total in self.arrays.items():
            total += factor * delta.arrays[name].astype(np.float64)
        self.weight += weight
        self._steps += weight * delta.steps
        self.examples += delta.num_examples
        self.clients += 1

    def mean(self) -> Delta:
        """Return the mean; its examples add up, its steps are the mean's, rounded up.

        Raises ValueError if nothing was added.
        """
        if not self.weight:
            raise ValueError("expected at least one delta, got none")
        arrays = {name: (a / self.weight).astype(np.float32) for name, a in self.arrays.items()}
        steps = math.ceil(self._steps / self.weight)
        return Delta(self.spec, arrays, self.examples, part=self.part, steps=steps)

    def private_mean(self, plan: ClientPrivacy, normal: Normal, *, steps: int) -> Delta:
        """Return the noisy mean; its examples and steps say nothing of who came.

        Raises PrivacyError for noise that is not standard Gaussian, or a sum that was clipped
        to another norm.
        """
        if self._norm != plan.clipping_norm:
            raise PrivacyError(
                f"client-level privacy: the sum was clipped to {self._norm:g}, the plan says "
                f"{plan.clipping_norm:g}: nothing is sent"
            )
        count = sum(array.size for array in self.arrays.values())
        noise = _gaussians(normal, count) * (plan.noise_multiplier * plan.clipping_norm)
        arrays, start = {}, 0
        with np.errstate(over="ignore", under="ignore"):  # Delta refuses what became infinite
            for name, array in self.arrays.items():
                part = noise[start : start + array.size].reshape(array.shape)
                arrays[name] = ((array + part) / plan.expected_cohort).astype(np.float32)
                start += array.size
        return Delta(self.spec, arrays, constant_examples(plan), part=self.part, steps=steps)


def constant_examples(plan: ClientPrivacy) -> int:
    """Return the examples that a gateway with client-level privacy states: its expected cohort."""
    return max(1, round(plan.expected_cohort))


def total_of(
    deltas: Iterable[Delta], spec: AdapterSpec, part: Part, *, by_examples: bool, norm: float | None
) -> Total:
    """Return the sum of a stream; one delta is held at a time."""
    total = Total(spec, part, norm)
    for delta in deltas:
        total.add(delta, float(delta.num_examples) if by_examples else 1.0)
    return total


def _gaussians(normal: Normal, count: int) -> NDArray[np.float64]:
    """Return `count` draws; PrivacyError if they are too small to be standard Gaussian.

    Σ ξ² of n of them is at most n − 2 √(n x) with a chance of e^−x (Laurent and Massart 2000,
    lemma 1).
    """
    noise = np.asarray(normal(count), np.float64)
    square = float(noise @ noise) if noise.shape == (count,) else math.nan
    least = max(0.0, count - 2 * math.sqrt(count * IMPROBABLE))
    if not (math.isfinite(square) and square > least):
        raise PrivacyError(
            f"client-level privacy: {count} noise values of sum of squares {square:g} are no "
            f"standard Gaussians, which have {count} on average: nothing is sent"
        )
    return noise
