"""From one run's row, wait, questions and events to what is shown of it.

Who takes part in a client-private run is protected, so of its rounds only what is published is
shown: metrics and the clients' ε.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from anabranch.protocols.config import RunConfig
from anabranch.server.coordinator.page.run_log import Event, RoundLog, RunLog, SiteLog
from anabranch.server.coordinator.page.shown import Curve, RoundView, RunSite, RunView
from anabranch.server.coordinator.state import Asked, RunEntry, Wait
from anabranch.server.sums.log import lost

RECENT = 5  # rounds whose pace is the run's
HISTORY = 50  # rounds listed
POINTS = 400  # of one curve
OVER = ("finished", "failed", "stopped")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that is known of one run."""

    entry: RunEntry
    config: RunConfig | None = None  # None: it cannot be read by this version
    refused: str = ""  # why
    wait: Wait | None = None
    asking: Mapping[str, Asked] = field(default_factory=dict)
    log: RunLog = field(default_factory=RunLog)
    unreadable: int = 0


def run_view(facts: RunFacts, active_sites: Iterable[str] = ()) -> RunView:
    """Return what is shown of a run; `active_sites` are listed in it from its start."""
    entry, config, log = facts.entry, facts.config, facts.log
    rounds = None if config is None else config.federation.rounds
    hidden = config is None or config.client_privacy is not None
    history = [_round(log.rounds[number], hidden) for number in sorted(log.rounds)]
    merged = [one for one in history if log.rounds[one.round].merged is not None]
    over = entry.state in OVER
    return RunView(
        run=entry.run,
        name=entry.name,
        state=entry.state,
        desired=entry.desired,
        doing=_doing(facts, rounds, hidden),
        detail=entry.detail or facts.refused or log.message,
        created=entry.created,
        started=log.started,
        ended=log.ended if over else None,
        round=log.merged,
        rounds=rounds,
        method="" if config is None else config.method,
        wait=None if over else facts.wait,
        sites=() if hidden else _sites(facts, active_sites),
        history=tuple(reversed(merged[-HISTORY:])),
        curves=_curves(merged),
        privacy=_privacy(config),
        epsilon=_last(one.epsilon for one in history),
        epsilon_ceiling=_ceiling(config),
        bytes_up=None if hidden else sum(one.bytes_up or 0 for one in merged),
        bytes_down=None if hidden else sum(one.bytes_down or 0 for one in merged),
        seconds_per_round=seconds_per_round(log),
        eta=None if over else eta(log, rounds),
        restarts=entry.restarts,
        unreadable=facts.unreadable,
    )


def durations(log: RunLog) -> list[float]:
    """Return the seconds of every round that is over, in order.

    From when it was first asked for, or from the end of the one before if that is later (in
    buffered runs rounds overlap), until it was evaluated.
    """
    found, before = list[float](), 0.0
    for number in sorted(log.rounds):
        one = log.rounds[number]
        if one.ended is None:
            continue
        if one.started is not None:
            found.append(max(0.0, one.ended - max(one.started, before)))
        before = max(before, one.ended)
    return found


def seconds_per_round(log: RunLog) -> float | None:
    """Return the median duration of the last five rounds that are over; None before the first.

    The median, so that one round with a wait or a restart in it does not move it.
    """
    recent = durations(log)[-RECENT:]
    return statistics.median(recent) if recent else None


def eta(log: RunLog, rounds: int | None) -> float | None:
    """Return when the last round will be over if every round takes `seconds_per_round`.

    t_r + (R − r)·s: t_r is when round r, the last that is over, ended; s is the pace of the last
    rounds. None before the first round is over, or without R. What is past is overdue.
    """
    pace = seconds_per_round(log)
    over = [one for one in log.rounds.values() if one.ended is not None]
    if pace is None or rounds is None or not over:
        return None
    last = max(over, key=lambda one: one.round)
    assert last.ended is not None
    return last.ended + max(0, rounds - last.round) * pace


def _doing(facts: RunFacts, rounds: int | None, hidden: bool) -> str:
    entry, log = facts.entry, facts.log
    done = f"{log.merged} of {rounds if rounds is not None else '?'} rounds"
    if entry.state != "running":
        said = {
            "queued": "queued: starts when the coordinator serves",
            "starting": f"starting, {done} are done",
            "stopped": f"stopped after {done}",
            "failed": f"failed after {done}",
            "finished": f"finished, {done}",
        }
        return said[entry.state]
    one = log.open
    if one is None:
        return "waiting for sites" if not log.merged else f"{done} are done"
    where = f"round {one.round} of {rounds}"
    if one.merged is not None:
        return f"{where}: evaluating"
    if hidden or not one.asked:
        return f"{where}: training"
    if one.summing is not None:
        return f"{where}: secure sum of {len(one.summing.sites)} sites"
    failed = f", {len(one.failed)} failed" if one.failed else ""
    return f"{where}: training, {len(one.trained)} of {len(one.asked)} sites have answered{failed}"


