"""Weights as small integers: one scale per channel (8 bits), or one per block of 4-bit codes.

    channels     w ≈ s_c · q        q int8 in ±limit, s_c = max |w| of channel c / limit
    pairs        channels whose codes cannot overflow 16 bits in pairs of products
    blocks       w ≈ s_b · (q - 8)  q in 0 … 15, b: `block` consecutive values of a row

A block's scale is d / -8 with d its value of largest magnitude, sign kept, so that this value
takes the one code without a mirror image, or that scale shrunk: whichever of a few leaves the
smallest squared error. Two codes share a byte, the first in the low half, which is the order of
ONNX's uint4 tensors and of onnxruntime's MatMulNBits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
Bytes = NDArray[np.uint8]

ZERO = 8  # the 4-bit code of zero
SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.70)  # factors of a block's scale that are tried
LEAST = np.float32(np.finfo(np.float32).tiny)  # of a scale: with less, codes would be 0 / 0
ROWS = 4096  # handled at once, so that memory does not grow with the vocabulary


def quantize_channels(weights: Floats, axis: int, limit: int) -> tuple[Codes, Floats]:
    """Return (codes, scales) of a matrix; codes of its shape, one scale per index of `axis`.

    |w - s·q| ≤ s/2 everywhere. A channel of zeros, or of values too small for a normal float32
    as their scale, has scale 1 and codes 0.
    """
    return _channels(weights, np.abs(weights).max(axis=1 - axis), axis, limit)


def quantize_pairs(weights: Floats) -> tuple[Codes, Floats]:
    """Return (codes, scales) of a layer (inputs, outputs), one scale per output.

    x86 without VNNI multiplies bytes of x, 0 … 255, by codes, and adds the products of inputs
    2i and 2i + 1 in 16 bits (VPMADDUBSW). Those of one pair and one sign add to 128 at most here,
    so that sum stays within ±255 · 128 and is exact. Codes of 7 bits have the same bound, but
    large weights are seldom neighbours: most outputs get codes up to 100 and more.

    |w - s·q| ≤ s/2 everywhere. A channel of zeros is coded as by `quantize_channels`.
    """
    inputs, outputs = weights.shape
    padded = np.zeros((inputs + inputs % 2, outputs), np.float32)
    padded[:inputs] = weights
    pairs = padded.reshape(-1, 2, outputs)
    sums = [np.maximum(sign * pairs, 0).sum(axis=1).max(axis=0) for sign in (1, -1)]
    # Rounding adds half a code to each of the two: 127 + 1.
    return _channels(weights, np.maximum(*sums), 1, 127)


def _channels(weights: Floats, largest: Floats, axis: int, limit: int) -> tuple[Codes, Floats]:
    """Return codes and scales with `largest`, of a channel, at the code `limit`."""
    scales = largest / np.float32(limit)
    scales = np.where(scales >= LEAST, scales, 1).astype(np.float32)
    codes = np.rint(weights / np.expand_dims(scales, 1 - axis))
    return np.clip(codes, -limit, limit).astype(np.int8), scales


def dequantize_channels(codes: Codes, scales: Floats, axis: int) -> Floats:
    """Return s·q: what DequantizeLinear computes."""
    result: Floats = codes.astype(np.float32) * np.expand_dims(scales, 1 - axis)
    return result


def block_for(columns: int, largest: int) -> int:
    """Return the block for rows of `columns`: a power of two from 16 to `largest`."""
    return max(16, min(largest, 1 << (columns - 1).bit_length()))


def quantize_blocks(weights: Floats, block: int) -> tuple[Bytes, Floats]:
    """Return (packed, scales) of a matrix (n, k): uint8 (n, b·block/2), float32 (n, b).

    b = ⌈k / block⌉; what fills the last block up is coded as zero. A block of zeros, or of
    values too small for a normal float32 as their scale, has scale 1 and decodes to zeros.
    """
    parts = [_blocks(weights[i : i + ROWS], block) for i in range(0, len(weights), ROWS)]
    codes = np.concatenate([part[0] for part in parts])
    return pack(codes), np.concatenate([part[1] for part in parts])


def dequantize_blocks(packed: Bytes, scales: Floats, columns: int) -> Floats:
    """Return the matrix (n, columns) that `quantize_blocks` stands for."""
    rows, count = scales.shape
    codes = unpack(packed).reshape(rows, count, -1).astype(np.float32) - ZERO
    return (codes * scales[:, :, None]).reshape(rows, -1)[:, :columns]


def pack(codes: Bytes) -> Bytes:
    """Return pairs of 4-bit codes along the last axis, of even length, as bytes, low half first."""
    if codes.shape[-1] % 2 or (codes.size and codes.max() > 15):
        raise ValueError(f"expected an even number of codes 0 to 15, got shape {codes.shape}")
    low, high = codes[..., 0::2], np.left_shift(codes[..., 1::2], np.uint8(4))
    return np.bitwise_or(low, high)


def unpack(packed: Bytes) -> Bytes:
    """Undo `pack`: twice as many codes along the last axis."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def _blocks(weights: Floats, block: int) -> tuple[Bytes, Floats]:
    rows, columns = weights.shape
    count = -(-columns // block)
    padded = np.zeros((rows, count * block), np.float32)
    padded[:, :columns] = weights
    values = padded.reshape(rows, count, block)
    at = np.abs(values).argmax(axis=2)[:, :, None]
    largest = np.take_along_axis(values, at, axis=2)
    exact = largest / -np.float32(ZERO)
    large = np.abs(exact) * np.float32(SHRINK[-1]) >= LEAST
    full = np.where(large, exact, 1).astype(np.float32)
    best = np.full((rows, count, 1), np.inf, np.float32)
    scales, codes = full.copy(), np.full(values.shape, ZERO, np.uint8)
    for factor in SHRINK:
        scale = full * np.float32(factor)
        levels = np.clip(np.rint(values / scale), -ZERO, 15 - ZERO)
        off = (levels * scale - values) / full  # of order 1: its square stays a float32
        error = np.square(off).sum(axis=2, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, scale, scales)
        np.copyto(codes, (levels + ZERO).astype(np.uint8), where=better)
    return codes.reshape(rows, -1), scales[:, :, 0]
