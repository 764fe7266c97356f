"""What a sum costs a member and the coordinator, beside the keystream that it cannot do without."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.protocols.secagg.messages import STAGES
from anabranch.protocols.secagg.plan import length
from benchmarks.harness import Figure, alternate, ratio
from benchmarks.secagg import keystream
from benchmarks.secagg.ours import Cost, Sum

MEMBERS, VALUES, DROPS = 100, 1_000_000, 5
EVERY = 4  # members, between two measurements of the floor
LIBRARY = "cryptography, the same keystream alone"


@dataclass(frozen=True)
class Measured:
    """One sum: of each member that was measured with its floor, and of the coordinator."""

    terms: str  # in words
    costs: Sequence[Cost]
    floors: Sequence[float]  # CPU seconds, one per cost
    unmasking: Sequence[float]
    unmasking_floors: Sequence[float]
    exact: bool


def measure(members: int, values: int, drops: int, repeats: int) -> Measured:
    """Run one sum in which `drops` members are lost after they have shared their secrets.

    The floor of a member is measured right after its mask stage. The coordinator takes the masks
    off `repeats` copies of what it has collected, in turn with its floor.
    """
    run = Sum(members, values, {"mask": range(drops)})
    run.run(until="mask")
    size = length(run.terms) * run.ring.dtype.itemsize
    floors: dict[int, float] = {}
    for place, _ in enumerate(run.answering()):
        if place >= drops and place % EVERY == 0:
            floors[place] = keystream.seconds(run.terms.keystream, members, size)
    run.aggregation.close()
    run.run(until="reveal")
    for _ in run.answering():
        pass
    masks = (members - drops) * (1 + drops)
    collected = [copy.deepcopy(run.aggregation) for _ in range(repeats + 1)]
    waiting = iter(collected)
    seconds = alternate(
        {
            "unmask": lambda: next(waiting).close(),
            "floor": lambda: keystream.seconds(run.terms.keystream, masks, size),
        },
        repeats + 1,
        clock=time.process_time,
    )
    exact = []
    for one in collected:
        run.aggregation = one
        exact.append(run.exact)
    return Measured(
        terms=f"{members} members, {values:,} values of {run.ring.bits} bits, "
        f"{run.terms.keystream}",
        costs=[run.costs[place] for place in floors],
        floors=list(floors.values()),
        unmasking=seconds["unmask"][1:],  # the first warms up
        unmasking_floors=seconds["floor"][1:],
        exact=all(exact),
    )


def figures(found: Measured, drops: int) -> list[Figure]:
    """Return seconds and ratios of the member and of the coordinator."""
    totals = [cost.total for cost in found.costs]
    client, client_spread = ratio(totals, found.floors)
    server, server_spread = ratio(found.unmasking, found.unmasking_floors)
    floor, server_floor = map(statistics.median, (found.floors, found.unmasking_floors))
    return [
        Figure(
            figure="client.seconds_n100_1m",
            value=statistics.median(totals),
            unit="s",
            target="<= 0.5",
            spread=(min(totals), max(totals)),
            note=f"CPU, {found.terms}: {parts(found.costs)}",
        ),
        Figure(
            figure="client.ratio_keystream",
            value=client,
            unit="ratio",
            target="<= 2",
            spread=client_spread,
            peer=LIBRARY,
            note=f"median of {len(totals)} members, each beside its floor, {floor:.4f} s",
        ),
        Figure(
            figure=f"server.ratio_keystream_{drops}_drops",
            value=server,
            unit="ratio",
            target="<= 2",
            spread=server_spread,
            peer=LIBRARY,
            note=f"{statistics.median(found.unmasking):.3f} / {server_floor:.3f} CPU s for the "
            f"masks of the survivors and of {drops} lost after sharing",
        ),
    ]


def parts(costs: Sequence[Cost]) -> str:
    """Return the median of every stage in milliseconds, in words."""
    said = []
    for stage in STAGES:
        value = 1e3 * statistics.median(cost.seconds[stage] for cost in costs)
        said.append(f"{stage} {value:.2g} ms" if value < 10 else f"{stage} {value:.0f} ms")
        if stage == "mask":
            encode = 1e3 * statistics.median(cost.encode for cost in costs)
            said[-1] += f" (rounding {encode:.1f})"
    return ", ".join(said)
