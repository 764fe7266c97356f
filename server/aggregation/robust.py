"""Robust statistics in place of the mean: some clients may send anything.

Notation: n deltas d_i of which f may be Byzantine; x_i = d_i as one vector; G_ij = <x_i, x_j>.

    norm-clipping      (1/n) Σ x_i min(1, τ / ‖x_i‖)                    (Sun et al. 2019,
                                                                        arXiv:1911.07963)
    krum               the x_i with the smallest score, the sum of the squared distances to its
                       n − f − 2 nearest others; n >= 2f + 3             (Blanchard et al. 2017,
                                                                        arXiv:1703.02757)
    multi-krum         the mean of the n − f − 2 best by that score      (same)
    geometric-median   argmin_v Σ ‖v − x_i‖: v <- Σ β_i x_i / Σ β_i, β_i = 1 / max(e, ‖v − x_i‖)
                       (smoothed Weiszfeld, RFA: Pillutla et al. 2022, arXiv:1912.13445)
    centred-clipping   v <- v + (1/n) Σ (x_i − v) min(1, τ / ‖x_i − v‖)  (Karimireddy et al. 2021,
                                                                        arXiv:2012.10333)
    median             of every coordinate                              (Yin et al. 2018,
    trimmed-mean       of every coordinate, a share cut at each end      arXiv:1803.01498)

All but the last two are Σ c_i x_i with coefficients c that G alone decides, because every
distance follows from it:

    ‖Σ c_j x_j − x_i‖² = c^T G c − 2 (G c)_i + G_ii

so the same code serves products of factors, whose G needs no out × in matrix (products.py).

Choices that the papers leave open: every client counts the same (its number of records is a claim
of its own); a share to cut is rounded up; τ without a value is the median norm of the round; e is
1e-6 of that norm; the geometric median starts from the clipped mean, so that a client far out
cannot use up the iterations; centred clipping starts from 0, the adapter that was sent out, and
there is no client momentum. A statistic needs all deltas at once: memory is O(n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import require_same_spec
from anabranch.protocols.tables import Robust
from anabranch.server.aggregation.mean import Combine

Array = NDArray[np.float64]
Coefficients = Callable[[Array], Array]  # G (n, n) -> c (n,)
Statistic = Callable[[Array], Array]  # (n, …) -> (…)

SMOOTHING = 1e-6  # e, as a share of the median norm


def combine_for(robust: Robust) -> Combine:
    """Return what takes the place of the weighted mean of one-factor or dense deltas.

    The weights that come with the deltas are not used. Guarantees: what the rule's paper
    proves for f Byzantine clients needs enough others, so a round with too few is refused;
    values up to the largest float32 do not overflow. The result has no part by ranks.

    Raises ConfigError if `robust` is incomplete; in a round, RunError for too few deltas or
    for deltas of different parts, ValueError without deltas, IncompatibleAdapter for
    different specs.
    """
    if robust.rule in ("median", "trimmed-mean"):
        return _combine(robust, lambda deltas: _by_coordinate(deltas, _statistic(robust)))
    coefficients = coefficients_for(robust)
    return _combine(robust, lambda deltas: weighted(deltas, coefficients(inner_products(deltas))))


def coefficients_for(robust: Robust) -> Coefficients:
    """Return G (n, n) -> c (n,): the robust mean is Σ c_i x_i.

    Raises ConfigError for a rule on coordinates, or Krum without `byzantine`; in a round,
    RunError for too few clients.
    """
    rules: dict[str, Callable[[Robust, Array, Array], Array]] = {
        "norm-clipping": _norm_clipping,
        "krum": lambda robust, g, norms: _krum(robust, g, 1),
        "multi-krum": lambda robust, g, norms: _krum(robust, g, _neighbours(robust, len(g))),
        "geometric-median": _geometric_median,
        "centred-clipping": _centred_clipping,
    }
    if robust.rule not in rules:
        raise ConfigError(
            f'robust.rule = "{robust.rule}" works on coordinates and has no coefficients: take '
            f"one of {', '.join(rules)}"
        )
    if robust.rule in ("krum", "multi-krum") and robust.byzantine is None:
        raise ConfigError("robust.byzantine is required: how many clients may lie")
    rule = rules[robust.rule]

    def coefficients(gram: Array) -> Array:
        require_enough(robust, len(gram))
        norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
        unit = float(norms.max()) or 1.0  # squares of squares stay far from overflow
        return rule(_in_units(robust, unit), gram / unit / unit, norms / unit)

    return coefficients


def least(robust: Robust) -> int:
    """Return how many deltas the rule needs: 2f + 1, Krum 2f + 3."""
    more = 3 if robust.rule in ("krum", "multi-krum") else 1
    return 2 * (robust.byzantine or 0) + more


def require_enough(robust: Robust, clients: int) -> None:
    """Raise RunError unless the rule means something with so many deltas."""
    if clients == 0:
        raise ValueError("expected at least one delta, got none")
    f, need = robust.byzantine or 0, least(robust)
    if clients < need:
        raise RunError(
            f'robust.rule = "{robust.rule}" needs {need} deltas for robust.byzantine = {f}, got '
            f"{clients}: raise federation.quorum to {need}, or lower robust.byzantine"
        )
    if robust.rule != "trimmed-mean":
        return
    cut = _cut(robust, clients)
    if 2 * cut >= clients:
        raise RunError(
            f"robust.trim = {robust.trim:g} cuts {cut} of {clients} deltas at each end and leaves "
            "none: raise federation.quorum, or lower robust.trim"
        )
    if cut < f:
        raise RunError(
            f"robust.trim = {robust.trim:g} cuts {cut} of {clients} deltas at each end, but "
            f"robust.byzantine = {f} may lie: raise robust.trim to {f / clients:.3g}"
        )


def _combine(
    robust: Robust, merge: Callable[[Sequence[Delta]], dict[str, NDArray[np.float32]]]
) -> Combine:
    def combine(deltas: Iterable[tuple[Delta, float]]) -> Delta:
        held = [delta for delta, _ in deltas]
        require_enough(robust, len(held))
        require_alike(held)
        spec, part = held[0].spec, held[0].part
        merged = Delta(spec, merge(held), sum(one.num_examples for one in held), part=part)
        whole = Part(factors=part.factors, dense=part.dense)
        arrays = whole.take(spec, merged.full())
        return Delta(spec, arrays, merged.num_examples, part=whole)

    return combine


def require_alike(deltas: Sequence[Delta]) -> None:
    """Raise RunError unless all deltas are of one part, IncompatibleAdapter for two specs."""
    first = deltas[0]
    for delta in deltas:
        require_same_spec(first.spec, delta.spec)
        if delta.part != first.part:
            raise RunError(
                f"[robust] compares the same values of all clients, but one delta is of "
                f"{first.part} and one of {delta.part}: let every site train the whole lora.rank, "
                "or leave [robust] out"
            )


def _by_coordinate(deltas: Sequence[Delta], statistic: Statistic) -> dict[str, NDArray[np.float32]]:
    return {
        name: statistic(np.stack([d.arrays[name] for d in deltas]).astype(np.float64)).astype(
            np.float32
        )
        for name in deltas[0].arrays
    }


def weighted(
    deltas: Sequence[Delta], c: Array, names: Iterable[str] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Return Σ c_i d_i, accumulated in float64, of these tensors (None: all)."""
    total = {}
    for name in deltas[0].arrays if names is None else names:
        total[name] = np.zeros(deltas[0].arrays[name].shape)
        for delta, factor in zip(deltas, c, strict=True):
            total[name] += factor * delta.arrays[name].astype(np.float64)
    return {name: array.astype(np.float32) for name, array in total.items()}


