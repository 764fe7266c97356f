"""A delta as a member's vector of the ring, and the sum of such vectors as one mean delta.

Notation: member k has delta d_k of n_k records and τ_k steps, weight w_k in units of 1/WEIGHT_UNIT.

    w_k = n_k · WEIGHT_UNIT ("examples") or WEIGHT_UNIT ("uniform")
    v_k = w_k · R / |I_k|           for the ranks I_k that it trained, with mixed ranks; else w_k
    vector = ( w_k / W · d_k on the grid, v_k in place of w_k for ranks;  counters )
    counters = n_k, w_k, w_k τ_k, and v_k for each rank index in I_k with mixed ranks

W is the terms' `weight`, the same for all. The coordinator sees Σ of each. From these:

    mean = Σ w_k d_k / Σ w_k        FedNova: d_k / τ_k in place of d_k, times Σ w_k τ_k / Σ w_k

rank by rank with mixed ranks, as server/aggregation/mean.py does it in the clear. Records, weights
and steps are seen as sums over all. But two ranks' v differ by those of the members that train one
of them alone, I_k is in the terms, and so Σ w_k over members of one I_k is seen: of one member, if
no other trains just these ranks. With uniform weights that says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import IncompatibleAdapter, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.secagg.fixed_point import Grid, read_counters, write_counters
from anabranch.protocols.secagg.ring import Ring
from anabranch.protocols.secagg.terms import Terms
from anabranch.protocols.spec import AdapterSpec

WEIGHT_UNIT = 1024
PLAIN_COUNTERS = 3  # records, weight, weight · steps

Weighting = Literal["examples", "uniform"]


def sizes(spec: AdapterSpec, part: Part, *, by_rank: bool) -> tuple[int, int]:
    """Return (values, counters) of the vectors of `part`, which has all ranks."""
    values = sum(math.prod(shape) for shape in part.shapes(spec).values())
    return values, PLAIN_COUNTERS + (spec.rank if by_rank else 0)


def weight_of(examples: int, weighting: Weighting) -> int:
    """Return w_k of a member with so many records."""
    return WEIGHT_UNIT * (examples if weighting == "examples" else 1)


def heaviest(weight: int, rank: int, ranks: int) -> int:
    """Return v_k of a member of weight w_k that trains `ranks` of `rank` rank indices."""
    return -(-weight * rank // max(ranks, 1)) if rank else weight


def grid_of(terms: Terms) -> Grid:
    """Return the grid that the members' values are rounded to."""
    return Grid(Ring(terms.ring), len(terms.members), terms.limit)


def contribute(
    delta: Delta,
    terms: Terms,
    part: Part,
    *,
    weighting: Weighting,
    normalize_steps: bool,
    by_rank: bool,
    random: Callable[[int], bytes],
) -> NDArray[Any]:
    """Return a member's vector (length(terms),) in the ring, before it is masked.

    `part` is what the sum is of, with all ranks; the delta's part may have fewer. `random` gives
    the key of the rounding.

    Raises OutOfRange for values that are not finite or beyond the terms' range, and ProtocolError
    for terms that do not fit the delta or its weight; their texts hold no number of either.
    """
    own = delta.part
    if (own.factors, own.dense) != (part.factors, part.dense) or part.ranks is not None:
        raise ProtocolError(f"the sum is of {part}, and the delta of {own}")
    if normalize_steps and not delta.steps:
        raise ProtocolError("federation.normalize_steps: the delta does not say its steps")
    if sizes(delta.spec, part, by_rank=by_rank) != (terms.values, terms.counters):
        raise ProtocolError(
            f"the terms have {terms.values} values and {terms.counters} counters, the delta "
            f"{sizes(delta.spec, part, by_rank=by_rank)}"
        )
    if own.ranks is not None and not by_rank:
        raise ProtocolError("the delta is of some ranks only, and the sum has no counters for them")
    weight = weight_of(delta.num_examples, weighting)
    ranks = delta.spec.rank if own.ranks is None else len(own.ranks)
    of_ranks = heaviest(weight, delta.spec.rank, ranks) if by_rank else weight
    if not 0 < max(weight, of_ranks) <= terms.weight:
        raise ProtocolError(
            f"terms: the heaviest weight is {terms.weight} units of 1/{WEIGHT_UNIT}, and this "
            "member's is not above 0 and up to that: does it have other records than when it was "
            "asked how many?"
        )
    vector = _flat(delta, part, weight / of_ranks)
    if normalize_steps:
        vector /= delta.steps
    counters = [delta.num_examples, weight, weight * delta.steps]
    if by_rank:
        held = range(delta.spec.rank) if own.ranks is None else own.ranks
        counters += [of_ranks if index in held else 0 for index in range(delta.spec.rank)]
    grid = grid_of(terms)
    values = grid.encode(vector, of_ranks / terms.weight, random)
    return np.concatenate([values, write_counters(counters, grid.ring, grid.members)])


