"""Rounds that do not wait for the slowest: merge as soon as K deltas are there.

FedBuff (Nguyen et al. 2022, arXiv:2106.06639, Algorithm 1). Round t sends out adapter t, and
ends with a merge; K = federation.buffer.

    every idle site ─► asked with adapter t ─► trains ─► its delta is ready
                            ▲                                │
                            └── round t + 1 ◄── merge ◄── K sites have a delta ready

A delta of round q that is merged in round t has age t − q, and counts 1 / √(1 + age) times
(server/aggregation/buffered.py). Those that are ready longest are merged first.

A site trains at most once in a round and counts at most once in a merge: a second delta of it
waits for the next one. So K may be more than can come; the round ends, too, when all that were
asked have been heard. `cohort`, if set, is how many train at a time.

Metrics are asked of sites that are free when a round ends, so they may be of few sites, or none:
records of the coordinator compare rounds better.

Every wait ends: a site has failed `deadline_s` after it was asked, and the round is merged from
what is there `deadline_s` after it began. Below the quorum it is a RunError with each site and
its reason. Given which deltas are ready, the merge is deterministic: by round, then by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import RunError
from anabranch.protocols.messages import Trained
from anabranch.server.aggregation.buffered import buffered
from anabranch.server.aggregation.rule import Merged
from anabranch.server.assigning import Assigner
from anabranch.server.desk import Waiting
from anabranch.server.exchange import Exchange
from anabranch.server.flower import Question
from anabranch.server.shortfall import below_quorum


class Buffered:
    """Keeps sites training across rounds, and merges K deltas at a time."""

    def __init__(self, exchange: Exchange, assigner: Assigner, size: int) -> None:
        self._exchange, self._assigner, self._size = exchange, assigner, size
        self._config, self._merge = exchange.config, buffered(assigner.rule)
        self._open: list[Question[Trained]] = []  # by round, until all of it was merged
        self._limits: dict[tuple[int, str], float] = {}  # (round, site) -> its deadline
        self._reported: set[tuple[int, str]] = set()  # failures that a report has named
        self._connected = False

    def merge(
        self,
        number: int,
        state: Any,
        adapter: Adapter,
        masking: Callable[[], None] = lambda: None,
    ) -> tuple[Any, Merged, Question[Trained]]:
        """Ask every idle site to train `adapter`, and merge the next K deltas into it.

        Returns the rule's new state, what it merged, and of what: the question's peers are the
        sites asked in this round, its reports those that count, its failures those that became
        known in this round. Raises RunError as `Synchronous.merge` does.
        """
        exchange = self._exchange
        if not self._connected:
            exchange.connect(number)
            self._connected = True
        exchange.retry()
        asked = self._assigner.question(number, adapter.spec)
        self._open.append(asked)
        self._ask_idle(asked, adapter)
        exchange.event("round_started", round=number, sites=list(asked.peers))
        told = Question("train", number, asked.peers, asked.read)
        state, merged = self._merge(state, adapter, self._aged(asked, told, adapter))
        return state, merged, told

    def _aged(
        self, asked: Question[Trained], told: Question[Trained], adapter: Adapter
    ) -> Iterator[tuple[Delta, int]]:
        """Wait until the buffer is full, then yield its deltas, each with its age."""
        exchange, quorum = self._exchange, self._config.federation.quorum
        started = exchange.clock()

        def done() -> bool:
            self._ask_idle(asked, adapter)
            self._give_up()
            ready = len(self._ready())
            if ready >= self._size or self._under_way():
                return ready >= self._size
            return ready >= quorum or exchange.clock() >= started + exchange.connect_s

        waiting = Waiting(
            why=lambda: (
                f"{self._size} deltas for round {told.round}, {len(self._ready())} are here"
            ),
            who=self._training,
            then=f"the round is merged from those that are here, if they are {quorum} or more",
            since=started,
        )
        exchange.until(done, started + self._config.federation.deadline_s, waiting)
        exchange.over()
        chosen = self._ready()[: self._size]
        for name, source in chosen:
            self._count(told, name, source)
        self._settle(told)
        if len(chosen) < quorum:
            raise RunError(below_quorum(told, quorum))
        for name, source in chosen:
            yield source.deltas.pop(name), told.ages.get(name, 0)
        for source in [one for one in self._open if not self._unfinished(one)]:
            self._open.remove(source)
            exchange.close(source)

    def _ask_idle(self, asked: Question[Trained], adapter: Adapter) -> None:
        """Send this round's adapter to sites that have nothing to do and have not had it."""
        exchange, federation = self._exchange, self._config.federation
        exchange.invite(exchange.clock() + federation.deadline_s)
        idle = {n: p for n, p in exchange.roster.available().items() if n not in asked.peers}
        if federation.cohort is not None and idle:
            free = max(0, federation.cohort - self._under_way())
            rng = np.random.default_rng([self._config.seed, asked.round])
            drawn = rng.permutation(len(idle))[:free]
            idle = {list(idle)[i]: list(idle.values())[i] for i in sorted(drawn)}
        if not idle:
            return
        limit = exchange.clock() + federation.deadline_s
        self._limits.update({(asked.round, name): limit for name in idle})
        exchange.ask(asked, self._assigner.put(asked, adapter, idle))

    def _ready(self) -> list[tuple[str, Question[Trained]]]:
        """Return (site, where its delta is), each site once, by round and then by name."""
        ready: dict[str, Question[Trained]] = {}
        for source in self._open:
            for name in sorted(source.deltas):
                ready.setdefault(name, source)
        return list(ready.items())

    def _under_way(self) -> int:
        """Return how many sites are training."""
        return sum(not source.heard(name) for source in self._open for name in source.peers)

    def _training(self) -> list[str]:
        """Return who is training, ascending."""
        return sorted({n for one in self._open for n in one.peers if not one.heard(n)})

    def _unfinished(self, source: Question[Trained]) -> bool:
        return bool(source.deltas) or not all(source.heard(name) for name in source.peers)

    def _give_up(self) -> None:
        """Let every site fail whose time is over."""
        now = self._exchange.clock()
        for source in self._open:
            for name in source.peers:
                if now >= self._limits[source.round, name]:
                    self._exchange.miss(source, name)

    def _count(self, told: Question[Trained], name: str, source: Question[Trained]) -> None:
        """Take a site's report into the merge's."""
        trained, age = source.reports[name], told.round - source.round
        told.reports[name], told.norms[name] = trained, source.norms[name]
        row = self._exchange.sites[name].after(trained)
        if age:
            told.ages[name] = age
            row = row.plus(stale=1)
        self._exchange.sites[name] = row

    def _settle(self, told: Question[Trained]) -> None:
        """Move what was sent and what failed since the last merge into this one's report."""
        for source in self._open:
            told.bytes_up, source.bytes_up = told.bytes_up + source.bytes_up, 0
            told.bytes_down, source.bytes_down = told.bytes_down + source.bytes_down, 0
            for name, failure in source.failed.items():
                if (source.round, name) not in self._reported:
                    self._reported.add((source.round, name))
                    told.failed[name] = failure
