"""A small convolutional network for 8x8 … 32x32 images, as in McMahan et al. 2017, section 3.

    image (C, S, S) ─► conv1 3x3, pool, relu ─► conv2 3x3, pool, relu ─► dense, relu ─► head
                       stage 0                  stage 1                  stage 2

16 and 32 channels, max-pooling by 2, 128 values before the head: 153,962 weights for 32x32 pixels
in colour and ten labels. relu(pool(x)) is pool(relu(x)) on a quarter of the values. From 16
pixels on convolutions have no padding; below, one pixel, or too little would be left.

The base is random (seeded) and frozen: lora.modules_to_save = ["*"] trains all of it in full,
LoRA adapts "dense". Images are laid out with channels last, which CPUs convolve faster; the
values are the same to rounding.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.tuning.vision import ImageClassifier
from anabranch.protocols.tables import Model

CHANNELS = (16, 32)
WIDTH = 128
PADDED_BELOW = 16  # pixels
STAGES = ("conv1", "conv2", "dense")


class ConvolutionalNetwork(nn.Module):
    """The base: everything below the head."""

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        padding = int(image_size < PADDED_BELOW)
        first, second = CHANNELS
        self.conv1 = nn.Conv2d(channels, first, 3, padding=padding)
        self.conv2 = nn.Conv2d(first, second, 3, padding=padding)
        side = _side(_side(image_size, padding), padding)
        self.dense = nn.Linear(second * side * side, WIDTH)


class ConvolutionalClassifier(ImageClassifier):
    """Two convolutions, one linear layer, and the head."""

    def __init__(
        self, base: ConvolutionalNetwork, model: Model, *, num_labels: int, base_digest: str
    ) -> None:
        padding = base.conv1.padding[0]
        super().__init__(
            base,
            model,
            width=WIDTH,
            num_labels=num_labels,
            base_digest=base_digest,
            function=f"padding={padding}",
        )

    @property
    def num_stages(self) -> int:
        """Return 3: two convolutions and the linear layer."""
        return len(STAGES)

    def stage_of(self, name: str) -> int:
        """Return the place of the layer that a name begins with."""
        return STAGES.index(name.partition(".")[0])

    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        """Return the output of stages start … stop - 1; `mask` is not used."""
        base = cast(ConvolutionalNetwork, self.base)
        for stage in range(start, stop):
            if stage < len(CHANNELS):
                layer = base.conv2 if stage else base.conv1
                maps = layer(h.contiguous(memory_format=torch.channels_last))
                h = torch.relu(functional.max_pool2d(maps, 2))
            else:
                h = torch.relu(base.dense(h.flatten(1)))
        return h


def build(model: Model, *, seed: int) -> ConvolutionalNetwork:
    """Return the seeded random base; every image size that [model] allows fits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvolutionalNetwork(model.channels, model.image_size)


def _side(size: int, padding: int) -> int:
    """Return the side of a map after a 3x3 convolution and pooling by 2."""
    return (size + 2 * padding - 2) // 2
