"""How a batch of many clients goes through their classifier: padded, or packed without padding.

A kernel takes the values of K clients and leaves the gradients of a batch where it was told to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor

from anabranch.client.local import Local
from anabranch.client.tuning.activations import Mixed
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Packing, Ragged
from anabranch.simulations.cohort import packed
from anabranch.simulations.cohort.batches import Batch, gather
from anabranch.simulations.cohort.grouped import Grouped, Unbatchable, grouped
from anabranch.simulations.cohort.perceptron import PerceptronKernel, is_plain
from anabranch.simulations.cohort.products import FLOAT32, Products
from anabranch.simulations.cohort.ragged import RaggedLayers


class Kernel(Protocol):
    """Runs batches of the clients whose values were bound last."""

    @property
    def filled(self) -> bool:
        """Return whether all clients must have as many records in a batch."""

    def bind(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Use these values, and write gradients there: name -> (K, *shape)."""

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (n, labels) of a batch. Raises Unbatchable."""

    def backward(self, error: Tensor) -> None:
        """Write the gradients of that batch, given those of its logits."""

    def require_complete(self) -> None:
        """Raise Unbatchable unless the backward pass reached everything that is trained."""


class Padded:
    """The classifier's own forward pass, with the layers of grouped.py."""

    filled = True

    def __init__(self, classifier: Classifier, group: Grouped) -> None:
        self._classifier, self._group = classifier, group
        self.bind, self.require_complete = group.bind, group.require_complete

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (K · B, labels); sequences are padded to the longest."""
        x, mask = gather(batch.records.features, batch.ids)
        self._group.begin(len(batch.ids))
        device = self._classifier.device
        mask = None if mask is None else mask.to(device)
        self._logits: Tensor = self._classifier(x.to(device), mask)
        logits: Tensor = self._logits.detach()
        return logits

    def backward(self, error: Tensor) -> None:
        """Write the gradients, given those of the logits."""
        torch.autograd.backward(self._logits, error)


class Packed:
    """Texts of unlike length, token after token; see packed.py."""

    filled = False

    def __init__(self, classifier: Classifier, products: Products = FLOAT32) -> None:
        self._classifier, self._layers = classifier, RaggedLayers(classifier, products)
        self.bind, self.require_complete = self._layers.bind, self._layers.require_complete

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of the records, in their order."""
        assert batch.sizes is not None  # not filled
        parts = cast(Sequence[Packing], batch.records.parts[: batch.clients])
        first = batch.records.first.tolist()
        ids = batch.ids.split(batch.sizes)
        local = [own - start for own, start in zip(ids, first, strict=False)]
        rows = packed.pack(parts, local)
        self._logits = packed.forward(self._classifier, rows, self._layers)
        return self._logits.detach()

    def backward(self, error: Tensor) -> None:
        """Write the gradients, given those of the logits."""
        torch.autograd.backward(self._logits, error)


@contextmanager
def kernel_for(locals: Sequence[Local], products: Products = FLOAT32) -> Iterator[Kernel]:
    """Yield the kernel for clients of one classifier, which is as before when this is over.

    Raises Unbatchable for products other than float32's where batches are not packed.
    """
    classifier = locals[0].classifier
    if packs(locals):
        yield Packed(classifier, products)
        return
    if products is not FLOAT32:
        raise Unbatchable('base_dtype = "bf16" is for packed texts: in float32')
    if is_plain(classifier):
        yield PerceptronKernel(classifier)
        return
    with grouped(classifier) as group:
        yield Padded(classifier, group)


def packs(locals: Sequence[Local]) -> bool:
    """Return whether the batches of these clients are packed."""
    ragged = all(isinstance(local.examples.features, Ragged | Mixed) for local in locals)
    return ragged and packed.why_not(locals[0].classifier) is None
