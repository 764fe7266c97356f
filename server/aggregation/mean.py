"""The weighted mean of a stream of deltas, rank by rank.

Notation: client k sends delta d_k with weight w_k > 0, and trained the rank indices I_k.

    mean_j = Σ_{k: j in I_k} v_k d_k,j / Σ_{k: j in I_k} v_k      for every rank index j
    mean   = Σ_k w_k d_k / Σ_k w_k                                for dense tensors

    v_k = w_k               both factors: everybody has the first ranks (RBLA, arXiv:2408.08699)
    v_k = w_k · R / |I_k|   one factor: I_k is a random choice of the R ranks

With equal I_k this is the server's step of FedAvg (McMahan et al. 2017, arXiv:1602.05629,
Algorithm 1, written for differences). A random choice of few ranks is one in R / |I_k| rounds
in any one of them: with that factor (Hájek's estimator of a mean from unequal samples) a client
weighs the same in all ranks together, whatever its rank; without it, clients of high rank would
pull the model to their own records.

FedNova (Wang et al. 2020, arXiv:2007.07481, equation 6, gradient weights a_k = 1), τ_k the
local steps of client k:

    mean = τ_eff Σ_k w_k (d_k / τ_k) / Σ_k w_k        τ_eff = Σ_k w_k τ_k / Σ_k w_k

Arithmetic: seven deltas are added in float32, seven such sums once more, and these go into a
float64 total. So a term passes through at most 14 float32 roundings of 6e-8, however many
clients there are, and little more memory is touched than by a plain sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import saxpy

from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec, Arrays, require_same_spec

# No site holds this many records; a larger weight would silence every other client.
MAX_WEIGHT = 1e9
FOLD = 7  # terms per float32 sum

# From (delta, weight) to one delta, as weighted_mean does it; robust rules are others.
Combine = Callable[[Iterable[tuple[Delta, float]]], Delta]


def weighted_mean(deltas: Iterable[tuple[Delta, float]]) -> Delta:
    """Return the mean of the module's docstring; its num_examples is Σ n_k.

    Deltas may be of parts that differ in `ranks`, not in `factors` or `dense`; the result is of
    all ranks, with zeros where nobody trained.

    Guarantees:
    * per value, the error is at most 1e-6 of Σ p_k |d_k|, p_k the normalised weights, or 1e-38
      (the smallest normal float32) where that is more; so the order of the deltas changes it by
      no more than twice that, and equal deltas give that delta back to that;
    * one delta is held at a time, and 16 bytes per value beside it, however many come.

    Raises ValueError if there is no delta, or a weight is not in (0, MAX_WEIGHT], and
    IncompatibleAdapter if two deltas do not fit together, or the mean does not fit float32.
    """
    total = Sum()
    for delta, weight in deltas:
        total.add(delta, weight)
    return total.delta()


def normalized_mean(deltas: Iterable[tuple[Delta, float]]) -> Delta:
    """Return FedNova's mean: clients that took more local steps do not count for more.

    As weighted_mean otherwise. Raises ValueError for a delta that does not say its steps.
    """
    total, steps, weights = Sum(), 0.0, 0.0
    for delta, weight in deltas:
        if not delta.steps:
            raise ValueError(
                "federation.normalize_steps: a delta does not say how many steps it took "
                "(steps = 0); update the client, or leave normalize_steps out"
            )
        total.add(delta, weight, 1 / delta.steps)
        steps += weight * delta.steps
        weights += weight
    return total.delta(steps / weights if weights else 1.0)


class Sum:
    """Σ w_k s_k d_k and Σ w_k, per rank index, of the deltas added so far.

    `exact` takes every step in float64: slower, and for measuring what float32 costs.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self.num_examples, self.clients = 0, 0
        self._exact = exact
        self._spec: AdapterSpec | None = None
        self._weight = 0.0  # Σ w_k over all deltas

    def add(self, delta: Delta, weight: float, scale: float = 1.0) -> None:
        """Add scale · delta with `weight`; raises as weighted_mean does."""
        if not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
            raise ValueError(f"expected a weight in (0, {MAX_WEIGHT:.0e}], got {weight}")
        if self._spec is None:
            self._start(delta)
        require_same_spec(self._spec or delta.spec, delta.spec)
        part = delta.part
        if (part.factors, part.dense) != (self._part.factors, self._part.dense):
            raise IncompatibleAdapter(f"delta is of {part}, expected {self._part}")
        whole = part.ranks is None or len(part.ranks) == delta.spec.rank
        if self._exact or not whole:
            self._add_exactly(delta, weight * scale)
        else:
            self._fold.add(delta.arrays, weight * scale)
        self._columns[slice(None) if part.ranks is None else list(part.ranks)] += weight * _rarity(
            delta
        )
        self._weight += weight
        self.num_examples += delta.num_examples
        self.clients += 1

    def mean(self, factor: float = 1.0) -> Iterator[tuple[str, NDArray[np.float64]]]:
        """Yield (name, factor · Σ w_k s_k d_k / Σ w_k) of every tensor, one at a time.

        Raises ValueError without deltas.
        """
        spec = self._required()
        self._fold.flush()
        columns = np.where(self._columns > 0, self._columns, 1.0)  # nobody's sum is 0
        weights: dict[str, NDArray[np.float64]] = {}
        for _, a, b in spec.factors():
            weights[a], weights[b] = columns[:, None], columns[None, :]
        every = np.full((), self._weight)
        for name, total in self._total.items():
            yield name, total * (factor * self._fold.unit / weights.get(name, every))

    def delta(self, factor: float = 1.0) -> Delta:
        """Return the mean in float32; IncompatibleAdapter if it does not fit."""
        with np.errstate(over="ignore", under="ignore"):  # Delta refuses what became infinite
            arrays = {name: array.astype(np.float32) for name, array in self.mean(factor)}
        return Delta(self._required(), arrays, self.num_examples, part=self._part)

    def _required(self) -> AdapterSpec:
        if self._spec is None:
            raise ValueError("expected at least one delta, got none")
        return self._spec

    def _start(self, delta: Delta) -> None:
        self._spec = delta.spec
        self._part = Part(factors=delta.part.factors, dense=delta.part.dense)
        self._columns = np.zeros(delta.spec.rank)
        shapes = self._part.shapes(delta.spec)
        self._total = {name: np.zeros(shape) for name, shape in shapes.items()}
        self._fold = _Fold(self._total)

    def _add_exactly(self, delta: Delta, weight: float) -> None:
        in_units, rarity = weight / self._fold.unit, _rarity(delta)
        ranks = slice(None) if delta.part.ranks is None else list(delta.part.ranks)
        places: dict[str, tuple[slice | list[int], ...]] = {}
        for _, a, b in delta.spec.factors():
            places[a], places[b] = (ranks,), (slice(None), ranks)
        for name, array in delta.arrays.items():
            times = in_units * rarity if name in places else in_units
            self._total[name][places.get(name, ())] += times * array.astype(np.float64)


