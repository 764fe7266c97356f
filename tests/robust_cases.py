"""Deltas to judge robust rules by, and Krum's score from its definition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Delta
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Robust
from anabranch.server.aggregation.robust import combine_for
from tests.lowrank import random_delta, spec_of

SPEC = spec_of(2)
PART = Part(factors="B")
Values = NDArray[np.float64]


def merge(robust: Robust, deltas: list[Delta]) -> Delta:
    return combine_for(robust)((delta, 1.0) for delta in deltas)


def cohort(count: int, seed: int, spread: float = 1.0) -> list[Delta]:
    """Return deltas around a common direction."""
    common = random_delta(SPEC, seed, PART)
    return [common.plus(random_delta(SPEC, seed + 1 + i, PART).times(spread)) for i in range(count)]


def flat(delta: Delta) -> Values:
    return np.concatenate([a.ravel() for a in delta.arrays.values()]).astype(np.float64)


def stack(deltas: list[Delta]) -> Values:
    return np.stack([flat(d) for d in deltas])


def filled(value: float) -> Delta:
    shapes = PART.shapes(SPEC)
    return Delta(SPEC, {n: np.full(s, value, np.float32) for n, s in shapes.items()}, 1, part=PART)


def krum_scores(vectors: Values, f: int) -> Values:
    distances = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    scores = []
    for i, row in enumerate(distances):
        others = np.sort(np.delete(row, i))
        scores.append(others[: len(vectors) - f - 2].sum())
    return np.array(scores)
