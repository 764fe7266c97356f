"""How the secure sums of a run went, as its events.jsonl tells it: one line for every attempt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

KIND = b'"kind":"secure_sum"'


class SumEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to sum a round. Unknown fields are let through."""

    round: int
    attempt: int = 1
    opened: bool
    reason: str = ""  # why it was not opened
    members: tuple[str, ...]  # ascending
    survivors: tuple[str, ...] = ()  # whose updates are in it; (): it was not opened
    dropped: Mapping[str, tuple[str, ...]] = {}  # stage -> who was lost there
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0  # of all stages

    @property
    def lost(self) -> dict[str, int]:
        """Return stage -> how many were lost there; stages at which nobody was are left out."""
        return lost(self.dropped)


def lost(dropped: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Return stage -> how many were lost there."""
    return {stage: len(names) for stage, names in dropped.items() if names}


def lost_words(found: Mapping[str, int]) -> str:
    """Return "2 at mask, 1 at share"; "" if nobody was lost."""
    return ", ".join(f"{count} at {stage}" for stage, count in found.items())


def sums_of(events: Path) -> tuple[SumEvent, ...]:
    """Return all attempts in order; () if there is no file, or no sum in it.

    A line that cannot be read is passed over: a crash can leave a torn one.
    """
    if not events.exists():
        return ()
    found = []
    with events.open("rb") as lines:
        for line in lines:
            if KIND in line:
                try:
                    found.append(msgspec.json.decode(line, type=SumEvent))
                except msgspec.DecodeError:
                    continue
    return tuple(found)
