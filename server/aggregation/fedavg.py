"""Federated averaging: every tensor by itself, both factors apart.

Notation: K clients; client k sends delta d_k, computed from n_k records, with weight w_k.

    w_{t+1} = w_t + Σ_k p_k d_k          p_k = w_k / Σ w_k,  w_k = n_k (FedAvg) or 1

(McMahan et al. 2017, arXiv:1602.05629, Algorithm 1, written for differences: there the server
averages the clients' weights w_t + d_k, which is the same thing because the p_k sum to 1.)
With LoRA this is FedIT (Zhang et al. 2024, arXiv:2305.05644): B and A are averaged apart, so the
merged product is not the mean of the clients' products. It is off by

    Σ_k p_k B_k A_k − B̄ Ā = Σ_k p_k (B_k − B̄)(A_k − Ā)

which Merged.error measures. FedProx needs nothing here: its proximal term acts on the client
(Li et al. 2020, arXiv:1812.06127, Algorithm 2).

Mixed ranks: client k has the first r_k rank indices, of an adapter cut down to them. For the
ranks it does not have,

    absent = "zero"   it counts with the value 0 (zero-padding, HetLoRA arXiv:2401.06432)
    absent = "skip"   it does not count: a mean over those that have them

A rank that nobody in the round has stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.server.aggregation.factor import moved
from anabranch.server.aggregation.mean import Combine, weighted_mean
from anabranch.server.aggregation.products import (
    ProductSum,
    Weighting,
    held,
    products_of,
    relative_error,
    trained_products,
    weight_of,
)
from anabranch.server.aggregation.rule import Merged, Rule


def fedavg(
    weighting: Weighting = "examples",
    absent: Literal["zero", "skip"] = "zero",
    *,
    combine: Combine = weighted_mean,
) -> Rule[None]:
    """Return FedAvg as a rule: every record counts the same, or every client does.

    Merged.error is None without factors, where not both of them are sent, and where `combine`
    aims at something else than the mean.
    """

    def merge(state: None, adapter: Adapter, deltas: Iterable[Delta]) -> tuple[None, Merged]:
        seen = _Seen(adapter, weighting, measured=combine is weighted_mean)
        mean = combine(seen.weighted(deltas))
        if absent == "zero":
            mean = _with_zeros(mean, adapter, seen.columns / seen.weight)
        merged = moved(adapter, mean)
        return state, Merged(
            adapter=merged,
            num_examples=mean.num_examples,
            clients=seen.clients,
            error=seen.error(merged),
        )

    return Rule(name="fedavg", init=lambda adapter: (None, adapter), merge=merge, truncates=True)


class _Seen:
    """What is noted of a round's deltas as they pass: weights per rank, and products."""

    def __init__(self, adapter: Adapter, weighting: Weighting, *, measured: bool) -> None:
        self.weight, self.clients = 0.0, 0
        self.columns = np.zeros(adapter.spec.rank)
        self._adapter, self._weighting = adapter, weighting
        self._products = ProductSum()
        self._both = measured and adapter.spec.rank > 0

    def weighted(self, deltas: Iterable[Delta]) -> Iterator[tuple[Delta, float]]:
        for delta in deltas:
            weight = weight_of(delta, self._weighting)
            ranks = delta.part.ranks
            self.columns[slice(None) if ranks is None else list(ranks)] += weight
            self.weight += weight
            self.clients += 1
            self._both = self._both and delta.part.factors == "both"
            if self._both:
                products = trained_products(self._adapter, delta, held(delta))
                self._products.add(weight, products)
            yield delta, weight

    def error(self, merged: Adapter) -> float | None:
        if not self._both:
            return None
        error = relative_error(self._products.mean(), products_of(merged))
        return error if math.isfinite(error) else None


def _with_zeros(mean: Delta, adapter: Adapter, shares: np.ndarray) -> Delta:
    """Return the mean delta with value 0 for absent ranks: share · mean − (1 − share) · value.

    shares: per rank index, the weight of those that have it (rank,); 0 leaves the rank alone.
    """
    if np.all((shares == 1) | (shares == 0)):
        return mean
    shares = np.where(shares > 0, shares, 1.0)
    arrays = dict(mean.arrays)
    for _, a, b in mean.spec.factors():
        for name, share in ((a, shares[:, None]), (b, shares[None, :])):
            if name in arrays:
                change = share * arrays[name] - (1 - share) * adapter.arrays[name]
                arrays[name] = change.astype(np.float32)
    return Delta(mean.spec, arrays, mean.num_examples, part=mean.part)
