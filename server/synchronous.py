"""Rounds in step: a cohort is asked, and all of it is waited for.

    wait for sites ─► draw a cohort ─► train ─► deltas in the order of names
         │                              │
         └ too few until connect_s:     └ fewer than the quorum until deadline_s:
           RunError                       RunError, with each site and its reason

Cohorts are drawn from (seed, round) over the sites' names. In a client-private run they are
Poisson samples from a secret stream, and there is no quorum: a round's size must decide nothing,
so few deltas, or none, are a round as any other, of the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import RunError
from anabranch.protocols.messages import Trained
from anabranch.server.aggregation.rule import Merged
from anabranch.server.assigning import Assigner
from anabranch.server.client_privacy import PoissonCohorts
from anabranch.server.exchange import Exchange
from anabranch.server.flower import Peer, Question


class Synchronous:
    """Asks every round's cohort, and merges its deltas; `private`: how cohorts are drawn."""

    def __init__(
        self, exchange: Exchange, assigner: Assigner, private: PoissonCohorts | None = None
    ) -> None:
        self._exchange, self._assigner, self._private = exchange, assigner, private
        self._config = exchange.config

    def merge(
        self, number: int, state: Any, adapter: Adapter
    ) -> tuple[Any, Merged, Question[Trained]]:
        """Let a cohort train `adapter`; return the rule's new state, what it merged, and of what.

        Raises RunError if too few sites connect, one of them cannot train its part, or too few
        send a delta that counts.
        """
        question = self._assigner.question(number, adapter.spec)
        cohort = self._drawn(number, self._exchange.connect(number))
        contents = self._assigner.put(question, adapter, cohort)
        self._exchange.event("round_started", round=number, sites=list(cohort))
        self._exchange.ask(question, contents)
        state, merged = self._assigner.rule.merge(state, adapter, self._deltas(question))
        return state, merged, question

    def _drawn(self, number: int, peers: Mapping[str, Peer]) -> dict[str, Peer]:
        if self._private is not None:
            return {name: peers[name] for name in self._private.draw(list(peers))}
        size = self._config.federation.cohort
        if size is None or size >= len(peers):
            return dict(peers)
        rng = np.random.default_rng([self._config.seed, number])
        drawn = rng.choice(len(peers), size=size, replace=False)
        names = list(peers)
        return {names[i]: peers[names[i]] for i in sorted(drawn)}

    def _deltas(self, question: Question[Trained]) -> Iterator[Delta]:
        """Yield the round's deltas in the order of names, each as soon as its turn has come.

        A delta that is ahead of its turn waits; one that was summed is let go. At the end, and
        so through the rule that consumes this, RunError if the quorum is not reached.
        """
        exchange = self._exchange
        deadline = exchange.clock() + self._config.federation.deadline_s
        for name in question.peers:
            exchange.until(partial(question.heard, name), deadline)
            if name in question.deltas:
                yield question.deltas.pop(name)
            else:
                exchange.miss(question, name)
        exchange.close(question)
        for name, trained in question.reports.items():
            exchange.sites[name] = exchange.sites[name].after(trained)
        if self._private is not None:
            return
        if len(question.reports) < self._config.federation.quorum:
            raise RunError(exchange.below_quorum(question))
