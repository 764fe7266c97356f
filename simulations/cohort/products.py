"""Products with frozen weights: in float32, or with bfloat16 inside.

    forward    y = x Wᵀ + b            backward    dx = e W

For bfloat16, x, e and W are rounded to it (8 bits of mantissa); the product adds up in float32
and comes back as float32. precision.py says when that is worth it, and what it costs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Products(Protocol):
    """How rows are multiplied with a frozen weight."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b for x (R, in), W (out, in), b (out,)."""

    def backward(self, e: Tensor, weight: Tensor) -> Tensor:
        """Return e W for e (R, out)."""


class Float32:
    """As torch computes it."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b."""
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())

    def backward(self, e: Tensor, weight: Tensor) -> Tensor:
        """Return e W."""
        return torch.mm(e, weight)


class Bfloat16:
    """Rounded for the product. Keeps a copy of every weight as long as the weight is there."""

    def __init__(self) -> None:
        self._copies = WeakTensorKeyDictionary()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b, float32; b is added in float32."""
        y = torch.mm(x.bfloat16(), self._copy(weight).t()).float()
        return y if bias is None else y.add_(bias)

    def backward(self, e: Tensor, weight: Tensor) -> Tensor:
        """Return e W, float32."""
        return torch.mm(e.bfloat16(), self._copy(weight)).float()

    def _copy(self, weight: Tensor) -> Tensor:
        copy: Tensor | None = self._copies.get(weight)
        if copy is None:
            copy = self._copies[weight] = weight.detach().bfloat16()
        return copy


FLOAT32 = Float32()
