"""int8 and int4: blocks of 64 values, one scale each, stochastic rounding.

Notation: L levels (127 for int8, 7 for int4), x the values of one block, s its scale.

    s = smallest bfloat16 with L · s ≥ max |x|;  0 for a block of zeros
    c = ⌊x/s⌋ + [u < x/s − ⌊x/s⌋],  u uniform in [0, 1)       −L ≤ c ≤ L
    Q(x) = c · s                                             exact in float32

E[Q(x)] = x (up to the float32 rounding of x/s, L · 2⁻²⁴ of a scale) and |Q(x) − x| < s: QSGD
(Alistarh et al., 2017, arXiv:1610.02132) with the largest value of a block as its
norm. A value that lies on the grid is not changed.

    bytes: ⌈n/64⌉ scales, u16 little-endian; then the codes
    int8   one byte per code, two's complement
    int4   two codes per byte, the first in the low four bits; the last byte of an odd n has
           zeros above

A scale is the upper half of a binary32 (bfloat16), rounded up so that no code is cut off. A
binary16 has as many bits, but none for scales below 6e-8, and deltas of LoRA factors are 1e-6
to 1e-9: every one of them would become 0. The last block may be shorter than 64.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.codecs.codec import Codec, CodecName, Values, require_size, require_values
from anabranch.protocols.errors import ConfigError, MalformedMessage

BLOCK = 64
INT8_LEVELS = 127
INT4_LEVELS = 7
MAX_SCALE = 0x7B80  # bits of 2¹²⁰: L times it is below the largest float32

T = TypeVar("T", bound=np.generic)
Codes = NDArray[np.int8]
Scales = NDArray[np.uint16]


def int8() -> Codec:
    """Return the codec of one byte per value: 3.9 times smaller than fp32."""

    def encode(values: Values, rng: np.random.Generator | None) -> bytes:
        scales, codes = _quantise("int8", values, INT8_LEVELS, rng)
        return scales.astype("<u2", copy=False).tobytes() + codes.tobytes()

    def decode(data: bytes | memoryview, count: int) -> Values:
        require_size(data, size(count))
        blocks = _blocks(count)
        scales = np.frombuffer(data, "<u2", blocks).astype(np.uint16)
        codes = np.frombuffer(data, np.int8, count, 2 * blocks)
        return _values(scales, codes, INT8_LEVELS)

    def size(count: int) -> int:
        return 2 * _blocks(count) + count

    return Codec("int8", encode, decode, size)


def int4() -> Codec:
    """Return the codec of half a byte per value: 7.5 times smaller than fp32."""

    def encode(values: Values, rng: np.random.Generator | None) -> bytes:
        scales, codes = _quantise("int4", values, INT4_LEVELS, rng)
        nibbles = _padded(codes, 2).view(np.uint8) & 0x0F
        packed = nibbles[0::2] | (nibbles[1::2] << 4)
        return scales.astype("<u2", copy=False).tobytes() + packed.tobytes()

    def decode(data: bytes | memoryview, count: int) -> Values:
        require_size(data, size(count))
        blocks = _blocks(count)
        scales = np.frombuffer(data, "<u2", blocks).astype(np.uint16)
        packed = np.frombuffer(data, np.uint8, offset=2 * blocks)
        if count % 2 and packed[-1] >> 4:
            raise MalformedMessage("the four bits after the last code: expected 0")
        codes = np.empty(2 * len(packed), np.int8)
        codes[0::2] = (packed << 4).view(np.int8) >> 4  # arithmetic shift: keeps the sign
        codes[1::2] = packed.view(np.int8) >> 4
        return _values(scales, codes[:count], INT4_LEVELS)

    def size(count: int) -> int:
        return 2 * _blocks(count) + (count + 1) // 2

    return Codec("int4", encode, decode, size)


def _quantise(
    name: CodecName, values: Values, levels: int, rng: np.random.Generator | None
) -> tuple[Scales, Codes]:
    """Return the scale of every block and the code of every value."""
    require_values(values)
    if rng is None:
        raise ValueError(f"{name} rounds at random: give it an rng")
    blocks = _padded(values, BLOCK).reshape(-1, BLOCK)
    largest = np.maximum(np.abs(blocks.max(axis=1)), np.abs(blocks.min(axis=1)))
    scales = _scales(largest, levels)
    if (scales > MAX_SCALE).any():
        raise ConfigError(
            f'uplink.codec = "{name}" holds values up to {levels * 2.0**120:g}, got '
            f'{float(largest.max()):g}: take "fp32", and a smaller learning rate'
        )
    steps = _as_float(scales)
    steps[scales == 0] = 1.0  # 0/1 for a block of zeros
    ratio = blocks / steps[:, None]
    codes = np.floor(ratio)
    ratio -= codes
    codes += rng.random(ratio.shape, np.float32) < ratio
    return scales, codes.astype(np.int8).reshape(-1)[: len(values)]


def _values(scales: Scales, codes: Codes, levels: int) -> Values:
    """Return scale times code, or raise MalformedMessage for what `_quantise` never returns."""
    if (scales > MAX_SCALE).any():
        raise MalformedMessage("a scale is negative, NaN, infinite or above 2^120")
    blocks = _padded(codes, BLOCK).reshape(-1, BLOCK)
    lowest, highest = blocks.min(axis=1), blocks.max(axis=1)
    if (lowest < -levels).any() or (highest > levels).any():
        raise MalformedMessage(f"a code is below -{levels} or above {levels}")
    reached = np.maximum(highest, -lowest)
    if (reached[scales == 0] != 0).any():
        raise MalformedMessage("a block of scale 0 has a code that is not 0")
    if (reached < _least(scales, levels)).any():
        raise MalformedMessage("the scale of a block is larger than its codes need")
    values = blocks * _as_float(scales)[:, None]
    return values.reshape(-1)[: len(codes)]


def _scales(largest: Values, levels: int) -> Scales:
    """Return the bits of the smallest bfloat16 s with levels · s >= largest."""
    exact = largest.astype(np.float64)
    bits = ((exact / levels).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits += _as_float(bits) * np.float64(levels) < exact  # the division may have rounded down
    return bits


def _least(scales: Scales, levels: int) -> NDArray[np.float64]:
    """Return the least that the largest |code| of a block with this scale can be.

    The next smaller scale p was too small: max |x| > L · p, so ⌊max |x| / s⌋ ≥ ⌊L · p / s⌋.
    """
    least = np.zeros(len(scales))
    held = scales > 0
    one = _as_float(scales[held]).astype(np.float64)
    smaller = _as_float(scales[held] - np.uint16(1)).astype(np.float64)
    least[held] = np.floor(levels * smaller / one)
    return least


def _as_float(scales: Scales) -> Values:
    return (scales.astype(np.uint32) << 16).view(np.float32)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _padded(array: NDArray[T], multiple: int) -> NDArray[T]:
    """Return the row with zeros appended until its length is a multiple of `multiple`."""
    missing = -len(array) % multiple
    return np.concatenate([array, np.zeros(missing, array.dtype)]) if missing else array
