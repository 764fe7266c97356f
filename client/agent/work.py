"""What the agent is doing, told while it is done: a Report that threads share."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from anabranch.client.flower import SiteLike
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PolicyError
from anabranch.protocols.identity.join import Activity, Report, plain
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.messages import Assignment, Evaluated, Trained


@dataclass(eq=False)
class Doing:
    """The present Report. `changed` is set whenever the activity is another one."""

    version: str
    clock: Callable[[], float] = time.time
    boot: str = field(default_factory=lambda: secrets.token_hex(32))
    changed: threading.Event = field(default_factory=threading.Event)
    report: Report = field(init=False)
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
            self.report = msgspec.structs.replace(now, **about)

    def watch(self, activity: Activity, step: int, steps: int) -> None:
        """Take a step of a site's work (client/site.py)."""
        self.set(activity, step=step, steps=steps)


@dataclass(eq=False)
class Told:
    """A site whose work is told to `doing`; a SiteLike."""

    site: SiteLike
    doing: Doing
    waits: dict[str, str] = field(default_factory=dict)  # run -> what its owner has to do

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def max_rank(self) -> int | None:
        """The site's highest rank."""
        return self.site.max_rank

    def admit(self, run: str, config: RunConfig, signed: Signed | None) -> None:
        """Admit a run, or say what it waits for."""
        self.doing.set("preparing", run=run, round=0)
        try:
            self.site.admit(run, config, signed)
        except PolicyError as error:
            self.waits[run] = str(error)
            raise
        self.waits.pop(run, None)

    def sizes(self, config: RunConfig) -> Any:
        """Return the site's records, to be counted."""
        return self.site.sizes(config)

    def train(self, assignment: Assignment, adapter: Adapter) -> tuple[Trained, bytes]:
        """Train."""
        self.doing.set("preparing", run=assignment.run, round=assignment.round)
        return self.site.train(assignment, adapter)

    def evaluate(self, assignment: Assignment, adapter: Adapter) -> Evaluated:
        """Evaluate."""
        self.doing.set("evaluating", run=assignment.run, round=assignment.round)
        return self.site.evaluate(assignment, adapter)

    def rest(self) -> None:
        """There is nothing to do now, or nothing before the owner has done something."""
        if self.waits:
            self.doing.set("waiting", reason="; ".join(self.waits.values()), message="")
        else:
            self.doing.set("idle", message="")
