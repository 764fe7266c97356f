"""A federation of toy sites on a virtual grid, with devices whose seconds are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from anabranch.client.flower import SiteLike, client_app
from anabranch.protocols.config import RunConfig
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.clock.flops import Work
from anabranch.simulations.clock.journeys import DeviceJourneys
from anabranch.simulations.clock.pace import Pace
from anabranch.simulations.population.devices import Devices
from anabranch.simulations.virtual_grid import VirtualGrid, one_by_one
from tests.simulations.rig import Events, ToySite, adapter

Ints = NDArray[np.int64]
BPS = 3e38  # so fast that a transfer adds nothing to a second
BATCH = 32  # of rig.config


class AlwaysOnline:
    """Clients that never leave."""

    def online(self, clients: Ints, at: float) -> NDArray[np.bool_]:
        return np.ones(len(clients), np.bool_)

    def online_until(self, client: int, at: float) -> float:
        return math.inf

    def next_online(self, client: int, at: float) -> float:
        return at

    def next_change(self, at: float) -> float:
        return math.inf


class Windows:
    """Client i is online within its windows, [begin, end), ascending and apart."""

    def __init__(self, *windows: Sequence[tuple[float, float]]) -> None:
        self._windows = windows

    def online(self, clients: Ints, at: float) -> NDArray[np.bool_]:
        return np.array([self.online_until(int(i), at) > at for i in clients], np.bool_)

    def online_until(self, client: int, at: float) -> float:
        return next((end for begin, end in self._windows[client] if begin <= at < end), at)

    def next_online(self, client: int, at: float) -> float:
        later = (max(at, begin) for begin, end in self._windows[client] if at < end)
        return next(later, math.inf)

    def next_change(self, at: float) -> float:
        times = [t for windows in self._windows for window in windows for t in window]
        return min((t for t in times if t > at), default=math.inf)


def devices_of(count: int, **arrays: Any) -> Devices:
    """Return equal devices with 1 GFLOP/s, changed by `arrays` (numbers or one per client)."""
    values: dict[str, Any] = {
        "gflops": 1.0,
        "memory_bytes": 1 << 40,
        "uplink_bps": BPS,
        "downlink_bps": BPS,
        "compute_watts": 4.0,
        "network_watts": 2.0,
        "dropout": 0.0,
        "clock_skew_s": 0.0,
        "utc_offset_h": 0.0,
        "kind": 0,
        "region": 0,
    } | arrays
    types = {"memory_bytes": np.int64, "kind": np.int16, "region": np.int16}
    return Devices(
        kinds=values.pop("kinds", ("phone",)),
        regions=values.pop("regions", ("world",)),
        **{
            name: np.broadcast_to(np.asarray(value, types.get(name, np.float32)), (count,)).copy()
            for name, value in values.items()
        },
    )


def journeys_of(
    run: RunConfig,
    seconds: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    availability: Any = None,
    devices: Devices | None = None,
    pace: Mapping[str, Any] | None = None,
    **options: Any,
) -> DeviceJourneys:
    """Return journeys on which client i trains for seconds[i]: a record takes one second."""
    devices = devices or devices_of(len(seconds))
    defaults: dict[str, Any] = {
        "gflops": devices.gflops,
        "uplink_bps": devices.uplink_bps,
        "downlink_bps": devices.downlink_bps,
        "sizes": np.array(seconds, np.int64),
        "work": Work(prefix=0.0, forward=1e9, backward=0.0),
        "batch_size": BATCH,
        "deadline_s": run.federation.deadline_s,
        "index": None if names is None else {name: i for i, name in enumerate(names)},
    }
    return DeviceJourneys(
        devices, availability or AlwaysOnline(), run, Pace(**defaults | dict(pace or {})), **options
    )


class Virtual:
    """A round engine over toy sites on a virtual grid, and all that it told."""

    def __init__(
        self,
        run: RunConfig,
        journeys: DeviceJourneys,
        sites: Sequence[SiteLike],
        *,
        ahead: int | None = None,
        needed: int | None = None,
        **engine: Any,
    ) -> None:
        self.trained: list[tuple[str, int]] = []
        self.events, self.journeys = Events(), journeys
        app = self._watched(client_app(lambda context: sites[place(context)]), sites)
        self.grid = VirtualGrid(
            one_by_one(app), len(sites), journeys=journeys, ahead=ahead, needed=needed
        )
        self.engine = RoundEngine(
            self.grid,
            run,
            run="toy-1",
            clock=self.grid.clock,
            sleep=self.grid.sleep,
            poll_s=math.inf,
            event=journeys.listening(self.grid.clock, self.events),
            **engine,
        )

    def run(self) -> Result:
        return self.engine.run(adapter())

    def times(self) -> list[tuple[float, float]]:
        """Return (started, merged) of every round."""
        return [(one.started_at, one.merged_at) for one in self.journeys.rounds()]

    def _watched(
        self, app: ClientApp, sites: Sequence[SiteLike]
    ) -> Callable[[Message, Context], Message]:
        def call(message: Message, context: Context) -> Message:
            if message.metadata.message_type == "train":
                number = int(message.metadata.group_id)
                self.trained.append((sites[place(context)].name, number))
            return app(message, context)

        return call


def place(context: Context) -> int:
    return int(context.node_config["partition-id"])


def toys(*steps: float) -> list[ToySite]:
    """Return sites, named as a population names its clients; each adds its step to all values."""
    return [ToySite(name(i), 1, step=step, held_out=0) for i, step in enumerate(steps)]


def name(client: int) -> str:
    return f"client-{client:06d}"
