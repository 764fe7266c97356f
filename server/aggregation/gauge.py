"""Another pair of factors for the same product: one of them becomes a frame.

Notation: B (out, rank), A (rank, in). QR in float64, the diagonal of T not negative:

    A^T = Q T     A <- Q^T,  B <- B T^T       orthonormal rows:    B T^T Q^T = B A
    B   = Q T     B <- Q,    A <- T A         orthonormal columns: Q T A = B A

A frame is an isometry: training the other factor, one unit of it (or of noise in it) is one unit
of the product, and its gradient is never longer than that of the product. That FedSVD
(arXiv:2505.12805) gains nothing but this by its SVD follows from rows(B A) being in rows(A).

A rank above `in` has no more than `in` orthonormal rows: the rest of A, and with it the columns
of B, become 0. Factors without full rank get a frame all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter

Array = NDArray[np.float64]
Factors = tuple[NDArray[np.float32], NDArray[np.float32]]  # B, A
Gauge = Callable[[NDArray[np.float32], NDArray[np.float32]], Factors]


def orthonormal_rows(b: NDArray[np.float32], a: NDArray[np.float32]) -> Factors:
    """Return (B', A') with the product B A and orthonormal rows of A'.

    The product is unchanged to 1e-6 of ‖B‖_F ‖A‖_F, and rows are orthonormal to 1e-6. The same
    input gives the same output.
    """
    q, t = _qr(a.astype(np.float64).T)
    rank = a.shape[0]
    return _widened(b @ t.T, rank), np.ascontiguousarray(_widened(q, rank).T)


def orthonormal_columns(b: NDArray[np.float32], a: NDArray[np.float32]) -> Factors:
    """Return (B', A') with the product B A and orthonormal columns of B'; as orthonormal_rows."""
    q, t = _qr(b.astype(np.float64))
    rank = b.shape[1]
    return _widened(q, rank), np.ascontiguousarray(_widened((t @ a).T, rank).T)


def regauged(adapter: Adapter, gauge: Gauge) -> Adapter:
    """Return the adapter with every pair of factors in another gauge; dense tensors stay."""
    arrays = dict(adapter.arrays)
    for _, a, b in adapter.spec.factors():
        arrays[b], arrays[a] = gauge(arrays[b], arrays[a])
    return Adapter(adapter.spec, arrays)


def _qr(matrix: Array) -> tuple[Array, Array]:
    """Return Q (n, k), T (k, columns) with k = min(n, columns) and a diagonal of T >= 0."""
    q, t = np.linalg.qr(matrix)
    signs = np.where(np.diag(t) < 0, -1.0, 1.0)
    return q * signs, t * signs[:, None]


def _widened(matrix: Array, columns: int) -> NDArray[np.float32]:
    """Return the matrix in float32, with zero columns up to `columns`."""
    return np.pad(matrix, ((0, 0), (0, columns - matrix.shape[1]))).astype(np.float32)
