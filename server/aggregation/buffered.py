"""FedBuff: merge as soon as K deltas are there, whichever rounds they began in.

Notation: delta d_k was trained from the adapter of τ_k merges ago, its age; p_k its weight among
the K deltas of the buffer (1/K, or n_k / Σ n_k).

    w_{t+1} = w_t + Σ_k p_k s(τ_k) d_k          s(τ) = 1 / √(1 + τ)

(Nguyen et al. 2022, arXiv:2106.06639: Algorithm 1 divides the buffer's sum by K and not by Σ s,
so a late delta makes the step shorter; s is the staleness scaling of its experiments. The paper
has p_k = 1/K and a server learning rate, which is a [server] optimiser here.)

The engine keeps the buffer, and the age of every delta: merges since its adapter was sent out.
It hands (delta, age) to what `buffered` returns, in place of Rule.merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.server.aggregation.rule import Merged, Rule, S


def staleness(age: int) -> float:
    """Return s(age) = 1 / √(1 + age); ValueError for an age below 0."""
    if age < 0:
        raise ValueError(f"expected an age of 0 merges or more, got {age}")
    return 1 / math.sqrt(1 + age)


def buffered(
    rule: Rule[S],
) -> Callable[[S, Adapter, Iterable[tuple[Delta, int]]], tuple[S, Merged]]:
    """Return (state, adapter, (delta, age) of the buffer) -> (state, merged).

    `adapter` is the newest one. `rule` weighs and merges as always, one delta at a time; with
    all ages 0 the result is that of `rule.merge`, bit for bit.

    Raises ValueError for a rule that re-gauges; in a merge, for an age below 0.
    """
    if rule.regauges:
        raise ValueError(
            f"late deltas do not fit {rule.name}: they belong to factors that are no more. "
            "Take ffa, whose A is fixed"
        )

    def merge(state: S, adapter: Adapter, aged: Iterable[tuple[Delta, int]]) -> tuple[S, Merged]:
        return rule.merge(state, adapter, _shortened(aged))

    return merge


def _shortened(aged: Iterable[tuple[Delta, int]]) -> Iterator[Delta]:
    for delta, age in aged:
        scale = staleness(age)
        yield delta if age == 0 else delta.times(scale)
