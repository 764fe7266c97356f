"""A share of a cohort, trained in a process of its own: what goes there, and what comes back.

    coordinator's process                       worker (a process, or a Ray actor anywhere)
    Sharded ── Batch: clients and messages ──►  Shard: its own cohort engine, base and cache
            ◄── Answers: one array of deltas ──

Deltas come back as one float32 matrix per shard, so that a round costs each worker one message
there and one back. A client goes to the same worker in every round unless that one has too much
to do: what the worker has computed of its records stays useful.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from numpy.typing import NDArray

from anabranch.client.flower import Handed, SiteFor, SiteLike, client_app, hand_over
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import RunError
from anabranch.protocols.messages import Trained
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.simulations.clients import Clients
from anabranch.simulations.cohort.engine import CohortEngine
from anabranch.simulations.cohort.executor import CohortExecutor
from anabranch.simulations.cohort.precision import BaseDtype
from anabranch.simulations.grid import begin_run, quiet

Rows = NDArray[np.float32]
SLACK = 1.1  # of a worker's fair share, before a client is trained elsewhere
HEAVY = frozenset({MessageType.TRAIN, MessageType.EVALUATE})


@dataclass(frozen=True, eq=False)
class Batch:
    """Messages to some clients; many of them share one content."""

    contents: tuple[RecordDict, ...]
    requests: tuple[tuple[int, str, int], ...]  # (client, message type, index of its content)


@dataclass(frozen=True, eq=False)
class Deltas:
    """Deltas of one part: row i belongs to reply `at[i]`."""

    spec: AdapterSpec
    part: Part
    at: tuple[int, ...]
    trained: tuple[Trained, ...]
    rows: Rows  # (len(at), values)


@dataclass(frozen=True, eq=False)
class Answers:
    """The replies to a Batch, in its order: contents, and deltas where there is None."""

    contents: tuple[RecordDict | None, ...]
    deltas: tuple[Deltas, ...]


class Shard:
    """Trains some of the clients. One thread; made in the process where it works."""

    def __init__(self, clients: Clients, base_dtype: BaseDtype = "fp32") -> None:
        torch.set_num_threads(1)  # more than one per process is several times slower
        quiet()
        begin_run()
        self._count = len(clients.names)
        self._execute = CohortExecutor(site_of(clients), CohortEngine(base_dtype))

    def answer(self, batch: Batch) -> Answers:
        """Return the clients' replies."""
        requests = []
        for client, kind, content in batch.requests:
            message = Message(batch.contents[content], client + 1, kind)
            requests.append((message, self._context(client)))
        return pack([reply.content for reply in self._execute(requests)])

    def _context(self, client: int) -> Context:
        return Context(
            run_id=1,
            node_id=client + 1,
            node_config={"partition-id": client, "num-partitions": self._count},
            state=RecordDict(),
            run_config={},
        )


class Worker(Protocol):
    """A Shard somewhere else."""

    def send(self, batch: Batch) -> None:
        """Begin to answer a batch."""

    def receive(self) -> Answers:
        """Wait for the answers; raise RunError if the worker is gone."""


class Sharded:
    """Answers messages with the help of workers; an Executor of VirtualGrid.

    With `pinned`, a client is always trained by the same worker: what it keeps between rounds
    (books on privacy, error feedback, tensors of its own) is that worker's. With `alone`, that
    worker answers all of its messages: what a client says of itself, the key that it signs secure
    sums with, must be said by who has it.
    """

    def __init__(
        self,
        clients: Clients,
        workers: Sequence[Worker],
        *,
        pinned: bool = False,
        alone: bool = False,
    ) -> None:
        self._clients, self._workers = clients, workers
        self._pinned, self._alone = pinned or alone, alone
        self._app = client_app(site_of(clients))

    def __call__(self, requests: Sequence[tuple[Message, Context]]) -> list[Message]:
        """Return one reply per request, in order."""
        heavy = [
            i
            for i, (message, _) in enumerate(requests)
            if self._alone or message.metadata.message_type in HEAVY
        ]
        clients = [int(requests[i][1].node_config["partition-id"]) for i in heavy]
        slack = math.inf if self._pinned else SLACK
        shares = share(clients, self._clients.weight, len(self._workers), slack)
        busy = []
        for worker, places in zip(self._workers, shares, strict=True):
            if places:
                chosen = [heavy[place] for place in places]
                worker.send(_batch(requests, chosen))
                busy.append((worker, chosen))
        replies: dict[int, Message] = {}
        for i in set(range(len(requests))) - set(heavy):
            replies[i] = self._app(*requests[i])
        for worker, chosen in busy:
            contents = unpack(worker.receive())
            for i, content in zip(chosen, contents, strict=True):
                replies[i] = Message(content, reply_to=requests[i][0])
        return [replies[i] for i in range(len(requests))]


