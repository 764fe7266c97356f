"""Give freed memory back to the system.

Batches of text differ in length, so training allocates and frees blocks of ever new sizes.
glibc keeps what is freed in the middle of its heaps: a process that trains round after round
grew by 1 GiB in 64 rounds of the demo while it held on to nothing. malloc_trim(3) returns
those pages; it takes milliseconds.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return free pages to the system where the C library can (glibc); elsewhere do nothing."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
    return trim
