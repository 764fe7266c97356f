"""What a coordinator knows of its sites beside their answers, and whom it tells what it waits for.

In a simulation there is none of it: an empty `Desk`. A coordinator that serves (server/coordinator)
has a roster, hears what each site is doing now, and shows every wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from anabranch.client.flower import DESCRIBE
from anabranch.client.sums.stages import STAGE_TYPES
from anabranch.protocols.identity.join import Report
from anabranch.protocols.secagg.messages import Stage
from anabranch.server.flower import Question

AskedKind = Literal[
    "train", "evaluate", "describe", "advertise", "share", "mask", "agree", "reveal"
]
AskedState = Literal["sent", "answered", "failed", "late"]
STAGES: dict[str, Stage] = {kind: stage for stage, kind in STAGE_TYPES.items()}
KINDS: dict[str, AskedKind] = {
    "train": "train",
    "evaluate": "evaluate",
    DESCRIBE: "describe",
    **STAGES,
}
VERBS: dict[AskedKind, str] = {
    "train": "sites train round {}",
    "evaluate": "sites evaluate round {}",
    "advertise": "sites show their keys of round {}",
    "share": "sites share keys of round {}",
    "mask": "sites send masked updates of round {}",
    "agree": "sites agree on who is in the sum of round {}",
    "reveal": "sites open the sum of round {}",
}
STEP_S = 1.0  # a wall clock that is set anew by more moves the times of what is waited for


@dataclass(frozen=True, kw_only=True)
class Wait:
    """What the coordinator waits for. Times are seconds since 1970, UTC."""

    why: str
    who: tuple[str, ...]  # sites that have not been heard, ascending
    since: float
    until: float
    then: str  # what happens at `until`


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a site was asked last, and what became of it. Times are seconds since 1970, UTC."""

    kind: AskedKind
    round: int  # 0: before the rounds
    since: float
    until: float
    state: AskedState
    reason: str = ""  # why it failed


class Reported(Protocol):
    """What a site said last of itself."""

    @property
    def report(self) -> Report:
        """What it is doing."""

    @property
    def at(self) -> float:
        """When that arrived, seconds since 1970, UTC."""


@dataclass(frozen=True, kw_only=True)
class Desk:
    """The roster, the sites' reports, and the one who is told; each may be missing.

    names   Flower's node id -> the name on the roster, None: not on it. Missing: a node is
            who it says it is
    sites   the names of all that may come; they are named in the wait for them
    holds   name -> its last report. With it, letters that were lost are sent again
    wait    is told what is waited for whenever that changes; None: nothing
    asked   is told what became of every question to every site
    later_s how long a round waits for sites whose owners are to approve the run, or whose hours
            are to begin; 0: no longer than for others
    now     seconds since 1970, UTC
    """

    names: Callable[[int], str | None] | None = None
    sites: Callable[[], Collection[str]] | None = None
    holds: Callable[[], Mapping[str, Reported]] | None = None
    wait: Callable[[Wait | None], None] | None = None
    asked: Callable[[str, Asked], None] | None = None
    later_s: float = 0.0
    now: Callable[[], float] = time.time


ALONE = Desk()


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What is waited for; `Wait` says the same with the times of a wall clock."""

    why: Callable[[], str]
    who: Callable[[], Iterable[str]]  # sites that have not been heard
    then: str  # what happens at the deadline
    since: float  # of the engine's clock


def answers(question: Question[Any], since: float, then: str) -> Waiting:
    """Return the wait for the answers to a question."""
    why = VERBS[KINDS[question.kind]].format(question.round)
    return Waiting(
        why=lambda: why,
        who=lambda: sorted(name for name in question.peers if not question.heard(name)),
        then=then,
        since=since,
    )


class Board:
    """Tells the desk of waits and questions, each once, in the time of its wall clock."""

    def __init__(self, desk: Desk, clock: Callable[[], float]) -> None:
        self._desk, self._clock = desk, clock
        self._wait: Wait | None = None  # what the desk knows
        self._asked: dict[str, Asked] = {}
        self._offset = desk.now() - clock()

    def wait(self, waiting: Waiting, deadline: float) -> None:
        """Say what is waited for until `deadline` of the engine's clock."""
        if self._desk.wait is None:
            return
        wait = Wait(
            why=waiting.why(),
            who=tuple(waiting.who()),
            since=self._wall(waiting.since),
            until=self._wall(deadline),
            then=waiting.then,
        )
        if wait != self._wait:
            self._wait = wait
            self._desk.wait(wait)

    def over(self) -> None:
        """Say that nothing is waited for."""
        if self._wait is not None and self._desk.wait is not None:
            self._desk.wait(None)
        self._wait = None

    def asked(self, site: str, kind: str, number: int, since: float, until: float) -> None:
        """Say what a site was asked; times are of the engine's clock."""
        if self._desk.asked is None:
            return
        since, until = self._wall(since), self._wall(until)
        row = Asked(kind=KINDS[kind], round=number, since=since, until=until, state="sent")
        self._asked[site] = row
        self._desk.asked(site, row)

    def state(self, site: str, state: AskedState, reason: str = "") -> None:
        """Say what became of the last question to a site."""
        if self._desk.asked is None or site not in self._asked:
            return
        row = replace(self._asked[site], state=state, reason=reason)
        if row != self._asked[site]:
            self._asked[site] = row
            self._desk.asked(site, row)

    def _wall(self, at: float) -> float:
        offset = self._desk.now() - self._clock()
        if abs(offset - self._offset) > STEP_S:
            self._offset = offset
        return at + self._offset