def _round(one: RoundLog, hidden: bool) -> RoundView:
    merged, evaluated = one.merged, one.evaluated
    counted = [e for name, e in one.trained.items() if name in one.counted]
    spent = [event.epsilon for event in counted if event.epsilon is not None]
    metrics = {} if evaluated is None else evaluated.coordinator
    client = {} if evaluated is None else evaluated.client
    if hidden or merged is None:
        return RoundView(
            round=one.round,
            ended=one.ended,
            coordinator=metrics,
            client={} if hidden else client,
            epsilon=one.epsilon if hidden else max(spent, default=None),  # of clients, or records
        )
    return RoundView(
        round=one.round,
        ended=one.ended,
        trained=len(merged.sites),
        asked=len(one.asked),
        failed=len(one.failed),
        members=None if one.sum is None else len(one.sum.members),
        survivors=None if one.sum is None else len(one.sum.survivors),
        lost={} if one.sum is None else lost(one.sum.dropped),
        examples=merged.num_examples,
        loss=training_loss(counted),
        update_norm=merged.update_norm,
        coordinator=metrics,
        client=client,
        bytes_up=merged.bytes_up,
        bytes_down=merged.bytes_down,
        seconds=merged.seconds,
        epsilon=max(spent, default=None),
    )


def training_loss(counted: Iterable[Event]) -> float | None:
    """Return Σ n_k l_k / Σ n_k over the sites' events that say a loss."""
    said = [(e.num_examples or 0, e.loss) for e in counted if e.loss is not None]
    total = sum(n for n, _ in said)
    return sum(n * loss for n, loss in said) / total if total else None


def _sites(facts: RunFacts, active: Iterable[str]) -> tuple[RunSite, ...]:
    """Return a row for every site that was asked or heard, and for those that could be."""
    log, names = facts.log, {*facts.log.sites, *facts.asking}
    if facts.entry.state not in OVER:
        names |= set(active)
    over = facts.entry.state in OVER
    return tuple(
        _site(name, log.sites.get(name, SiteLog()), None if over else facts.asking.get(name))
        for name in sorted(names)
    )


def _site(name: str, log: SiteLog, asked: Asked | None) -> RunSite:
    problem = log.problem
    said = f"{problem.reason}: {problem.message}" if problem is not None else ""
    row = RunSite(
        site=name,
        reason=said,
        rounds=len(log.counted),
        failures=log.failures(),
        late=log.late,
        examples=log.examples,
        epsilon=None if log.last is None else log.last.epsilon,
        delta=None if log.last is None else log.last.delta,
    )
    if asked is None:
        return row
    return _with_question(row, asked)


def _with_question(row: RunSite, asked: Asked) -> RunSite:
    return replace(
        row,
        asked=asked.kind,
        round=asked.round,
        state=asked.state,
        since=asked.since,
        until=asked.until if asked.state == "sent" else None,
        reason=asked.reason or row.reason,
    )


def _curves(history: list[RoundView]) -> tuple[Curve, ...]:
    """Return the curves that have points: metrics, the loss of training, ε."""
    curves = []
    sources: list[tuple[str, Callable[[RoundView], Mapping[str, float]]]] = [
        ("coordinator", lambda one: one.coordinator),
        ("sites' mean", lambda one: one.client),
    ]
    metrics = sorted({m for one in history for _, of in sources for m in of(one)})
    for metric in sorted(metrics, key=lambda name: (name != "accuracy", name)):
        for source, of in sources:
            points = {one.round: of(one).get(metric) for one in history}
            curves.append(_curve(metric, source, points))
    losses = {one.round: one.loss for one in history}
    curves.append(_curve("training loss", "sites' mean", losses))
    spent = {one.round: one.epsilon for one in history}
    curves.append(_curve("epsilon", "largest", spent))
    return tuple(curve for curve in curves if curve.points)


def _curve(metric: str, source: str, values: Mapping[int, float | None]) -> Curve:
    points = [(number, value) for number, value in values.items() if value is not None]
    step = -(-len(points) // POINTS) or 1  # every so many, counted from the last
    return Curve(metric=metric, source=source, points=tuple(points[::-1][::step][::-1]))


def _privacy(config: RunConfig | None) -> Literal["none", "record", "client"]:
    if config is None or (config.privacy is None and config.client_privacy is None):
        return "none"
    return "record" if config.client_privacy is None else "client"


def _ceiling(config: RunConfig | None) -> float | None:
    if config is None:
        return None
    table = config.client_privacy or config.privacy
    return None if table is None else table.epsilon


def _last(values: Iterable[float | None]) -> float | None:
    return next((value for value in reversed(list(values)) if value is not None), None)
