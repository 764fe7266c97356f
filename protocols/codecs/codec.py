"""What a codec is: one tensor's values as bytes, and back.

Notation: x is the flattened tensor (float32), Q(x) what the decoder returns, n = len(x).

    codec    bytes for n values            Q(x)
    fp32     4n                            x
    fp16     2n                            nearest binary16; biased by at most half an ulp
    int8     n + 2⌈n/64⌉                   unbiased: E[Q(x)] = x; |Q(x) − x| < scale of the block
    int4     ⌈n/2⌉ + 2⌈n/64⌉               unbiased: as int8
    top-k    8k, k = ⌈keep · n⌉            the k largest as they are, 0 elsewhere

The number of bytes follows from n alone, and a decoder accepts only what its encoder writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import MalformedMessage

CodecName = Literal["fp32", "fp16", "int8", "int4", "top-k"]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Codec:
    """A pair of pure functions and the size of what they exchange.

    `encode` takes finite float32 values of one dimension, at least one; ValueError for others.
    It raises ConfigError for a value that the codec cannot hold. `rng` decides the rounding of
    int8 and int4, which need it; the others leave it alone.
    `decode` returns a new array of `count` values, or raises MalformedMessage saying which rule
    the bytes break.
    """

    name: CodecName
    encode: Callable[[Values, np.random.Generator | None], bytes]
    decode: Callable[[bytes | memoryview, int], Values]
    size: Callable[[int], int]  # number of values -> number of bytes


def require_values(values: Values) -> None:
    """Raise ValueError unless `values` is one row of finite float32."""
    if values.dtype != np.float32 or values.ndim != 1 or not len(values):
        raise ValueError(f"expected one row of float32, got {values.dtype} {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values: expected finite ones, got NaN or infinity")


def require_size(data: bytes | memoryview, expected: int) -> None:
    """Raise MalformedMessage unless `data` has the expected number of bytes."""
    if len(data) != expected:
        raise MalformedMessage(f"expected {expected} bytes, got {len(data)}")


def require_finite(values: NDArray[np.floating]) -> None:
    """Raise MalformedMessage if a decoded value is NaN or infinite."""
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(values.size - finite.sum())
        raise MalformedMessage(f"{bad} of {values.size} values are NaN or infinite")
