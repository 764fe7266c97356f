"""The rounds of one run, over any Flower Grid.

    wait for sites ─► draw a cohort ─► train ─► sum up ─► checkpoint ─► evaluate ─► next round
         │                              │
         └ too few until connect_s:     └ fewer than the quorum until deadline_s:
           RunError                       RunError, with each site and its reason

Every wait ends at a deadline, and every site that was asked ends each round as trained, or
failed with a reason. An answer after its deadline is recorded as late and dropped; its site is
asked again once it has nothing left to answer.

The engine is deterministic: cohorts are drawn from (seed, round) over the sites' names, and
deltas are summed in the order of names, so equal deltas give the same adapter, bit for bit,
however they travelled. Time is an argument.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import msgspec
import numpy as np
from flwr.serverapp import Grid

from anabranch.client.flower import (
    DESCRIBE,
    Describe,
    pack_assignment,
    pack_describe,
    payload_bytes,
)
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.aggregation.rule import Aggregator
from anabranch.server.flower import (
    Failure,
    Letter,
    Mailbox,
    Peer,
    Question,
    read_evaluated,
    read_trained,
)
from anabranch.server.result import Result, RoundReport, SiteRow, mean_metrics
from anabranch.server.roster import Roster


class Events(Protocol):
    """Where the engine tells what happens, as it happens; server/store.py writes it down."""

    def __call__(self, kind: str, **fields: Any) -> None:
        """Take one event."""


class RoundEngine:
    """Runs `config.federation` over `grid`; see the module's docstring."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        *,
        run: str,
        rule: Aggregator[Any] | None = None,
        evaluate: Callable[[Adapter], Mapping[str, float]] | None = None,
        checkpoint: Callable[[int, Adapter], None] = lambda round, adapter: None,
        event: Events = lambda kind, **fields: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        poll_s: float = 0.02,
        connect_s: float = 60.0,
    ) -> None:
        federation = config.federation
        # A private run releases no metrics of its records, so its clients are not asked.
        self._asks_clients = (
            federation.client_evaluation and config.training.holdout > 0 and config.privacy is None
        )
        if federation.early_stopping and not (self._asks_clients or evaluate):
            raise ConfigError(
                "federation.early_stopping compares evaluations, and there are none: set "
                "training.holdout above 0, or give the coordinator records of its own"
            )
        self._config, self._run = config, run
        self._rule: Aggregator[Any] = rule or rule_for(config)
        self._own_metrics, self._checkpoint, self._event = evaluate, checkpoint, event
        self._clock, self._sleep, self._poll_s = clock, sleep, poll_s
        self._connect_s = connect_s
        self._mail = Mailbox(grid, deadline_s=federation.deadline_s)
        self._roster = Roster(self._mail, pack_describe(Describe(run=run, config=config)))
        self._question: Question[Any] | None = None
        self._sites: dict[str, SiteRow] = {}

    def run(self, adapter: Adapter) -> Result:
        """Return the result of all rounds, starting from `adapter`.

        Raises RunError if too few sites connect, or a round stays below its quorum.
        """
        started, state = self._clock(), self._rule.init()
        history: list[RoundReport] = []
        best, best_round, best_score = adapter, 0, None
        for number in range(1, self._config.federation.rounds + 1):
            adapter, state, report = self._round(number, adapter, state)
            history.append(report)
            score = report.score
            if best_score is None or (score is not None and score > best_score):
                best, best_round, best_score = adapter, number, score
            patience = self._config.federation.early_stopping
            if patience is not None and number - best_round >= patience:
                self._event("stopped_early", round=number, best_round=best_round)
                break
        self._event("run_finished", rounds=len(history), best_round=best_round)
        return Result(
            adapter=adapter,
            best_adapter=best,
            best_round=best_round,
            history=tuple(history),
            sites=dict(sorted(self._sites.items())),
            bytes_up=sum(row.bytes_up for row in self._sites.values()),
            bytes_down=sum(row.bytes_down for row in self._sites.values()),
            seconds=self._clock() - started,
        )

    def _round(self, number: int, adapter: Adapter, state: Any) -> tuple[Adapter, Any, RoundReport]:
        started, federation = self._clock(), self._config.federation
        training = self._train(number, self._cohort(number), adapter)
        state, update = self._rule.apply(state, self._deltas(training))
        adapter = adapter.plus(update)
        self._checkpoint(number, adapter)
        self._event(
            "round_aggregated",
            round=number,
            sites=sorted(training.reports),
            num_examples=update.num_examples,
            update_norm=update.norm(),
            bytes_up=training.bytes_up,
            bytes_down=training.bytes_down,
            seconds=self._clock() - started,
        )
        due = number % federation.evaluate_every == 0 or number == federation.rounds
        testing = self._evaluate(number, adapter, due)
        report = RoundReport(
            round=number,
            asked=tuple(training.peers),
            trained=training.reports,
            failed=training.failed,
            update_norm=update.norm(),
            delta_norms=training.norms,
            evaluated=testing.reports,
            client=mean_metrics(testing.reports.values()),
            coordinator=dict(self._own_metrics(adapter)) if due and self._own_metrics else {},
            bytes_up=training.bytes_up + testing.bytes_up,
            bytes_down=training.bytes_down + testing.bytes_down,
            seconds=self._clock() - started,
        )
        self._event(
            "round_evaluated", round=number, client=report.client, coordinator=report.coordinator
        )
        return adapter, state, report

    def _cohort(self, number: int) -> dict[str, Peer]:
        """Wait until enough sites are connected; return those that train in this round."""
        federation = self._config.federation
        need = federation.quorum
        if number == 1:  # later, a site that is gone must not cost every round `connect_s`
            need = max(need, federation.cohort or 0)
        self._roster.retry()

        def enough() -> bool:
            self._roster.invite()
            return self._roster.settled() and len(self._roster.available()) >= need

        self._until(enough, self._clock() + self._connect_s)
        self._roster.give_up()
        peers = self._roster.available()
        if len(peers) < federation.quorum:
            raise RunError(self._too_few(number, peers))
        if federation.cohort is None or federation.cohort >= len(peers):
            return peers
        rng = np.random.default_rng([self._config.seed, number])
        drawn = rng.choice(len(peers), size=federation.cohort, replace=False)
        names = list(peers)
        return {names[i]: peers[names[i]] for i in sorted(drawn)}

    def _train(self, number: int, peers: Mapping[str, Peer], adapter: Adapter) -> Question[Trained]:
        """Ask `peers` to train; `_deltas` yields what they learned."""
        self._event("round_started", round=number, sites=list(peers))
        read = partial(read_trained, spec=adapter.spec)
        question: Question[Trained] = Question("train", number, peers, read)
        self._ask(question, adapter)
        return question

    def _deltas(self, question: Question[Trained]) -> Iterator[Delta]:
        """Yield the round's deltas in the order of names, each as soon as its turn has come.

        A delta that is ahead of its turn waits; one that was summed is let go. At the end, and
        so through the rule that consumes this, RunError if the quorum is not reached.
        """
        deadline = self._clock() + self._config.federation.deadline_s
        for name in question.peers:
            self._until(partial(question.heard, name), deadline)
            if name in question.deltas:
                yield question.deltas.pop(name)
            else:
                self._miss(question, name)
        self._question = None
        for name, trained in question.reports.items():
            self._sites[name] = self._sites[name].after(trained)
        if len(question.reports) < self._config.federation.quorum:
            raise RunError(self._below_quorum(question))

    def _evaluate(self, number: int, adapter: Adapter, due: bool) -> Question[Evaluated]:
        """Return the metrics of every connected site that has held-out records, if due."""
        peers: dict[str, Peer] = {}
        if due and self._asks_clients:
            peers = {name: p for name, p in self._roster.available().items() if p.held_out}
        question: Question[Evaluated] = Question("evaluate", number, peers, read_evaluated)
        if peers:
            self._ask(question, adapter)
            deadline = self._clock() + self._config.federation.deadline_s
            self._until(lambda: all(question.heard(name) for name in peers), deadline)
        for name in peers:
            self._miss(question, name)
        self._question = None
        return question

    def _ask(self, question: Question[Any], adapter: Adapter) -> None:
        """Send the adapter to the question's sites; `_listen` takes their answers in."""
        self._question = question
        assignment = Assignment(run=self._run, round=question.round, config=self._config)
        content = pack_assignment(assignment, wire.encode(adapter))
        size = payload_bytes(content)
        question.bytes_down = size * len(question.peers)
        letters = []
        for name, peer in question.peers.items():
            self._count(name, bytes_down=size)
            letters.append((Letter(question.kind, question.round, peer.node, name), content))
        self._mail.send(letters)

    def _miss(self, question: Question[Any], site: str) -> None:
        """Its time is over: unless it has been heard, whatever the site still says is late."""
        if not question.heard(site):
            limit = self._config.federation.deadline_s
            self._fail(question, site, Failure("deadline", f"no answer within {limit:g} s"))

    def _until(self, done: Callable[[], bool], deadline: float) -> None:
        """Listen until `done()` or the deadline; what has arrived by then is heard."""
        while True:
            self._listen()
            left = deadline - self._clock()
            if done() or left <= 0:
                return
            self._sleep(min(self._poll_s, left))

    def _listen(self) -> None:
        """Take in every answer that is there."""
        for letter, answer in self._mail.receive():
            question, site = self._question, letter.site
            if letter.kind == DESCRIBE:
                self._meet(letter.node, self._roster.hear(letter.node, answer))
                continue
            size = 0 if isinstance(answer, Failure) else payload_bytes(answer)
            self._count(site, bytes_up=size)
            if question is None or not question.expects(letter):
                self._count(site, late=1)
                self._event("site_late", site=site, round=letter.round, asked=letter.kind)
                continue
            question.bytes_up += size
            self._take(question, site, question.read(answer, question.peers[site]))

    def _take(
        self, question: Question[Any], site: str, got: tuple[Any, Delta | None] | Failure
    ) -> None:
        if isinstance(got, Failure):
            self._fail(question, site, got)
            return
        report, delta = got
        question.reports[site] = report
        facts = {"round": question.round, **msgspec.structs.asdict(report)}
        if delta is not None:
            question.deltas[site] = delta
            facts["norm"] = question.norms[site] = delta.norm()
        self._event("site_trained" if question.kind == "train" else "site_evaluated", **facts)

    def _fail(self, question: Question[Any], site: str, failure: Failure) -> None:
        question.failed[site] = failure
        self._count(site, failures=1)
        self._event(
            "site_failed",
            site=site,
            round=question.round,
            asked=question.kind,
            reason=failure.reason,
            message=failure.message,
        )

    def _meet(self, node: int, met: Peer | Failure) -> None:
        if isinstance(met, Failure):
            self._event("node_refused", node=node, reason=met.reason, message=met.message)
        else:
            self._event(
                "site_joined", site=met.name, num_examples=met.num_examples, held_out=met.held_out
            )

    def _count(self, site: str, **counts: float) -> None:
        self._sites[site] = self._sites.get(site, SiteRow()).plus(**counts)

    def _too_few(self, number: int, peers: Mapping[str, Peer]) -> str:
        return (
            f"round {number}: {self._config.federation.quorum} sites are needed, after "
            f"{self._connect_s:g} s there are {len(peers)}{_listed(peers)}; start the missing "
            "clients, or lower federation.quorum" + _lines(self._roster.problems())
        )

    def _below_quorum(self, question: Question[Trained]) -> str:
        lines = [f"{name}: {f.reason}: {f.message}" for name, f in question.failed.items()]
        return (
            f"round {question.round}: {len(question.reports)} of {len(question.peers)} sites sent "
            f"a delta that counts{_listed(question.reports)}, "
            f"{self._config.federation.quorum} are needed" + _lines(lines)
        )


def _listed(names: Mapping[str, object]) -> str:
    return f" ({', '.join(sorted(names))})" if names else ""


def _lines(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in sorted(lines))
