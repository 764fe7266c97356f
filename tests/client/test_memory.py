"""Freed memory goes back to the system where the C library can."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from anabranch.client.memory import give_back


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_pages_freed_below_a_live_block_are_returned() -> None:
    give_back()  # does nothing where it cannot, and never fails
    if platform.libc_ver()[0] != "glibc":
        return
    blocks = [np.ones(12_000) for _ in range(2_000)]  # 96 KB each: below the mmap threshold
    keep = blocks[-1]
    blocks.clear()
    before = resident()

    give_back()

    assert resident() < before - 100e6
    assert keep.sum() == 12_000