def site_of(clients: Clients) -> SiteFor:
    """Return what finds the client of a Flower context: a node knows its partition alone."""

    def site_for(context: Context) -> SiteLike:
        return clients.site(int(context.node_config["partition-id"]))

    return site_for


def share(
    clients: Sequence[int],
    weight: Callable[[int], float],
    workers: int,
    slack: float = SLACK,
) -> list[list[int]]:
    """Return, per worker, the places in `clients` that it trains.

    Heaviest first, each to the worker of its index (client modulo workers) unless that one would
    have more than `slack` times its fair share; then to the one with least to do. Deterministic.
    """
    weights = [weight(client) for client in clients]
    limit = slack * sum(weights) / workers
    loads, shares = [0.0] * workers, [list[int]() for _ in range(workers)]
    for place in sorted(range(len(clients)), key=lambda i: (-weights[i], clients[i])):
        home = clients[place] % workers
        if loads[home] + weights[place] > limit:
            home = min(range(workers), key=lambda i: (loads[i], i))
        loads[home] += weights[place]
        shares[home].append(place)
    return [sorted(places) for places in shares]


def pack(contents: Sequence[RecordDict]) -> Answers:
    """Return replies for the way between processes."""
    groups: dict[tuple[int, Part], list[int]] = {}
    specs: list[AdapterSpec] = []
    for i, content in enumerate(contents):
        if isinstance(content, Handed):
            spec = content.delta.spec
            if spec not in specs:
                specs.append(spec)
            groups.setdefault((specs.index(spec), content.delta.part), []).append(i)
    deltas = [_stacked(contents, at) for at in groups.values()]
    plain = tuple(None if isinstance(content, Handed) else content for content in contents)
    return Answers(plain, tuple(deltas))


def _stacked(contents: Sequence[RecordDict], at: Sequence[int]) -> Deltas:
    handed = [content for i in at if isinstance(content := contents[i], Handed)]
    first = handed[0].delta
    rows = np.empty((len(handed), sum(a.size for a in first.arrays.values())), np.float32)
    for row, one in zip(rows, handed, strict=True):
        np.concatenate([a.reshape(-1) for a in one.delta.arrays.values()], out=row)
    trained = tuple(one.trained for one in handed)
    return Deltas(first.spec, first.part, tuple(at), trained, rows)


def unpack(answers: Answers) -> list[RecordDict]:
    """Return the replies' contents, in order."""
    contents: dict[int, RecordDict] = {
        i: content for i, content in enumerate(answers.contents) if content is not None
    }
    for group in answers.deltas:
        shapes = group.part.shapes(group.spec)
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        for i, trained, row in zip(group.at, group.trained, group.rows, strict=True):
            pieces = np.split(row, ends[:-1])
            arrays = {
                name: piece.reshape(shape)
                for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
            }
            delta = Delta(
                group.spec, arrays, trained.num_examples, part=group.part, steps=trained.steps
            )
            contents[i] = hand_over(trained, delta)
    if len(contents) != len(answers.contents):
        raise RunError(f"a worker answered {len(contents)} of {len(answers.contents)} requests")
    return [contents[i] for i in range(len(contents))]


def _batch(requests: Sequence[tuple[Message, Context]], chosen: Sequence[int]) -> Batch:
    contents: dict[int, int] = {}  # id -> its place
    kept: list[RecordDict] = []
    rows = []
    for i in chosen:
        message, context = requests[i]
        content = message.content
        if id(content) not in contents:
            contents[id(content)] = len(kept)
            kept.append(content)
        client = int(context.node_config["partition-id"])
        rows.append((client, message.metadata.message_type, contents[id(content)]))
    return Batch(tuple(kept), tuple(rows))