class _Fold:
    """Adds weighted float32 arrays into float64 totals, FOLD · FOLD at a time.

    Weights and totals are in units of a power of two, at least FOLD · FOLD times the largest
    weight added here so far: no float32 sum can overflow, and a new unit costs no precision.
    """

    def __init__(self, total: dict[str, NDArray[np.float64]]) -> None:
        self._names = list(total)
        self._total = [array.reshape(-1) for array in total.values()]  # views
        self._inner = [np.empty(array.size, np.float32) for array in self._total]
        self._outer = [np.empty(array.size, np.float32) for array in self._total]
        self._count, self.unit = 0, 2.0**-500  # below every weight

    def add(self, arrays: Arrays, weight: float) -> None:
        if self._count == FOLD * FOLD:
            self.flush()
        if weight * FOLD * FOLD > self.unit:
            self._grow(weight * FOLD * FOLD)
        factor = np.float32(weight / self.unit)
        first = self._count % FOLD == 0
        for i, name in enumerate(self._names):
            values, inner = arrays[name].reshape(-1), self._inner[i]
            # saxpy adds factor · values into inner in one pass over both.
            self._inner[i] = (
                np.multiply(values, factor, inner) if first else saxpy(values, inner, a=factor)
            )
        self._count += 1
        if self._count % FOLD == 0:
            self._close_inner()

    def flush(self) -> None:
        """Bring all that was added into the totals."""
        if self._count % FOLD:
            self._close_inner()
        if self._count:
            for total, outer in zip(self._total, self._outer, strict=True):
                np.add(total, outer, total)
        self._count = 0

    def _grow(self, least: float) -> None:
        """Take the smallest power of two >= `least` as the unit."""
        self.flush()
        unit = 2.0 ** math.ceil(math.log2(least))
        for total in self._total:
            total *= self.unit / unit
        self.unit = unit

    def _close_inner(self) -> None:
        if self._count <= FOLD:
            self._inner, self._outer = self._outer, self._inner
            return
        for inner, outer in zip(self._inner, self._outer, strict=True):
            np.add(outer, inner, outer)


def _rarity(delta: Delta) -> float:
    """Return v_k / w_k of the module's docstring."""
    if delta.part.ranks is None or delta.part.factors not in ("A", "B"):
        return 1.0
    return delta.spec.rank / len(delta.part.ranks)
