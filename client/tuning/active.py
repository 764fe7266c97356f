"""What one fit trains: its part of the adapter, and nothing else.

Whole tensors outside it ask for no gradient, so none is computed. Where only some ranks of a
factor are trained, gradients are zero elsewhere before any norm is taken, and the values there
are put back after every step: weight decay and momentum move them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec


@dataclass(frozen=True, eq=False)
class Active:
    """The parameters of one fit by name, ascending, with their values before it."""

    parameters: dict[str, nn.Parameter]
    start: dict[str, Tensor]
    masks: dict[str, Tensor]  # bool: where a tensor is trained, for those trained in part

    def mask_gradients(self) -> None:
        """Set gradients to zero outside the masks."""
        for name, mask in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def pull(self, mu: float) -> None:
        """Add μ (w − w_t), the gradient of μ/2 ‖w − w_t‖², to every gradient that there is."""
        for name, p in self.parameters.items():
            if mu and p.grad is not None:
                p.grad.add_(p - self.start[name], alpha=mu)

    @torch.no_grad()
    def hold(self) -> None:
        """Put the values outside the masks back, bit for bit."""
        for name, mask in self.masks.items():
            p = self.parameters[name]
            p.copy_(torch.where(mask, p, self.start[name]))

    @torch.no_grad()
    def undo(self) -> None:
        """Put all values back."""
        for name, p in self.parameters.items():
            p.copy_(self.start[name])


@contextmanager
def only(classifier: Classifier, part: Part, kept: Part | None = None) -> Iterator[Active]:
    """Let exactly what is in `part` or `kept` ask for gradients; afterwards all may again.

    Raises IncompatibleAdapter, with nothing changed, if a part is empty or names a rank that
    the adapter does not have.
    """
    masks = union(classifier.spec, part, kept)
    everything = trainable_parameters(classifier)
    frozen = [p for name, p in everything.items() if name not in masks]
    chosen = {name: p for name, p in everything.items() if name in masks}
    device = classifier.device
    try:
        for p in frozen:
            p.requires_grad_(False)
        yield Active(
            parameters=chosen,
            start={name: p.detach().clone() for name, p in chosen.items()},
            masks={
                name: torch.from_numpy(mask).to(device)
                for name, mask in masks.items()
                if mask is not None
            },
        )
    finally:
        for p in frozen:
            p.requires_grad_(True)


def union(
    spec: AdapterSpec, part: Part, kept: Part | None = None
) -> dict[str, NDArray[np.bool_] | None]:
    """Return name -> where the tensor is in `part` or in `kept`, None for all of it."""
    masks: dict[str, NDArray[np.bool_] | None] = {}
    for one in (part,) if kept is None else (part, kept):
        one.shapes(spec)  # refuses ranks that are not there
        partial = one.mask(spec)
        for name in one.names(spec):
            mask = partial.get(name)
            before = masks.get(name, mask)
            masks[name] = None if mask is None or before is None else mask | before
    return masks
