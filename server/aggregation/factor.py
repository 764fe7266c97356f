"""What the rules share in which all clients of a round train the same factor.

With B trained and A common, the clients' products add up in B alone, whatever ranks each trained:

    Σ_k p_k (B + ΔB_k) A = (B + Σ_k p_k ΔB_k) A

and the same with the roles exchanged. So the mean of one factor is exact, and linear: the
coordinator needs no more than the sum. (FedIT, which averages both factors apart, is off by
Σ_k p_k (B_k − B̄)(A_k − Ā).)

A client of low rank trains a random choice of rank indices, another one each round, drawn from
(seed, round, name) and not from its records (after FSLoRA, arXiv:2501.19389); every rank is a
mean over those that trained it, in which a rare choice weighs more (mean.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.mean import Combine, Sum, weighted_mean
from anabranch.server.aggregation.products import Weighting, weight_of
from anabranch.server.aggregation.rule import Merged

Factor = Literal["A", "B"]


def drawn_ranks(seed: int, number: int, client: str, limit: int, rank: int) -> Part:
    """Return Part(ranks) of `limit` rank indices, all equally likely; all of them if it can.

    A function of (seed, round, name): the same on every machine, and known to everybody.
    """
    if limit >= rank:
        return Part()

    def key(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{number}/{index}/{client}".encode()).digest()

    return Part(ranks=tuple(sorted(sorted(range(rank), key=key)[:limit])))


def part_of(
    factor: Callable[[int], Factor], seed: int, *, dense: bool = True
) -> Callable[[AdapterSpec, int, str, int], Part]:
    """Return Rule.part: the factor that round trains, and a drawn choice of ranks."""

    def part(spec: AdapterSpec, number: int, client: str, limit: int) -> Part:
        ranks = drawn_ranks(seed, number, client, limit, spec.rank).ranks
        return Part(factors=factor(number), ranks=ranks, dense=dense)

    return part


def merge_factor(
    weighting: Weighting, combine: Combine, allowed: str = "AB", *, measured: bool = True
) -> Callable[[None, Adapter, Iterable[Delta]], tuple[None, Merged]]:
    """Return Rule.merge: the adapter plus the combined deltas of one factor.

    Merged.error is what rounding to float32 costs, measured against a float64 mean; None where
    `combine` aims at something else than the mean. Raises IncompatibleAdapter for a delta of
    another factor than `allowed`, and as `combine` does.
    """

    def merge(state: None, adapter: Adapter, deltas: Iterable[Delta]) -> tuple[None, Merged]:
        reference = Sum(exact=True) if measured and combine is weighted_mean else None
        count = 0

        def weighted() -> Iterator[tuple[Delta, float]]:
            nonlocal count
            for delta in deltas:
                if delta.part.factors not in allowed:
                    raise IncompatibleAdapter(
                        f"delta is of {delta.part}, expected factors {' or '.join(allowed)}"
                    )
                weight = weight_of(delta, weighting)
                if reference is not None:
                    reference.add(delta, weight)
                count += 1
                yield delta, weight

        mean = combine(weighted())
        merged = moved(adapter, mean)
        error = None if reference is None else _rounding(adapter, merged, dict(reference.mean()))
        return state, Merged(
            adapter=merged, num_examples=mean.num_examples, clients=count, error=error
        )

    return merge


def moved(adapter: Adapter, change: Delta) -> Adapter:
    """Return adapter + change; IncompatibleAdapter naming the tensor that float32 cannot hold."""
    with np.errstate(over="ignore"):
        return adapter.plus(change)


def _rounding(
    before: Adapter, merged: Adapter, mean: dict[str, NDArray[np.float64]]
) -> float | None:
    """Return ‖(B + mean − B') A‖_F / ‖(B + mean) A‖_F over all layers, or with A for B.

    The norm of a product with the common factor F comes from its Gram matrix:
    ‖D F‖² = Σ (D^T D) ∘ (F F^T), O((in + out) rank²).
    """
    missed = whole = 0.0
    for _, a, b in before.spec.factors():
        name, frozen = (b, before.arrays[a]) if b in mean else (a, before.arrays[b].T)
        if name not in mean:
            return None
        common = frozen.astype(np.float64) @ frozen.astype(np.float64).T
        wanted = before.arrays[name] + mean[name]
        for array, is_error in ((wanted, False), (wanted - merged.arrays[name], True)):
            tall = array if name == b else array.T
            square = max(0.0, float(np.sum((tall.T @ tall) * common)))
            missed, whole = (missed + square, whole) if is_error else (missed, whole + square)
    if whole == 0:
        return 0.0 if missed == 0 and before.spec.rank else None
    return math.sqrt(missed / whole)
