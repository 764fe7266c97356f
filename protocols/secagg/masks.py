"""Masks: a key of 32 bytes becomes a vector of Z_2^b that looks uniform to all who lack the key.

    PRG(key) = the cipher's keystream under `key`, read as little-endian words
    aes-256-ctr   AES-256 in counter mode, first counter block 16 zero bytes (NIST SP 800-38A)
    chacha20      ChaCha20, block counter 0, nonce of 12 zero bytes (RFC 8439)

    ring bits    16   24   32   64
    word bytes    2    4    4    8      (24 bits: the lower three bytes of a word count)

The nonce is constant: a key makes one mask only. Keys come from HKDF or from `secrets`, fresh in
every round. Which cipher a round uses is part of its agreed terms, since all members must expand
alike. Both are believed secure; `fastest` tells which one this machine runs faster.

The keystream is made in chunks that fit the processor's second-level cache, and each is added
before the next is made: a mask is never in memory as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256, ChaCha20
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from anabranch.protocols.secagg.ring import Ring, RingArray

Keystream = Literal["aes-256-ctr", "chacha20"]
KEYSTREAMS: tuple[Keystream, ...] = ("aes-256-ctr", "chacha20")
KEY_BYTES = 32
CHUNK_BYTES = 1 << 18  # 64 KiB chunks are some 8 % slower, 1 MiB chunks no faster
TRIAL_BYTES = 1 << 20
TRIALS = 5


def cipher(keystream: Keystream, key: bytes) -> Cipher[Any]:
    """Return the cipher whose encryption of zeros is PRG(key)."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"expected a mask key of {KEY_BYTES} bytes, got {len(key)}")
    match keystream:
        case "aes-256-ctr":
            return Cipher(AES256(key), CTR(bytes(16)))
        case "chacha20":
            return Cipher(ChaCha20(key, bytes(16)), mode=None)
        case _:
            raise ValueError(f"expected one of {', '.join(KEYSTREAMS)}, got {keystream!r}")


class Expander:
    """Adds and subtracts masks of `count` values; its buffers serve one mask after another.

    Not for two threads at a time. The buffer is cleared after each mask; the cipher's copy of
    the key lives until its object is collected.
    """

    def __init__(self, keystream: Keystream, ring: Ring, count: int) -> None:
        self._keystream, self._ring, self._count = keystream, ring, count
        itemsize = ring.dtype.itemsize
        size = min(CHUNK_BYTES, count * itemsize)
        self._zeros = memoryview(bytes(size))
        self._buffer = memoryview(bytearray(size))
        self._words: RingArray = np.frombuffer(self._buffer, ring.dtype)

    def add(self, key: bytes, total: RingArray) -> None:
        """Add PRG(key) to `total` (count,) in place, mod 2^bits."""
        self._apply(np.add, key, total)

    def subtract(self, key: bytes, total: RingArray) -> None:
        """Subtract PRG(key) from `total` (count,) in place, mod 2^bits: the inverse of `add`."""
        self._apply(np.subtract, key, total)

    def keystream(self, key: bytes) -> bytes:
        """Return the keystream of a whole mask."""
        return b"".join(chunk.tobytes() for _, chunk in self._chunks(key))

    def _apply(self, operation: Callable[..., NDArray[Any]], key: bytes, total: RingArray) -> None:
        self._ring.check(total)
        if len(total) != self._count:
            raise ValueError(f"expected a vector of {self._count} values, got {len(total)}")
        for start, words in self._chunks(key):
            part = total[start : start + len(words)]
            operation(part, words, out=part)

    def _chunks(self, key: bytes) -> Iterator[tuple[int, RingArray]]:
        """Yield (first index, words) for every chunk; the words are overwritten by the next."""
        stream = cipher(self._keystream, key).encryptor()
        full, itemsize = len(self._words), self._ring.dtype.itemsize
        for start in range(0, self._count, full or 1):
            count = min(full, self._count - start)
            stream.update_into(self._zeros[: count * itemsize], self._buffer)
            yield start, self._words[:count]
        self._words.fill(0)


@lru_cache(maxsize=1)
def fastest() -> Keystream:
    """Return the keystream that this machine expands faster, measured once per process."""
    ring = Ring(32)
    count = TRIAL_BYTES // ring.dtype.itemsize
    total = ring.zeros(count)
    best: dict[Keystream, float] = {}
    for keystream in KEYSTREAMS:
        expander = Expander(keystream, ring, count)
        times: list[float] = []
        for _ in range(TRIALS):
            before = time.perf_counter()
            expander.add(bytes(KEY_BYTES), total)
            times.append(time.perf_counter() - before)
        best[keystream] = min(times)
    return min(KEYSTREAMS, key=best.__getitem__)
