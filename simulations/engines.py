"""One run on one machine: the same coordinator and the same ClientApp on two engines.

    sequential   simulations/grid.py: this process, no server; the default
    flower       Flower's Simulation Runtime: Ray actors, one process each

A third engine needs no code here: a SuperLink and SuperNodes (examples/flower-app). All three
give the same adapter, because the round engine depends on sites' names only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from anabranch.client.app import open_site
from anabranch.client.flower import SiteLike, client_app
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError, ConfigError, RunError
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.grid import InProcessGrid, quiet

Engine = Literal["sequential", "flower"]


def run(
    engine: Engine,
    config: RunConfig,
    sites: Mapping[str, Path],
    adapter: Adapter,
    *,
    run_name: str,
    workers: int = 1,
    open_site: Callable[[Path], SiteLike] = open_site,
    **rounds: Any,
) -> Result:
    """Return the result of `config` over `sites` (name -> folder), starting from `adapter`.

    `workers` clients train at a time; `rounds` is passed on to RoundEngine (evaluate,
    checkpoint, event, …). With engine "flower", `open_site` must be importable by name, for it
    is called in other processes.

    Raises ConfigError for a wrong engine or no sites, and what RoundEngine raises.
    """
    if not sites:
        raise ConfigError("expected at least one site, got none")
    app = _client_app(sites, open_site)

    def coordinate(grid: Grid, **time: Any) -> Result:
        return RoundEngine(grid, config, run=run_name, **{**rounds, **time}).run(adapter)

    if engine == "sequential":
        quiet()
        with InProcessGrid(
            app, [str(folder) for _, folder in _sorted(sites)], workers=workers
        ) as grid:
            return coordinate(grid)
    if engine == "flower":
        return _in_ray(app, len(sites), coordinate, workers)
    raise ConfigError(f"engine: expected 'sequential' or 'flower', got {engine!r}")


def _sorted(sites: Mapping[str, Path]) -> list[tuple[str, Path]]:
    return sorted(sites.items())


def _client_app(sites: Mapping[str, Path], open_site: Callable[[Path], SiteLike]) -> ClientApp:
    """Return a ClientApp whose partition i is the i-th site by name.

    In Flower's Simulation Runtime a node knows its partition and nothing else.
    """
    folders = [folder for _, folder in _sorted(sites)]

    def site_for(context: Context) -> SiteLike:
        return open_site(folders[int(context.node_config["partition-id"])])

    return client_app(site_for)


def _in_ray(
    app: ClientApp, num_sites: int, coordinate: Callable[..., Result], workers: int
) -> Result:
    """Run under `flwr.simulation.run_simulation`: deprecated, but public and in process.

    Its replacement, `flwr run`, leaves a daemon behind.
    """
    quiet()
    from flwr.simulation import run_simulation

    outcome: list[Result | AnabranchError] = []
    ended = threading.Event()
    server = ServerApp()

    def sleep(seconds: float) -> None:
        if ended.wait(seconds):  # no site will ever answer: do not wait for the deadline
            raise RunError("Flower's Simulation Runtime ended before the run did")

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            outcome.append(coordinate(grid, sleep=sleep))
        except AnabranchError as error:  # Flower would wrap it, and log a traceback
            outcome.append(error)

    with _quiet_log():
        try:
            run_simulation(server, app, num_sites, backend_config=_ray_config(workers))
        except RuntimeError as error:
            raise RunError(f"Flower's Simulation Runtime failed: {error.__cause__}") from error
        finally:
            ended.set()
    (result,) = outcome
    if isinstance(result, AnabranchError):
        raise result
    return result


def _ray_config(workers: int) -> dict[str, Any]:
    """Return one core per client, `workers` at a time, and no log lines from the actors."""
    return {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": workers, "log_to_driver": False},
    }


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Drop what Flower logs below a warning, and its notice that `run_simulation` is deprecated.

    A command is quiet in a pipe, and the notice is not for our user.
    """

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and "DEPRECATED FEATURE" not in str(record.msg)

    logger = logging.getLogger("flwr")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
