"""top-k: the k = ⌈keep · n⌉ values of largest magnitude, and where they are.

    bytes: k indices, u32 little-endian, ascending; then k values, float32 little-endian

keep · n is rounded to binary64 before it is rounded up. Of equal magnitudes the lower index is
taken. What is not sent is 0 at the receiver: biased, so [uplink] error_feedback = true belongs
to it (Stich et al., 2018, arXiv:1809.07599; for LoRA: FLASC, arXiv:2406.05233).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.codecs.codec import (
    Codec,
    Values,
    require_finite,
    require_size,
    require_values,
)
from anabranch.protocols.errors import MalformedMessage

MAX_COUNT = 2**32  # an index has four bytes


def top_k(keep: float) -> Codec:
    """Return the codec that sends the share `keep` of the values, 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share above 0, at most 1, got {keep}")

    def held(count: int) -> int:
        return math.ceil(keep * count)

    def encode(values: Values, rng: np.random.Generator | None) -> bytes:
        require_values(values)
        if len(values) > MAX_COUNT:
            raise ValueError(f"expected at most {MAX_COUNT} values, got {len(values)}")
        chosen = _largest(np.abs(values), held(len(values)))
        sent = values[chosen].astype("<f4", copy=False)
        return bytes(chosen.astype("<u4").tobytes() + sent.tobytes())

    def decode(data: bytes | memoryview, count: int) -> Values:
        require_size(data, size(count))
        indices = np.frombuffer(data, "<u4", held(count)).astype(np.int64)
        sent = np.frombuffer(data, "<f4", held(count), 4 * held(count))
        if (np.diff(indices) <= 0).any() or indices[-1] >= count:
            raise MalformedMessage(f"indices: expected ascending ones below {count}")
        require_finite(sent)
        values = np.zeros(count, np.float32)
        values[indices] = sent
        # A zero is sent only when all that is left is zero, and then the first ones are.
        zeros = indices[sent == 0]
        if (zeros != np.flatnonzero(values == 0)[: len(zeros)]).any():
            raise MalformedMessage("a zero is sent that is not among the first")
        return values

    def size(count: int) -> int:
        return 8 * held(count)

    return Codec("top-k", encode, decode, size)


def _largest(magnitudes: Values, k: int) -> NDArray[np.intp]:
    """Return the indices of the k largest, ascending; of equal ones the first."""
    least = np.partition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k]
    chosen = magnitudes > least
    equal = np.flatnonzero(magnitudes == least)
    chosen[equal[: k - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)
