"""Kills in a row (tests/faults/killing.py), and a soak: long, with a kill every few rounds.

recovery    seconds from a kill (of what a supervisor starts again) or from the restart (of
            what systemd would) until the run has merged a further round
soak        memory (RSS) and open files of all processes of coordinator and sites, after every
            merge; growth = median over the last quarter of the rounds / over the second
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.network.federation import require_finished
from benchmarks.network.tasks import tiny
from tests.faults.killing import OVER, Kill, Storm, accounts, storm, strike, undisturbed
from tests.faults.rig import MODULES, Rig

MERGE_S, END_S = 120.0, 300.0
SHORTEST, LONGEST = 3, 6  # rounds between two kills of the soak
SOAK = [
    Kill(who) for who in ("run", "superlink", "door", "page", "supervisor", "coordinator", "site")
]
PAGE = 4096  # bytes


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What all processes hold together at one time, and what lies on disk."""

    round: int
    memory: int  # bytes
    files: int
    disk: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What came of a soak."""

    storm: Storm
    samples: Sequence[Sample]
    rounds: int

    def growth(self, of: Callable[[Sample], int]) -> float:
        """Return the median over the last quarter of the rounds / that over the second."""
        quarters: dict[int, list[int]] = {}
        for sample in self.samples:
            quarters.setdefault(4 * (sample.round - 1) // self.rounds, []).append(of(sample))
        return statistics.median(quarters[3]) / statistics.median(quarters[1])


def storms(
    rig: Rig, records: Mapping[str, Path], folder: Path, kills: int, rounds: int, seed: int
) -> list[Storm]:
    """Return what came of as many runs as it takes for so many kills."""
    toml = tiny(rounds, "storm")
    expected = undisturbed(folder, toml, records)
    found: list[Storm] = []
    while (left := kills - sum(one.kills for one in found)) > 0:
        found.append(storm(rig, rig.begin(toml), left, seed + len(found), expected))
    return found


def soak(rig: Rig, records: Mapping[str, Path], folder: Path, rounds: int, seed: int) -> Soak:
    """Return what came of one run with random kills every few rounds."""
    toml = tiny(rounds, "soak")
    expected = undisturbed(folder, toml, records)
    rng, run = random.Random(seed), rig.begin(toml)
    recoveries: list[float] = []
    samples: list[Sample] = []
    due = rng.randint(SHORTEST, LONGEST)
    while rig.run(run).state not in OVER:
        merged = rig.merged(run)
        if (not samples or merged > samples[-1].round) and (found := sample(rig, merged)):
            samples.append(found)
        if due <= merged < rounds:
            taken = strike(rig, run, rng.choice(SOAK), rng)
            recoveries += [] if taken is None else [taken]
            due = rig.merged(run) + rng.randint(SHORTEST, LONGEST)
        rig.until(lambda m=merged: rig.merged(run) > m or rig.run(run).state in OVER, MERGE_S)  # type: ignore[misc]
    require_finished(rig, run, END_S)
    lost, doubled = accounts(rig, run)
    outcome = Storm(
        kills=len(recoveries),
        recoveries_s=tuple(recoveries),
        lost=lost,
        doubled=doubled,
        equal=rig.adapter(run) == expected,
    )
    return Soak(storm=outcome, samples=samples, rounds=rounds)


def sample(rig: Rig, merged: int) -> Sample | None:
    """Return what is held now; None before the first merge, or while a process is missing."""
    pids = [rig.pid(child) for child in MODULES]
    pids += [
        one.process.pid if one.process and one.alive else None
        for one in (rig.coordinator, *rig.agents.values())
    ]
    if merged == 0 or None in pids:
        return None
    try:
        held = [_held(pid) for pid in pids if pid is not None]
    except OSError:
        return None  # one has just ended
    return Sample(
        round=merged,
        memory=sum(memory for memory, _ in held),
        files=sum(files for _, files in held),
        disk=sum(disk(folder) for folder in (rig.federation, *map(rig.site, rig.sites))),
    )


def _held(pid: int) -> tuple[int, int]:
    """Return the resident memory in bytes and the open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * PAGE, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def disk(folder: Path) -> int:
    """Return the bytes of all files in a folder; one that is just being replaced may be missed."""
    size = 0
    for file in folder.rglob("*"):
        try:
            size += 0 if file.is_dir() else file.lstat().st_size
        except FileNotFoundError:
            continue
    return size
