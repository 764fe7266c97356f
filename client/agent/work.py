"""What the agent is doing, told while it is done: a Report that threads share."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from anabranch.client.flower import (
    NO_LIMITS,
    Rostered,
    SiteLike,
    SummingSite,
    peer_key_of,
)
from anabranch.client.policy.rules import NotAllowed
from anabranch.client.refusals import tells
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import (
    ConfigError,
    DataError,
    PolicyError,
    PrivacyError,
    ProtocolError,
)
from anabranch.protocols.identity.join import Activity, Report, plain
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import Request
from anabranch.protocols.secagg.terms import Roster

WAIT_S = 60.0  # a run that waits for this site asks every few seconds: later it waits no more
REFUSED_S = 600.0  # for which a refusal that does not pass by itself is told
PASSING = ("pending", "hours")  # codes of refusals that pass: the owner answers, the hours begin

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Doing:
    """The present Report. `changed` is set whenever the activity is another one."""

    version: str
    clock: Callable[[], float] = time.time
    boot: str = field(default_factory=lambda: secrets.token_hex(32))
    changed: threading.Event = field(default_factory=threading.Event)
    report: Report = field(init=False)
    hides: bool = False  # whether the run in work keeps its steps from the coordinator
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.report = Report(
            boot=self.boot, activity="starting", since=self.clock(), version=self.version
        )

    def set(self, activity: Activity | None = None, **about: Any) -> None:
        """Change the report; another activity begins now and forgets the reason and the steps."""
        with self._lock:
            now = self.report
            if activity is not None and activity != now.activity:
                about = {"since": self.clock(), "reason": "", "step": 0, "steps": 0} | about
                about["activity"] = activity
                self.changed.set()
            if about.get("reason", now.reason) != now.reason:
                self.changed.set()
            if "reason" in about:
                about["reason"] = plain(about["reason"])
            if "run" in about:  # as the message says, before anybody has approved it
                about["run"] = plain(about["run"], 200)
            if "round" in about:
                about["round"] = min(about["round"], 2**53)
            self.report = msgspec.structs.replace(now, **about)

    @property
    def outward(self) -> Report:
        """Return the report as it leaves: of a run that hides updates, without its steps."""
        now = self.report
        if not self.hides or now.activity != "training":
            return now
        return msgspec.structs.replace(now, step=0, steps=0)

    def watch(self, activity: Activity, step: int, steps: int) -> None:
        """Take a step of a site's work (client/site.py)."""
        self.set(activity, step=step, steps=steps)


@dataclass(frozen=True)
class Refusal:
    """Why a run was refused."""

    sentence: str
    passes: bool  # by itself, or with the owner's answer
    until: float  # of the monotonic clock: for as long it is told


@dataclass(eq=False)
class Told:
    """A site whose work is told to `doing`; a SiteLike."""

    site: SiteLike
    doing: Doing
    refusals: dict[str, Refusal] = field(default_factory=dict)  # run -> the last one

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def max_rank(self) -> int | None:
        """The site's highest rank."""
        return self.site.max_rank

    def peer_key(self, run: str, config: RunConfig) -> str | None:
        """The site's key in secure sums."""
        return peer_key_of(self.site, run, config)

    def show_roster(self, roster: Roster) -> None:
        """Show the owner among whom the run of the next question sums."""
        if isinstance(self.site, Rostered):
            self.site.show_roster(roster)

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        """Admit a run, or say what it waits for."""
        self.doing.set("preparing", run=run, round=0)
        with self._noting(run):
            self.site.admit(run, config, signed)

    def sizes(self, config: RunConfig) -> Any:
        """Return the site's records, to be counted."""
        with self._noting(self.doing.report.run):
            return self.site.sizes(config)

    def train(self, assignment: Assignment, adapter: Adapter) -> tuple[Trained, bytes]:
        """Train."""
        began = time.monotonic()
        self.doing.hides = tells(assignment.config) != "all"
        self.doing.set("preparing", run=assignment.run, round=assignment.round)
        with self._noting(assignment.run):
            report, frame = self.site.train(assignment, adapter)
        took = time.monotonic() - began
        log.info(
            "run %s: round %d trained in %.1f s, %.1f kB to be sent",
            assignment.run, assignment.round, took, len(frame) / 1e3,
        )  # fmt: skip
        return report, frame

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        """Evaluate."""
        self.doing.set("evaluating", run=assignment.run, round=assignment.round)
        with self._noting(assignment.run):
            return self.site.evaluate(assignment, adapter)

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        """Answer one stage of a secure sum."""
        self.doing.set("preparing", run=assignment.run, round=assignment.round)
        with self._noting(assignment.run):
            if not isinstance(self.site, SummingSite):
                raise ProtocolError(f"{self.name} takes part in no secure sums")
            answer = self.site.secure(assignment, request, limits)
        log.info(
            "run %s: round %d, secure sum: answered %r",
            assignment.run, assignment.round, request.stage,
        )  # fmt: skip
        return answer

    def rest(self) -> None:
        """There is nothing to do now, or nothing before the owner has done something."""
        now = time.monotonic()
        self.refusals = {run: one for run, one in self.refusals.items() if now < one.until}
        waits = [one.sentence for one in self.refusals.values() if one.passes]
        if waits:
            self.doing.set("waiting", reason="; ".join(waits), message="")
            return
        refused = [f"refused run {run}: {one.sentence}" for run, one in self.refusals.items()]
        self.doing.set("idle", reason="; ".join(refused), message="")

    @contextmanager
    def _noting(self, run: str) -> Iterator[None]:
        """Keep why a run is refused, for as long as that is worth telling."""
        try:
            yield
        except (PolicyError, DataError, ConfigError, PrivacyError) as error:
            passes = isinstance(error, NotAllowed) and error.code in PASSING
            until = time.monotonic() + (WAIT_S if passes else REFUSED_S)
            self.refusals[run] = Refusal(str(error), passes, until)
            raise
        self.refusals.pop(run, None)
