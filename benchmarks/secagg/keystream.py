"""The floor: what `cryptography` needs for the same bytes of the same cipher, and no more.

Zeros are encrypted under as many keys as a sum has masks, into one buffer that stays in the
cache. Nothing is added, derived or checked.
"""

from __future__ import annotations

import time

from anabranch.protocols.secagg.masks import CHUNK_BYTES, KEY_BYTES, Keystream, cipher


def seconds(keystream: Keystream, masks: int, size: int) -> float:
    """Return the CPU seconds of `masks` keystreams of `size` bytes each."""
    zeros, out = memoryview(bytes(CHUNK_BYTES)), bytearray(CHUNK_BYTES)
    whole, rest = divmod(size, CHUNK_BYTES)
    started = time.process_time()
    for number in range(masks):
        stream = cipher(keystream, number.to_bytes(KEY_BYTES)).encryptor()
        for _ in range(whole):
            stream.update_into(zeros, out)
        stream.update_into(zeros[:rest], out)
    return time.process_time() - started
