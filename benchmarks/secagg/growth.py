"""How a member's cost grows with the number of members, in sums that really run.

Vectors of 100,000 values. 10 % of the members, drawn with a fixed seed, are each lost at a stage
drawn likewise; costs are medians over those who stay to the end. Up to graph.COMPLETE_UP_TO members
everybody is everybody's neighbour, above it k = O(log n) are.

In sums of more than TIMED members, as many are timed, evenly spread.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.protocols.secagg.graph import shape_of
from anabranch.protocols.secagg.messages import STAGES, Stage
from anabranch.protocols.secagg.plan import length
from anabranch.server.charts import Line, line_chart
from anabranch.server.svg import BYTES, Markup, Unit, stacked
from benchmarks.harness import Figure
from benchmarks.secagg.ours import TABLE, Sum

VALUES = 100_000
SIZES = (16, 32, 64, 128, 256, 512, 1000)
DEGREES = (*SIZES, 2000, 4000, 10_000)  # computed, not run
LOST = 0.1
SEED = 0
TIMED = 128
PANEL = 280.0  # CSS pixels: the height of a chart of up to 11 lines


@dataclass(frozen=True)
class Point:
    """Medians of those who stayed in one sum."""

    members: int
    neighbours: int
    lost: int
    seconds: dict[str, float]  # CPU, per stage
    up: float  # bytes
    down: float
    vector: int  # bytes of the masked vector, in `up`
    exact: bool

    @property
    def total(self) -> float:
        """Return the CPU seconds of all stages."""
        return sum(self.seconds.values())


def measure(members: int, values: int = VALUES) -> Point:
    """Run one sum with its dropouts."""
    drops = dropouts(members)
    timed = range(0, members, -(-members // TIMED))
    run = Sum(members, values, drops, timed)
    run.run()
    costs = [run.costs[index] for index in timed]
    stayed = [cost for cost in costs if len(cost.seconds) == len(STAGES)]
    return Point(
        members=members,
        neighbours=neighbours(members),
        lost=sum(map(len, drops.values())),
        seconds={
            stage: statistics.median(cost.seconds[stage] for cost in stayed) for stage in STAGES
        },
        up=statistics.median(cost.up for cost in stayed),
        down=statistics.median(cost.down for cost in stayed),
        vector=length(run.terms) * run.ring.width,
        exact=run.exact,
    )


def dropouts(members: int) -> dict[Stage, list[int]]:
    """Return who is lost at which stage."""
    draw = random.Random(SEED)
    lost: dict[Stage, list[int]] = {stage: [] for stage in STAGES}
    for member in draw.sample(range(members), int(LOST * members)):
        lost[draw.choice(STAGES)].append(member)
    return lost


def neighbours(members: int) -> int:
    """Return how many others a member shares a mask with when nobody is lost."""
    return shape_of(members, TABLE.threshold, TABLE.colluding).holders - 1


def figures(points: Sequence[Point]) -> list[Figure]:
    """Return what the largest sum cost, and that it came out."""
    last = points[-1]
    first = next(point for point in points if 10 * point.members >= last.members)
    said = f"{last.members / first.members:.0f} times the members"
    return [
        Figure(
            figure="growth.exact",
            value=sum(point.exact for point in points) / len(points),
            unit="share",
            target=">= 1",
            note=f"sums of {', '.join(str(p.members) for p in points)} members, "
            f"{VALUES:,} values, {last.lost} of {last.members} lost at random stages",
        ),
        Figure(
            figure="growth.client_seconds_largest",
            value=last.total,
            unit="s",
            note=f"CPU, {last.members} members, {last.neighbours} neighbours each: "
            + ", ".join(f"{stage} {1e3 * s:.1f} ms" for stage, s in last.seconds.items()),
        ),
        Figure(
            figure="growth.client_seconds_ratio",
            value=last.total / first.total,
            unit="ratio",
            note=f"{last.members} members / {first.members}: {said}, "
            f"{last.neighbours / first.neighbours:.1f} times the neighbours, "
            f'{last.seconds["mask"] / first.seconds["mask"]:.1f} times the stage "mask"',
        ),
    ]


def table(points: Sequence[Point]) -> str:
    """Return a row per number of members as Markdown."""
    head = [
        "| members | neighbours | lost | CPU ms | share | mask | reveal "
        "| kB up beside the vector | kB down |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rows = [
        f"| {p.members} | {p.neighbours} | {p.lost} | {1e3 * p.total:.1f} "
        + "".join(f"| {1e3 * p.seconds[stage]:.1f} " for stage in ("share", "mask", "reveal"))
        + f"| {(p.up - p.vector) / 1e3:.1f} | {p.down / 1e3:.1f} |"
        for p in points
    ]
    return "\n".join([*head, *rows])


def draw(points: Sequence[Point]) -> str:
    """Return one SVG file: seconds, bytes and neighbours over the number of members."""
    stages = ("share", "mask", "reveal")
    seconds = [
        Line("all", tuple((math.log2(p.members), 1e3 * p.total) for p in points)),
        *(
            Line(s, tuple((math.log2(p.members), 1e3 * p.seconds[s]) for p in points))
            for s in stages
        ),
    ]
    traffic = [
        Line("down", tuple((math.log2(p.members), p.down) for p in points)),
        Line(
            "up, beside the vector", tuple((math.log2(p.members), p.up - p.vector) for p in points)
        ),
    ]
    degree = [Line("neighbours", tuple((math.log2(n), float(neighbours(n))) for n in DEGREES))]
    milliseconds = Unit("{:.0f} ms".format, "{:g}".format)
    whole = Unit("{:.0f}".format, "{:g}".format)
    charts = [
        _chart(seconds, f"CPU milliseconds of a member, {VALUES:,} values", milliseconds),
        _chart(traffic, "bytes of a member", BYTES),
        _chart(degree, "neighbours of a member", whole),
    ]
    return stacked("What a member's part in a secure sum costs, over the members", charts, PANEL)


def _chart(lines: Sequence[Line], title: str, unit: Unit) -> Markup:
    powers = Unit(lambda x: f"{2**x:.0f}", lambda x: f"{2**x:.0f}")
    return line_chart(
        lines, label=title, unit=unit, y_title=title, x_title="members", x_unit=powers, zero=True
    )
