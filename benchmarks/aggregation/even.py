"""A mean of one factor in which a client counts the same whatever its rank: a candidate.

Notation: client k of rank r_k <= R trained the rank indices I_k, from n_k records.

    mean_j = Σ_{k: j in I_k} w_k Δ_kj / Σ_{k: j in I_k} w_k        w_k = n_k R / r_k

The product's mean has w_k = n_k: there a client of rank 8 moves four times as many ranks as one of
rank 2, and so counts four times as much in the model. With R / r_k (the inverse of the chance that
a rank index is drawn, as in Horvitz and Thompson 1952) every client's expected share is n_k.
Dense tensors keep n_k. It is as exact, and as linear, as the product's.
"""

from __future__ import annotations

from collections.abc import Iterable

from anabranch.protocols.adapter import Delta
from anabranch.protocols.part import Part
from anabranch.server.aggregation.mean import weighted_mean


def even_mean(deltas: Iterable[tuple[Delta, float]]) -> Delta:
    """Return the mean above; all deltas are held at once."""
    held = list(deltas)
    first = held[0][0]
    factors = weighted_mean(
        (_only(delta, Part(factors=delta.part.factors, ranks=delta.part.ranks, dense=False)), w)
        for delta, w in ((delta, weight * _inverse_share(delta)) for delta, weight in held)
    )
    arrays = dict(factors.arrays)
    if first.part.dense:
        dense = weighted_mean((_only(delta, Part(factors="none")), w) for delta, w in held)
        arrays |= dense.arrays
    part = Part(factors=first.part.factors, dense=first.part.dense)
    return Delta(first.spec, arrays, factors.num_examples, part=part)


def _inverse_share(delta: Delta) -> float:
    """Return R / r_k."""
    return 1.0 if delta.part.ranks is None else delta.spec.rank / len(delta.part.ranks)


def _only(delta: Delta, part: Part) -> Delta:
    arrays = {name: delta.arrays[name] for name in part.shapes(delta.spec)}
    return Delta(delta.spec, arrays, delta.num_examples, part=part)
