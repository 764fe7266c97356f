"""FlexLoRA: the clients' products are averaged, and cut to the adapter's rank by SVD.

Notation: p_k = w_k / Σ w; client k has the first r_k of R ranks; singular values s_1 >= s_2 >= …

    X = Σ p_k B_k A_k = U S V^T        B <- U_R √S_R,   A <- √S_R V_R^T

(Bai et al., NeurIPS 2024, arXiv:2402.11505.) The factors are balanced
here, and X is never formed: see products.py. Ranks are sorted by singular value, so a client's
first r_k ranks are the best approximation of that rank.

Where X has rank q < R, rank indices q … R−1 would be 0 in both factors and never train again:
their gradients are multiples of each other. They get a zero column of B and rows of A that are
orthonormal and orthogonal to the others, drawn from the layer's name: the product stays.

With `reweight`, coefficients c take the place of the weights, in product space:

    X = B A + Σ c_k (B_k A_k − B A),   c = reweight(G),   G_ij = <D_i, D_j>

with D_k what client k changes of the model: s (B_k A_k − B A) of every layer, s = alpha / R, and
its dense delta; in each difference, B A is what that client was sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.server.aggregation.mean import Sum
from anabranch.server.aggregation.products import (
    Array,
    Product,
    ProductSum,
    Weighting,
    changed_products,
    gram,
    held,
    products_of,
    relative_error,
    stacked,
    trained_products,
    weight_of,
    with_dense,
    with_products,
)
from anabranch.server.aggregation.robust import inner_products, require_alike, weighted
from anabranch.server.aggregation.rule import Merged, Rule

Reweight = Callable[[Array], Array]  # G (K, K) -> c (K,)

# A singular value below this share of the largest is less than the rounding of float32.
UNSEEN = float(np.finfo(np.float32).eps) / 2


def flexlora(weighting: Weighting = "examples", reweight: Reweight | None = None) -> Rule[None]:
    """Return FlexLoRA.

    Guarantees: the merged product is the best approximation of X at the adapter's rank, so
    Merged.error, measured against X, is float32 rounding (below 1e-6) where X has no higher
    rank; every rank can train in the next round; the gauge of a client's factors does not
    matter. Without `reweight`, memory does not grow with the number of clients; with it, all
    deltas are held at once and `weighting` is not used.

    `merge` raises ValueError without deltas, IncompatibleAdapter for deltas of one factor;
    with `reweight`, RunError for deltas of different parts, and what `reweight` raises.
    """

    def merge(state: None, sent: Adapter, deltas: Iterable[Delta]) -> tuple[None, Merged]:
        both = (_of_both_factors(delta) for delta in deltas)
        if reweight is None:
            return state, _merged(sent, *_mean(sent, both, weighting))
        return state, _merged(sent, *_reweighted(sent, list(both), reweight))

    return Rule(
        name="flexlora",
        init=lambda adapter: (None, adapter),
        merge=merge,
        regauges=True,
        truncates=True,
    )


Wanted = tuple[dict[str, Product], Delta, int]  # X; dense change; clients


def _mean(sent: Adapter, deltas: Iterable[Delta], weighting: Weighting) -> Wanted:
    """Return X = Σ p_k B_k A_k, the mean delta, K."""
    mean, total = Sum(), ProductSum()
    for delta in deltas:
        weight = weight_of(delta, weighting)
        mean.add(delta, weight)
        total.add(weight, trained_products(sent, delta, held(delta)))
    return total.mean(), mean.delta(), mean.clients


def _reweighted(sent: Adapter, deltas: Sequence[Delta], reweight: Reweight) -> Wanted:
    """Return X = B A + Σ c_k (B_k A_k − B A), the same of the dense tensors, K.

    Ranks that no client was sent stay in B A.
    """
    if not deltas:
        raise ValueError("expected at least one delta, got none")
    require_alike(deltas)
    factors = {name for _, a, b in sent.spec.factors() for name in (a, b)}
    dense = [name for name in deltas[0].arrays if name not in factors]
    changes = [changed_products(sent, delta, held(delta)) for delta in deltas]
    c = reweight(sent.spec.scaling**2 * gram(changes) + inner_products(deltas, dense))
    current = products_of(sent)
    wanted = {
        module: stacked(
            [current[module], *(one[module].times(x) for one, x in zip(changes, c, strict=True))]
        )
        for module in current
    }
    zeros = {name: np.zeros_like(array) for name, array in deltas[0].arrays.items()}
    num_examples = sum(delta.num_examples for delta in deltas)
    part = deltas[0].part
    arrays = zeros | weighted(deltas, c, dense)
    return wanted, Delta(sent.spec, arrays, num_examples, part=part), len(deltas)


def _merged(sent: Adapter, wanted: dict[str, Product], change: Delta, clients: int) -> Merged:
    factors = {
        module: refilled(module, product.split(sent.spec.rank)[0])
        for module, product in wanted.items()
    }
    adapter = with_products(with_dense(sent, change), factors)
    return Merged(
        adapter=adapter,
        num_examples=change.num_examples,
        clients=clients,
        error=relative_error(wanted, products_of(adapter)),
    )


def refilled(module: str, product: Product) -> Product:
    """Return a balanced product, ranks by singular value, so that every rank can train.

    Ranks of a singular value that float32 cannot tell from 0 get a zero column of B and a row of
    A of norm 1, orthogonal to all other rows, while there are such (rank <= in).
    """
    norms = np.sum(product.a**2, axis=1)  # balanced: the singular values
    used = int(np.count_nonzero(norms > UNSEEN * norms.max(initial=0.0)))
    rank, size = product.a.shape
    free = min(rank, size) - used
    if free <= 0:
        return product
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little")
    random = np.random.default_rng(seed).standard_normal((size, free))
    rows = np.linalg.qr(np.concatenate([product.a[:used].T, random], axis=1))[0].T[used:]
    b, a = product.b.copy(), np.zeros_like(product.a)
    b[:, used:] = 0
    a[:used], a[used : used + free] = product.a[:used], rows
    return Product(b, a)


def _of_both_factors(delta: Delta) -> Delta:
    if delta.part.factors != "both":
        raise IncompatibleAdapter(f"delta is of {delta.part}, expected both factors")
    return delta
