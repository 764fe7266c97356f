"""A frozen base, a trainable head, and the cut between what is computed once and what is trained.

A classifier is a chain of stages and a linear head:

    stage 0: embed     stages 1 … L: blocks     stage L + 1: pool     head
    └───────── prefix: the first `cut` stages ────────┘└─ forward: the rest ─┘

The cut lies below the first stage that holds a trainable tensor. Nothing below it changes
in training and nothing in it is random (the base runs in eval mode, without dropout), so
the prefix of a record is computed once and kept (prefix.py).

Names of tensors are relative to the base, as its own library names them
(`encoder.layer.5.attention.self.query.lora_A.weight`), or begin with `head.`.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.client.tuning.lora import HEAD, base_weights, unset_linear
from anabranch.protocols.errors import ModelError
from anabranch.protocols.spec import AdapterSpec


class Classifier(nn.Module, ABC):
    """Base of the text, image and table classifiers. Made by `bases.load_classifier`."""

    spec: AdapterSpec  # set by lora.adapt

    blocks: str | None = None  # name of the base's list of blocks: what `layers = "last:k"` counts
    unit_features = False  # scale pooled vectors to length sqrt(d) before the head

    def __init__(
        self,
        base: nn.Module,
        *,
        width: int,
        num_labels: int,
        base_digest: str,
        tokenizer_digest: str = "",
        function: str = "",
    ) -> None:
        """Put a zero head on `base`; `function` says what the weights do not (see prefix_id)."""
        super().__init__()
        if hasattr(base, HEAD):
            raise ModelError(f"the base has a module named {HEAD!r}: the name is taken by the head")
        self.base = base.requires_grad_(False)
        self.head = unset_linear(width, num_labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.base_digest = base_digest
        self.tokenizer_digest = tokenizer_digest
        self.merged = False  # set by lora.merge and lora.unmerge
        self._function = function
        self.cut = self.num_stages
        # What base tensors trained in full were before training; see compute_base_digest.
        self.untrained: dict[str, Tensor] = {}
        self.eval()

    @property
    @abstractmethod
    def num_stages(self) -> int:
        """Return the number of stages before the head."""

    @abstractmethod
    def stage_of(self, name: str) -> int:
        """Return the stage that a base tensor or module belongs to; 0 when in doubt."""

    @abstractmethod
    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        """Return the output of stages start … stop - 1 for their input `h`."""

    @abstractmethod
    def encode(self, inputs: Sequence[str] | NDArray[np.float32]) -> list[Tensor]:
        """Return one tensor per record (the input of stage 0), on the CPU, not padded."""

    @property
    def num_labels(self) -> int:
        """Return the number of logits."""
        labels: int = self.head.out_features
        return labels

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        device: torch.device = self.head.weight.device
        return device

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks (encoder layers, hidden layers)."""
        blocks = self.base.get_submodule(self.blocks) if self.blocks else ()
        return len(blocks)  # type: ignore[arg-type]

    @property
    def cached_layers(self) -> int:
        """Return how many blocks lie below the cut: their work is done once per record."""
        stages = (self.stage_of(f"{self.blocks}.{i}.") for i in range(self.num_blocks))
        return sum(stage < self.cut for stage in stages)

    @property
    def prefix_id(self) -> str:
        """Return a name of the function that `prefix` computes: equal names, equal function."""
        return f"{type(self).__name__}:{self._function}:{self.base_digest}:{self.cut}"

    @torch.no_grad()
    def prefix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the hidden states at the cut for a batch of encoded records."""
        return self.run(x, mask, 0, self.cut)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits (B, labels) for hidden states at the cut."""
        logits: Tensor = self.head(self.run(h, mask, self.cut, self.num_stages))
        return logits

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return forward(prefix(x)): the logits (B, labels) for a batch of encoded records."""
        logits: Tensor = self.head(self.run(x, mask, 0, self.num_stages))
        return logits

    def scale(self, pooled: Tensor) -> Tensor:
        """Return pooled vectors (B, d) as the head sees them, of length sqrt(d) if asked for.

        Coordinates are then of order 1 for every base, so one learning rate fits all heads
        and the norm of a record's head gradient, which DP-SGD clips, varies little.
        """
        if not self.unit_features:
            return pooled
        return nn.functional.normalize(pooled, dim=-1) * math.sqrt(pooled.shape[-1])

    def train(self, mode: bool = True) -> Self:
        """Set training mode on what is trained; frozen modules always stay in eval mode.

        So there is no dropout in the base, while hooks (Opacus) that look at `training` see
        the trained layers.
        """
        super().train(mode)
        for module in self.base.modules():
            if not any(p.requires_grad for p in module.parameters(recurse=False)):
                module.training = False
        return self

    def compute_base_digest(self) -> str:
        """Return the digest of the base weights as they are now.

        Equal to `base_digest` as long as nothing wrote to a frozen weight. Modules trained in
        full are part of the adapter: for them the weights before training count.
        """
        return weights_digest(base_weights(self.base) | self.untrained)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over (name, dtype, shape, bytes) of all tensors, by ascending name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # no copy
    return digest.hexdigest()
