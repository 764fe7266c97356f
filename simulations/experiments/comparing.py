"""Runs laid beside each other: groups of repetitions, curves with their spread, tables.

A group is runs that differ in nothing but the seed (experiments/about.py). Over the n runs of a
group, at the same x:

    mean     Σ y_i / n
    spread   from the smallest to the largest y_i, drawn as a band
    ± std    √(Σ (y_i − mean)² / (n − 1)), of n >= 2 runs

Over time or bytes every run has its own x. There a run's value at x is that of its last evaluation
at or before x: what one would have in hand if one stopped then. A group's curve spans the x at
which all its runs have a value.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.experiments import rounds
from anabranch.simulations.experiments.about import About, read_about
from anabranch.simulations.experiments.rounds import Round, read_rounds
from anabranch.simulations.experiments.sweep import MANIFEST, read_manifest

SUMMARY: Final = ("accuracy", "macro_f1", "best_round")  # what is read of a summary.json
POINTS: Final = 60  # of a curve over time or bytes
Point = tuple[float, float, float, float]  # x, mean, smallest, largest


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    folder: Path
    about: About
    rounds: Sequence[Round]
    summary: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: Sequence[Run]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Groups that were measured alike."""

    groups: Sequence[Group]
    source: str | None  # what curves were measured on: "validation" or "clients"
    time: str | None  # "virtual" or "real"; None: some the one, some the other
    targets: tuple[float, ...]
    missing: Sequence[str]  # runs of sweeps that are not finished


@dataclass(frozen=True)
class Mean:
    """A number over the runs of a group."""

    mean: float
    std: float | None  # None: of one run
    count: int


def gather(paths: Sequence[Path], targets: Sequence[float] = ()) -> Compared:
    """Return the runs of run folders and sweep folders, in groups, in the order given.

    Raises ConfigError for a folder that is no finished run, and for runs that cannot be compared,
    with what differs: labels, test records, validation records, or what curves were measured on.
    """
    folders, missing = _folders(paths)
    runs = [_read(folder) for folder in dict.fromkeys(folders)]
    if not runs:
        raise ConfigError("there is no finished run to compare: name run folders, or sweeps")
    require_comparable(runs)
    known = sorted({one for run in runs for one in run.about.targets} | set(targets))
    times = {run.about.time for run in runs}
    return Compared(
        groups=_grouped(runs),
        source=rounds.source_of(runs[0].rounds),
        time=times.pop() if len(times) == 1 else None,
        targets=tuple(known),
        missing=missing,
    )


def require_comparable(runs: Sequence[Run]) -> None:
    """Raise ConfigError if two of the runs were not measured alike."""
    first = runs[0]
    for run in runs[1:]:
        for name, of in _MUST_AGREE.items():
            ours, theirs = of(first), of(run)
            if ours != theirs:
                raise ConfigError(
                    f"{run.folder} cannot be compared with {first.folder}: {name} differ "
                    f"({_short(theirs)}, there {_short(ours)})"
                )


_MUST_AGREE: Final[Mapping[str, Callable[[Run], Any]]] = {
    "labels": lambda run: run.about.labels,
    "test records": lambda run: run.about.test,
    "validation records": lambda run: run.about.validation,
    "records that the rounds were measured on": lambda run: rounds.source_of(run.rounds),
}


def curve(
    group: Group, metric: str, of: Callable[[Round], float | None] | None = None
) -> list[Point]:
    """Return a group's metric over x = of(round), or over rounds without `of`; [] if unknown."""
    tracks = [_track(run, metric, of) for run in group.runs]
    if not tracks or not all(tracks):
        return []
    if of is None:
        values = [dict(track) for track in tracks]
        shared = sorted(set.intersection(*(set(one) for one in values)))
        return [(x, *_spread([one[x] for one in values])) for x in shared]
    low, high = max(track[0][0] for track in tracks), min(track[-1][0] for track in tracks)
    if low > high:
        return []
    inner = {x for track in tracks for x, _ in track if low <= x <= high}
    grid = sorted(inner) if len(inner) <= POINTS else _grid(low, high)
    return [(x, *_spread([_held(track, x) for track in tracks])) for x in grid]


