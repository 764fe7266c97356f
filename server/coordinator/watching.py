"""What a run's process has beside its rounds: the coordinator's state, and patience.

    Watching   the roster, the sites' reports, and the rows that show people what is waited for
    Patience   sleeping until it is to stop, writing until there is room, waiting for the SuperLink

The roster and the reports are read at most once in LOOK_S, the operator's wish once in WISH_S. A
row that cannot be written is for people, and stops no round; everything else is written again
until it is, for ROOM_S.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import RunError
from anabranch.server.coordinator import state as states
from anabranch.server.coordinator.state import Reported, State
from anabranch.server.desk import Asked, Desk, Wait
from anabranch.server.evaluation import initial_adapter

LOOK_S, WISH_S = 1.0, 0.5
POLL_S = 0.1  # each look is a request to the SuperLink, on this machine
ROOM_S = 600.0  # how long a process waits for room on the disk

T = TypeVar("T")

log = logging.getLogger(__name__)


class AttachedGrid(Protocol):
    """A Grid that is a Flower run of its own."""

    flower_run: int


class Stop(Exception):
    """The run is to end here, and may go on later; `wished`: by its operator."""

    def __init__(self, *, wished: bool) -> None:
        super().__init__("by its operator" if wished else "with the coordinator, to go on with it")
        self.wished = wished


class Away(Exception):
    """What the process needs was away for too long: it ends, and is started again."""


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What a run's process takes from outside. `attach` ends the Flower run that it is given."""

    attach: Callable[[int | None], AbstractContextManager[AttachedGrid]]
    ended: Callable[[], bool]  # whether the process is to end kindly
    first: Callable[[RunConfig], Adapter] = initial_adapter
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    poll_s: float = POLL_S


class Watching:
    """The desk of one run over the coordinator's state."""

    def __init__(
        self,
        state: State,
        run: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        later_s: float = 0.0,
    ) -> None:
        self._state, self._run, self._clock, self._now = state, run, clock, now
        self._later_s = later_s
        self._names: dict[int, str] = {}
        self._reports: dict[str, Reported] = {}
        self._looked: float | None = None
        self._wait: Wait | None = None  # of the round engine

    def desk(self) -> Desk:
        """Return what the round engine asks and tells."""
        return Desk(
            names=self.name_of,
            sites=self.sites,
            holds=self.reports,
            wait=self.wait,
            asked=self.asked,
            later_s=self._later_s,
            now=self._now,
        )

    def name_of(self, node: int) -> str | None:
        """Return the active site with this node; None: there is none."""
        self._look()
        return self._names.get(node)

    def sites(self) -> Collection[str]:
        """Return the names of the active sites."""
        self._look()
        return self._names.values()

    def reports(self) -> Mapping[str, Reported]:
        """Return what the active sites said last."""
        self._look()
        return self._reports

    def wait(self, wait: Wait | None) -> None:
        """Write down what the round engine waits for."""
        self._wait = wait
        self.show(wait)

    def again(self) -> None:
        """Write down what the round engine waits for, as something else was shown."""
        self.show(self._wait)

    def show(self, wait: Wait | None) -> None:
        """Write down what the run waits for now."""
        row = None if wait is None else states.Wait(**dataclasses.asdict(wait))
        self._told("wait", lambda: self._state.wait(self._run, row))

    def asked(self, site: str, asked: Asked) -> None:
        """Write down what a site was asked, and what became of it."""
        row = states.Asked(**dataclasses.asdict(asked))
        self._told(f"question to {site}", lambda: self._state.asked(self._run, site, row))

    def wanted(self) -> bool:
        """Whether the operator wants the run to go on."""
        try:
            entry = self._state.run(self._run)
        except RunError as error:
            log.warning("run %s: whether it is wanted cannot be read: %s", self._run, error)
            return True
        return entry is not None and entry.desired == "running"

    def over(self) -> None:
        """Write down that nothing is waited for, and nothing asked."""
        self.wait(None)
        self._told("end", self._forget)

    def _forget(self) -> None:
        for site, asked in self._state.asking(self._run).items():
            if asked.state == "sent":
                self._state.asked(self._run, site, None)

    def _told(self, what: str, write: Callable[[], Any]) -> None:
        try:
            write()
        except RunError as error:
            log.warning("run %s: its %s is not shown: %s", self._run, what, error)

    def _look(self) -> None:
        now = self._clock()
        if self._looked is not None and now < self._looked + LOOK_S:
            return
        try:
            active = [one for one in self._state.sites() if one.status == "active"]
            reports = self._state.reports()
        except RunError as error:
            log.warning("run %s: the roster cannot be read: %s", self._run, error)
            return
        self._names = {one.node: one.name for one in active if one.node is not None}
        names = {one.name for one in active}
        self._reports = {n: one for n, one in reports.items() if n in names}
        self._looked = now


class Patience:
    """Lets a run's process wait, never longer than said, and never against its operator's wish."""

    def __init__(self, watching: Watching, outside: Outside) -> None:
        self._watching, self._outside = watching, outside
        self._asked: float | None = None  # when the operator's wish was read

    def sleep(self, seconds: float) -> None:
        """Sleep. Raises Stop if the run is not to go on."""
        self.require_wanted()
        self._outside.sleep(seconds)
        self.require_wanted()

    def require_wanted(self) -> None:
        """Raise Stop if the run is not to go on."""
        if self._outside.ended():
            raise Stop(wished=False)
        now = self._outside.clock()
        if self._asked is None or now >= self._asked + WISH_S:
            self._asked = now
            if not self._watching.wanted():
                raise Stop(wished=True)

    def wait(self, why: str, since: float, until: float, pause: float, then: str) -> None:
        """Wait for `pause`, at most to `until`: Away is raised then, with `then`."""
        ahead = self._outside.now() - self._outside.clock()
        self._watching.show(
            Wait(
                why=why,
                who=(),
                since=since + ahead,
                until=until + ahead,
                then="this process ends, and is started again",
            )
        )
        end = min(self._outside.clock() + pause, until)
        while (left := end - self._outside.clock()) > 0:
            self.sleep(min(WISH_S, left))
        if self._outside.clock() >= until:
            raise Away(then)

    def kept(self, write: Callable[[], T]) -> T:
        """Write something that must not be lost; while the disk takes nothing, again and again."""
        since, waited = self._outside.clock(), False
        while True:
            try:
                written = write()
            except (OSError, RunError) as error:
                reason, waited = str(error), True
            else:
                if waited:
                    self._watching.again()
                return written
            then = f"nothing could be written for {ROOM_S:g} s: {reason}"
            self.wait(f"room on the disk: {reason}", since, since + ROOM_S, WISH_S, then)
