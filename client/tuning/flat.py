"""All trained tensors of a fit as one vector, and their gradients as another.

Noise is then one draw, and the optimiser's update two tensors (the head's learning rate is
its own) instead of one per factor. Inside `Flat.attached` the parameters are views of the
vector; afterwards their values are back in the memory where they were.

The values of a factor B (out, rank) stand transposed, (rank, out): so its per-record gradients
uᵀ e are written row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from anabranch.client.tuning.lora import HEAD
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spec import LORA_B


@dataclass(frozen=True)
class Slot:
    """Where one tensor stands in the vector: values start … stop − 1."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def transposed(self) -> bool:
        """Return whether the values stand column by column."""
        return self.name.endswith(LORA_B)

    def shaped(self, values: Tensor) -> Tensor:
        """Return a view of the slot's values (stop − start,) in the shape of the tensor."""
        if self.transposed:
            return values.view(self.shape[::-1]).t()
        return values.view(self.shape)

    def ordered(self, rows: Tensor) -> Tensor:
        """Return (R, *shape) as rows (R, stop − start) in the order of the slot."""
        return (rows.mT if self.transposed else rows).reshape(len(rows), self.stop - self.start)


def slots_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Slot, ...]:
    """Return one slot per tensor: ascending names, those of the head last."""
    names = sorted(shapes, key=lambda name: (_in_head(name), name))
    sizes = [torch.Size(shapes[name]).numel() for name in names]
    bounds = pairwise(accumulate(sizes, initial=0))
    return tuple(Slot(n, tuple(shapes[n]), *at) for n, at in zip(names, bounds, strict=True))


class Flat:
    """The vector of values, the vector of gradients, and the slots of both."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises PrivacyError if the tensors are not of one type on one device."""
        kinds = {(p.dtype, p.device) for p in parameters.values()}
        if len(kinds) != 1:
            raise PrivacyError(f"expected trained tensors of one type on one device, got {kinds}")
        self.slots = slots_of({name: tuple(p.shape) for name, p in parameters.items()})
        self._parameters = [parameters[slot.name] for slot in self.slots]
        first = self._parameters[0]
        self.values = torch.empty(self.slots[-1].stop, dtype=first.dtype, device=first.device)
        self.gradient = torch.zeros_like(self.values)
        self._gradients = self._views(self.gradient)

    def _views(self, vector: Tensor) -> list[Tensor]:
        return [slot.shaped(vector[slot.start : slot.stop]) for slot in self.slots]

    @contextmanager
    def attached(self) -> Iterator[dict[str, nn.Parameter]]:
        """Let the parameters be views of the vector; yield what an optimiser steps.

        That is the head's part of the vector and the rest, named so that make_optimizer tells
        them apart. Gradients given to them are `gradient`.
        """
        own = [p.data for p in self._parameters]
        for p, view in zip(self._parameters, self._views(self.values), strict=True):
            view.copy_(p.data)
            p.data = view
        try:
            yield self._halves()
        finally:
            for p, data in zip(self._parameters, own, strict=True):
                data.copy_(p.data)
                p.data = data
                p.grad = None

    def _halves(self) -> dict[str, nn.Parameter]:
        cut = sum(slot.stop - slot.start for slot in self.slots if not _in_head(slot.name))
        parts = {"rest": slice(0, cut), f"{HEAD}.all": slice(cut, len(self.values))}
        halves = {}
        for name, at in parts.items():
            if at.start < at.stop:
                halves[name] = nn.Parameter(self.values[at])
                halves[name].grad = self.gradient[at]
        return halves

    def hide_gradients(self) -> None:
        """Take the gradients off the parameters: whatever a backward pass leaves is new."""
        for p in self._parameters:
            p.grad = None

    def show_gradients(self) -> None:
        """Make `gradient` the gradients of the parameters."""
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient

    def mask(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        """Return where a value is NOT trained, (P,) bool; None if all are."""
        if not masks:
            return None
        frozen = torch.zeros_like(self.values, dtype=torch.bool)
        for slot in self.slots:
            if slot.name in masks:
                slot.shaped(frozen[slot.start : slot.stop]).copy_(~masks[slot.name])
        return frozen


def _in_head(name: str) -> bool:
    return name.startswith(f"{HEAD}.")
