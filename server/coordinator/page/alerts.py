"""What somebody should look at, from what is shown anyway.

    site silent          an active site has not reported for SILENT_S
    site not ready       a preflight check of it did not pass
    site waits           it waits for its owner, or for the hours of its policy
    clock skew           its clock is ahead of the coordinator's by more than SKEW_S
    certificate ends     of a site or the coordinator: it should have been renewed long ago
    disk low             less than DISK_LOW bytes, or DISK_SHARE of the disk, are free
    run failed           and is among those shown
    run restarted        its process ended and was started again
    policy refusal       a site's policy does not allow what a run asks (not: not yet)
    epsilon              EPSILON_SHARE of what was planned is spent, and rounds are left
    wait overdue         a wait is past its end by OVERDUE_S, which should never be

A certificate is renewed with a third of its time left; with a sixth left something is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from anabranch.server.coordinator.page.run_view import OVER, RunFacts
from anabranch.server.coordinator.page.shown import Alert, Level, RunView, SiteView
from anabranch.server.coordinator.state import Reported
from anabranch.server.roster import waits

SILENT_S = 30.0  # a site reports every two seconds
SKEW_S = 60.0
OVERDUE_S = 60.0
DISK_LOW, DISK_SHARE = 2e9, 0.05
EPSILON_SHARE = 0.95
RENEWAL_SHARE = 1 / 6
RESTARTS = 2  # of a run's process, from which on it is said
DAY_S = 86400.0


def site_alerts(site: SiteView, reported: Reported | None, days: float, now: float) -> list[Alert]:
    """Return what is wrong with one active site, whose certificates are made for `days`."""
    if site.status != "active":
        return []
    found = list(_certificate(site.name, site.certificate_ends, days, now))
    if site.state in ("silent", "not heard yet"):
        said = "no report from it" if site.heard else "it has joined, and never reported"
        found.append(_alert("site silent", "problem", site.name, said, site.since))
        return found
    if site.state == "waiting":
        said = site.reason or "it does not say why"
        found.append(_alert("site waits", "notice", site.name, f"it waits: {said}", site.since))
    found += [
        _alert("site not ready", "notice", site.name, f"preflight: {check}")
        for check in site.checks
    ]
    ahead = 0.0 if reported is None else reported.report.since - reported.at
    if ahead > SKEW_S:
        text = f"its clock is at least {ahead / 60:.0f} min ahead; set it by NTP"
        found.append(_alert("clock skew", "problem", site.name, text))
    return found


def coordinator_alerts(
    ends: float | None, days: float, free: int | None, total: int | None, now: float
) -> list[Alert]:
    """Return what is wrong with the coordinator's own certificate and disk."""
    found = [] if ends is None else list(_certificate("coordinator", ends, days, now))
    if free is not None and total and (free < DISK_LOW or free < DISK_SHARE * total):
        text = f"{free / 1e9:.1f} of {total / 1e9:.0f} GB of its disk are free; make room"
        found.append(_alert("disk low", "problem", "coordinator", text))
    return found


def run_alerts(run: RunView, facts: RunFacts, allowed: int, now: float) -> list[Alert]:
    """Return what is wrong with one run, whose process may be restarted `allowed` times."""
    found = list(_refusals(run, facts))
    if run.state == "failed" and now - (run.ended or run.created) < DAY_S:
        text = f"failed: {run.detail or 'it does not say why'}"
        found.append(_alert("run failed", "problem", run.run, text, run.ended))
    if run.state in OVER:
        return found
    if run.restarts >= RESTARTS:
        level: Level = "problem" if run.restarts >= allowed else "notice"
        text = f"its process was restarted {run.restarts} times"
        found.append(_alert("run restarted", level, run.run, text))
    spent, ceiling = run.epsilon, run.epsilon_ceiling
    if spent is not None and ceiling and spent >= EPSILON_SHARE * ceiling:
        text = f"ε is {spent:.2f}, and {ceiling:.2f} is planned for the whole run"
        found.append(_alert("epsilon", "notice", run.run, text))
    if run.wait is not None and run.wait.until is not None and now > run.wait.until + OVERDUE_S:
        text = f"it waits longer than it said it would: {run.wait.why}"
        found.append(_alert("wait overdue", "problem", run.run, text, run.wait.until))
    return found


def _refusals(run: RunView, facts: RunFacts) -> Iterator[Alert]:
    """Yield a site's refusals by policy, as long as no later round counted a delta of it."""
    if run.state in OVER or run.privacy == "client":
        return
    for name, log in sorted(facts.log.sites.items()):
        last, times = log.problem, log.failures("policy")
        if last is None or last.reason != "policy":
            continue
        text = f"{run.run}: refused by its policy {_times(times)}: {last.message}"
        yield _alert("policy refusal", "problem", name, text, last.time)
    refused = [event for event in facts.log.refused if event.reason == "policy"]
    met = [one for one in refused if not waits(one.message)]
    if met:
        text = f"{_times(len(met))} a site's policy refused it: {met[-1].message}"
        yield _alert("policy refusal", "problem", run.run, text, met[-1].time)


def _certificate(about: str, ends: float, days: float, now: float) -> Iterable[Alert]:
    left = ends - now
    if left <= 0:
        yield _alert("certificate ends", "problem", about, "its certificate has expired", ends)
    elif left < days * DAY_S * RENEWAL_SHARE:
        hours = left / 3600
        when = f"{hours / 24:.0f} days" if hours >= 48 else f"{max(1, round(hours))} h"
        text = f"its certificate ends in {when} and was not renewed"
        yield _alert("certificate ends", "problem", about, text)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _alert(kind: str, level: Level, about: str, text: str, since: float | None = None) -> Alert:
    return Alert(kind=kind, level=level, about=about, text=text, since=since)
