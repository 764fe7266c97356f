"""The rounds of one run, over any Flower Grid.

    sites train ─► deltas are merged ─► checkpoint ─► evaluate ─► next round

Who is asked, and how long a round waits, is in server/synchronous.py (a cohort, and all of it)
or server/buffered_rounds.py (the first K that are ready). Every wait ends at a deadline, and
every site that was asked ends as trained, or failed with a reason. An answer after its deadline
is recorded as late and dropped; its site is asked again once it has nothing left to answer.

What the numbers are is the rule's (server/aggregation/rule.py): it opens the adapter that is
sent out, says which part each site trains, and merges what comes back.

The engine is deterministic: in synchronous rounds deltas are merged in the order of names, so
equal deltas give the same adapter, bit for bit, however they travelled. Time is an argument.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.serverapp import Grid

from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.messages import Evaluated
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.aggregation.private import ClientPrivate, require_planned
from anabranch.server.aggregation.rule import Rule
from anabranch.server.assigning import Assigner
from anabranch.server.buffered_rounds import Buffered
from anabranch.server.change import update_norm
from anabranch.server.client_privacy import PoissonCohorts, epsilon_after, plan_of, published
from anabranch.server.exchange import Events, Exchange
from anabranch.server.flower import Peer, Question, read_evaluated
from anabranch.server.result import Result, RoundReport, mean_metrics
from anabranch.server.synchronous import Synchronous


class RoundEngine:
    """Runs `config.federation` over `grid`; see the module's docstring.

    With [client_privacy], `randomness` draws cohorts and noise: leave it out but for tests, and
    a new key comes from the operating system. Raises ConfigError for tables that need what is
    not there, PrivacyError if the run cannot be client-private; nobody has been asked then.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        *,
        run: str,
        rule: Rule[Any] | None = None,
        randomness: Randomness | None = None,
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
            federation.client_evaluation
            and config.training.holdout > 0
            and config.privacy is None
            and config.client_privacy is None
        )
        if federation.early_stopping and not (self._asks_clients or evaluate):
            raise ConfigError(
                "federation.early_stopping compares evaluations, and there are none: set "
                "training.holdout above 0, or give the coordinator records of its own"
            )
        self._config, self._event, self._clock = config, event, clock
        self._plan, secret = plan_of(config), randomness or Randomness.fresh()
        if rule is not None and self._plan is not None:
            raise ConfigError(
                "[client_privacy] is built around the rule of run.toml: give no other"
            )
        self._rule: Rule[Any] = rule or rule_for(config, self._plan, secret.normal)
        cohorts = None if self._plan is None else PoissonCohorts(self._plan, secret.sample)
        self._own_metrics, self._checkpoint = evaluate, checkpoint
        self._exchange = Exchange(
            grid,
            config,
            run=run,
            event=event,
            clock=clock,
            sleep=sleep,
            poll_s=poll_s,
            connect_s=connect_s,
        )
        self._assigner = Assigner(rule=self._rule, config=config, run=run)
        self._sites: Synchronous | Buffered = (
            Synchronous(self._exchange, self._assigner, cohorts)
            if federation.buffer is None
            else Buffered(self._exchange, self._assigner, federation.buffer)
        )

    def run(self, adapter: Adapter) -> Result:
        """Return the result of all rounds, starting from `adapter`.

        Raises RunError if too few sites connect, a round stays below its quorum, or the rule
        cannot use a site's rank.
        """
        started = self._clock()
        state, adapter = self._rule.init(adapter)
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
        if self._plan is not None:
            require_planned(self._plan, state.made, len(history))
        self._event("run_finished", rounds=len(history), best_round=best_round)
        rows = dict(sorted(self._exchange.sites.items()))
        result = Result(
            adapter=adapter,
            best_adapter=best,
            best_round=best_round,
            history=tuple(history),
            sites=rows,
            bytes_up=sum(row.bytes_up for row in rows.values()),
            bytes_down=sum(row.bytes_down for row in rows.values()),
            seconds=self._clock() - started,
        )
        return result if self._plan is None else published(result)

    def _round(self, number: int, adapter: Adapter, state: Any) -> tuple[Adapter, Any, RoundReport]:
        started, federation, rule = self._clock(), self._config.federation, self._rule
        sent = rule.open(state, adapter, number)
        state, merged, training = self._sites.merge(number, state, sent)
        if self._plan is not None:
            self._noised(number, state)
        self._checkpoint(number, merged.adapter)
        moved = update_norm(sent, merged.adapter, regauged=rule.regauges)
        error = merged.error if merged.error is None or math.isfinite(merged.error) else None
        self._event(
            "round_aggregated",
            round=number,
            method=rule.name,
            sites=sorted(training.reports),
            ages=training.ages,
            num_examples=merged.num_examples,
            update_norm=moved,
            aggregation_error=error,
            bytes_up=training.bytes_up,
            bytes_down=training.bytes_down,
            seconds=self._clock() - started,
        )
        due = number % federation.evaluate_every == 0 or number == federation.rounds
        testing = self._evaluate(number, merged.adapter, due)
        own = dict(self._own_metrics(merged.adapter)) if due and self._own_metrics else {}
        report = RoundReport(
            round=number,
            asked=tuple(sorted(training.peers)),
            trained=training.reports,
            failed=training.failed,
            method=rule.name,
            update_norm=moved,
            aggregation_error=error,
            delta_norms=training.norms,
            ages=training.ages,
            evaluated=testing.reports,
            client=mean_metrics(testing.reports.values()),
            coordinator=own,
            bytes_up=training.bytes_up + testing.bytes_up,
            bytes_down=training.bytes_down + testing.bytes_down,
            seconds=self._clock() - started,
        )
        self._event(
            "round_evaluated", round=number, client=report.client, coordinator=report.coordinator
        )
        return merged.adapter, state, report

    def _noised(self, number: int, state: ClientPrivate[Any]) -> None:
        """Check the round's noise against the plan before anything of it is written."""
        assert self._plan is not None
        require_planned(self._plan, state.made, number)
        self._event(
            "client_noise",
            round=number,
            noise_multiplier=state.made[-1],
            noisy_rounds=len(state.made),
            clipping_norm=state.clipped_at,
            next_clipping_norm=state.clipping_norm,
            share_within=state.share,
            epsilon=epsilon_after(self._plan, number),
        )

    def _evaluate(self, number: int, adapter: Adapter, due: bool) -> Question[Evaluated]:
        """Return the metrics of every site that is free and has held-out records, if due."""
        exchange, peers = self._exchange, dict[str, Peer]()
        if due and self._asks_clients:
            peers = {name: p for name, p in exchange.roster.available().items() if p.held_out}
        question: Question[Evaluated] = Question("evaluate", number, peers, read_evaluated)
        if peers:
            content = self._assigner.evaluation(number, adapter)
            exchange.ask(question, dict.fromkeys(peers, content))
            deadline = self._clock() + self._config.federation.deadline_s
            exchange.until(lambda: all(question.heard(name) for name in peers), deadline)
        for name in peers:
            exchange.miss(question, name)
        exchange.close(question)
        return question