def mean_of(
    total: NDArray[Any],
    terms: Terms,
    spec: AdapterSpec,
    part: Part,
    *,
    normalize_steps: bool,
    by_rank: bool,
) -> Delta:
    """Return the weighted mean behind a sum of vectors, as one delta of all its records.

    `total` (length(terms),) is the sum of the members' vectors. The mean's steps are Σ w τ / Σ w,
    rounded up. A rank that nobody trained is 0. Raises ProtocolError for a sum that no members
    make: no weight at all.
    """
    grid = grid_of(terms)
    values = grid.decode(total[: terms.values])
    counters = read_counters(total[terms.values :], grid.ring, grid.members)
    examples, weight, steps = counters[:PLAIN_COUNTERS]
    most = len(terms.members) * terms.weight  # what a member adds to a counter nobody sees
    if not 1 <= weight <= most or examples < 1 or max(counters[PLAIN_COUNTERS:], default=0) > most:
        raise ProtocolError(
            f"the sum has weight {weight} of {examples} records, with a weight of {most} at most: "
            "no updates add up to that"
        )
    factor = terms.weight * (steps / weight if normalize_steps else 1.0)
    columns = np.array(counters[PLAIN_COUNTERS:] if by_rank else [weight] * spec.rank, np.float64)
    columns[columns == 0] = 1.0
    weights: dict[str, NDArray[np.float64]] = {}
    for _, a, b in spec.factors():
        weights[a], weights[b] = columns[:, None], columns[None, :]
    arrays, every = {}, np.full((), float(weight))
    with np.errstate(over="ignore", under="ignore"):  # Delta refuses what became infinite
        for name, array in _cut(values, spec, part):
            arrays[name] = (array * (factor / weights.get(name, every))).astype(np.float32)
    try:
        return Delta(spec, arrays, examples, part=part, steps=math.ceil(steps / weight))
    except IncompatibleAdapter as error:
        raise ProtocolError(
            f"the sum of round {terms.round} is no mean of updates: {error}"
        ) from None


def _flat(delta: Delta, part: Part, dense: float) -> NDArray[np.float32]:
    """Return all values of `part` in one row, dense tensors times `dense`; a copy."""
    arrays = delta.arrays if delta.part == part else part.take(delta.spec, delta.full())
    factors = {name for _, a, b in delta.spec.factors() for name in (a, b)}
    rows = [
        array.reshape(-1)
        if dense == 1 or name in factors
        else array.reshape(-1) * np.float32(dense)
        for name, array in arrays.items()
    ]
    return np.concatenate(rows).astype(np.float32, copy=False)


def _cut(
    values: NDArray[np.float64], spec: AdapterSpec, part: Part
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    start = 0
    for name, shape in part.shapes(spec).items():
        stop = start + math.prod(shape)
        yield name, values[start:stop].reshape(shape)
        start = stop
