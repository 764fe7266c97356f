"""Flower's Simulation Runtime: the engine "flower"."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from anabranch.protocols.errors import AnabranchError, RunError
from anabranch.server.result import Result
from anabranch.simulations.grid import quiet


def run_in_flower(
    app: ClientApp, num_sites: int, coordinate: Callable[..., Result], workers: int
) -> Result:
    """Return what `coordinate` returns for the Grid of Flower's Simulation Runtime.

    It runs under `flwr.simulation.run_simulation`: deprecated, but public and in process.

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
