"""What a guarded site asks of the site behind it: to be watched, and which records it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from anabranch.client.data.records import Records
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig

Watch = Callable[[str, int, int], None]  # (activity, step, of so many steps)


@runtime_checkable
class Watched(Protocol):
    """A site that calls `watch` at every step of its work."""

    watch: Watch | None


@runtime_checkable
class SaysZeros(Protocol):
    """A site that calls `on_zeros` when an update counts as zeros and nobody else is told."""

    on_zeros: Callable[[], None] | None


@runtime_checkable
class WithRecords(Protocol):
    """A site that has read its records."""

    def records(self, config: RunConfig) -> tuple[Records, Records]:
        """Return (training, held-out) records."""


def bytes_of(adapter: Adapter) -> int:
    """Return the bytes of an adapter's values."""
    return sum(array.nbytes for array in adapter.arrays.values())


def both(one: Watch | None, other: Watch) -> Watch:
    """Return a watch that tells one, then the other."""
    if one is None:
        return other

    def watch(activity: str, step: int, steps: int) -> None:
        one(activity, step, steps)
        other(activity, step, steps)

    return watch
