"""The one value that travels: a LoRA adapter, and the delta that local training makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import (
    AdapterSpec,
    Arrays,
    Shape,
    require_same_shapes,
    require_same_spec,
)

WHOLE = Part()


@dataclass(frozen=True, eq=False)
class Adapter:
    """Values for every tensor of a spec. Checked on construction: names, shapes, finite."""

    spec: AdapterSpec
    arrays: Arrays
    # All values, tensor after tensor, where the arrays are views of it; None: they lie apart.
    row: NDArray[np.float32] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", checked(self.spec, self.arrays))

    @classmethod
    def of_rows(
        cls, spec: AdapterSpec, rows: NDArray[np.float32]
    ) -> list[Adapter | IncompatibleAdapter]:
        """Return one adapter of views per row of `rows` (K, values), all checked at once.

        A row that is not finite gives the error that its adapter would have raised. Raises
        IncompatibleAdapter for rows of another length or type.
        """
        if rows.dtype != np.float32 or rows.shape[1:] != (_bounds(spec)[-1][2],):
            raise IncompatibleAdapter(
                f"rows: expected float32 of {spec.num_values} values, got {rows.dtype} of shape "
                f"{rows.shape}"
            )
        found: list[Adapter | IncompatibleAdapter] = []
        sound: list[bool] = np.logical_and.reduce(np.isfinite(rows), axis=1).tolist()
        for row, finite in zip(rows, sound, strict=True):
            if finite:
                one = object.__new__(cls)
                one.__dict__.update(spec=spec, arrays=_cut(spec, row), row=row)
                found.append(one)
                continue
            try:
                found.append(cls(spec, _cut(spec, row)))
            except IncompatibleAdapter as error:
                found.append(error)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the row: in a copy the arrays are no views of it."""
        return {"spec": self.spec, "arrays": self.arrays}

    def minus(
        self, before: Adapter, *, num_examples: int, part: Part = WHOLE, steps: int = 0
    ) -> Delta:
        """Return what training changed in `part`: self − before.

        Raises IncompatibleAdapter for another spec, or for a difference that is not finite.
        """
        require_same_spec(before.spec, self.spec)
        with np.errstate(over="ignore"):  # Delta refuses what became infinite
            if part.whole and self.row is not None and before.row is not None:
                row = self.row - before.row
                return Delta.of_row(self.spec, row, num_examples, part=part, steps=steps)
            if part.whole:
                arrays = {name: array - before.arrays[name] for name, array in self.arrays.items()}
            else:
                now, then = (part.take(self.spec, one.arrays) for one in (self, before))
                arrays = {name: array - then[name] for name, array in now.items()}
        return Delta(self.spec, arrays, num_examples, part=part, steps=steps)

    def plus(self, delta: Delta) -> Adapter:
        """Return self + delta; what is not in the delta's part stays as it is."""
        require_same_spec(self.spec, delta.spec)
        change = delta.full()
        return Adapter(self.spec, {name: a + change[name] for name, a in self.arrays.items()})

    def only(self, part: Part) -> Adapter:
        """Return this adapter with zeros in place of what is not in `part`."""
        taken = part.take(self.spec, self.arrays)
        return Adapter(self.spec, part.spread(self.spec, taken))


