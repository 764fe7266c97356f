"""What a federation does now: from its folder to one tree of values (shown.py).

    Watcher.facts   reads: state, roster, what was added to each run's events.jsonl, disk
    compose         Facts ─► View, a pure function
    seen_by         View ─► what one of its sites may see

A Watcher that is asked again reads only what was added to the events since.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity.authority import read_certificate
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.alerts import (
    SILENT_S,
    coordinator_alerts,
    run_alerts,
    site_alerts,
)
from anabranch.server.coordinator.page.run_log import EventFile, RunLog
from anabranch.server.coordinator.page.run_view import OVER, RunFacts, run_view
from anabranch.server.coordinator.page.shown import RunView, SiteView, View
from anabranch.server.coordinator.settings import Settings
from anabranch.server.coordinator.state import (
    OpenInvitation,
    Reported,
    RunEntry,
    SiteEntry,
    Wait,
)

LISTED = 8  # runs that are over; those that are not are always listed
DISK_STEP = 100_000_000  # bytes to which free space is rounded down: it changes all the time


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a view is made of."""

    settings: Settings
    version: str
    sites: tuple[SiteEntry, ...] = ()
    reports: Mapping[str, Reported] = field(default_factory=dict)
    runs: tuple[RunFacts, ...] = ()  # in the order in which they are shown
    older_runs: int = 0
    invitations: tuple[OpenInvitation, ...] = ()
    disk: tuple[int, int] | None = None  # free, total
    certificate_ends: float | None = None


