"""What happened to every message to a device: one row each, as arrays.

Outcomes:

    merged       its delta is part of an adapter
    surplus      the round had its deltas before (over-selection)
    late         it would have been there after the deadline
    dropped      the device gave up
    offline      the device went offline before it was done
    memory       the device has less memory than training needs; it said so at once
    unmerged     it was there in time and counted nowhere: refused, rejected, or the run was over
    evaluated    it was asked for metrics, and sent them in time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KINDS: Final = ("train", "evaluate", "other")
OUTCOMES: Final = (
    "merged", "surplus", "late", "dropped", "offline", "memory", "unmerged", "evaluated",
)  # fmt: skip
FAILED: Final = frozenset({"late", "dropped", "offline", "memory"})  # known when it is sent


@dataclass(slots=True)
class Row:
    """One message; seconds and bytes are what was spent, also when it failed half-way."""

    client: int
    kind: int  # index into KINDS
    round: int
    sent_at: float  # virtual seconds
    download_s: float
    compute_s: float
    upload_s: float
    arrived_at: float  # virtual seconds; NaN: no answer ever came
    bytes_down: int
    bytes_up: int
    joules: float
    grams: float  # of CO₂-equivalents
    steps: int  # of the optimiser, that fit
    planned: int  # that were asked for
    outcome: int  # index into OUTCOMES
    merged_in: int = 0  # the round whose adapter it is part of; 0: none
    computed: bool = False  # the simulator trained it

    @property
    def seconds(self) -> float:
        """Return the device's seconds."""
        return self.download_s + self.compute_s + self.upload_s


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """One round of the coordinator, in virtual seconds."""

    round: int
    started_at: float  # when its cohort was asked
    merged_at: float
    ended_at: float  # after its evaluation
    coordinator: Mapping[str, float]  # metrics on the coordinator's own records, if any
    client: Mapping[str, float]  # on the clients'


@dataclass(frozen=True, eq=False)
class Log:
    """All rows of a run in the order of sending: one array per field of Row."""

    columns: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["client"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a column."""
        return self.columns[name]

    @property
    def seconds(self) -> Floats:
        """Return the device seconds of every row."""
        total: Floats = self["download_s"] + self["compute_s"] + self["upload_s"]
        return total

    def where(self, *, kind: str | None = None, outcome: str | None = None) -> NDArray[np.bool_]:
        """Return which rows are of a kind and an outcome."""
        chosen = np.ones(len(self), np.bool_)
        if kind is not None:
            chosen &= self["kind"] == KINDS.index(kind)
        if outcome is not None:
            chosen &= self["outcome"] == OUTCOMES.index(outcome)
        return chosen

    def table(self) -> dict[str, NDArray[Any]]:
        """Return the columns with words for kinds and outcomes, as CSV and Parquet take them."""
        named = {"kind": np.array(KINDS), "outcome": np.array(OUTCOMES)}
        return {
            name: named[name][column] if name in named else column
            for name, column in self.columns.items()
        }


def log_of(rows: list[Row]) -> Log:
    """Return the rows as arrays."""
    types = {"int": np.int64, "float": np.float64, "bool": np.bool_}
    return Log(
        {
            field.name: np.array([getattr(row, field.name) for row in rows], types[str(field.type)])
            for field in fields(Row)
        }
    )