def inner_products(deltas: Sequence[Delta], names: Iterable[str] | None = None) -> Array:
    """Return <x_i, x_j> in float64 over these tensors (None: all), one at a time."""
    total = np.zeros((len(deltas), len(deltas)))
    for name in deltas[0].arrays if names is None else names:
        flat = np.stack([d.arrays[name].ravel() for d in deltas]).astype(np.float64)
        total += flat @ flat.T
    return total


def _statistic(robust: Robust) -> Statistic:
    if robust.rule == "median":
        return lambda values: np.asarray(np.median(values, axis=0))
    return lambda values: trimmed_mean(values, _cut(robust, len(values)))


def trimmed_mean(values: Array, cut: int) -> Array:
    """Return the mean over axis 0 without the `cut` smallest and largest of each coordinate."""
    ordered = np.sort(values, axis=0)[cut : len(values) - cut]
    return np.asarray(ordered.mean(axis=0))


def _cut(robust: Robust, clients: int) -> int:
    """Return how many to cut at each end: the share, rounded up (0.1 · 30 is 3, not 4)."""
    return math.ceil(robust.trim * clients - 1e-9)


def _in_units(robust: Robust, unit: float) -> Robust:
    """Return the same rule for vectors divided by `unit`."""
    if robust.clipping_norm is None:
        return robust
    return msgspec.structs.replace(robust, clipping_norm=robust.clipping_norm / unit)


def _radius(robust: Robust, norms: Array) -> float:
    """Return τ."""
    return float(np.median(norms)) if robust.clipping_norm is None else robust.clipping_norm


def _shrink(norms: Array, radius: float) -> Array:
    """Return min(1, radius / norm), 1 for norm 0."""
    return np.where(norms > radius, radius / np.where(norms > 0, norms, 1.0), 1.0)


def _distances(g: Array, c: Array) -> Array:
    """Return ‖Σ c_j x_j − x_i‖ for every i."""
    across = g @ c
    return np.sqrt(np.maximum(c @ across - 2 * across + np.diag(g), 0.0))


def _norm_clipping(robust: Robust, g: Array, norms: Array) -> Array:
    return _shrink(norms, _radius(robust, norms)) / len(norms)


def _neighbours(robust: Robust, clients: int) -> int:
    """Return n − f − 2, at least f + 1 where n >= 2f + 3."""
    return clients - (robust.byzantine or 0) - 2


def _krum(robust: Robust, g: Array, keep: int) -> Array:
    """Average the `keep` best; of equal scores the first client's wins, as in the paper."""
    norms = np.diag(g)
    squared = np.maximum(norms[:, None] + norms[None, :] - 2 * g, 0.0)
    np.fill_diagonal(squared, np.inf)  # a client is not its own neighbour
    nearest = np.sort(squared, axis=1)[:, : _neighbours(robust, len(g))]
    best = np.argsort(nearest.sum(axis=1), kind="stable")[:keep]
    c = np.zeros(len(g))
    c[best] = 1 / keep
    return c


def _geometric_median(robust: Robust, g: Array, norms: Array) -> Array:
    typical = float(np.median(norms))
    c = _shrink(norms, typical) / len(norms)
    if typical == 0:  # more than half of the deltas are 0: so is their geometric median
        return np.zeros(len(norms))
    for _ in range(robust.iterations):
        beta = 1 / np.maximum(SMOOTHING * typical, _distances(g, c))
        c = beta / beta.sum()
    return c


def _centred_clipping(robust: Robust, g: Array, norms: Array) -> Array:
    radius, c = _radius(robust, norms), np.zeros(len(norms))
    for _ in range(robust.iterations):
        shrink = _shrink(_distances(g, c), radius)
        c = c * (1 - shrink.mean()) + shrink / len(norms)
    return c
