"""Server optimisers: what the coordinator does with the mean of the deltas.

Notation: d_t the mean delta of round t, taken as a gradient of the wrong sign; η the server's
learning rate; β_1, β_2 in [0, 1); τ > 0.

    m_t = β_1 m_{t−1} + (1 − β_1) d_t
    v_t = β_2 v_{t−1} + (1 − β_2) d_t²
    update = η_t · m̂_t / (√v̂_t + τ)        m̂_t = m_t / (1 − β_1^t),  v̂_t = v_t / (1 − β_2^t)

FedAdam (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2), with Adam's bias correction (Kingma
and Ba 2015, Algorithm 1), which the paper leaves out: with it the first rounds move as far as
later ones. Under DP all of this is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Delta
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.rule import Aggregator, S

Moments = dict[str, NDArray[np.float64]]
Rate = Callable[[str, int], float]  # (name of a tensor, round from 1) -> η_t


@dataclass(frozen=True)
class AdamState:
    """Moments after `rounds` rounds; the wrapped rule's own state beside them."""

    inner: object
    rounds: int
    first: Moments
    second: Moments


def fedadam(
    rule: Aggregator[S],
    rate: Rate,
    *,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-8,
) -> Aggregator[AdamState]:
    """Wrap `rule`: its mean delta is the gradient of Adam on the server.

    The update moves a value by about η_t in the direction of its deltas, however small they
    are, so equal local work counts the same in all tensors. Raises ValueError for a beta
    outside [0, 1) or tau <= 0.
    """
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"expected {name} in [0, 1), got {value}")
    if not tau > 0:
        raise ValueError(f"expected tau > 0, got {tau}")

    def apply(state: AdamState, deltas: Iterable[Delta]) -> tuple[AdamState, Delta]:
        inner, mean = rule.apply(state.inner, deltas)  # type: ignore[arg-type]
        t = state.rounds + 1
        first = _average(state.first, mean, beta1, power=1)
        second = _average(state.second, mean, beta2, power=2)
        arrays = {}
        for name in mean.arrays:
            m = first[name] / (1 - beta1**t)
            v = second[name] / (1 - beta2**t)
            arrays[name] = (rate(name, t) * m / (np.sqrt(v) + tau)).astype(np.float32)
        return AdamState(inner, t, first, second), Delta(mean.spec, arrays, mean.num_examples)

    return Aggregator(lambda: AdamState(rule.init(), 0, {}, {}), apply)


def linear_decay(rate: float, head_rate: float, rounds: int) -> Rate:
    """Return η_t = η · (1 − (t − 1) / rounds), with another η for the head."""

    def at(name: str, t: int) -> float:
        base = head_rate if name.startswith("head.") else rate
        return base * max(0.0, 1 - (t - 1) / rounds)

    return at


def constant(rate: float, head_rate: float) -> Rate:
    """Return η_t = η, with another η for the head."""
    return lambda name, t: head_rate if name.startswith("head.") else rate


def _average(before: Moments, mean: Delta, beta: float, *, power: int) -> Moments:
    """Return β · before + (1 − β) · mean^power for every tensor."""
    spec: AdapterSpec = mean.spec
    zeros = {name: np.zeros(shape) for name, shape in spec.tensors}
    return {
        name: beta * (before or zeros)[name] + (1 - beta) * array.astype(np.float64) ** power
        for name, array in mean.arrays.items()
    }
