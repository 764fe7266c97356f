"""Everything that status, page and metrics show: one tree of plain values.

Times are seconds since 1970, UTC; sizes are bytes; what is not known is None, never 0. Nothing here
is computed from records but what their sites have sent: metrics, counts, ε.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from anabranch.server.coordinator.state import (
    Desired,
    OpenInvitation,
    RunState,
    SiteStatus,
    Wait,
)

Level = Literal["problem", "notice"]


class Alert(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that somebody should look at."""

    kind: str  # for programs: alerts.py lists them
    level: Level
    about: str  # a site, a run, or "coordinator"
    text: str
    since: float | None = None


class SiteView(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One site of the roster, and what it does."""

    name: str
    status: SiteStatus
    state: str  # one word or two: its activity, "silent", "not heard yet", "revoked", "left"
    doing: str  # a sentence
    since: float | None = None  # of what it does
    reason: str = ""  # why it waits, was revoked or left
    heard: float | None = None  # its last report, by the coordinator's clock
    ready: bool = False  # every preflight check passed
    checks: tuple[str, ...] = ()  # those that did not
    run: str = ""
    certificate_ends: float
    version: str = ""
    seconds_per_round: float | None = None  # as its preflight estimates


class RunSite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One site in one run."""

    site: str
    asked: str = ""  # train, evaluate, describe; "": nothing
    round: int = 0
    state: str = ""  # sent, answered, failed, late
    since: float | None = None  # when it was asked
    until: float | None = None  # its answer's deadline
    reason: str = ""  # why it failed or refused last
    rounds: int = 0  # deltas that counted
    failures: int = 0
    late: int = 0
    examples: int | None = None
    epsilon: float | None = None  # spent on its records, as it says
    delta: float | None = None


class RoundView(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One round; who took part in a client-private run is not said."""

    round: int
    ended: float | None = None  # merged, and evaluated if it was
    trained: int | None = None
    asked: int | None = None
    failed: int | None = None
    members: int | None = None  # of its secure sum, in the last attempt; None: there is no sum
    survivors: int | None = None  # whose updates are in it
    lost: dict[str, int] = {}  # stage of the sum -> members that were lost there
    examples: int | None = None
    loss: float | None = None  # of training, the mean over the sites' examples
    update_norm: float | None = None
    coordinator: dict[str, float] = {}  # metrics on the coordinator's records
    client: dict[str, float] = {}  # the mean of the sites' metrics
    bytes_up: int | None = None
    bytes_down: int | None = None
    seconds: float | None = None
    epsilon: float | None = None  # the largest of its sites', or the clients'


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a chart."""

    metric: str  # accuracy, macro_f1, loss, epsilon, …
    source: str  # whose: "coordinator", "sites' mean", "training", "largest"
    points: tuple[tuple[int, float], ...]  # (round, value), ascending


class RunView(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run."""

    run: str
    name: str
    state: RunState
    desired: Desired
    doing: str  # a sentence
    detail: str = ""
    created: float
    started: float | None = None
    ended: float | None = None
    round: int = 0  # the last that was merged
    rounds: int | None = None  # planned
    method: str = ""
    wait: Wait | None = None
    sites: tuple[RunSite, ...] = ()
    history: tuple[RoundView, ...] = ()  # the newest first
    curves: tuple[Curve, ...] = ()
    privacy: Literal["none", "record", "client"] = "none"
    epsilon: float | None = None  # spent: the largest of the sites', or the clients'
    epsilon_ceiling: float | None = None  # planned for the whole run
    bytes_up: int | None = None
    bytes_down: int | None = None
    seconds_per_round: float | None = None
    eta: float | None = None  # when it will be over, at the pace of the last rounds
    restarts: int = 0
    unreadable: int = 0  # lines of events.jsonl


class View(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A federation at one moment."""

    at: float
    federation: str
    address: str
    version: str
    viewer: str = ""  # the site that looks; "": the operator
    sites: tuple[SiteView, ...] = ()
    runs: tuple[RunView, ...] = ()  # active ones first, then the newest first
    older_runs: int = 0  # that are not listed
    alerts: tuple[Alert, ...] = ()
    invitations: tuple[OpenInvitation, ...] = ()
    disk_free: int | None = None  # bytes, rounded down
    disk_total: int | None = None
    certificate_ends: float | None = None  # the coordinator's own

    def same(self, other: View | None) -> bool:
        """Whether the other shows the same, whenever it was made."""
        return other is not None and msgspec.structs.replace(other, at=self.at) == self
