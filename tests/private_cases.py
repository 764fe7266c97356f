"""What tests of client-level privacy share: a plan, sources of noise, and a rule that keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.part import Part
from anabranch.server.aggregation.private import ClientPlan, ClientPrivate, Normal
from anabranch.server.aggregation.rule import Merged, Rule
from tests.lowrank import spec_of

Array = NDArray[np.float64]

SPEC = spec_of(3)
PLAN = ClientPlan(
    population=200,
    sample_rate=0.1,
    rounds=5,
    noise_multiplier=2.0,
    clipping_norm=0.5,
    adaptive=False,
    target_quantile=0.5,
    max_examples=None,
    delta=1e-4,
    epsilon=3.0,
)


def gaussians(seed: int) -> Normal:
    rng = np.random.default_rng(seed)
    return lambda count: rng.standard_normal(count)


def zeros() -> Adapter:
    return Adapter(SPEC, {name: np.zeros(shape, np.float32) for name, shape in SPEC.tensors})


def flat(arrays: dict[str, Any]) -> Array:
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays.values()])


def rounds(
    rule: Rule[Any], cohorts: Sequence[Sequence[Delta]], first: Adapter | None = None
) -> list[tuple[ClientPrivate[Any], Merged]]:
    """Return state and result of every round of `rule` from zeros."""
    state, adapter = rule.init(first or zeros())
    history = []
    for number, cohort in enumerate(cohorts, 1):
        state, merged = rule.merge(state, rule.open(state, adapter, number), iter(cohort))
        adapter = merged.adapter
        history.append((state, merged))
    return history


def keeping(part: Part, held: list[Delta]) -> Rule[None]:
    """Return a rule on one part that keeps what it was given."""

    def merge(state: None, adapter: Adapter, deltas: Iterable[Delta]) -> tuple[None, Merged]:
        (delta,) = deltas
        held.append(delta)
        return None, Merged(adapter=adapter.plus(delta), num_examples=1, clients=1, error=0.5)

    return Rule(
        name="kept",
        init=lambda adapter: (None, adapter),
        merge=merge,
        part=lambda spec, number, client, limit: part,
    )


def filled(value: float, n: int = 1) -> Delta:
    return Delta(SPEC, {name: np.full(s, value, np.float32) for name, s in SPEC.tensors}, n)
