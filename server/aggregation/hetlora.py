"""HetLoRA: factors of unequal ranks, padded with zeros and averaged by the norm of the product.

Notation: client k has the first r_k of R ranks; S_k = ‖B_k A_k‖_F over all layers together.

    p_k = S_k / Σ S_j        B <- Σ p_k [B_k 0]        A <- Σ p_k [A_k; 0]

(Cho et al., EMNLP 2024, arXiv:2401.06432, figure 2: zero-padding, sparsity-weighted
aggregation, cutting to each client's rank.) Dense tensors are averaged by the clients' data
weights. Rank self-pruning, by which a client of that paper lowers its own rank while it trains,
is left out: the rank would depend on the records and so be a release that no DP accounting
covers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.server.aggregation.mean import Sum
from anabranch.server.aggregation.products import (
    Array,
    Product,
    ProductSum,
    Weighting,
    held,
    norm,
    products_of,
    relative_error,
    trained_products,
    weight_of,
    with_dense,
    with_products,
)
from anabranch.server.aggregation.rule import Merged, Rule

SMALLEST_NORM = 1e-30  # clients whose products are all 0 count the same


def hetlora(weighting: Weighting = "examples") -> Rule[None]:
    """Return HetLoRA; `weighting` is for the dense tensors.

    Not exact: factors are averaged apart. Merged.error is measured against Σ p_k B_k A_k with
    the p_k above. A client whose product is large counts for more, so one client can outweigh
    all others. Two sums: memory does not grow with the number of clients. `merge` raises
    ValueError without deltas, IncompatibleAdapter for deltas of one factor.
    """

    def merge(state: None, sent: Adapter, deltas: Iterable[Delta]) -> tuple[None, Merged]:
        dense, total, factors = Sum(), ProductSum(), _Padded(sent)
        for delta in deltas:
            if delta.part.factors != "both":
                raise IncompatibleAdapter(f"delta is of {delta.part}, expected both factors")
            dense.add(delta, weight_of(delta, weighting))
            products = trained_products(sent, delta, held(delta))
            share = max(norm(products), SMALLEST_NORM)
            total.add(share, products)
            factors.add(share, products, delta)
        adapter = with_products(with_dense(sent, dense.delta()), factors.mean(total.weight))
        return state, Merged(
            adapter=adapter,
            num_examples=dense.num_examples,
            clients=dense.clients,
            error=relative_error(total.mean(), products_of(adapter)),
        )

    return Rule(name="hetlora", init=lambda adapter: (None, adapter), merge=merge, truncates=True)


class _Padded:
    """Σ S_k [B_k 0] and Σ S_k [A_k; 0] of every layer."""

    def __init__(self, sent: Adapter) -> None:
        shapes = sent.spec.shapes
        self._sums: dict[str, tuple[Array, Array]] = {
            module: (np.zeros(shapes[b]), np.zeros(shapes[a]))
            for module, a, b in sent.spec.factors()
        }

    def add(self, share: float, products: dict[str, Product], delta: Delta) -> None:
        ranks = held(delta)
        for module, (b, a) in self._sums.items():
            b[:, ranks] += share * products[module].b
            a[ranks] += share * products[module].a

    def mean(self, shares: float) -> dict[str, Product]:
        return {module: Product(b / shares, a / shares) for module, (b, a) in self._sums.items()}
