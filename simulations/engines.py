"""One run on one machine or on a cluster: the same coordinator, the same clients, four engines.

    sequential   simulations/grid.py: one client after another, as a deployed site trains
    cohort       simulations/virtual_grid.py and cohort/: a round's clients trained together
    ray          the same cohort engine as Ray actors, over shards of every cohort (ray_actors.py)
    flower       Flower's Simulation Runtime: Ray actors, one client per call

A fifth needs no code here: a SuperLink and SuperNodes (examples/flower-app). All of them give
the same adapter, because the round engine depends on clients' names only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from anabranch.client.app import open_site
from anabranch.client.flower import SiteFor, SiteLike, client_app
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.clients import Clients, FolderClients
from anabranch.simulations.cohort.executor import CohortExecutor
from anabranch.simulations.flower_runtime import run_in_flower
from anabranch.simulations.grid import InProcessGrid, quiet
from anabranch.simulations.virtual_grid import (
    Executor,
    Journeys,
    Tampering,
    VirtualGrid,
    one_by_one,
)

Engine = Literal["sequential", "cohort", "ray", "flower"]
VIRTUAL = frozenset({"sequential", "cohort", "ray"})  # engines that know virtual time


def run(
    engine: Engine,
    config: RunConfig,
    sites: Clients | Mapping[str, Path],
    adapter: Adapter,
    *,
    run_name: str,
    workers: int = 1,
    open_site: Callable[[Path], SiteLike] = open_site,
    journeys: Journeys | None = None,
    tampering: Tampering | None = None,
    **rounds: Any,
) -> Result:
    """Return the result of `config` over `sites` (clients, or name -> folder) from `adapter`.

    `workers` clients train at a time, or with "cohort" and "ray" so many shards of a cohort.
    `journeys` puts the run into virtual time, `tampering` puts faults into it. `rounds` is
    passed on to RoundEngine (evaluate, checkpoint, event, …). With engine "flower" or "ray",
    what is in `sites`, and `open_site`, must be importable by name.

    Raises ConfigError for a wrong engine or no sites, and what RoundEngine raises.
    """
    clients = FolderClients(sites, open_site) if isinstance(sites, Mapping) else sites
    simulated = journeys is not None or tampering is not None
    if simulated and engine not in VIRTUAL:
        raise ConfigError(
            f'engine = "{engine}" runs in real time: devices and faults need one of '
            f"{', '.join(sorted(VIRTUAL))}"
        )

    def coordinate(grid: Grid, **time: Any) -> Result:
        return RoundEngine(grid, config, run=run_name, **{**rounds, **time}).run(adapter)

    quiet()
    if engine == "sequential" and not simulated:
        names = [str(i) for i in range(len(clients.names))]
        with InProcessGrid(_app(clients), names, workers=workers) as grid:
            return coordinate(grid)
    if engine == "flower":
        return run_in_flower(_app(clients), len(clients.names), coordinate, workers)
    if engine not in VIRTUAL:
        raise ConfigError(
            f"engine: expected 'sequential', 'cohort', 'ray' or 'flower', got {engine!r}"
        )
    federation = config.federation
    executor, close = _executor(engine, clients, workers)
    try:
        virtual = VirtualGrid(
            executor,
            len(clients.names),
            journeys=journeys,
            tampering=tampering,
            ahead=federation.buffer or federation.cohort,
        )
        if not simulated:
            return coordinate(virtual)
        return coordinate(virtual, clock=virtual.clock, sleep=virtual.sleep, poll_s=math.inf)
    finally:
        close()


def _executor(
    engine: Engine, clients: Clients, workers: int
) -> tuple[Executor, Callable[[], None]]:
    """Return what answers messages, and what ends it."""
    if engine == "sequential":
        return one_by_one(_app(clients)), lambda: None
    return CohortExecutor(_site_for(clients)), lambda: None


def _site_for(clients: Clients) -> SiteFor:
    """Return the client of a Flower context: a node knows its partition and nothing else."""

    def site_for(context: Context) -> SiteLike:
        return clients.site(int(context.node_config["partition-id"]))

    return site_for


def _app(clients: Clients) -> ClientApp:
    return client_app(_site_for(clients))
