"""A Flower Grid of simulated clients: a round's requests are answered together, in virtual time.

    push ─► each request gets the time at which its answer is there (journeys), or never
    pull ─► answers whose time has come; what was not computed yet is computed now, in cohorts
    sleep ─► virtual time jumps to the next answer, to the next client that comes online, or to the
             end of the sleep, whichever is first

Any ServerApp and any Flower strategy runs on it, our round engine with `clock` and `sleep` of
this Grid, so that it waits without waiting. Without journeys every answer is there at once and
time stands still.

An answer is computed when the first one of its batch is asked for: those after it in the order
of arrival come along, so that clients are trained together. What nobody asks for is not trained
at all: who is late, lost or over-selected costs nothing here, whatever it costs there.

A message that nothing answers comes back as Flower's error when its time to live is over, as a
SuperLink sends it: until then its client has something left to answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flwr.app import Context, Message, MessageType, RecordDict

from anabranch.simulations.grid import EXPIRED, LocalGrid, answered, error_reply, number

Executor = Callable[[Sequence[tuple[Message, Context]]], list[Message]]

FIRST_NODE = 1001


class Journeys(Protocol):
    """What lies between the coordinator and its clients, in virtual seconds."""

    def reachable(self, now: float) -> Sequence[int]:
        """Return the indices of the clients that are connected."""

    def answered_at(self, client: int, message: Message, now: float) -> float | None:
        """Return when the answer to a message that leaves now will be there; None: never."""

    def next_change(self, now: float) -> float:
        """Return when somebody connects or leaves next, above `now`; infinity: never."""


@runtime_checkable
class Bookkeeping(Journeys, Protocol):
    """Journeys that know which answers count nowhere (simulations/clock): these are not computed.

    `listening` is how they learn it: from what the round engine tells.
    """

    def spared(self, client: int, message: Message) -> Message | None:
        """Return the reply of a client that need not train any more; None: it has to."""

    def computed(self, message: Message) -> None:
        """Note that the answer to this message is being computed."""

    def listening(self, clock: Callable[[], float], event: Any) -> Any:
        """Return `event` (server/exchange.py), which these journeys hear from now on, too."""


class Tampering(Protocol):
    """What is done to messages on their way: faults and attacks (simulations/faults)."""

    def request(self, client: int, message: Message) -> list[Message]:
        """Return the request as the client gets it: not at all, once, or more often."""

    def reply(self, client: int, reply: Message, request: Message) -> list[Message]:
        """Return the reply as the coordinator gets it: none, one, or more of them."""


@dataclass(eq=False)
class _Pending:
    """A request under way."""

    order: int
    client: int
    message: Message
    due: float  # virtual time of the answer
    expires: float  # virtual time at which Flower answers in its stead
    replies: list[Message] | None = None  # None: not computed yet


class VirtualGrid(LocalGrid):
    """`clients` nodes, whose messages `execute` answers.

    `ahead` is how many answers are computed together, the cohort of a run. `needed` is how many
    of the answers to one round's request to train count, if not all do: more are computed one by
    one, when one of them is no good.
    """

    def __init__(
        self,
        execute: Executor,
        clients: int,
        *,
        journeys: Journeys | None = None,
        tampering: Tampering | None = None,
        ahead: int | None = None,
        needed: int | None = None,
    ) -> None:
        if clients < 1:
            raise ValueError(f"expected clients, got {clients}")
        super().__init__()
        self._execute, self._clients, self._journeys = execute, clients, journeys
        self._tampering, self._ahead = tampering, ahead
        self._books = journeys if isinstance(journeys, Bookkeeping) else None
        self._needed, self._computed = needed, Counter[str]()  # round -> answers, of training
        self._now = 0.0
        self._pushed = 0
        self._fresh = False  # whether something was pushed since the last pull
        self._pending: dict[str, _Pending] = {}
        self._contexts: dict[int, Context] = {}  # of clients that keep something in it

    def clock(self) -> float:
        """Return the virtual time, in seconds since the beginning."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass: until something happens, at most `seconds`."""
        end = self._now + seconds
        fresh, self._fresh = self._fresh, False
        if fresh and any(one.due <= self._now for one in self._pending.values()):
            return  # an answer is there already, and whoever sleeps has not looked yet
        events = [one.due for one in self._pending.values() if one.due > self._now]
        if self._journeys is not None:
            events.append(self._journeys.next_change(self._now))
        at = min(end, *events) if events else end
        if not math.isfinite(at):
            raise RuntimeError("the coordinator waits for ever, and nothing is under way")
        self._now = max(self._now, at)

    def get_node_ids(self) -> Sequence[int]:
        """Return the ids of the clients that are connected now."""
        if self._journeys is None:
            return range(FIRST_NODE, FIRST_NODE + self._clients)
        return [FIRST_NODE + client for client in self._journeys.reachable(self._now)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages on their way; return the ids to pull replies by."""
        ids = []
        for message in messages:
            name = number(message)
            ids.append(name)
            client = message.metadata.dst_node_id - FIRST_NODE
            due: float | None = self._now
            if self._journeys is not None:
                due = self._journeys.answered_at(client, message, self._now)
            expires = self._now + message.metadata.ttl
            one = _Pending(self._pushed, client, message, expires if due is None else due, expires)
            if due is None or due > expires:
                _expire(one)
            self._pending[name] = one
            self._pushed += 1
            self._fresh = True
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies whose time has come, each once, in the order of arrival."""
        self._fresh = False
        wanted = [(i, self._pending[i]) for i in message_ids if i in self._pending]
        due = [(i, one) for i, one in wanted if one.due <= self._now]
        due.sort(key=lambda pair: (pair[1].due, pair[1].order))
        replies = []
        for i, one in due:
            while one.replies is None:
                self._compute()
            if not one.replies:  # it was lost on its way, or the client died
                _expire(one)
            if one.due <= self._now:
                replies += self._pending.pop(i).replies or []
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push, wait in virtual time for all replies or until `timeout`, and pull."""
        ids = self.push_messages(messages)
        end = math.inf if timeout is None else self._now + timeout
        replies = []
        while True:
            if all(self._pending[i].due <= self._now for i in ids) or self._now >= end:
                replies += self.pull_messages(ids)
                ids = [i for i in ids if i in self._pending]
            if not ids or self._now >= end:
                return replies
            self.sleep(end - self._now)

    def _compute(self) -> None:
        """Compute the next answers in the order of arrival, `ahead` of them."""
        waiting = [one for one in self._pending.values() if one.replies is None]
        waiting.sort(key=lambda one: (one.due, one.order))
        batch, change = self._batch(waiting), self._tampering
        if not batch:
            return
        contexts = [self._context(one.client) for one in batch]
        copies = [
            [one.message] if change is None else change.request(one.client, one.message)
            for one in batch
        ]
        for one in batch:
            one.replies = []
        for turn in range(max(map(len, copies))):  # who is asked twice answers one by one
            asked = [i for i, requests in enumerate(copies) if len(requests) > turn]
            answers = self._execute([(copies[i][turn], contexts[i]) for i in asked])
            for i, reply in zip(asked, answers, strict=True):
                one, replies = batch[i], batch[i].replies
                assert replies is not None
                number(reply)
                replies += (
                    [reply] if change is None else change.reply(one.client, reply, one.message)
                )
        for one, context in zip(batch, contexts, strict=True):
            if len(context.state):
                self._contexts[one.client] = context

    def _batch(self, waiting: Sequence[_Pending]) -> list[_Pending]:
        """Return what is computed now, at least the first that must be; the spared are answered.

        No client is in it twice.
        """
        batch: list[_Pending] = []
        taken: set[int] = set()
        for one in waiting:
            if one.client in taken:  # its next round begins with what it keeps of this one
                break
            reply = None if self._books is None else self._books.spared(one.client, one.message)
            if reply is not None:
                number(reply)
                one.replies = [reply]
                continue
            metadata = one.message.metadata
            if self._needed is not None and metadata.message_type == MessageType.TRAIN:
                if batch and self._computed[metadata.group_id] >= self._needed:
                    break
                self._computed[metadata.group_id] += 1
            if self._books is not None:
                self._books.computed(one.message)
            batch.append(one)
            taken.add(one.client)
            if len(batch) == self._ahead:
                break
        return batch

    def _context(self, client: int) -> Context:
        held = self._contexts.get(client)
        if held is not None:
            return held
        return Context(
            run_id=self._run.run_id,
            node_id=FIRST_NODE + client,
            node_config={"partition-id": client, "num-partitions": self._clients},
            state=RecordDict(),
            run_config={},
        )


def _expire(one: _Pending) -> None:
    """Let Flower answer, at the end of the message's time to live."""
    reply = error_reply(one.message, EXPIRED, "no reply in the time to live")
    number(reply)
    one.due, one.replies = one.expires, [reply]


def one_by_one(app: Callable[[Message, Context], Message]) -> Executor:
    """Return an executor that calls any Flower ClientApp, message by message."""

    return lambda requests: [answered(app, message, context) for message, context in requests]
