"""A small vision transformer for 8x8 … 32x32 images (Dosovitskiy et al. 2021, arXiv:2010.11929).

    image (C, S, S) ─► patches (N, d) + position ─► L pre-norm blocks ─► norm, mean ─► head
                       stage 0                      stages 1 … L         stage L + 1

Per block: x ← x + attention(norm1 x); x ← x + down(gelu(up(norm2 x))). The base is random
(seeded) and frozen: LoRA and modules_to_save decide how much of it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.client.tuning.classifier import Classifier
from anabranch.protocols.errors import DataError, ModelError
from anabranch.protocols.tables import Model


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key, value and output layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed tokens for x (B, N, d)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mixed: Tensor = self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        return mixed


class Mlp(nn.Module):
    """Two linear layers with GELU between them; the inner one is twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape as x (B, N, d)."""
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape as x (B, N, d)."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """The base: everything below the head. `heads` must divide `width`, `patch` the image."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.patch = nn.Conv2d(model.channels, model.width, model.patch, stride=model.patch)
        self.num_patches = (model.image_size // model.patch) ** 2
        self.position = nn.Embedding(self.num_patches, model.width)
        self.blocks = nn.ModuleList(Block(model.width, model.heads) for _ in range(model.depth))
        self.norm = nn.LayerNorm(model.width)
        nn.init.normal_(self.position.weight, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Return patch vectors plus their positions, (B, N, d), for images (B, C, S, S)."""
        index = torch.arange(self.num_patches, device=images.device)
        # One row of positions per image: per-sample gradients need the batch axis.
        positions = self.position(index.expand(images.shape[0], -1))
        patches: Tensor = self.patch(images).flatten(2).transpose(1, 2) + positions
        return patches


class ImageClassifier(Classifier):
    """A classifier of images of one shape: what vision transformer and convolutions share."""

    def __init__(
        self,
        base: nn.Module,
        model: Model,
        *,
        width: int,
        num_labels: int,
        base_digest: str,
        function: str,
    ) -> None:
        self.image_shape = (model.channels, model.image_size, model.image_size)
        super().__init__(
            base, width=width, num_labels=num_labels, base_digest=base_digest, function=function
        )

    def encode(self, inputs: Sequence[str] | NDArray[np.float32]) -> list[Tensor]:
        """Return one float32 image (C, S, S) per record."""
        images = torch.tensor(np.asarray(inputs, dtype=np.float32))
        if images.shape[1:] != self.image_shape:
            raise DataError(
                f"images have shape {tuple(images.shape[1:])}, the model expects "
                f"{self.image_shape} (channels, height, width): see [model] in run.toml"
            )
        return list(images)


class TransformerClassifier(ImageClassifier):
    """A small vision transformer with mean pooling."""

    blocks = "blocks"

    def __init__(
        self, base: VisionTransformer, model: Model, *, num_labels: int, base_digest: str
    ) -> None:
        super().__init__(
            base,
            model,
            width=model.width,
            num_labels=num_labels,
            base_digest=base_digest,
            function=f"heads={model.heads}",
        )

    @property
    def num_stages(self) -> int:
        """Return L + 2: patches, blocks, norm and mean."""
        return self.num_blocks + 2

    def stage_of(self, name: str) -> int:
        """Return i + 1 for what lies in block i, L + 1 for the last norm, else 0."""
        first, _, rest = name.partition(".")
        if first == "norm":
            return self.num_stages - 1
        return int(rest.partition(".")[0]) + 1 if first == "blocks" else 0

    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        """Return the output of stages start … stop - 1; all patches count, `mask` is not used."""
        base = cast(VisionTransformer, self.base)
        if start == 0 < stop:
            h = base.embed(h)
        for block in base.blocks[max(start - 1, 0) : max(stop - 1, 0)]:
            h = block(h)
        if start < self.num_stages <= stop:
            h = self.scale(base.norm(h).mean(dim=1))
        return h


def build(model: Model, *, seed: int) -> VisionTransformer:
    """Return the seeded random base; raise ModelError if the sizes in [model] do not fit."""
    if model.image_size % model.patch:
        raise ModelError(
            f"model.patch = {model.patch} does not divide model.image_size = {model.image_size}"
        )
    if model.width % model.heads:
        raise ModelError(f"model.heads = {model.heads} does not divide model.width = {model.width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(model)