class Watcher:
    """Looks at one federation again and again; not for several threads at a time."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._logs: dict[str, tuple[EventFile, RunLog]] = {}
        self._configs: dict[str, tuple[RunConfig | None, str]] = {}

    def view(self, now: float) -> View:
        """Return what there is to see. Raises what State raises for a damaged or busy file."""
        return compose(self.facts(now), now)

    def facts(self, now: float) -> Facts:
        """Read what has changed."""
        federation, state = self._federation, self._federation.state
        entries = state.runs()
        listed = shown(entries)
        for gone in self._logs.keys() - {entry.run for entry in listed}:
            del self._logs[gone]
        waits = state.waits()
        usage = shutil.disk_usage(federation.folder)
        return Facts(
            settings=federation.settings,
            version=federation.version,
            sites=tuple(state.sites()),
            reports=state.reports(),
            runs=tuple(self._run(entry, waits.get(entry.run)) for entry in listed),
            older_runs=len(entries) - len(listed),
            invitations=tuple(state.open_invitations(now)),
            disk=(usage.free, usage.total),
            certificate_ends=_certificate_ends(federation.folder / "authority" / "server.pem"),
        )

    def _run(self, entry: RunEntry, wait: Wait | None) -> RunFacts:
        file, log = self._log(entry.run)
        if entry.run not in self._configs:
            self._configs[entry.run] = _config(entry)
        config, refused = self._configs[entry.run]
        return RunFacts(
            entry=entry,
            config=config,
            refused=refused,
            wait=wait,
            asking=self._federation.state.asking(entry.run),
            log=log,
            unreadable=file.unreadable,
        )

    def _log(self, run: str) -> tuple[EventFile, RunLog]:
        if run not in self._logs:
            path = self._federation.run_folder(run) / "events.jsonl"
            self._logs[run] = EventFile(path), RunLog()
        file, log = self._logs[run]
        events, anew = file.read()
        if anew:
            log = RunLog()
        for event in events:
            log.take(event)
        self._logs[run] = file, log
        return file, log


def view(federation: Federation, now: float) -> View:
    """Return what there is to see of a federation, once; a Watcher does it again and again."""
    return Watcher(federation).view(now)


def shown(entries: list[RunEntry]) -> list[RunEntry]:
    """Return the runs that are listed: those that go on, then the newest that are over."""
    active = [entry for entry in entries if entry.state not in OVER]
    over = sorted((e for e in entries if e.state in OVER), key=lambda e: -e.created)
    return [*sorted(active, key=lambda e: e.created), *over[:LISTED]]


def compose(facts: Facts, now: float) -> View:
    """Return the view of these facts at `now`."""
    settings = facts.settings
    sites = [site_view(entry, facts.reports.get(entry.name), now) for entry in facts.sites]
    active = [site.name for site in sites if site.status == "active"]
    runs = [run_view(one, active) for one in facts.runs]
    free, total = facts.disk or (None, None)
    free = None if free is None else free // DISK_STEP * DISK_STEP
    alerts = coordinator_alerts(facts.certificate_ends, settings.server_days, free, total, now)
    for run, known in zip(runs, facts.runs, strict=True):
        alerts += run_alerts(run, known, settings.runs.restarts, now)
    for site in sites:
        alerts += site_alerts(site, facts.reports.get(site.name), settings.site_days, now)
    return View(
        at=now,
        federation=settings.name,
        address=settings.address,
        version=facts.version,
        sites=tuple(sites),
        runs=tuple(runs),
        older_runs=facts.older_runs,
        alerts=tuple(sorted(alerts, key=lambda alert: alert.level != "problem")),
        invitations=facts.invitations,
        disk_free=free,
        disk_total=total,
        certificate_ends=facts.certificate_ends,
    )


def seen_by(whole: View, site: str) -> View:
    """Return what a site may see: itself, and of runs what is not about other sites."""
    return replace(
        whole,
        viewer=site,
        sites=tuple(one for one in whole.sites if one.name == site),
        runs=tuple(_run_seen_by(run, site) for run in whole.runs),
        alerts=tuple(alert for alert in whole.alerts if alert.about == site),
        invitations=(),
        disk_free=None,
        disk_total=None,
    )


def _run_seen_by(run: RunView, site: str) -> RunView:
    wait = run.wait
    if wait is not None:
        who = tuple(name for name in wait.who if name == site)
        others = len(wait.who) - len(who)
        named = "another site" if others == 1 else f"{others} other sites"
        hidden = run.privacy == "client"
        wait = replace(
            wait,
            who=() if hidden else (*who, named) if others else who,
            why="waiting" if others or hidden else wait.why,  # it may name them
        )
    return replace(
        run,
        wait=wait,
        detail="",
        sites=tuple(one for one in run.sites if one.site == site),
    )


def site_view(entry: SiteEntry, reported: Reported | None, now: float) -> SiteView:
    """Return what is shown of a site of the roster."""
    shown = SiteView(
        name=entry.name,
        status=entry.status,
        state=entry.status,
        doing=entry.status,
        reason=entry.reason,
        certificate_ends=entry.expires,
        version=entry.version,
        heard=None if reported is None else reported.at,
    )
    if entry.status != "active":
        return shown
    if reported is None:
        return replace(
            shown, state="not heard yet", doing="has joined, not reported yet", since=entry.joined
        )
    report = reported.report
    shown = replace(
        shown,
        reason=report.reason,
        ready=report.ready,
        checks=report.checks,
        run=report.run,
        version=report.version or entry.version,
        seconds_per_round=report.seconds_per_round,
    )
    if now - reported.at > SILENT_S:
        doing = f"silent; it was {_doing(reported)}"
        return replace(shown, state="silent", doing=doing, since=reported.at)
    return replace(shown, state=report.activity, doing=_doing(reported), since=report.since)


def _doing(reported: Reported) -> str:
    """Return a sentence such as "training, step 40 of 200, round 3"."""
    report = reported.report
    parts: list[str] = [report.activity]
    if report.activity in ("training", "evaluating") and report.steps:
        parts.append(f"step {report.step} of {report.steps}")
    if report.round and report.activity != "idle":
        parts.append(f"round {report.round}")
    if report.activity == "idle" and not report.ready:
        parts.append("not ready" if report.checks else "not checked yet")
    return ", ".join(parts)


def _config(entry: RunEntry) -> tuple[RunConfig | None, str]:
    try:
        return parse(entry.toml, source=f"run {entry.run}"), ""
    except ConfigError as error:  # of another version; what is known is shown without it
        return None, f"no longer valid with this version: {error}"


def _certificate_ends(file: Path) -> float | None:
    try:
        found = read_certificate(file.read_bytes(), str(file))
    except OSError:
        return None
    return found.not_valid_after_utc.timestamp()
