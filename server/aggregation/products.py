"""Arithmetic on products B A of factors, in float64, that never forms an out × in matrix.

Notation, for one adapted layer: B (out, c), A (c, in), c columns (for one client its rank). A sum
of products is a product of stacks:

    Σ_k w_k B_k A_k = [w_1 B_1 … w_K B_K] [A_1; …; A_K]

Its rank is at most min(out, in). Once a stack has twice as many columns, one QR makes it exactly
min(out, in) wide:

    in <= out:   A^T = Q R,   B A = (B R^T) Q^T          otherwise:   B = Q R,   B A = Q (R A)

so that memory is flat in the number of clients. With B = Q_b R_b and A^T = Q_a R_a,

    ‖B A‖_F = ‖R_b R_a^T‖_F,      R_b R_a^T = U S V^T   =>   B A = (Q_b U) S (Q_a V)^T

and, between clients, <B_i A_i, B_j A_j> = tr((B_j^T B_i)(A_i A_j^T)). The norm of a difference of
two products is that of their stack [B_1 −B_2] [A_1; A_2] by QR: it keeps what a Gram matrix would
cancel (below about 1e-8 of the products).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.spec import require_same_spec

Array = NDArray[np.float64]

# Singular values below this share of the largest one are rounding.
NEGLIGIBLE = 1e-13


@dataclass(frozen=True, eq=False)
class Product:
    """The matrix B A of one layer, as its factors: b (out, c), a (c, in), float64."""

    b: Array
    a: Array

    @property
    def columns(self) -> int:
        """Return c, an upper bound on the rank."""
        return int(self.b.shape[1])

    def times(self, factor: float) -> Product:
        """Return factor × self."""
        return Product(self.b * factor, self.a)

    def norm(self) -> float:
        """Return ‖B A‖_F; what cancels inside the stack is lost at 1e-16 of its parts."""
        if not self.columns:
            return 0.0
        left, right = np.linalg.qr(self.b)[1], np.linalg.qr(self.a.T)[1]
        return float(np.linalg.norm(left @ right.T))

    def svd(self) -> tuple[Array, Array, Array]:
        """Return U (out, q), S (q,) descending, V^T (q, in), without negligible values.

        Signs are canonical: the largest entry of each row of V^T is positive.
        """
        left, r_left = np.linalg.qr(self.b)
        right, r_right = np.linalg.qr(self.a.T)
        u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        q = int(np.count_nonzero(s > NEGLIGIBLE * s[0])) if s.size else 0
        u, vt = left @ u[:, :q], vt[:q] @ right.T
        at = np.abs(vt).argmax(axis=1) if q else np.zeros(0, np.intp)
        signs = np.where(vt[np.arange(q), at] < 0, -1.0, 1.0)
        return u * signs, s[:q], vt * signs[:, None]

    def split(self, rank: int) -> tuple[Product, Product]:
        """Return (the best approximation of that rank, the rest), balanced: U √S and √S V^T.

        The first has exactly `rank` columns, zeros last (Eckart and Young 1936); the second
        as many as it needs.
        """
        u, s, vt = self.svd()
        root = np.sqrt(s)
        b, a = u * root, vt * root[:, None]
        missing = max(0, rank - s.size)
        kept = Product(
            np.pad(b[:, :rank], ((0, 0), (0, missing))),
            np.pad(a[:rank], ((0, missing), (0, 0))),
        )
        return kept, Product(b[:, rank:], a[rank:])

    def narrowed(self) -> Product:
        """Return the same matrix with at most min(out, in) columns."""
        width = min(self.b.shape[0], self.a.shape[1])
        if self.columns <= width:
            return self
        if self.a.shape[1] == width:
            q, r = np.linalg.qr(self.a.T)
            return Product(self.b @ r.T, np.ascontiguousarray(q.T))
        q, r = np.linalg.qr(self.b)
        return Product(q, r @ self.a)


Products = Mapping[str, Product]  # name of an adapted layer -> its product
Ranks = slice | list[int]
Weighting = Literal["examples", "uniform"]  # w_k = n_k, or 1
ALL = slice(None)


def stacked(products: Sequence[Product]) -> Product:
    """Return the sum of at least one product of a layer, as one."""
    return Product(
        np.concatenate([product.b for product in products], axis=1),
        np.concatenate([product.a for product in products], axis=0),
    )


def difference(one: Product, other: Product) -> Product:
    """Return one − other."""
    return stacked([one, other.times(-1.0)])


@dataclass(eq=False)
class ProductSum:
    """Σ w_k B_k A_k of every layer of an adapter, added one client at a time.

    Guarantees: exact but for float64 rounding; a layer never holds more than 2 min(out, in)
    columns and those of the client just added, however many clients come.
    """

    weight: float = 0.0  # Σ w_k
    _stacks: dict[str, list[Product]] = field(default_factory=dict)

    def add(self, weight: float, products: Products) -> None:
        """Add one client's products; every client brings the same layers."""
        self.weight += weight
        for module, product in products.items():
            stack = self._stacks.setdefault(module, [])
            stack.append(product.times(weight))
            width = min(product.b.shape[0], product.a.shape[1])
            if sum(part.columns for part in stack) > 2 * width:
                stack[:] = [stacked(stack).narrowed()]

    def mean(self) -> dict[str, Product]:
        """Return Σ w_k B_k A_k / Σ w_k; all zero where every weight was 0."""
        scale = 1 / self.weight if self.weight else 0.0
        return {module: stacked(stack).times(scale) for module, stack in self._stacks.items()}

    def columns(self) -> int:
        """Return the most columns that any layer holds now: what memory is."""
        return max(
            (sum(part.columns for part in stack) for stack in self._stacks.values()), default=0
        )


