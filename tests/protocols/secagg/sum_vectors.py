"""Golden vectors of what goes into a sum: terms as text, and deltas as vectors and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from anabranch.protocols.adapter import WHOLE, Delta
from anabranch.protocols.part import Part
from anabranch.protocols.secagg.contribution import contribute, mean_of, sizes
from anabranch.protocols.secagg.terms import Terms
from anabranch.protocols.spec import AdapterSpec
from tests.protocols.secagg.rig import integers, names_of, random_of, roster_of, terms_of

Vector = dict[str, Any]

SPEC = AdapterSpec(
    base="b" * 64,
    tokenizer="",
    rank=2,
    alpha=2.0,
    targets=("q",),
    tensors=(("head.bias", (2,)), ("q.lora_A.weight", (2, 3)), ("q.lora_B.weight", (1, 2))),
)
# records, steps, rank indices that it trained, its values
MEMBERS = (
    (7, 3, (0, 1), (0.5, -0.25, 0.1, 0.2, 0.3, -0.4, -0.5, -0.6, 1.0, -1.0)),
    (2, 5, (0,), (0.0, 1.0, 0.7, -0.7, 0.7, 0.0, 0.0, 0.0, 0.25, 0.0)),
    (4, 1, (0, 1), (-1.0, 1.0, 0.0, 0.0, 0.0, 0.9, 0.8, 0.7, -0.125, 0.5)),
)


def terms() -> list[Vector]:
    """Return terms as canonical JSON, and its digest."""
    names = names_of(3)
    changed: list[dict[str, Any]] = [
        {},
        {"group": 2, "limit": 1e-5, "threshold": 2 / 3, "colluding": 0.1},
        {"limit": 1e16, "run": 'málaga "1" \\ é', "keystream": "chacha20"},
        {"limit": 2.5e-7, "ranks": {"site-0001": (0, 2), "site-0000": (1,)}},
    ]
    return [
        {"canonical": msgspec.json.encode(one, order="sorted").decode(), "digest": one.digest}
        for changes in changed
        for one in [terms_of(names, roster_of(names), **changes)]
    ]


def contributions() -> list[Vector]:
    """Return deltas, the vectors that stand for them, their sum and its mean."""
    return [
        _contribution("examples", ring=32),
        _contribution("uniform", ring=24),
        _contribution("examples", ring=32, normalize_steps=True),
        _contribution("examples", ring=32, by_rank=True),
    ]


def _contribution(
    weighting: Any, *, ring: int, normalize_steps: bool = False, by_rank: bool = False
) -> Vector:
    names = names_of(len(MEMBERS))
    values, counters = sizes(SPEC, WHOLE, by_rank=by_rank)
    heaviest = 7 * 1024 if weighting == "examples" else 1024
    one: Terms = terms_of(
        names, roster_of(names), ring=ring, weight=heaviest, values=values, counters=counters
    )
    how: dict[str, Any] = {"normalize_steps": normalize_steps, "by_rank": by_rank}
    vectors = [
        contribute(
            _delta(member, by_rank=by_rank),
            one,
            WHOLE,
            weighting=weighting,
            random=random_of(name),
            **how,
        )
        for name, member in zip(names, MEMBERS, strict=True)
    ]
    total = np.sum(vectors, axis=0, dtype=vectors[0].dtype)
    mean = mean_of(total, one, SPEC, WHOLE, **how)
    return {
        "weighting": weighting,
        "normalize_steps": normalize_steps,
        "mixed_ranks": by_rank,
        "rank": SPEC.rank,
        "tensors": {name: list(shape) for name, shape in SPEC.tensors},
        "ring": ring,
        "limit": one.limit,
        "weight": one.weight,
        "counters": counters,
        "members": [
            {
                "records": records,
                "steps": steps,
                "ranks": list(ranks) if by_rank else None,
                "values": _flat(_delta(member, by_rank=by_rank).full()),
                "rounding": random_of(name)(32).hex(),
                "vector": integers(vector, ring),
            }
            for name, member, vector in zip(names, MEMBERS, vectors, strict=True)
            for records, steps, ranks, _ in [member]
        ],
        "sum": integers(total, ring),
        "mean": _flat(mean.arrays),
        "mean_records": mean.num_examples,
        "mean_steps": mean.steps,
    }


def _delta(member: tuple[int, int, tuple[int, ...], tuple[float, ...]], *, by_rank: bool) -> Delta:
    records, steps, ranks, values = member
    row, arrays, start = np.array(values, np.float32), {}, 0
    for name, shape in SPEC.tensors:
        stop = start + int(np.prod(shape))
        arrays[name] = row[start:stop].reshape(shape)
        start = stop
    part = Part(ranks=ranks) if by_rank and len(ranks) < SPEC.rank else WHOLE
    return Delta(SPEC, part.take(SPEC, arrays), records, part=part, steps=steps)


def _flat(arrays: Mapping[str, Any]) -> list[float]:
    return [float(value) for array in arrays.values() for value in array.reshape(-1).tolist()]
