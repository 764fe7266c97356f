"""Ours beside Flower's SecAgg+: the same members, the same vectors, taking turns in one run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from benchmarks.harness import Figure, ratio
from benchmarks.secagg.ours import Cost, Sum
from benchmarks.secagg.peer import SecAggPlus

FLOWER = f"flwr {metadata.version('flwr')}, SecAgg+ (legacy workflow)"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is compared; `shares` are Flower's: a client's neighbours and itself."""

    figure: str
    members: int
    values: int
    shares: int
    repeats: int = 1
    target: str | None = None

    @property
    def threshold(self) -> int:
        """Return the shares that give a key back: the same fraction as ours."""
        return 2 * self.shares // 3 + 1


@dataclass(frozen=True)
class Compared:
    """Costs per member, in turn, and whether the sums, theirs and ours, were exact."""

    case: Case
    ours: Sequence[Cost]
    theirs: Sequence[Cost]
    exact: Sequence[bool]


def compare(case: Case) -> Compared:
    """Run both, a message of one after a message of the other."""
    ours: list[Cost] = []
    theirs: list[Cost] = []
    right: list[bool] = []
    for _ in range(case.repeats):
        run = Sum(case.members, case.values)
        found = SecAggPlus(
            case.members, case.values, shares=case.shares, threshold=case.threshold
        ).run(run.turns())
        ours += run.costs
        theirs += found.costs
        right += [run.exact, found.exact]
    return Compared(case, ours, theirs, right)


def speedup(found: Compared) -> Figure:
    """Return how many times as long Flower's client computes: all stages, without training."""
    case = found.case
    own, other = [c.total for c in found.ours], [c.total for c in found.theirs]
    value, spread = ratio(other, own)
    graph = "every other as neighbour" if case.shares == case.members else "20 neighbours there"
    return Figure(
        figure=case.figure,
        value=value,
        unit="ratio",
        target=case.target,
        spread=spread,
        peer=FLOWER,
        note=f"{1e3 * statistics.median(other):.0f} / {1e3 * statistics.median(own):.0f} CPU ms, "
        f"{case.members} members, {case.values:,} values, {graph}; median of {len(own)} members",
    )


def size(found: Compared) -> Figure:
    """Return how many times as many bytes Flower's client sends and receives."""
    up, down, own_up, own_down = (
        statistics.median(getattr(cost, way) for cost in side)
        for side in (found.theirs, found.ours)
        for way in ("up", "down")
    )
    return Figure(
        figure="bytes_ratio_flower",
        value=(up + down) / (own_up + own_down),
        unit="ratio",
        target=">= 1",
        peer=FLOWER,
        note=f"up {up:,.0f} / {own_up:,.0f}, down {down:,.0f} / {own_down:,.0f} bytes, "
        f"{found.case.members} members, {found.case.values:,} values, without the model",
    )