def products_of(adapter: Adapter, ranks: Ranks = ALL) -> dict[str, Product]:
    """Return the products of an adapter, or of some of its ranks."""
    return {
        module: Product(_float64(adapter, b)[:, ranks], _float64(adapter, a)[ranks])
        for module, a, b in adapter.spec.factors()
    }


def trained_products(sent: Adapter, delta: Delta, ranks: Ranks = ALL) -> dict[str, Product]:
    """Return a client's products (B + ΔB)(A + ΔA) after training.

    ranks: those that the client has, `held(delta)` if it was sent no others. Ranks outside the
    delta's part are as in `sent`. Raises IncompatibleAdapter for a delta of another spec.
    """
    return {
        module: Product(b + change_b, a + change_a)
        for module, b, a, change_b, change_a in _trained(sent, delta, ranks)
    }


def changed_products(sent: Adapter, delta: Delta, ranks: Ranks = ALL) -> dict[str, Product]:
    """Return what training changed: (B + ΔB)(A + ΔA) − B A = ΔB (A + ΔA) + B ΔA.

    As trained_products otherwise. Nothing cancels.
    """
    return {
        module: stacked([Product(change_b, a + change_a), Product(b, change_a)])
        for module, b, a, change_b, change_a in _trained(sent, delta, ranks)
    }


def held(delta: Delta) -> Ranks:
    """Return the rank indices of a delta's part: all that a client has if its adapter was cut."""
    return ALL if delta.part.ranks is None else list(delta.part.ranks)


def weight_of(delta: Delta, weighting: Weighting) -> float:
    """Return w_k."""
    return float(delta.num_examples) if weighting == "examples" else 1.0


def with_products(adapter: Adapter, products: Products, ranks: Ranks = ALL) -> Adapter:
    """Return the adapter with these products, in float32, in place of those of `ranks`.

    Raises IncompatibleAdapter if a value does not fit float32.
    """
    arrays = dict(adapter.arrays)
    for module, name_a, name_b in adapter.spec.factors():
        with np.errstate(over="ignore", under="ignore"):  # Adapter refuses what became infinite
            a, b = (np.array(arrays[name]) for name in (name_a, name_b))
            a[ranks], b[:, ranks] = products[module].a, products[module].b
        arrays |= {name_a: a, name_b: b}
    return Adapter(adapter.spec, arrays)


def with_dense(adapter: Adapter, change: Delta) -> Adapter:
    """Return the adapter with a delta's dense tensors added, whatever it holds of the factors."""
    factors = {name for _, a, b in adapter.spec.factors() for name in (a, b)}
    arrays = dict(adapter.arrays)
    for name in change.arrays.keys() - factors:
        arrays[name] = arrays[name] + change.arrays[name]
    return Adapter(adapter.spec, arrays)


def norm(products: Products) -> float:
    """Return the Frobenius norm over all layers together."""
    return math.hypot(*(product.norm() for product in products.values()))


def relative_error(wanted: Products, got: Products) -> float:
    """Return ‖wanted − got‖_F / ‖wanted‖_F over all layers together.

    0 where both are 0 everywhere, infinity where only `wanted` is.
    """
    missed = norm({name: difference(wanted[name], got[name]) for name in wanted})
    if missed == 0:
        return 0.0
    whole = norm(wanted)
    return missed / whole if whole else math.inf


def gram(clients: Sequence[Products]) -> Array:
    """Return G (K, K), G_ij = Σ over layers <B_i A_i, B_j A_j>; symmetric.

    O((out + in) c²) per pair and layer, (Σ c_k)² values of memory.
    """
    total = np.zeros((len(clients), len(clients)))
    for module in clients[0] if clients else ():
        parts = [client[module] for client in clients]
        every = stacked(parts)
        starts = np.cumsum([0, *(part.columns for part in parts[:-1])])
        inner = (every.b.T @ every.b) * (every.a @ every.a.T)
        total += np.add.reduceat(np.add.reduceat(inner, starts, axis=0), starts, axis=1)
    return (total + total.T) / 2


def _float64(adapter: Adapter, name: str) -> Array:
    return adapter.arrays[name].astype(np.float64)


def _trained(
    sent: Adapter, delta: Delta, ranks: Ranks
) -> Iterator[tuple[str, Array, Array, Array, Array]]:
    """Yield (module, B, A, ΔB, ΔA) of every layer."""
    require_same_spec(sent.spec, delta.spec)
    change = Adapter(delta.spec, delta.full())
    for module, a, b in sent.spec.factors():
        yield (
            module,
            _float64(sent, b)[:, ranks],
            _float64(sent, a)[ranks],
            _float64(change, b)[:, ranks],
            _float64(change, a)[ranks],
        )
