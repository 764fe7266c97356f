"""Runs of toy sites under a plan of faults, in virtual time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Context, Message

from anabranch.client.flower import DESCRIBE, SiteLike, client_app
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import RunError
from anabranch.server.aggregation.buffered import staleness
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.cohort.executor import CohortExecutor
from anabranch.simulations.faults.inject import FaultyJourneys, FaultyMessages, Struck
from anabranch.simulations.faults.plan import Fault, FaultPlan, Restart
from anabranch.simulations.faults.restarts import run_restarting, waiting
from anabranch.simulations.virtual_grid import Executor, Journeys, VirtualGrid, one_by_one
from tests.simulations.rig import Events, ToySite, adapter, config

CLIENTS = 4


def toys(count: int = CLIENTS, **fields: Any) -> list[ToySite]:
    """Return sites whose deltas are 1, 2, 4, … in every value: a sum tells who is in it."""
    return [ToySite(f"toy-{i}", 10 + i, step=float(2**i), **fields) for i in range(count)]


@dataclass(frozen=True)
class Steady:
    """Journeys of `seconds` times a number in [1, 2) that depends on client and round."""

    clients: int
    seconds: float = 5.0

    def reachable(self, now: float) -> Sequence[int]:
        return range(self.clients)

    def answered_at(self, client: int, message: Message, now: float) -> float | None:
        if message.metadata.message_type == DESCRIBE:
            return now
        text = f"{client}/{message.metadata.group_id}/{message.metadata.message_type}"
        share = int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 65536
        return now + self.seconds * (1 + share)

    def next_change(self, now: float) -> float:
        return math.inf


@dataclass
class Ran:
    """What came of a run under a plan."""

    events: Events = field(default_factory=Events)
    result: Result | None = None
    error: RunError | None = None
    grid: VirtualGrid | None = None

    @property
    def done(self) -> Result:
        assert self.result is not None, self.error
        return self.result

    def bytes(self) -> bytes:
        return b"".join(array.tobytes() for array in self.done.adapter.arrays.values())


def backwards(execute: Executor) -> Executor:
    """Return the same executor, which computes every batch from its end."""
    return lambda requests: execute(requests[::-1])[::-1]


def executor(sites: Sequence[SiteLike], kind: str = "sequential") -> Executor:
    """Return what answers messages to these sites: "sequential", "cohort" or "backwards"."""

    def site_for(context: Context) -> SiteLike:
        return sites[int(context.node_config["partition-id"])]

    if kind == "cohort":
        return CohortExecutor(site_for)
    one = one_by_one(client_app(site_for))
    return backwards(one) if kind == "backwards" else one


def run_faulty(
    faults: FaultPlan | Iterable[Fault] = (),
    *,
    run: RunConfig | None = None,
    sites: Sequence[SiteLike] | None = None,
    kind: str = "sequential",
    journeys: Journeys | None = None,
    ahead: int | None = None,
    start: float = 0.0,
    **engine: Any,
) -> Ran:
    """Run toy sites under a plan; every error but a RunError is raised."""
    plan = faults if isinstance(faults, FaultPlan) else FaultPlan(faults=tuple(faults))
    sites, run, struck, ran = sites or toys(), run or config(), Struck(plan), Ran()
    ran.grid = grid = VirtualGrid(
        executor(sites, kind),
        len(sites),
        journeys=FaultyJourneys(journeys, struck, len(sites)),
        tampering=FaultyMessages(struck),
        ahead=ahead,
    )
    settings = {"event": ran.events, **engine}

    def make(**hooks: Any) -> RoundEngine:
        return RoundEngine(
            grid,
            run,
            run="toy-1",
            clock=grid.clock,
            sleep=grid.sleep,
            poll_s=math.inf,
            **{**settings, **hooks},
        )

    restarts = list(plan.of(Restart))
    try:
        wait = waiting(grid.clock, grid.sleep)
        ran.result = run_restarting(make, adapter(start), restarts, settings, wait)
    except RunError as error:
        ran.error = error
    return ran


def expected_value(result: Result, steps: dict[str, float], start: float = 0.0) -> float:
    """Return every value of the adapter if each delta of a report was counted once.

    For uniform weighting, and sites whose delta is steps[name] in every value.
    """
    value = start
    for report in result.history:
        counted = [steps[n] * staleness(report.ages.get(n, 0)) for n in report.trained]
        value += float(np.mean(counted))
    return value
