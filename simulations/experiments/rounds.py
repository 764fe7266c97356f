"""rounds.csv: one line per round of a run, for tables and curves.

round                  1, 2, …
seconds                since the beginning, virtual or real (experiment.json: time)
bytes_up, bytes_down   since the beginning; empty where they would tell who took part
asked, trained, failed clients of the round
validation.accuracy …  metrics on the coordinator's records, where the round was evaluated
clients.accuracy …     the mean over the clients' held-out records, weighted by records
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anabranch.protocols.errors import DataError
from anabranch.server.result import RoundReport
from anabranch.storage.files import write_atomic

NAME = "rounds.csv"
SOURCES = ("validation", "clients")  # what metrics were measured on, the better one first
FIXED = ("round", "seconds", "bytes_up", "bytes_down", "asked", "trained", "failed")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round; sums go from the beginning of the run to its end."""

    round: int
    seconds: float
    bytes_up: int | None
    bytes_down: int | None
    asked: int
    trained: int
    failed: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # "validation.accuracy" -> value

    @property
    def bytes(self) -> int | None:
        """Return all bytes moved so far."""
        if self.bytes_up is None or self.bytes_down is None:
            return None
        return self.bytes_up + self.bytes_down


def rounds_of(history: Sequence[RoundReport], *, hidden: bool) -> list[Round]:
    """Return the rounds of a result; `hidden`: nothing that tells who took part, or how many."""
    seconds = itertools.accumulate(report.seconds for report in history)
    up = itertools.accumulate(report.bytes_up for report in history)
    down = itertools.accumulate(report.bytes_down for report in history)
    return [
        Round(
            round=report.round,
            seconds=at,
            bytes_up=None if hidden else sent,
            bytes_down=None if hidden else received,
            asked=len(report.asked),
            trained=len(report.trained),
            failed=len(report.failed),
            metrics={
                f"{source}.{name}": value
                for source, metrics in zip(
                    SOURCES, (report.coordinator, report.client), strict=True
                )
                for name, value in metrics.items()
                if math.isfinite(value)
            },
        )
        for report, at, sent, received in zip(history, seconds, up, down, strict=True)
    ]


def source_of(rounds: Sequence[Round]) -> str | None:
    """Return what the run's metrics were measured on, "validation" before "clients"; None: no."""
    found = {name.partition(".")[0] for one in rounds for name in one.metrics}
    return next((source for source in SOURCES if source in found), None)


def first_at(rounds: Sequence[Round], accuracy: float) -> Round | None:
    """Return the first round whose adapter is at least so accurate; None: it never was."""
    name = f"{source_of(rounds)}.accuracy"
    return next((one for one in rounds if one.metrics.get(name, -1.0) >= accuracy), None)


def time_to_accuracy(
    rounds: Sequence[Round], targets: Sequence[float]
) -> list[dict[str, float | int | None]]:
    """Return for each target the round, seconds and bytes until it was reached; None: never."""
    found = [(target, first_at(rounds, target)) for target in targets]
    return [
        {
            "accuracy": target,
            "round": None if at is None else at.round,
            "seconds": None if at is None else at.seconds,
            "bytes": None if at is None else at.bytes,
        }
        for target, at in found
    ]


def write_rounds(path: Path, rounds: Sequence[Round]) -> None:
    """Write the file; numbers read back equal."""
    names = sorted({name for one in rounds for name in one.metrics}, key=_order)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIXED, *names])
    for one in rounds:
        fixed = [getattr(one, name) for name in FIXED]
        cells = [*fixed, *(one.metrics.get(name) for name in names)]
        writer.writerow(["" if cell is None else repr(cell) for cell in cells])
    write_atomic(path, text.getvalue().encode())


def read_rounds(path: Path) -> list[Round]:
    """Return the rounds in a file; raise DataError if it is not there or not one of these."""
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
        return [_round(line) for line in lines]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a finished run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error!r}; expected the rounds of a run") from None


def _round(line: Mapping[str, str]) -> Round:
    def whole(name: str) -> int | None:
        return int(line[name]) if line[name] else None

    return Round(
        round=int(line["round"]),
        seconds=float(line["seconds"]),
        bytes_up=whole("bytes_up"),
        bytes_down=whole("bytes_down"),
        asked=int(line["asked"]),
        trained=int(line["trained"]),
        failed=int(line["failed"]),
        metrics={n: float(text) for n, text in line.items() if n not in FIXED and text},
    )


def _order(name: str) -> tuple[int, str]:
    source, _, metric = name.partition(".")
    return SOURCES.index(source), metric
