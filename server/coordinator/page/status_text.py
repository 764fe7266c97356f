"""A view as text: plain for pipes and files, with rich for a terminal.

    text(view)      plain
    render(view)    the same lines and tables for rich
    watch(…)        again and again, until it is interrupted

What sites say is shown without control characters, so none of it can write elsewhere on the
terminal. Times of day are local.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.run_view import OVER
from anabranch.server.coordinator.page.shown import Alert, RunSite, RunView, View
from anabranch.server.coordinator.page.view import Watcher
from anabranch.server.coordinator.state import Wait
from anabranch.server.sums.log import lost_words
from anabranch.server.svg import size

ABSENT = "\u2013"  # a value that is not there, unlike 0
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BREAK = re.compile(r"[ \r]*\n[ \n\r]*")  # reasons of many sites stand on a line each


@dataclass(frozen=True)
class Rows:
    """A table: names of columns, then rows as long."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Part = str | Rows


def parts(view: View, zone: tzinfo | None = None) -> list[tuple[str, Part]]:
    """Return what is shown, in order: (kind, line or table); kinds are title, problem, notice,
    run, wait, line and table.
    """
    when = Clock(view.at, zone)
    found: list[tuple[str, Part]] = [("title", _title(view, when))]
    for alert in view.alerts:
        found.append((alert.level, _alert_line(alert, when)))
    for run in view.runs:
        found += _run_parts(run, when)
    if not view.runs:
        found.append(("line", "no run yet; `anabranch coordinator run RUN.toml` starts one"))
    if view.older_runs:
        found.append(("line", f"and {view.older_runs} older runs"))
    found.append(("run", f"sites: {len(view.sites)}"))
    if view.sites:
        found.append(("table", _site_rows(view, when)))
    for one in view.invitations:
        until = when.until(one.expires)
        found.append(("line", f"invited: {one.site}; the invitation ends {until}"))
    return [(kind, _clean(part)) for kind, part in found]


def text(view: View, zone: tzinfo | None = None) -> str:
    """Return the view as plain text, without colour, that ends with a line's end."""
    lines = []
    for kind, part in parts(view, zone):
        if isinstance(part, Rows):
            lines += ["  " + line for line in _aligned(part)]
        elif kind in ("problem", "notice"):
            lines.append(f"{kind.upper()}: {part}")
        elif kind == "run":
            lines += ["", part]
        else:
            lines.append(part if kind == "title" else f"  {part}")
    return "\n".join(lines) + "\n"


STYLES = {"title": "bold", "problem": "bold red", "notice": "yellow", "run": "bold", "wait": "cyan"}


def render(view: View, zone: tzinfo | None = None) -> RenderableType:
    """Return the view for a rich console: words as in `text`, wrapped to the terminal's width."""
    shown: list[RenderableType] = []
    for kind, part in parts(view, zone):
        if isinstance(part, Rows):
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
            for name in part.head:
                table.add_column(name, overflow="fold")
            for row in part.rows:
                table.add_row(*(Text(cell) for cell in row))
            shown.append(table)
            continue
        said = f"{kind.upper()}: {part}" if kind in ("problem", "notice") else part
        shown += [Text("")] if kind == "run" else []
        shown.append(Text(said, style=STYLES.get(kind, "")))
    return Group(*shown)


def watch(
    federation: Federation,
    every_s: float = 2.0,
    *,
    out: TextIO | None = None,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
    times: int | None = None,
) -> None:
    """Show the federation every `every_s` seconds, `times` times or until interrupted (Ctrl-C).

    On a terminal the picture is replaced; in a pipe a text is written whenever what it shows has
    changed. Raises what `Watcher.view` raises.
    """
    out = out or sys.stdout
    watcher = Watcher(federation)
    views = _views(watcher, every_s, now, sleep, times)
    try:
        if out.isatty():
            console = Console(file=out)
            with Live(console=console, screen=True, auto_refresh=False) as live:
                for view in views:
                    live.update(render(view), refresh=True)
            return
        before: View | None = None
        for view in views:
            if not view.same(before):
                out.write(text(view) + "\n")
                out.flush()
            before = view
    except KeyboardInterrupt:
        return


def _views(
    watcher: Watcher,
    every_s: float,
    now: Callable[[], float],
    sleep: Callable[[float], None],
    times: int | None,
) -> Iterator[View]:
    shown = 0
    while times is None or shown < times:
        yield watcher.view(now())
        shown += 1
        if shown != times:
            sleep(every_s)


# -- parts -----------------------------------------------------------------------------------------


def _title(view: View, when: Clock) -> str:
    return f"{view.federation} at {view.address}, {when.full(view.at)}, anabranch {view.version}"


def _alert_line(alert: Alert, when: Clock) -> str:
    since = "" if alert.since is None else f" ({when.since(alert.since)})"
    return f"{alert.about}: {alert.text}{since}"


def _run_parts(run: RunView, when: Clock) -> list[tuple[str, Part]]:
    found: list[tuple[str, Part]] = [("run", f"run {run.run}: {run.state}")]
    found.append(("line", run.doing))
    if run.detail:
        found.append(("line", run.detail))
    if run.wait is not None:
        found += [("wait", line) for line in wait_lines(run.wait, when)]
    elif run.state == "running":
        found.append(("wait", "waits for nobody"))
    facts = list(_facts(run, when))
    if facts:
        found.append(("line", "; ".join(facts)))
    if run.sites and run.state not in OVER:
        found.append(("table", _run_site_rows(run, when)))
    return found


