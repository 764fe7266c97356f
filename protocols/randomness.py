"""Random numbers that privacy rests on: a ChaCha20 key stream (RFC 8439).

A numpy generator can be predicted from what it gave, and torch's takes 32 bits of its seed and
ignores the rest, so noise drawn from it could be found by trying every seed. Here the key has
256 bits and comes from the operating system, once per fit: parties and rounds never share noise.

Gaussians come in pairs, by Box and Muller's transform of 12 bytes of the stream:

    u  53 bits, uniform on the multiples of 2⁻⁵³ in [0, 1)       radius  r = √(−2 ln(1 − u))
    k  32 bits, a signed integer                                 angle   a = π k / 2³¹
    r · cos a,  r · sin a

r is computed in float64, so the tail is the Gaussian's as far as 53 bits reach: 8.57 standard
deviations, beyond which a mass below 2⁻⁵³ is missing. Sine and cosine are computed, and
values returned, in float32, relative errors below 10⁻⁶: they are added to sums in float32.
That arithmetic is NOT hardened against attacks on its low bits (Mironov 2012; Jin et al. 2021,
arXiv:2112.05307), and nothing here takes the same time whatever is drawn.
"""

from __future__ import annotations

import secrets
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

KEY_BYTES = 32
TURN = np.float32(np.pi * 2.0**-31)


class Randomness:
    """A stream of numbers that nobody without the key can predict."""

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(ChaCha20(key, nonce=bytes(16)), mode=None).encryptor()

    @classmethod
    def fresh(cls) -> Self:
        """Return a stream with a new key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return `count` independent numbers, uniform on the multiples of 2⁻⁵³ in [0, 1)."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")
        return np.asarray((words >> np.uint64(11)) * 2.0**-53, np.float64)

    def sample(self, count: int, rate: float) -> list[int]:
        """Return a Poisson sample: each of 0 … count − 1 with chance `rate`, independently."""
        chosen: list[int] = np.flatnonzero(self.uniform(count) < rate).tolist()
        return chosen

    def normal(self, count: int) -> NDArray[np.float32]:
        """Return `count` independent standard Gaussians."""
        half = (count + 1) // 2
        radius = self.uniform(half)
        np.negative(radius, out=radius)  # 1 − u lies in (0, 1]: the logarithm is finite
        np.log1p(radius, out=radius)
        np.multiply(radius, -2.0, out=radius)
        length = np.sqrt(radius, out=radius).astype(np.float32)
        words = np.frombuffer(self._stream.update(bytes(4 * half)), "<i4")
        angle = words.astype(np.float32)
        np.multiply(angle, TURN, out=angle)
        pairs = np.empty((2, half), np.float32)
        np.multiply(length, np.cos(angle), out=pairs[0])
        np.multiply(length, np.sin(angle, out=angle), out=pairs[1])
        return pairs.reshape(-1)[:count]
