"""A Flower Grid in this process: no server, no sockets, no Ray.

The round engine and any Flower strategy run on it unchanged. It behaves as Flower does where
that matters: a client gets its own copy of a message's records (Flower's mods change them in
place), keeps one Context between messages, and an exception becomes an error reply.

This is the only module of simulations that touches what is private to Flower (TaskIdentity,
ids in a message's metadata, error codes, the telemetry switch); a new release of Flower is
checked against it first.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from copy import copy
from queue import SimpleQueue

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

# What Flower, uv and Ray would send or fetch, switched off: a run talks to its sites only.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray is going to do anyway; it warns else
}

# Why Flower answers in a client's stead: codes of an error reply.
UNKNOWN = ErrorCode.UNKNOWN
RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
EXPIRED = ErrorCode.MESSAGE_UNAVAILABLE
UNAVAILABLE = ErrorCode.NODE_UNAVAILABLE

NUMBERS = itertools.count()
JOIN_S = 1.0  # an idle thread ends at once


def quiet() -> None:
    """Switch off telemetry, update check and run-time installation in this process."""
    os.environ.update(QUIET)
    telemetry.FLWR_TELEMETRY_ENABLED = "0"  # read from the environment when it was imported


class LocalGrid(Grid):
    """A Grid without a server: the identity of a run, and what Flower asks of every Grid."""

    def __init__(self) -> None:
        self._run = begin_run()

    def set_run(self, run: Run) -> None:
        """Take another run's identity, as Flower's runtime does before a ServerApp starts."""
        self._run = run
        identify(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; deprecated by Flower, which still asks every Grid for it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class InProcessGrid(LocalGrid):
    """Runs `client_app` once per message in `workers` threads.

    `sites[i]` is given to client i as `context.node_config["site"]`, with "partition-id" i and
    "num-partitions", as Flower's Simulation Runtime names them.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: Sequence[str],
        *,
        workers: int = 1,
        node_ids: Sequence[int] | None = None,
    ) -> None:
        if workers < 1 or len(sites) < 1:
            raise ValueError(f"expected sites and workers, got {len(sites)} and {workers}")
        super().__init__()
        self._app = client_app
        ids = list(node_ids) if node_ids is not None else list(range(1001, 1001 + len(sites)))
        self._contexts = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config={"site": site, "partition-id": i, "num-partitions": len(sites)},
                state=RecordDict(),
                run_config={},
            )
            for i, (node, site) in enumerate(zip(ids, sites, strict=True))
        }
        self._replies: dict[str, Future[Message]] = {}
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Daemon threads: a client that never answers must not keep the process from ending.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Let the threads end; one whose client never answers is left behind."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=JOIN_S)

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_node_ids(self) -> list[int]:
        """Return the ids of all clients."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand every message to its client's queue; return the ids to pull replies by."""
        ids = []
        for message in messages:
            name = number(message)
            ids.append(name)
            reply: Future[Message] = Future()
            self._replies[name] = reply
            self._queue.put(lambda m=message, r=reply: r.set_result(self._handle(m)))  # type: ignore[misc]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once; never wait."""
        ready = [i for i in message_ids if i in self._replies and self._replies[i].done()]
        return [self._replies.pop(i).result() for i in ready]

    def wait(self, message_ids: Iterable[str], timeout_s: float | None = None) -> None:
        """Block until these messages have been answered, or `timeout_s` has passed."""
        wait([self._replies[i] for i in message_ids if i in self._replies], timeout=timeout_s)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push, wait for all replies or until `timeout` seconds have passed, and pull."""
        ids = self.push_messages(messages)
        self.wait(ids, timeout)
        return self.pull_messages(ids)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job()

    def _handle(self, message: Message) -> Message:
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            reply = error_reply(message, UNAVAILABLE, "no such node")
        else:
            reply = answered(self._app, message, context)
        number(reply)
        return reply


def answered(
    app: Callable[[Message, Context], Message], message: Message, context: Context
) -> Message:
    """Return a ClientApp's reply; its exception becomes an error reply, as Flower does."""
    try:
        return app(own_copy(message), context)
    except Exception as error:  # noqa: BLE001 - as Flower does: a client's error is a reply
        return error_reply(message, RAISED, f"{type(error)}:<'{error}'>")


def error_reply(message: Message, code: int, reason: str) -> Message:
    """Return what Flower answers where no client does; `code` is one of those above."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def begin_run() -> Run:
    """Give this process a run of its own, as a Grid and every worker of one have; return it."""
    run = Run.create_empty(run_id=1)
    identify(run)
    return run


def identify(run: Run) -> None:
    """Say who this process is; a Message cannot be made without it."""
    TaskIdentity.run_id = run.run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1


def number(message: Message) -> str:
    """Give a message the id that a SuperLink would give it."""
    name = f"message-{next(NUMBERS)}"
    message.metadata.__dict__["_message_id"] = name
    return name


def own_copy(message: Message) -> Message:
    """Return the same message around records of its own; arrays' bytes are shared."""
    records = message.content
    arrays = {name: ArrayRecord(dict(r)) for name, r in records.array_records.items()}
    metrics = {name: MetricRecord(dict(r)) for name, r in records.metric_records.items()}
    configs = {name: ConfigRecord(dict(r)) for name, r in records.config_records.items()}
    return around(message, RecordDict({**arrays, **metrics, **configs}))


def around(message: Message, content: RecordDict) -> Message:
    """Return the same message around another content; the one that was given stays as it is."""
    own = copy(message)
    own.__dict__["_metadata"] = copy(message.metadata)
    own.content = content
    return own