def mean_of(values: Sequence[float | int | None]) -> Mean | None:
    """Return the mean of what is known; None if nothing is."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return Mean(statistics.fmean(known), std, len(known))


def final(run: Run) -> dict[str, float | None]:
    """Return what a run ended with; accuracy is that on the test records, else the curve's best."""
    accuracy = next(iter(run.summary["accuracy"].values()), None)
    if accuracy is None:
        name = f"{rounds.source_of(run.rounds)}.accuracy"
        accuracy = max((r.metrics[name] for r in run.rounds if name in r.metrics), default=None)
    last = run.rounds[-1]
    return {
        "accuracy": accuracy,
        "macro_f1": next(iter(run.summary["macro_f1"].values()), None),
        "best_round": run.summary["best_round"],
        "seconds": last.seconds,
        "bytes": last.bytes,
    }


def long_rows(compared: Compared) -> list[dict[str, Any]]:
    """Return every metric of every round of every run: one row each."""
    return [
        {
            "group": group.name,
            "run": str(run.folder),
            "seed": run.about.seed,
            "round": one.round,
            "seconds": one.seconds,
            "bytes_up": one.bytes_up,
            "bytes_down": one.bytes_down,
            "asked": one.asked,
            "trained": one.trained,
            "failed": one.failed,
            "measured_on": name.partition(".")[0],
            "metric": name.partition(".")[2],
            "value": value,
        }
        for group in compared.groups
        for run in group.runs
        for one in run.rounds
        for name, value in sorted(one.metrics.items())
    ]


def _folders(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return run folders, sweeps opened; and the names of runs that are not finished."""
    folders: list[Path] = []
    missing: list[str] = []
    for path in paths:
        if not (path / MANIFEST).exists():
            folders.append(path.resolve())
            continue
        for entry in read_manifest(path).runs:
            folder = path / entry.folder
            if (folder / "summary.json").exists():
                folders.append(folder.resolve())
            else:
                missing.append(f"{folder}: {entry.error or entry.state}")
    return folders, missing


def _read(folder: Path) -> Run:
    about, path = read_about(folder), folder / "summary.json"
    try:
        summary = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError:
        raise ConfigError(f"{folder}: the run is not finished: there is no summary.json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    absent = [name for name in SUMMARY if name not in summary]
    if absent:
        raise ConfigError(
            f"{path}: there is no {absent[0]!r}; expected the summary of a run by `anabranch "
            "simulate`: run it again"
        )
    return Run(
        folder=folder, about=about, rounds=read_rounds(folder / rounds.NAME), summary=summary
    )


def _grouped(runs: Sequence[Run]) -> list[Group]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.about.group, []).append(run)
    names = [members[0].about.name for members in groups.values()]
    return [
        Group(
            name=name if names.count(name) == 1 else f"{name} ({members[0].folder.name})",
            runs=members,
        )
        for name, members in zip(names, groups.values(), strict=True)
    ]


def _track(
    run: Run, metric: str, of: Callable[[Round], float | None] | None
) -> list[tuple[float, float]]:
    """Return (x, value) of a run, x ascending; of two values at one x the later counts."""
    name = f"{rounds.source_of(run.rounds)}.{metric}"
    points: dict[float, float] = {}
    for one in run.rounds:
        x = one.round if of is None else of(one)
        if x is not None and name in one.metrics:
            points[float(x)] = one.metrics[name]
    return sorted(points.items())


def _held(track: Sequence[tuple[float, float]], x: float) -> float:
    return track[bisect.bisect_right(track, x, key=lambda point: point[0]) - 1][1]


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    low, high = min(values), max(values)
    return min(max(statistics.fmean(values), low), high), low, high


def _grid(low: float, high: float) -> list[float]:
    step = (high - low) / (POINTS - 1)
    return [*itertools.islice(itertools.count(low, step), POINTS - 1), high]


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
