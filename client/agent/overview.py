"""What a site knows of itself, for `anabranch site status`. Reads files; asks nobody.

A part that cannot be read is said to be so, in a sentence; the others are shown all the same.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from anabranch.client.agent.identity import Identity
from anabranch.client.agent.status import AgentState, read_state, running
from anabranch.client.policy.approvals import Approvals
from anabranch.client.policy.policy_file import read_policy
from anabranch.client.site_file import ledger_of, read_site
from anabranch.protocols.errors import AnabranchError, MalformedMessage
from anabranch.protocols.identity.audit import MAX_LINE, Entry, read_line

AUDIT = "audit.jsonl"
SITE = Path("site")  # the folder of a site, unless another one is named
LAST = 5  # lines of the audit log
SHOWN = 160  # characters of an audit line's fields
ZEROS = "update-of-zeros"  # see client/policy/guard.py

HASH = re.compile("[0-9a-f]{32,}")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Overview:
    """One look at a site."""

    folder: Path
    site: str
    federation: str
    address: str
    now: float  # seconds since 1970, UTC, as all times here
    running: bool
    state: AgentState | None
    expires: float  # of the certificate
    pending: tuple[str, ...]  # runs that wait for the owner: digest, run and author
    spent: int  # events of the privacy ledger
    audit: tuple[str, ...]  # the last lines, oldest first
    problems: tuple[str, ...]  # what could not be read

    def as_dict(self) -> dict[str, Any]:
        """Return it for --json."""
        state = self.state
        return {
            "site": self.site,
            "federation": self.federation,
            "coordinator": self.address,
            "running": self.running,
            "connected": self.running and state is not None and state.connected,
            "activity": None if state is None or not self.running else state.activity,
            "run": "" if state is None else state.run,
            "round": 0 if state is None else state.round,
            "step": 0 if state is None else state.step,
            "steps": 0 if state is None else state.steps,
            "since": None if state is None else state.since,
            "reason": self.reason,
            "certificate_until": datetime.fromtimestamp(self.expires, UTC).isoformat(),
            "approvals_pending": list(self.pending),
            "ledger_events": self.spent,
            "audit": list(self.audit),
            "problems": list(self.problems),
        }

    @property
    def reason(self) -> str:
        """Return why nothing is trained now, or "": a sentence."""
        state = self.state
        if not self.running or state is None:
            return f"the agent is not running; start it with `anabranch site serve{self._option}`"
        return state.reason if state.connected else state.link or state.reason

    def text(self) -> str:
        """Return it for people."""
        days = (self.expires - self.now) / 86_400
        lines = [
            f"{self.site} of {self.federation}, coordinator {self.address}",
            f"agent        {self._agent()}",
            f"certificate  {days:.0f} days left" if days > 0 else "certificate  has expired",
            f"ledger       {self.spent} events",
        ]
        if self.pending:
            listed = f"`anabranch site policy list{self._option}`"
            lines.append(f"approvals    {len(self.pending)} pending: {listed}")
            lines += [f"             {one}" for one in self.pending]
        lines += [f"problem      {one}" for one in self.problems]
        lines += ["", *self.audit] if self.audit else []
        return "\n".join(lines)

    @property
    def _option(self) -> str:
        """How a command names the folder; nothing for the default."""
        return "" if self.folder == SITE else f" --folder {shlex.quote(str(self.folder))}"

    def _agent(self) -> str:
        state = self.state
        if not self.running or state is None:
            return self.reason
        parts = [f"{state.activity} for {_duration(self.now - state.since)}"]
        if state.run and state.activity != "idle":
            parts.append(f"run {state.run}" + f" round {state.round}" * bool(state.round))
        if state.steps:
            parts.append(f"step {state.step} of {state.steps}")
        parts.append("connected" if state.connected else "NOT connected")
        return ", ".join(parts) + f": {self.reason}" * bool(self.reason)


def overview(folder: Path, clock: Callable[[], float] = time.time) -> Overview:
    """Look at the site in `folder`. Raises ConfigError if it has not joined."""
    identity, file = Identity(folder), read_site(folder)
    problems: list[str] = []

    def attempt(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (AnabranchError, OSError) as error:
            problems.append(str(error))
            return otherwise

    def spent() -> int:
        ledger = ledger_of(folder, file)
        found = ledger.state() if ledger.path.exists() else None
        return 0 if found is None else found.count

    now = clock()
    attempt(lambda: read_policy(folder), None)
    audit = attempt(lambda: tail(folder / AUDIT), tuple[str, ...]())
    if any(line.split()[1:2] == [ZEROS] for line in audit):
        problems.append("an update counted as zeros, as nothing was learned: see the site's log")
    state = attempt(lambda: read_state(folder), None)
    return Overview(
        folder=folder,
        site=identity.name,
        federation=identity.federation,
        address=identity.address,
        now=now,
        running=running(state, now),
        state=state,
        expires=attempt(lambda: identity.expires, 0.0),
        pending=attempt(lambda: _pending(folder), ()),
        spent=attempt(spent, 0),
        audit=audit,
        problems=tuple(problems),
    )


def tail(path: Path, count: int = LAST) -> tuple[str, ...]:
    """Return the last lines of an audit log for people; nothing is verified here."""
    if not path.exists():
        return ()
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - (MAX_LINE + 1)))
        lines = file.read().splitlines()[-count:]
    shown = []
    for line in lines:
        try:
            shown.append(_shown(read_line(line)))
        except MalformedMessage:
            continue  # cut by where reading began, or by a crash; `site log verify` judges
    return tuple(shown)


def _shown(entry: Entry) -> str:
    fields = " ".join(f"{name}={_short(value)}" for name, value in entry.fields.items())
    return f"{entry.time[:19]}  {entry.kind}  {fields[:SHOWN]}".rstrip()


def _short(value: object) -> object:
    """Return a hash by its first digits."""
    return f"{value[:12]}…" if isinstance(value, str) and HASH.fullmatch(value) else value


def _pending(folder: Path) -> tuple[str, ...]:
    return tuple(
        f"{digest[:12]}  {entry.proposal.run} by {entry.proposal.author}"
        for digest, entry in Approvals(folder).entries().items()
        if entry.state == "pending"
    )


def _duration(seconds: float) -> str:
    seconds = max(seconds, 0)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
