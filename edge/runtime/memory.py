"""How many records one call may take: known before anything is allocated.

The manifest holds what a call with B records of T tokens needs, measured, and what the process
may use in all (bundle_manifest.py). A batch is cut, in its order, into micro-batches that fit;
a record that does not fit by itself is refused.

How a batch is cut depends on the limits and not on what is free at the moment, so that the same
training gives the same bits; where less is free than is needed, DeviceError says how much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime.bundle_manifest import Limits, Manifest, Memory
from anabranch.edge.runtime.engine import Feeds
from anabranch.protocols.errors import DeviceError

TEXTS = "text-classification"


def narrowed(limits: Limits, memory_bytes: int | None) -> Limits:
    """Return limits with at most `memory_bytes` of memory."""
    if memory_bytes is None or memory_bytes >= limits.memory_bytes:
        return limits
    return Limits(
        memory_bytes=memory_bytes, max_records=limits.max_records, max_tokens=limits.max_tokens
    )


def micro_batches(lengths: Sequence[int], memory: Memory, limits: Limits) -> list[slice]:
    """Return consecutive slices of records, each as long as memory and limits allow.

    `lengths` are tokens per record; a micro-batch of B records costs as much as B records of its
    longest. Raises DeviceError if a record is too long, or does not fit by itself.
    """
    slices, start, longest = [], 0, 0
    for at, tokens in enumerate(lengths):
        if tokens > limits.max_tokens:
            raise DeviceError(
                f"a record has {tokens} tokens, this bundle allows {limits.max_tokens}"
            )
        needed = memory.needed(1, tokens)
        if needed > limits.memory_bytes:
            raise DeviceError(
                f"one record of {tokens} tokens needs {_mb(needed)} of memory, the limit is "
                f"{_mb(limits.memory_bytes)}: take a smaller precision or allow more memory"
            )
        longest = max(longest, tokens)
        count = at + 1 - start
        fits = memory.needed(count, longest) <= limits.memory_bytes
        if at > start and not (fits and count <= limits.max_records):
            slices.append(slice(start, at))
            start, longest = at, tokens
    if len(lengths):
        slices.append(slice(start, len(lengths)))
    return slices


def cut(
    manifest: Manifest, memory: Memory, limits: Limits, feeds: Feeds
) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
    """Yield (rows, their inputs) of every micro-batch, after checking that all of them fit.

    Raises DeviceError before the first one if one does not fit, or if less memory is free than
    the largest needs.
    """
    if set(feeds) != set(manifest.inputs):
        expected = ", ".join(manifest.inputs)
        raise ValueError(f"expected the model's inputs {expected}, got {', '.join(feeds)}")
    count = records_of(feeds)
    lengths = np.ones(count, np.int64)
    if manifest.task == TEXTS:
        lengths = _real_tokens(feeds[manifest.inputs[1]])
    parts = micro_batches(lengths.tolist(), memory, limits)
    needs = [memory.needed(p.stop - p.start, int(lengths[p].max())) for p in parts]
    require_free(max(needs, default=0))
    for rows in parts:
        if manifest.task == TEXTS:
            width = int(lengths[rows].max())
            yield rows, {n: np.ascontiguousarray(a[rows, :width]) for n, a in feeds.items()}
        else:
            yield rows, {n: np.ascontiguousarray(a[rows]) for n, a in feeds.items()}


def require_free(needed: int) -> None:
    """Raise DeviceError unless the process may grow to `needed` bytes with what is free now.

    Without psutil nothing is known about the device, and nothing is checked.
    """
    free = free_memory()
    if free is not None and needed > free:
        raise DeviceError(
            f"{_mb(needed)} of memory are needed, {_mb(free)} are free: close other programs, or "
            "give a lower limit of memory so that smaller micro-batches are taken"
        )


def free_memory() -> int | None:
    """Return the bytes that this process can have in all: its own, and what is free."""
    with contextlib.suppress(ImportError):
        import psutil  # type: ignore[import-untyped,unused-ignore]

        own: int = psutil.Process().memory_info().rss
        return own + int(psutil.virtual_memory().available)
    return None


def records_of(feeds: Feeds) -> int:
    """Return the number of records B in a model's inputs."""
    return len(next(iter(feeds.values())))


def _real_tokens(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Return the columns up to the last real token of every row, at least 1."""
    real = np.asarray(mask) != 0
    width = real.shape[1]
    last = width - np.argmax(real[:, ::-1], axis=1)
    return np.where(real.any(axis=1), last, 1).astype(np.int64)


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
