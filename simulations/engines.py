"""One run on one machine or on a cluster: the same coordinator, the same clients, four engines.

    sequential   simulations/grid.py: one client after another, as a deployed site trains
    cohort       simulations/virtual_grid.py and cohort/: a round's clients trained together
    ray          the same cohort engine as Ray actors, over shards of every cohort, on any cluster
    flower       Flower's Simulation Runtime: Ray actors, one client per call

A fifth needs no code here: a SuperLink and SuperNodes (examples/flower-app). All of them give
the same adapter, because the round engine depends on clients' names only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from anabranch.client.app import open_site
from anabranch.client.flower import SiteLike, client_app
from anabranch.client.sums.participant import PARTICIPANTS
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Device
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.clients import Clients, FolderClients
from anabranch.simulations.cohort.engine import CohortEngine
from anabranch.simulations.cohort.executor import CohortExecutor
from anabranch.simulations.cohort.precision import BaseDtype
from anabranch.simulations.cohort.ray_actors import ray_workers
from anabranch.simulations.cohort.shard import Sharded, site_of
from anabranch.simulations.cohort.workers import local_workers
from anabranch.simulations.faults.plan import Restart
from anabranch.simulations.faults.restarts import run_restarting, waiting
from anabranch.simulations.flower_runtime import run_in_flower
from anabranch.simulations.grid import InProcessGrid, quiet
from anabranch.simulations.population.clients import PopulationClients
from anabranch.simulations.virtual_grid import (
    Bookkeeping,
    Executor,
    Journeys,
    Tampering,
    VirtualGrid,
    one_by_one,
)

Engine = Literal["sequential", "cohort", "ray", "flower"]
VIRTUAL = frozenset({"sequential", "cohort", "ray"})  # engines that know virtual time
COHORTS = frozenset({"cohort", "ray"})  # engines that train a round's clients together


def run(
    engine: Engine,
    config: RunConfig,
    sites: Clients | Mapping[str, Path],
    adapter: Adapter,
    *,
    run_name: str,
    workers: int = 1,
    device: Device = "cpu",
    base_dtype: BaseDtype = "fp32",
    open_site: Callable[[Path], SiteLike] = open_site,
    journeys: Journeys | None = None,
    tampering: Tampering | None = None,
    restarts: Sequence[Restart] = (),
    **rounds: Any,
) -> Result:
    """Return the result of `config` over `sites` (clients, or name -> folder) from `adapter`.

    `workers` clients train at a time; with "cohort" and "ray", so many processes of one thread
    train shards of a cohort. `device` is where the clients train: "ray" asks for GPUs by it.
    `base_dtype = "bf16"` multiplies frozen weights in bfloat16 ("cohort" and "ray";
    cohort/precision.py says what that costs and brings).
    `journeys` puts the run into virtual time, `tampering` and `restarts` put faults into it
    (simulations/faults). `rounds` is passed on to RoundEngine (evaluate, checkpoint, event, …).
    With federation.buffer, "sequential" takes answers in the order of "cohort", one at a time;
    "flower" takes them as its processes give them, which no seed decides.
    With engine "flower" or "ray", what is in `sites`, and `open_site`, must be importable by name.

    Raises ConfigError for a wrong engine, no sites, or "flower" with a private population, and
    what RoundEngine raises.
    """
    clients = FolderClients(sites, open_site) if isinstance(sites, Mapping) else sites
    simulated = journeys is not None or tampering is not None or bool(restarts)
    require_engine(engine, virtual=simulated, base_dtype=base_dtype)
    if engine == "flower" and isinstance(clients, PopulationClients) and clients.books is not None:
        raise ConfigError(
            'engine = "flower" does not go with [privacy] in a population: clients move between '
            "its processes, and what they have spent would be counted in each of them anew. Take "
            '"cohort", "ray" or "sequential"'
        )

    if engine == "flower" and workers > 1 and config.secure_aggregation is not None:
        raise ConfigError(
            'engine = "flower" with more than one worker does not go with [secure_aggregation]: '
            "clients move between its processes, and the secrets of a sum stay in one. Set workers "
            '= 1, or take "cohort", "ray" or "sequential"'
        )

    def coordinate(grid: Grid, **time: Any) -> Result:
        try:
            return rounds_over(grid, **time)
        finally:
            PARTICIPANTS.forget(run_name)  # what clients of this process kept for secure sums

    def rounds_over(grid: Grid, **time: Any) -> Result:
        settings = {**rounds, **time}
        if not restarts:
            return RoundEngine(grid, config, run=run_name, **settings).run(adapter)

        def make(**hooks: Any) -> RoundEngine:
            return RoundEngine(grid, config, run=run_name, **{**settings, **hooks})

        wait = waiting(settings["clock"], settings["sleep"])
        return run_restarting(make, adapter, restarts, settings, wait)

    quiet()
    if engine == "sequential" and not simulated and config.federation.buffer is None:
        names = [str(i) for i in range(len(clients.names))]
        with InProcessGrid(_app(clients), names, workers=workers) as grid:
            return coordinate(grid)
    if engine == "flower":
        return run_in_flower(_app(clients), len(clients.names), coordinate, workers)
    federation = config.federation
    with _executor(engine, clients, config, workers, device, base_dtype) as executor:
        virtual = VirtualGrid(
            executor,
            len(clients.names),
            journeys=journeys,
            tampering=tampering,
            ahead=federation.buffer or federation.cohort,
            needed=federation.cohort if federation.over_selection else None,
        )
        if not simulated:
            return coordinate(virtual)
        time = {"clock": virtual.clock, "sleep": virtual.sleep, "poll_s": math.inf}
        if isinstance(journeys, Bookkeeping):
            told = rounds.get("event", lambda kind, **fields: None)
            time["event"] = journeys.listening(virtual.clock, told)
        return coordinate(virtual, **time)


def require_engine(
    engine: Engine, *, virtual: bool = False, base_dtype: BaseDtype = "fp32", where: str = ""
) -> None:
    """Raise ConfigError, beginning with `where`, for an engine that is none or cannot do this."""
    if engine not in get_args(Engine):
        raise ConfigError(
            f"{where}engine: expected 'sequential', 'cohort', 'ray' or 'flower', got {engine!r}"
        )
    if virtual and engine not in VIRTUAL:
        raise ConfigError(
            f'{where}engine = "{engine}" runs in real time: [devices], [clock] and [faults] need '
            f"one of {', '.join(sorted(VIRTUAL))}"
        )
    if base_dtype != "fp32" and engine not in COHORTS:
        raise ConfigError(
            f'{where}base_dtype = "{base_dtype}" is for engine "cohort" or "ray", not "{engine}": '
            "take one of them, or leave base_dtype out"
        )


@contextmanager
def _executor(
    engine: Engine,
    clients: Clients,
    config: RunConfig,
    workers: int,
    device: Device,
    base_dtype: BaseDtype,
) -> Iterator[Executor]:
    """Yield what answers messages."""
    alone = config.secure_aggregation is not None
    if engine == "sequential":
        yield one_by_one(_app(clients))
    elif engine == "ray":
        with ray_workers(clients, workers, config, device, base_dtype) as actors:
            yield Sharded(clients, actors, pinned=_keeps(config), alone=alone)
    elif workers > 1:
        with local_workers(clients, workers, base_dtype) as processes:
            yield Sharded(clients, processes, pinned=_keeps(config), alone=alone)
    else:
        with _one_thread():
            yield CohortExecutor(site_of(clients), CohortEngine(base_dtype))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: for small layers two are slower; workers use further cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _keeps(config: RunConfig) -> bool:
    """Return whether clients keep something from round to round."""
    own = config.kept is not None or config.personal.rank > 0
    own = own or config.secure_aggregation is not None
    return own or config.uplink.error_feedback or config.privacy is not None


def _app(clients: Clients) -> ClientApp:
    return client_app(site_of(clients))