def wait_lines(wait: Wait, when: Clock) -> list[str]:
    """Return who is waited for and why, since when and until when, and what happens then."""
    who = ", ".join(wait.who) or "nobody in particular"
    until = "until somebody acts" if wait.until is None else f"until {when.until(wait.until)}"
    then = f"; then: {wait.then}" if wait.then else ""
    return [f"waits for {who}: {wait.why}", f"  {when.since(wait.since)}, {until}{then}"]


def _facts(run: RunView, when: Clock) -> Iterator[str]:
    if run.history:
        last = run.history[0]
        for source, metrics in (("coordinator", last.coordinator), ("sites", last.client)):
            if metrics:
                said = ", ".join(f"{name} {value:.3f}" for name, value in sorted(metrics.items()))
                yield f"{source}: {said}"
        if last.members is not None:
            gone = lost_words(last.lost)
            said = f"last secure sum: {last.survivors} of {last.members} members"
            yield f"{said}, lost {gone}" if gone else said
    if run.epsilon is not None:
        planned = "" if run.epsilon_ceiling is None else f" of {run.epsilon_ceiling:.2f} planned"
        yield f"ε {run.epsilon:.2f}{planned}"
    if run.seconds_per_round is not None:
        yield f"{length(run.seconds_per_round)} per round"
    if run.eta is not None and run.state == "running":
        yield f"over about {when.until(run.eta)}"
    if run.bytes_up is not None and run.history:
        yield f"{size(run.bytes_up)} up, {size(run.bytes_down or 0)} down"
    if run.restarts:
        yield f"restarted {run.restarts} times"


def _run_site_rows(run: RunView, when: Clock) -> Rows:
    private = run.privacy == "record"
    head = ("site", "asked", "since", "until", "rounds", "failed", "late", *(("ε",) * private))
    rows = []
    for one in run.sites:
        spent = (ABSENT if one.epsilon is None else f"{one.epsilon:.2f}",) * private
        counts = (str(one.rounds), str(one.failures), str(one.late))
        asked = asked_words(one)
        cells = (when.at(one.since), when.at(one.until))
        rows.append((one.site, asked, *cells, *counts, *spent, one.reason))
    return Rows((*head, "reason"), tuple(rows))


def asked_words(site: RunSite) -> str:
    """Return what a site was asked and what became of it: "train, round 3: sent"."""
    if not site.asked:
        return ABSENT
    round_ = f", round {site.round}" if site.round else ""
    return f"{site.asked}{round_}: {site.state}"


def _site_rows(view: View, when: Clock) -> Rows:
    head = ("site", "state", "doing", "since", "last report", "certificate ends", "version", "why")
    rows = tuple(
        (
            one.name,
            one.state,
            one.doing,
            when.at(one.since),
            ABSENT if one.heard is None else f"{length(max(0.0, view.at - one.heard))} ago",
            when.day(one.certificate_ends),
            one.version,
            one.reason or "; ".join(one.checks),
        )
        for one in view.sites
    )
    return Rows(head, rows)


# -- words -----------------------------------------------------------------------------------------


def length(seconds: float) -> str:
    """Return a duration: "0.4 s", "12 s", "3 min", "2 h 5 min", "3 d 4 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


@dataclass(frozen=True)
class Clock:
    """Writes times as seen at `now`; `zone` None: this machine's."""

    now: float
    zone: tzinfo | None = None

    def _local(self, when: float) -> datetime:
        return datetime.fromtimestamp(when, UTC).astimezone(self.zone)

    def full(self, when: float) -> str:
        """Return date and time of day."""
        return self._local(when).strftime("%Y-%m-%d %H:%M:%S")

    def day(self, when: float) -> str:
        """Return the date."""
        return self._local(when).strftime("%Y-%m-%d")

    def at(self, when: float | None) -> str:
        """Return the time of day, with the date if that is another one than today."""
        if when is None:
            return ABSENT
        same = self.day(when) == self.day(self.now)
        return self._local(when).strftime("%H:%M:%S") if same else self.full(when)

    def since(self, when: float) -> str:
        """Return "since 12:03:10 (2 min)"."""
        return f"since {self.at(when)} ({length(max(0.0, self.now - when))})"

    def until(self, when: float) -> str:
        """Return "12:33:10 (in 28 min)", or that it is overdue."""
        left = when - self.now
        return f"{self.at(when)} ({f'in {length(left)}' if left > 0 else 'overdue'})"


def _clean(part: Part) -> Part:
    if isinstance(part, str):
        return _line(part)
    return Rows(part.head, tuple(tuple(map(_line, row)) for row in part.rows))


def _line(said: str) -> str:
    """Return it on one line, without what would control a terminal."""
    return _CONTROL.sub("\ufffd", _BREAK.sub("; ", said.strip()) if "\n" in said else said)


def _aligned(table: Rows) -> Iterable[str]:
    lines: Sequence[tuple[str, ...]] = (table.head, *table.rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    for line in lines:
        yield "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
