"""The rounds of one run, over any Flower Grid.

    sites train ─► deltas are merged ─► checkpoint ─► evaluate ─► next round

Who is asked, and how long a round waits, is in server/synchronous.py (a cohort, and all of it)
or server/buffered_rounds.py (the first K that are ready). Every wait ends at a deadline, and
every site that was asked ends as trained, or failed with a reason. An answer after its deadline
is recorded as late and dropped; its site is asked again once it has nothing left to answer.

What the numbers are is the rule's (server/aggregation/rule.py): it opens the adapter that is
sent out, says which part each site trains, and merges what comes back.

A round that was merged is kept before its checkpoint is written: a coordinator that is started
again goes on from there (server/progress.py).

The engine is deterministic: in synchronous rounds deltas are merged in the order of names, so
equal deltas give the same adapter, bit for bit, however they travelled. Time is an argument.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter, RunError
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.secagg.terms import Roster
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.aggregation.private import ClientPrivate, require_planned
from anabranch.server.aggregation.rule import Rule
from anabranch.server.asking import meet, metrics
from anabranch.server.assigning import Assigner
from anabranch.server.buffered_rounds import Buffered
from anabranch.server.change import update_norm
from anabranch.server.client_privacy import (
    PoissonCohorts,
    epsilon_after,
    plan_of,
    published,
    summed_noise,
)
from anabranch.server.desk import ALONE, Desk
from anabranch.server.exchange import Events, Exchange
from anabranch.server.progress import Progress
from anabranch.server.result import Result, RoundReport, SiteRow, mean_metrics
from anabranch.server.synchronous import Synchronous


class RoundEngine:
    """Runs `config.federation` over `grid`; see the module's docstring.

    `progress` is handed what has been done after every merge, and again after its evaluation
    (server/progress.py); `run` goes on from there in another process. `signed` goes with every
    message; `desk` is what the coordinator knows of its sites beside (server/desk.py); `peers` is
    the roster that a run with [secure_aggregation] was proposed with.

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
        progress: Callable[[Progress], None] = lambda progress: None,
        event: Events = lambda kind, **fields: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        poll_s: float = 0.02,
        connect_s: float = 60.0,
        signed: Signed | None = None,
        desk: Desk = ALONE,
        retry_s: float = 5.0,
        peers: Roster | None = None,
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
        self._own_metrics, self._checkpoint, self._progress = evaluate, checkpoint, progress
        self._run, self._cohorts = run, cohorts
        self._exchange = Exchange(
            grid,
            config,
            run=run,
            event=event,
            clock=clock,
            sleep=sleep,
            poll_s=poll_s,
            connect_s=connect_s,
            signed=signed,
            desk=desk,
            retry_s=retry_s,
            peers=peers,
        )
        self._assigner = Assigner(rule=self._rule, config=config, run=run, signed=signed)
        self._sites: Synchronous | Buffered = (
            Synchronous(self._exchange, self._assigner, cohorts)
            if federation.buffer is None
            else Buffered(self._exchange, self._assigner, federation.buffer)
        )

    def run(self, adapter: Adapter, progress: Progress | None = None) -> Result:
        """Return the result of all rounds, starting from `adapter`, or going on from `progress`.

        A run that goes on after a merge ends with the adapter of one that was never stopped, bit
        for bit, if its rounds are synchronous and its sites answer the same. A round that was
        under way is asked again. Deltas that a buffer held are lost, and their sites asked again.

        Raises RunError if too few sites connect, a round stays below its quorum, the rule cannot
        use a site's rank, what was sent is too large to be merged, or `progress` is of another
        run.
        """
        started = self._clock()
        if progress is None:
            state, adapter = self._rule.init(adapter)
            now = self._first(adapter, state)
        else:
            now = self._resumed(progress)

        def elapsed() -> float:
            return self._clock() - started + (0.0 if progress is None else progress.seconds)

        while True:
            if not now.evaluated:
                now = replace(self._conclude(now), seconds=elapsed())
                self._progress(now)
            if self._over(now):
                break
            now = replace(self._merge(now), seconds=elapsed())
            self._progress(now)
        if not now.history:
            raise RunError("no round was merged: the only one was lost; propose the run again")
        if self._plan is not None:
            require_planned(self._plan, now.state.made, len(now.history))
        self._event("run_finished", rounds=len(now.history), best_round=now.best_round)
        rows = now.sites
        result = Result(
            adapter=now.adapter,
            best_adapter=now.best,
            best_round=now.best_round,
            history=now.history,
            sites=rows,
            bytes_up=sum(row.bytes_up for row in rows.values()),
            bytes_down=sum(row.bytes_down for row in rows.values()),
            seconds=elapsed(),
        )
        return result if self._config.client_privacy is None else published(result)

    def _first(self, adapter: Adapter, state: Any) -> Progress:
        """Return a run of which nothing has been done yet."""
        return Progress(
            run=self._run,
            config=self._config.digest(),
            adapter=adapter,
            state=state,
            best=adapter,
            sites={},
        )

    def _resumed(self, progress: Progress) -> Progress:
        """Take over what an earlier process has done; RunError if it is of another run."""
        mine = (self._run, self._config.digest())
        if (progress.run, progress.config) != mine:
            raise RunError(
                f"run {mine[0]} of configuration {mine[1][:12]}… cannot go on from round "
                f"{progress.round} of run {progress.run} of configuration "
                f"{progress.config[:12]}…: give it the progress and the run.toml of one run"
            )
        self._exchange.sites.update(progress.sites)
        if self._cohorts is not None:
            self._cohorts.met.update(progress.met)
        if isinstance(self._sites, Synchronous):
            self._sites.latencies.times.update(progress.latencies)
        self._event("restarted", round=progress.round, evaluated=progress.evaluated)
        if (
            progress.masked > progress.round
        ):  # its updates were given away, and nobody knows the sum
            self._event("round_lost", round=progress.masked)
            progress = replace(progress, round=progress.masked)
            self._progress(progress)
        if not progress.evaluated and self._asks_clients:
            meet(self._exchange)
        return progress

    def _over(self, now: Progress) -> bool:
        """Whether no round is left, or patience is at its end."""
        patience = self._config.federation.early_stopping
        if patience is not None and now.round and now.round - now.best_round >= patience:
            self._event("stopped_early", round=now.round, best_round=now.best_round)
            return True
        return now.round >= self._config.federation.rounds

    def _merge(self, now: Progress) -> Progress:
        """Let sites train, and merge what they send: the next round, without its evaluation."""
        number, started, rule = now.round + 1, self._clock(), self._rule
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # Adapter refuses what is not finite
                sent = rule.open(now.state, now.adapter, number)
                state, merged, training = self._sites.merge(
                    number, now.state, sent, lambda: self._progress(replace(now, masked=number))
                )
        except (IncompatibleAdapter, np.linalg.LinAlgError) as reason:
            raise RunError(
                f"round {number}: what the sites sent cannot be merged: {reason}. The norm of each "
                "delta is in its site_trained event: leave out who sends the largest, or set "
                "[robust]"
            ) from reason
        if self._plan is not None:
            self._noised(number, state)
        summed = summed_noise(self._config, sent.spec, number)
        if summed is not None:
            self._event("client_noise", round=number, noisy_rounds=number, **summed)
        error = merged.error if merged.error is None or math.isfinite(merged.error) else None
        report = RoundReport(
            round=number,
            asked=tuple(sorted(training.peers)),
            trained=training.reports,
            failed=training.failed,
            method=rule.name,
            update_norm=update_norm(sent, merged.adapter, regauged=rule.regauges),
            aggregation_error=error,
            delta_norms=training.norms,
            ages=training.ages,
            evaluated={},
            client={},
            coordinator={},
            bytes_up=training.bytes_up,
            bytes_down=training.bytes_down,
            seconds=self._clock() - started,
        )
        return replace(
            now,
            round=number,
            adapter=merged.adapter,
            state=state,
            history=(*now.history, report),
            evaluated=False,
            num_examples=merged.num_examples,
            sites=self._rows(),
            met=frozenset() if self._cohorts is None else frozenset(self._cohorts.met),
            latencies={}
            if isinstance(self._sites, Buffered)
            else dict(self._sites.latencies.times),
        )

    def _conclude(self, now: Progress) -> Progress:
        """Write the checkpoint of a merged round, announce it, and evaluate its adapter."""
        number, report, started = now.round, now.history[-1], self._clock()
        self._checkpoint(number, now.adapter)
        self._event(
            "round_aggregated",
            round=number,
            method=report.method,
            sites=sorted(report.trained),
            ages=report.ages,
            num_examples=now.num_examples,
            update_norm=report.update_norm,
            aggregation_error=report.aggregation_error,
            bytes_up=report.bytes_up,
            bytes_down=report.bytes_down,
            seconds=report.seconds,
        )
        federation = self._config.federation
        due = number % federation.evaluate_every == 0 or number == federation.rounds
        asked = due and self._asks_clients
        testing = metrics(self._exchange, self._assigner, number, now.adapter, due=asked)
        own = dict(self._own_metrics(now.adapter)) if due and self._own_metrics else {}
        report = replace(
            report,
            evaluated=testing.reports,
            client=mean_metrics(testing.reports.values()),
            coordinator=own,
            bytes_up=report.bytes_up + testing.bytes_up,
            bytes_down=report.bytes_down + testing.bytes_down,
            seconds=report.seconds + self._clock() - started,
        )
        self._event(
            "round_evaluated", round=number, client=report.client, coordinator=report.coordinator
        )
        now = replace(now, history=(*now.history[:-1], report), evaluated=True, sites=self._rows())
        score = report.score
        if now.best_score is None or (score is not None and score > now.best_score):
            return replace(now, best=now.adapter, best_round=number, best_score=score)
        return now

    def _rows(self) -> dict[str, SiteRow]:
        return self._exchange.rows()

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
