"""What every training engine on a device offers: gradients of a batch, and the adapter.

    ℓ_i     cross-entropy of record i          w_i   its weight: 1/B for a mean over B records,
                                                     0 for a row that only pads the batch
    plain:  loss = Σ_i w_i ℓ_i                 grad  = Σ_i w_i ∂ℓ_i
    clipped: g_i = ∂ℓ_i over the whole adapter grad  = Σ_i w_i · min(1, C / ‖g_i‖₂) · g_i

Sums of micro-batches add up to the sum of the batch. Two engines: `joint.JointEngine` runs the
bundle's plain ONNX graphs in any onnxruntime; `ort_training.OrtTrainingEngine` runs its
onnxruntime-training artifacts. Both take and give the same named tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.spec import AdapterSpec, Arrays

EngineName = Literal["joint", "ort-training"]
Floats = NDArray[np.float32]
Feeds = Mapping[str, NDArray[Any]]  # model inputs by name; the first axis is the record


@dataclass(frozen=True, eq=False)
class Batch:
    """Records as the graphs take them. B rows; labels (B,) int64; weights (B,) float32."""

    feeds: Feeds
    labels: NDArray[np.int64]
    weights: Floats

    def __len__(self) -> int:
        """Return B, padding rows included."""
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one call computed: sums over the batch's records; float32, of the spec's shapes."""

    loss: float  # Σ w_i ℓ_i
    arrays: dict[str, Floats]
    norms: Floats | None = None  # (B,): ‖g_i‖₂ before clipping; None from a plain call


class Engine(Protocol):
    """A bundle's training step with an adapter in it. Not safe for two threads."""

    @property
    def spec(self) -> AdapterSpec:
        """Names and shapes of the adapter's tensors."""

    def params(self) -> dict[str, Floats]:
        """Return copies of the adapter's tensors."""

    def set_params(self, arrays: Arrays) -> None:
        """Replace the adapter. Raises IncompatibleAdapter for other names, shapes or NaN."""

    def grads(self, batch: Batch, *, clipping_norm: float | None = None) -> Gradients:
        """Return the (clipped, if a norm is given) sums for a batch; the adapter stays as it is."""

    def predict(self, feeds: Feeds) -> Floats:
        """Return the logits (B, labels) under the current adapter."""

    def close(self) -> None:
        """Give back the memory of sessions; the engine cannot be used afterwards."""
