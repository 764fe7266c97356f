"""Federated averaging as a pure function over deltas.

Notation: K clients; client k sends delta d_k, computed from n_k records, with weight w_k.

    w_{t+1} = w_t + Σ_k w_k d_k / Σ_k w_k          w_k = n_k (FedAvg) or 1

(McMahan et al. 2017, arXiv:1602.05629, Algorithm 1, written for differences: there the server
averages the clients' weights w_t + d_k, which is the same thing because the factors sum to 1.)

FedProx needs nothing here: its proximal term acts on the client (Li et al. 2020,
arXiv:1812.06127, Algorithm 2), and its server averages as above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Delta
from anabranch.protocols.spec import AdapterSpec, require_same_spec
from anabranch.server.aggregation.rule import Aggregator

# No site holds this many records; a larger weight would silence every other client.
MAX_WEIGHT = 1e9


def fedavg(weighting: Literal["examples", "uniform"] = "examples") -> Aggregator[None]:
    """Return FedAvg as a rule: every record counts the same, or every client does."""

    def apply(state: None, deltas: Iterable[Delta]) -> tuple[None, Delta]:
        weighted = (
            (delta, float(delta.num_examples) if weighting == "examples" else 1.0)
            for delta in deltas
        )
        return state, weighted_mean(weighted)

    return Aggregator(lambda: None, apply)


def weighted_mean(deltas: Iterable[tuple[Delta, float]]) -> Delta:
    """Return Σ w_k d_k / Σ w_k; its num_examples is Σ n_k.

    Guarantees:
    * one float64 accumulator: memory is that of one delta and a half, however many come;
    * the order of deltas changes a value by less than one float32 rounding;
    * K equal deltas give that delta back, exactly.

    Raises ValueError if there is no delta, or a weight is not in (0, MAX_WEIGHT], and
    IncompatibleAdapter if two deltas have different specs. Nothing is returned then.
    """
    spec: AdapterSpec | None = None
    total: dict[str, NDArray[np.float64]] = {}
    weights, num_examples = 0.0, 0
    for delta, weight in deltas:
        if not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
            raise ValueError(f"expected a weight in (0, {MAX_WEIGHT:.0e}], got {weight}")
        if spec is None:
            spec = delta.spec
            total = {name: np.zeros(shape, np.float64) for name, shape in spec.tensors}
        require_same_spec(spec, delta.spec)
        for name, array in delta.arrays.items():
            total[name] += weight * array.astype(np.float64)
        weights += weight
        num_examples += delta.num_examples
    if spec is None:
        raise ValueError("expected at least one delta, got none")
    mean = {name: (array / weights).astype(np.float32) for name, array in total.items()}
    return Delta(spec, mean, num_examples)
