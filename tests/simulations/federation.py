"""A round engine over toy sites in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.flower import SiteLike
from anabranch.protocols.config import RunConfig
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from tests.simulations.rig import (
    SIZES,
    DelayedGrid,
    Events,
    ToySite,
    VirtualTime,
    adapter,
    app_of,
    config,
)

NAMES = sorted(SIZES)
POLL_S = 1.0


class Federation:
    """A round engine over sites in virtual time, and all that it told."""

    def __init__(
        self,
        sites: Iterable[SiteLike] = (),
        *,
        run: RunConfig | None = None,
        delays: dict[str, float | list[float]] | None = None,
        slow: str = "train",
        tamper: dict[str, Callable[[RecordDict], None]] | None = None,
        app: ClientApp | None = None,
        order: list[str] | None = None,
        node_ids: list[int] | None = None,
        **engine: Any,
    ) -> None:
        sites = list(sites) or [ToySite(name, n) for name, n in SIZES.items()]
        self.time, self.events = VirtualTime(), Events()
        self.grid = DelayedGrid(
            app or app_of(sites, tamper),
            order or [site.name for site in sites],
            self.time,
            delays or {},
            slow=slow,
            node_ids=node_ids,
        )
        self.engine = RoundEngine(
            self.grid,
            run or config(),
            run="toy-1",
            event=self.events,
            clock=self.time.clock,
            sleep=self.time.sleep,
            poll_s=POLL_S,
            **engine,
        )

    def run(self) -> Result:
        with self.grid:
            return self.engine.run(adapter())


def value(result: Result) -> float:
    return float(result.adapter.arrays["head.weight"][2, 4])


def arrays_of(result: Result) -> bytes:
    return b"".join(array.tobytes() for array in result.adapter.arrays.values())
