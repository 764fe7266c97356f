"""Every number of dropouts at every stage, on complete graphs: exact, or aborted with nothing open.

n members, t of whom are needed. Up to n − t may be lost at any one stage. One more, and there is
no sum; those who are lost before they advertised were never in it, and the rest make a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anabranch.protocols.secagg.graph import quorum
from anabranch.protocols.secagg.messages import STAGES, Stage
from benchmarks.harness import Figure
from benchmarks.secagg.ours import TABLE, Sum

VALUES = 50


@dataclass
class Tally:
    """How often a stage was tried, and how often it went as it must."""

    held: int = 0  # sums with enough members left
    exact: int = 0  # of those
    short: int = 0  # sums with one member too few
    aborted: int = 0  # of those, with a reason and nothing opened
    reasons: list[str] = field(default_factory=list)


def measure(sizes: Sequence[int]) -> dict[Stage, Tally]:
    """Play all of them; the first members are those who are lost."""
    found: dict[Stage, Tally] = {stage: Tally() for stage in STAGES}
    for members in sizes:
        spare = members - quorum(members, TABLE.threshold)
        for stage, tally in found.items():
            for lost in range(spare + 1):
                run = _run(members, stage, lost)
                tally.held += 1
                tally.exact += run.exact
            if stage == "advertise":
                continue
            run = _run(members, stage, spare + 1)
            over = run.aggregation
            tally.short += 1
            tally.aborted += over.stage == "aborted" and bool(over.reason) and not over.sums
            tally.reasons.append(over.reason)
    return found


def _run(members: int, stage: Stage, lost: int) -> Sum:
    run = Sum(members, VALUES, {stage: range(lost)})
    run.run()
    return run


def figures(found: dict[Stage, Tally], sizes: Sequence[int]) -> list[Figure]:
    """Return the shares that went as they must: 1 and 1."""
    held, exact, short, aborted = (
        sum(getattr(tally, name) for tally in found.values())
        for name in ("held", "exact", "short", "aborted")
    )
    between = f"{sizes[0]} to {sizes[-1]} members"
    return [
        Figure(
            figure="dropouts.exact",
            value=exact / held,
            unit="share",
            target=">= 1",
            note=f"of {held} sums of {between}, 0 to n − t lost at each of the five stages",
        ),
        Figure(
            figure="dropouts.aborted",
            value=aborted / short,
            unit="share",
            target=">= 1",
            note=f"of {short} sums with t − 1 left, at each stage after the first",
        ),
    ]


def table(found: dict[Stage, Tally]) -> str:
    """Return a row per stage as Markdown."""
    rows = []
    for stage, tally in found.items():
        short = f"{tally.aborted} of {tally.short} aborted" if tally.short else "a smaller sum"
        reason = tally.reasons[-1] if tally.reasons else ""
        rows.append(f"| {stage} | {tally.exact} of {tally.held} exact | {short} | {reason} |")
    head = "| lost at | up to n − t lost | t − 1 left | the reason given, largest n |"
    return "\n".join([head, "|---|---|---|---|", *rows])
