"""Rounds in step: a cohort is asked, and all of it is waited for, or the first K deltas.

    wait for sites ─► draw a cohort ─► train ─► deltas in the order of names
         │                              │
         └ too few until connect_s:     └ fewer than the quorum until deadline_s:
           RunError                       RunError, with each site and its reason

Cohorts are drawn from (seed, round) over the sites' names. In a client-private run they are
Poisson samples from a secret stream, and there is no quorum: a round's size must decide nothing,
so few deltas, or none, are a round as any other, of the same noise.

With `federation.over_selection` more sites are asked than are needed. The first K deltas to
arrive count; whoever comes later is late, and dropped. With `federation.tiers` cohorts are drawn
among sites of like speed. Both let time decide who counts (server/selection.py); given who does,
the merge is as deterministic as without them: in the order of names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import RunError
from anabranch.protocols.messages import Trained
from anabranch.server.aggregation.rule import Merged
from anabranch.server.assigning import Assigner
from anabranch.server.client_privacy import PoissonCohorts
from anabranch.server.desk import answers
from anabranch.server.exchange import Exchange
from anabranch.server.flower import Failure, Peer, Question
from anabranch.server.selection import Latencies, asked_for, draw, draw_tier, tiers
from anabranch.server.shortfall import below_quorum
from anabranch.server.sums.rounds import SecureSums

SURPLUS = "surplus"  # the reason of a site that was asked, and not needed
SILENT = frozenset({"deadline", SURPLUS})  # it takes at least as long as it was waited for


class Synchronous:
    """Asks every round's cohort, and merges its deltas; `private`: how cohorts are drawn."""

    def __init__(
        self, exchange: Exchange, assigner: Assigner, private: PoissonCohorts | None = None
    ) -> None:
        self._exchange, self._assigner, self._private = exchange, assigner, private
        self._config = exchange.config
        secure = self._config.secure_aggregation
        self._secure = None if secure is None else SecureSums(exchange, assigner, secure)
        self.latencies = Latencies()
        self._measured: tuple[int, set[str]] = (0, set())  # the round, and who was measured in it

    def merge(
        self,
        number: int,
        state: Any,
        adapter: Adapter,
        masking: Callable[[], None] = lambda: None,
    ) -> tuple[Any, Merged, Question[Trained]]:
        """Let a cohort train `adapter`; return the rule's new state, what it merged, and of what.

        `masking` is called before masked vectors are asked for. Raises RunError if too few sites
        connect, one of them cannot train its part, too few send a delta that counts, or a secure
        sum cannot be opened.
        """
        question = self._assigner.question(number, adapter.spec)
        cohort = self._drawn(number, self._exchange.connect(number))
        if self._secure is not None:
            self._secure.require_possible(adapter.spec, self._most_summed(cohort))
        contents = self._assigner.put(question, adapter, cohort)
        self._exchange.event("round_started", round=number, sites=list(cohort))
        self._exchange.ask(question, contents)
        if self._secure is not None:
            for _ in self._deltas(question):
                raise RunError(f"round {number}: a delta came that was to be kept for a secure sum")
            summed = self._secure.sum(question, adapter, masking)
            self._count(question)
            state, merged = self._assigner.rule.merge(state, adapter, summed.deltas)
            clients = len(summed.survivors)
            return state, replace(merged, error=None, clients=clients), question
        state, merged = self._assigner.rule.merge(state, adapter, self._deltas(question))
        return state, merged, question

    def _most_summed(self, cohort: Collection[str]) -> int:
        """Return how many of those asked are in the sum, at most: with over-selection not all."""
        federation = self._config.federation
        if federation.cohort is None or not federation.over_selection:
            return len(cohort)
        return min(len(cohort), federation.cohort)

    def _drawn(self, number: int, peers: Mapping[str, Peer]) -> dict[str, Peer]:
        if self._private is not None:
            return {name: peers[name] for name in self._private.draw(list(peers))}
        federation, names = self._config.federation, list(peers)
        size = federation.cohort
        if size is None or size >= len(peers):
            return dict(peers)
        rng = np.random.default_rng([self._config.seed, number])
        asked = asked_for(size, federation.over_selection)
        if federation.tiers is None:
            chosen = draw(names, size, asked - size, rng)
        else:
            means = self.latencies.means(names)
            groups = tiers(means, federation.tiers, asked)
            unmeasured = [name for name in names if name not in means]
            chosen = draw_tier(names, [*groups, unmeasured], asked, rng)
        return {name: peers[name] for name in chosen}

    def _deltas(self, question: Question[Trained]) -> Iterator[Delta]:
        """Yield the round's deltas in the order of names, each as soon as its turn has come.

        A delta that is ahead of its turn waits; one that was summed is let go. At the end, and
        so through the rule that consumes this, RunError if the quorum is not reached.
        """
        exchange, federation = self._exchange, self._config.federation
        started = exchange.clock()
        deadline = started + federation.deadline_s
        if federation.over_selection and federation.cohort is not None:
            self._wait_for_first(question, federation.cohort, started, deadline)
        for name in question.peers:
            if not question.heard(name):
                self._until(question, partial(question.heard, name), started, deadline)
            if name in question.deltas:
                yield question.deltas.pop(name)
            else:
                exchange.miss(question, name)
        exchange.close(question)
        self._measure(
            question, [n for n, f in question.failed.items() if f.reason in SILENT], started
        )
        need = federation.quorum if self._private is None else 0
        if self._secure is None:
            self._count(question)
        else:
            need = self._secure.needed
        if len(question.reports) < need:
            raise RunError(below_quorum(question, need))

    def _count(self, question: Question[Trained]) -> None:
        """Add the round to the rows of the sites whose deltas count."""
        for name, trained in question.reports.items():
            self._exchange.sites[name] = self._exchange.sites[name].after(trained)

    def _wait_for_first(
        self, question: Question[Trained], size: int, started: float, deadline: float
    ) -> None:
        """Wait until `size` deltas are there; then nobody else is waited for."""
        exchange = self._exchange

        def enough() -> bool:
            heard = len(question.reports) + len(question.failed)
            return len(question.reports) >= size or heard == len(question.peers)

        self._until(question, enough, started, deadline)
        if len(question.reports) < size:
            return
        for name in list(question.reports)[size:]:  # in the order of arrival
            for held in (question.reports, question.deltas, question.norms):
                held.pop(name, None)
            exchange.count(name, late=1)
            exchange.event("site_late", site=name, round=question.round, asked=question.kind)
        for name in [name for name in question.peers if not question.heard(name)]:
            question.failed[name] = Failure(SURPLUS, f"{size} deltas were there before its own")
            exchange.event("site_surplus", site=name, round=question.round)

    def _until(
        self,
        question: Question[Trained],
        done: Callable[[], bool],
        started: float,
        deadline: float,
    ) -> None:
        """Listen until `done()` or the deadline; with tiers, note how long each answer took."""

        def look() -> bool:
            self._measure(question, question.reports, started)
            return done()

        quorum = self._config.federation.quorum if self._secure is None else self._secure.needed
        kept = "" if self._private is not None else f", if they are {quorum} or more"
        then = f"the round is merged from those that answered{kept}"
        self._exchange.until(look, deadline, answers(question, started, then))

    def _measure(self, question: Question[Trained], sites: Iterable[str], started: float) -> None:
        """Take the time of these sites' answers, each once in a round."""
        if self._config.federation.tiers is None:
            return
        if self._measured[0] != question.round:
            self._measured = question.round, set()
        seconds = self._exchange.clock() - started
        for name in sites:
            if name not in self._measured[1]:
                self._measured[1].add(name)
                self.latencies.take(name, seconds)