@dataclass(frozen=True, eq=False)
class Delta:
    """Adapter after local training minus adapter before it, for what was trained.

    Deltas of one spec and part form a vector space: `plus` and `times` are its operations.
    """

    spec: AdapterSpec
    arrays: Arrays  # of the shapes part.shapes(spec)
    num_examples: int  # local records behind this delta
    part: Part = WHOLE
    steps: int = 0  # local optimiser steps behind this delta; 0: not said
    # As in an Adapter.
    row: NDArray[np.float32] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _require_counts(self.num_examples, self.steps)
        shapes = self.part.shapes(self.spec)
        object.__setattr__(self, "arrays", checked_shapes(shapes, self.arrays))

    @classmethod
    def of_row(
        cls,
        spec: AdapterSpec,
        row: NDArray[np.float32],
        num_examples: int,
        *,
        part: Part = WHOLE,
        steps: int = 0,
    ) -> Delta:
        """Return the delta of a whole adapter with the values `row`, checked at once.

        Raises what the constructor does.
        """
        if not part.whole or row.shape != (_bounds(spec)[-1][2],):
            raise IncompatibleAdapter(
                f"row: expected {spec.num_values} values of a whole adapter, got shape {row.shape} "
                f"of {part}"
            )
        arrays = _cut(spec, row)
        if row.dtype != np.float32 or not np.isfinite(row).all():
            return cls(spec, arrays, num_examples, part=part, steps=steps)  # says which tensor
        _require_counts(num_examples, steps)
        one = object.__new__(cls)
        one.__dict__.update(
            spec=spec, arrays=arrays, num_examples=num_examples, part=part, steps=steps, row=row
        )
        return one

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the row: in a copy the arrays are no views of it."""
        return {name: value for name, value in self.__dict__.items() if name != "row"}

    def plus(self, other: Delta) -> Delta:
        """Return self + other; examples and steps add up."""
        require_same_spec(self.spec, other.spec)
        if self.part != other.part:
            raise IncompatibleAdapter(f"delta is of {other.part}, expected {self.part}")
        arrays = {name: a + other.arrays[name] for name, a in self.arrays.items()}
        examples = self.num_examples + other.num_examples
        return Delta(self.spec, arrays, examples, part=self.part, steps=self.steps + other.steps)

    def times(self, factor: float) -> Delta:
        """Return factor × self; num_examples and steps are unchanged."""
        arrays = {name: a * np.float32(factor) for name, a in self.arrays.items()}
        return Delta(self.spec, arrays, self.num_examples, part=self.part, steps=self.steps)

    def full(self) -> dict[str, NDArray[np.float32]]:
        """Return arrays of the spec's shapes, with zeros where nothing was trained."""
        if self.part == WHOLE:
            return dict(self.arrays)
        return self.part.spread(self.spec, self.arrays)

    def norm(self) -> float:
        """Return the Euclidean norm over all values, accumulated in float64."""
        if self.row is None:
            wide = [array.astype(np.float64).reshape(-1) for array in self.arrays.values()]
        else:
            row = self.row.astype(np.float64)
            wide = [row[start:stop] for _, start, stop, _ in _bounds(self.spec)]
        return math.sqrt(sum(float(np.dot(a, a)) for a in wide))


_Bounds = tuple[tuple[str, int, int, Shape], ...]
_last: tuple[AdapterSpec, _Bounds] | None = None  # found out once for many adapters of one spec


def _bounds(spec: AdapterSpec) -> _Bounds:
    """Return (name, first, last + 1, shape) of every tensor in a row of all values."""
    global _last
    held = _last
    if held is not None and held[0] is spec:
        return held[1]
    ends = accumulate((math.prod(shape) for _, shape in spec.tensors), initial=0)
    bounds = tuple(
        (name, start, stop, shape)
        for (name, shape), (start, stop) in zip(spec.tensors, pairwise(ends), strict=True)
    )
    _last = spec, bounds
    return bounds


def _cut(spec: AdapterSpec, row: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Return every tensor of a row of all values, as a view."""
    return {name: row[start:stop].reshape(shape) for name, start, stop, shape in _bounds(spec)}


def _require_counts(num_examples: int, steps: int) -> None:
    for name, count in (("num_examples", num_examples), ("steps", steps)):
        if count < 0:
            raise ValueError(f"expected {name} >= 0, got {count}")


def checked(spec: AdapterSpec, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """Return arrays as float32 in the spec's order, or raise IncompatibleAdapter."""
    return checked_shapes(spec.shapes, arrays)


def checked_shapes(shapes: Mapping[str, Shape], arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """Return arrays as float32 in the order of `shapes`, or raise IncompatibleAdapter."""
    require_same_shapes(shapes, {name: np.shape(a) for name, a in arrays.items()})
    result = {}
    for name in shapes:
        array = np.asarray(arrays[name])
        if array.dtype != np.float32:
            raise IncompatibleAdapter(f"{name}: expected float32, got {array.dtype}")
        if not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise IncompatibleAdapter(f"{name}: {bad} of {array.size} values are NaN or infinite")
        result[name] = np.asarray(array, order="C")
    return result
