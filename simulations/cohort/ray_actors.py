"""Workers on a Ray cluster: one actor per core or GPU, over shards of every cohort.

An existing cluster is found as Ray finds it (RAY_ADDRESS, or a node started on this machine
with `ray start`); without one, Ray starts on this machine, unless RAY_ADDRESS says where it should
be. Clients and the frozen base go through Ray's object store: once per node, whatever the number
of actors, and a node needs no model files.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from anabranch.client.tuning import bases
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import RunError
from anabranch.protocols.tables import Device
from anabranch.simulations.clients import Clients
from anabranch.simulations.cohort.precision import BaseDtype
from anabranch.simulations.cohort.shard import Answers, Batch, Shard
from anabranch.simulations.grid import QUIET, quiet

WORDS = ("auto", "local")  # of RAY_ADDRESS, which are no address
LISTENS_S = 5.0  # a machine that does not accept a connection by then is not there


@contextmanager
def ray_workers(
    clients: Clients,
    count: int,
    config: RunConfig,
    device: Device,
    base_dtype: BaseDtype = "fp32",
) -> Iterator[Sequence[_Actor]]:
    """Yield `count` actors, spread over the nodes of the cluster.

    Raises RunError if no Ray answers at RAY_ADDRESS, or if the cluster has not the cores (or, for
    "cuda", the GPUs) for them.
    """
    quiet()
    import ray

    started = not ray.is_initialized()
    if started:
        _connect(count)
    try:
        _require_room(ray.cluster_resources(), count, device)
        shared = ray.put((clients, bases.share(config.model)))
        actor = ray.remote(num_cpus=1, num_gpus=1 if device == "cuda" else 0)(_RemoteShard)
        yield [
            _Actor(actor.options(scheduling_strategy="SPREAD").remote(shared, base_dtype))
            for _ in range(count)
        ]
    finally:
        if started:
            ray.shutdown()


def _connect(count: int) -> None:
    """Join the cluster that is there, or start Ray on this machine with `count` cores.

    Raises RunError if RAY_ADDRESS is set and no Ray answers there.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", *WORDS):
        _require_listener(address)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.WARNING,
        "runtime_env": {"env_vars": dict(QUIET)},
    }
    try:
        ray.init(address="auto", **options)
    except ConnectionError as error:
        if address:
            raise _nobody_at(address, error) from None
        ray.init(num_cpus=count, include_dashboard=False, **options)


def _require_listener(address: str) -> None:
    """Raise RunError unless somebody listens there: Ray itself goes on trying for minutes."""
    try:
        at = urlsplit(address if "://" in address else f"//{address}")
        host, port = at.hostname, at.port
        if at.scheme not in ("", "ray"):
            return  # a way of its own to a cluster: Ray's to find
    except ValueError as error:
        raise _nobody_at(address, error) from None
    if host is None or port is None:
        raise _nobody_at(address, "expected HOST:PORT")
    try:
        socket.create_connection((host, port), timeout=LISTENS_S).close()
    except OSError as error:
        raise _nobody_at(address, error) from None


def _nobody_at(address: str, reason: object) -> RunError:
    return RunError(
        f"RAY_ADDRESS = {address}: no Ray cluster answers there ({reason}): start one with `ray "
        "start --head`, correct the address, or unset RAY_ADDRESS to run Ray on this machine"
    )


def _require_room(resources: dict[str, float], count: int, device: Device) -> None:
    kind = "GPU" if device == "cuda" else "CPU"
    there = int(resources.get(kind, 0))
    if there < count:
        raise RunError(
            f"workers = {count}: the Ray cluster has {there} {kind}s, and every worker takes one: "
            "lower workers, or add nodes"
        )


class _RemoteShard:
    """A Shard in an actor."""

    def __init__(self, shared: tuple[Clients, bases.Shared | None], base_dtype: BaseDtype) -> None:
        clients, base = shared
        if base is not None:
            bases.lend(base)
        self._shard = Shard(clients, base_dtype)

    def answer(self, batch: Batch) -> Answers:
        return self._shard.answer(batch)


class _Actor:
    """A worker that is a Ray actor."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._answers: Any = None

    def send(self, batch: Batch) -> None:
        self._answers = self._handle.answer.remote(batch)

    def receive(self) -> Answers:
        import ray

        try:
            answers: Answers = ray.get(self._answers)
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"a Ray actor failed: {lines[-1]}") from None
        return answers
