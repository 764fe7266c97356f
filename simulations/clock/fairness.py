"""How evenly clients take part.

Notation: x_i is how many deltas of client i were merged, over all N clients of the population.

    Gini    Σ_i Σ_j |x_i − x_j| / (2 N Σ x)      0: all equal; near 1: one client has everything
    Jain    (Σ x)² / (N Σ x²)                    1: all equal; 1 / N: one client has everything

Jain, Chiu and Hawe 1984, "A quantitative measure of fairness", DEC TR-301. Where nothing was
merged, all have the same: Gini 0, Jain 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def gini(counts: Ints) -> float:
    """Return the Gini coefficient of counts >= 0, in [0, 1)."""
    total, number = int(counts.sum()), len(counts)
    if not total:
        return 0.0
    places = 2 * np.arange(1, number + 1) - number - 1
    return float((places * np.sort(counts)).sum() / (number * total))


def jain(counts: Ints) -> float:
    """Return Jain's index of counts >= 0, in [1/N, 1]."""
    squares = float((counts.astype(np.float64) ** 2).sum())
    return float(counts.sum()) ** 2 / (len(counts) * squares) if squares else 1.0


def participation(counts: Ints, kind: NDArray[np.int16], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return Gini, Jain, the share of clients never merged, and the same by device class.

    By class: "clients", their share of the population and of all merged deltas, and the share of
    them that was never merged.
    """
    total = int(counts.sum())
    by_class = {}
    for index, name in enumerate(kinds):
        own = counts[kind == index]
        if len(own):
            by_class[name] = {
                "clients": len(own),
                "share_of_clients": len(own) / len(counts),
                "share_of_merged": float(own.sum() / total) if total else 0.0,
                "never": float((own == 0).mean()),
            }
    return {
        "gini": gini(counts),
        "jain": jain(counts),
        "never": float((counts == 0).mean()),
        "by_class": by_class,
    }
