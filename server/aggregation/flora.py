"""FLoRA: the clients' products are stacked, exactly, into an extra frozen adapter.

Notation: p_k = w_k / Σ w; the adapter's rank indices 0 … r−1 are trained (factors B, A), r … R−1
are the extra adapter (factors E, F), which every client has and none trains; C is carried by the
server alone. Every round starts from B = 0 and a new random A, of which client k trains the first
r_k rows (and columns of B):

    X = E F + C + Σ p_k B_k A_k = [E C_b p_1 B_1 … p_K B_K] [F; C_a; A_1; …; A_K]
    E F <- the best rank-(R − r) part of X, C <- the rest; B <- 0
    A_ij ~ U(−1/√in, 1/√in)     PEFT's initial law, kaiming_uniform(a = √5)

(Wang et al., NeurIPS 2024, arXiv:2409.05976: there every client gets the whole stack
and adds it to its base weights. Here the base is never written, and the extra adapter holds the
sum of all rounds.) Exact while X fits in R − r ranks; what does not fit is offered again in the
next round.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.fedex import (
    Carried,
    require_extra,
    require_positive,
    with_extra,
)
from anabranch.server.aggregation.mean import Sum
from anabranch.server.aggregation.products import (
    ProductSum,
    Weighting,
    trained_products,
    weight_of,
    with_dense,
)
from anabranch.server.aggregation.rule import Merged, Rule


def flora(rank: int, seed: int, weighting: Weighting = "examples") -> Rule[Carried]:
    """Return FLoRA for adapters of which the first `rank` rank indices are trained.

    Guarantees: Merged.error, measured against Σ p_k B_k A_k with everything the clients had, is
    float32 rounding (below 1e-6) while the extra ranks suffice and nothing is carried, whatever
    the clients' ranks; memory does not grow with the number of clients; `open` draws A from
    (seed, round, layer) alone. `init` raises ValueError for an adapter without extra ranks;
    `part` ConfigError for a client of rank 0; `merge` IncompatibleAdapter for a delta that
    trained an extra rank.
    """
    require_positive(rank)

    def init(adapter: Adapter) -> tuple[Carried, Adapter]:
        require_extra(adapter.spec, rank)
        return Carried(), adapter

    def reopen(carried: Carried, adapter: Adapter, number: int) -> Adapter:
        arrays = dict(adapter.arrays)
        for module, name_a, name_b in adapter.spec.factors():
            if arrays[name_b][:, :rank].any():  # an adapter to start from: its product stays
                continue
            arrays[name_a] = arrays[name_a].copy()
            arrays[name_a][:rank] = _drawn(rank, arrays[name_a].shape[1], seed, number, module)
        return Adapter(adapter.spec, arrays)

    def part(spec: AdapterSpec, number: int, client: str, limit: int) -> Part:
        if limit < 1:
            raise ConfigError(f"{client}: trains no rank (limit {limit}), flora needs at least one")
        return Part(ranks=tuple(range(min(limit, rank))))

    def merge(carried: Carried, sent: Adapter, deltas: Iterable[Delta]) -> tuple[Carried, Merged]:
        mean, total = Sum(), ProductSum()
        for delta in deltas:
            _require_trained(delta, rank)
            weight = weight_of(delta, weighting)
            mean.add(delta, weight)
            total.add(weight, trained_products(sent, delta, slice(rank)))
        wanted = total.mean()
        emptied = _emptied(with_dense(sent, mean.delta()), rank)
        return with_extra(sent, emptied, rank, wanted, wanted, carried, mean)

    return Rule(name="flora", init=init, open=reopen, part=part, merge=merge, regauges=True)


def _drawn(rank: int, size: int, seed: int, number: int, module: str) -> NDArray[np.float32]:
    """Return A (rank, in) of one layer and round; layers and rounds have streams of their own."""
    name = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little")
    rng = np.random.default_rng([seed, number, name])
    bound = 1 / math.sqrt(size)
    return rng.uniform(-bound, bound, (rank, size)).astype(np.float32)


def _emptied(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter with B = 0 in the trained ranks."""
    arrays = dict(adapter.arrays)
    for _, _, name_b in adapter.spec.factors():
        arrays[name_b] = arrays[name_b].copy()
        arrays[name_b][:, :rank] = 0
    return Adapter(adapter.spec, arrays)


def _require_trained(delta: Delta, rank: int) -> None:
    ranks = delta.part.ranks
    if delta.part.factors != "both" or ranks is None or ranks[-1] >= rank:
        raise IncompatibleAdapter(
            f"delta is of {delta.part}, expected both factors of ranks below {rank}"
        )
