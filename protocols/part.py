"""What of an adapter one client trains and sends in one round.

Notation: an adapted layer has A (rank, in) and B (out, rank); rank index j names row j of A and
column j of B. All other tensors (the head, modules trained in full) are dense.

    Part()                            both factors, every rank, the dense tensors
    Part(factors="B")                 every B and the dense tensors; A is frozen
    Part(factors="B", ranks=(0, 3))   columns 0 and 3 of every B, and the dense tensors

Deltas of different parts of one spec can be summed: `spread` puts zeros where nothing was
trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.spec import MAX_SIZE, AdapterSpec, Arrays, Shape, shown

Factors = Literal["A", "B", "both", "none"]
Rank = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
Index = tuple[slice | list[int], ...]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A choice of factors, rank indices and dense tensors; every field narrows it."""

    factors: Factors = "both"
    ranks: tuple[Rank, ...] | None = None  # ascending; None: all of them
    dense: bool = True

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.factors == "both" and self.ranks is None and self.dense

    def names(self, spec: AdapterSpec) -> list[str]:
        """Return the names of the tensors of which some values are in this part, ascending."""
        return [name for name, _ in self._indices(spec)]

    def shapes(self, spec: AdapterSpec) -> dict[str, Shape]:
        """Return name -> shape of what is in this part of each tensor.

        Raises IncompatibleAdapter if a rank index is not in the spec, or the part is empty.
        """
        if self.whole and spec.tensors:
            return spec.shapes
        if self.ranks is not None:
            _require_ranks(self.ranks, spec.rank)
        held = 0 if self.ranks is None else len(self.ranks)
        shapes, full = {}, spec.shapes
        for name, index in self._indices(spec):
            shapes[name] = tuple(
                size if isinstance(at, slice) else held
                for size, at in zip(full[name], index, strict=True)
            )
        if not shapes:
            raise IncompatibleAdapter(
                f"{shown(str(self))}: nothing of this adapter is in this part"
            )
        return shapes

    def take(self, spec: AdapterSpec, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
        """Return a copy of this part of the spec's full arrays."""
        if self.whole:
            return {name: np.array(arrays[name], order="C") for name, _ in spec.tensors}
        return {
            name: np.array(arrays[name][index], order="C") for name, index in self._indices(spec)
        }

    def spread(self, spec: AdapterSpec, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
        """Return full arrays that hold `arrays` in this part, and zeros elsewhere."""
        full = {name: np.zeros(shape, np.float32) for name, shape in spec.tensors}
        for name, index in self._indices(spec):
            full[name][index] = arrays[name]
        return full

    def mask(self, spec: AdapterSpec) -> dict[str, NDArray[np.bool_]]:
        """Return name -> where the tensor is in this part, for the tensors only partly in it.

        What `names` lists and this does not is in the part as a whole.
        """
        if self.ranks is None or len(self.ranks) == spec.rank:
            return {}
        masks, full = {}, spec.shapes
        for name, index in self._indices(spec):
            if all(isinstance(at, slice) for at in index):
                continue
            masks[name] = np.zeros(full[name], np.bool_)
            masks[name][index] = True
        return masks

    def _indices(self, spec: AdapterSpec) -> Iterator[tuple[str, Index]]:
        """Yield (name, index along each dimension) of every tensor that is touched, ascending."""
        ranks: slice | list[int] = slice(None) if self.ranks is None else list(self.ranks)
        chosen: dict[str, Index] = {}
        for _, a, b in spec.factors():
            if self.factors in ("A", "both"):
                chosen[a] = (ranks, slice(None))
            if self.factors in ("B", "both"):
                chosen[b] = (slice(None), ranks)
        factors = {name for _, a, b in spec.factors() for name in (a, b)}
        for name, shape in spec.tensors:
            if name in chosen:
                yield name, chosen[name]
            elif self.dense and name not in factors:
                yield name, (slice(None),) * len(shape)


def _require_ranks(ranks: tuple[int, ...], rank: int) -> None:
    ascending = all(before < after for before, after in pairwise(ranks))
    if not ranks or not ascending or not (ranks[0] >= 0 and ranks[-1] < rank):
        raise IncompatibleAdapter(
            f"ranks: expected different indices from 0 to {rank - 1}, ascending, "
            f"got {shown(str(ranks))}"
        )
