"""Random numbers that privacy rests on: a ChaCha20 key stream (RFC 8439).

torch's CPU generator takes 32 bits of its seed and ignores the rest, so noise drawn from it
could be found by trying every seed. Here the key has 256 bits and comes from the operating
system, once per fit: sites and rounds never share noise.

The stream is turned into 53-bit uniforms and, by Box and Muller's transform, into float64
Gaussians, cut off by that at 8.6 standard deviations (a mass below 1e-16). Noise is added in
floating point, which is NOT hardened against attacks on its low bits (Mironov 2012; Jin et
al. 2021, arXiv:2112.05307).
"""

from __future__ import annotations

import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

KEY_BYTES = 32


class Randomness:
    """A stream of numbers that nobody without the key can predict."""

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(ChaCha20(key, nonce=bytes(16)), mode=None).encryptor()

    @classmethod
    def fresh(cls) -> Randomness:
        """Return a stream with a new key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def reproducible(cls, generator: torch.Generator) -> Randomness:
        """Return a stream decided by `generator`: for tests, whoever knows the seed knows all."""
        return cls(bytes(torch.randint(256, (KEY_BYTES,), generator=generator).tolist()))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return `count` independent numbers, uniform on the multiples of 2⁻⁵³ in [0, 1)."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")
        return np.asarray((words >> np.uint64(11)) * 2.0**-53, np.float64)

    def sample(self, count: int, rate: float) -> list[int]:
        """Return a Poisson sample: each of 0 … count − 1 with chance `rate`, independently."""
        return [int(i) for i in np.flatnonzero(self.uniform(count) < rate)]

    def normal(self, count: int) -> NDArray[np.float64]:
        """Return `count` independent standard Gaussians."""
        half = (count + 1) // 2
        radius = np.sqrt(-2 * np.log1p(-self.uniform(half)))  # 1 − u lies in (0, 1]
        angle = 2 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
