"""What the events of a run say so far. Every line of events.jsonl is read once, in order.

`EventFile` reads what was added since it read last; `RunLog.take` folds one event in. A round that
was asked again after a restart has the same number, and what its later events say replaces what the
earlier ones said: nothing is counted twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec

PIECE = 4 << 20  # bytes read at a time


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of events.jsonl: of all kinds the fields that are shown.

    Unknown fields are let through: kinds and fields are added as the engine grows.
    """

    at: datetime
    kind: str
    run: str = ""
    round: int = 0
    site: str = ""
    sites: tuple[str, ...] = ()
    reason: str = ""
    message: str = ""
    num_examples: int | None = None
    loss: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    method: str = ""
    update_norm: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    seconds: float | None = None
    members: tuple[str, ...] = ()  # of a secure sum
    survivors: tuple[str, ...] = ()
    dropped: dict[str, tuple[str, ...]] = {}  # stage -> who was lost there
    client: dict[str, float] = {}
    coordinator: dict[str, float] = {}

    @property
    def time(self) -> float:
        """Return seconds since 1970, UTC."""
        return self.at.timestamp()


class EventFile:
    """events.jsonl of a run, which others append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0  # bytes of whole lines that were read
        self.unreadable = 0  # lines, such as the one that a crash left torn
        self._inode: int | None = None

    def read(self) -> tuple[list[Event], bool]:
        """Return what was added since the last call, and whether the file is another one now.

        Then it is read from its beginning. A last line without its end is left for later. No file
        is no events.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return [], False
        events: list[Event] = []
        with file:
            stat = os.fstat(file.fileno())
            anew = self._inode not in (None, stat.st_ino) or stat.st_size < self.offset
            if anew:
                self.offset = self.unreadable = 0
            self._inode = stat.st_ino
            file.seek(self.offset)
            while True:
                piece = file.read(PIECE)
                whole, end, _ = piece.rpartition(b"\n")
                if not end and len(piece) < PIECE:
                    break
                self.offset += len(whole) + 1 if end else PIECE
                file.seek(self.offset)
                events += self._decoded(whole.split(b"\n") if end else [b""])
        return events, anew

    def _decoded(self, lines: Iterable[bytes]) -> Iterable[Event]:
        for line in lines:
            try:
                yield _DECODER.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self.unreadable += 1


_DECODER = msgspec.json.Decoder(Event)


@dataclass
class RoundLog:
    """One round."""

    round: int
    started: float | None = None
    asked: tuple[str, ...] = ()
    trained: dict[str, Event] = field(default_factory=dict)  # site_trained
    failed: dict[str, Event] = field(default_factory=dict)  # site_failed
    summing: Event | None = None  # secure_sum_started, while it is under way
    sum: Event | None = None  # secure_sum, the last attempt
    merged: Event | None = None  # round_aggregated
    evaluated: Event | None = None  # round_evaluated
    epsilon: float | None = None  # of clients

    @property
    def ended(self) -> float | None:
        """Return when it was over; None while it is not."""
        last = self.evaluated or self.merged
        return None if last is None else last.time

    @property
    def counted(self) -> tuple[str, ...]:
        """Return the sites whose deltas were merged."""
        return () if self.merged is None else self.merged.sites


@dataclass
class SiteLog:
    """One site over the run."""

    counted: set[int] = field(default_factory=set)  # rounds with a delta of it
    failed: dict[tuple[int, str], Event] = field(default_factory=dict)  # by round and reason
    late: int = 0
    last: Event | None = None  # the last site_trained
    examples: int | None = None

    def failures(self, reason: str | None = None) -> int:
        """Return how many rounds it failed in, for one reason or for any."""
        rounds = {number for number, why in self.failed if reason in (None, why)}
        return len(rounds)

    @property
    def problem(self) -> Event | None:
        """Return its last failure, unless a later round counted a delta of it."""
        if not self.failed:
            return None
        last = max(self.failed.values(), key=lambda event: event.at)
        return None if any(number > last.round for number in self.counted) else last


@dataclass
class RunLog:
    """A run, as its events tell it."""

    started: float | None = None
    ended: float | None = None
    message: str = ""  # of its failure
    rounds: dict[int, RoundLog] = field(default_factory=dict)
    sites: dict[str, SiteLog] = field(default_factory=dict)
    refused: list[Event] = field(default_factory=list)  # node_refused; the last ones

    def take(self, event: Event) -> None:
        """Fold one event in. Kinds that are not shown change nothing."""
        match event.kind:
            case "run_started":
                self.started = self.started or event.time
            case "run_finished":
                self.ended = event.time
            case "run_failed":
                self.ended, self.message = event.time, event.message
            case "restarted":
                self.ended, self.message = None, ""
            case "site_joined":
                self.site(event.site).examples = event.num_examples
            case "node_refused":
                self.refused = [*self.refused, event][-20:]
            case "site_trained":
                self.round(event.round).trained[event.site] = event
                self.round(event.round).failed.pop(event.site, None)
                self.site(event.site).last = event
                if event.num_examples is not None:  # else: kept for a secure sum, and not said
                    self.site(event.site).examples = event.num_examples
            case "site_failed" | "secure_dropout":
                self.round(event.round).failed[event.site] = event
                self.site(event.site).failed[event.round, event.reason] = event
            case "secure_sum_started":
                self.round(event.round).summing = event
            case "secure_sum":
                self.round(event.round).summing, self.round(event.round).sum = None, event
            case "site_late":
                self.site(event.site).late += 1
            case "client_noise":
                self.round(event.round).epsilon = event.epsilon
            case "round_started" | "round_aggregated" | "round_evaluated":
                self._round_event(event)

    def round(self, number: int) -> RoundLog:
        """Return a round, a new one if there is none."""
        return self.rounds.setdefault(number, RoundLog(number))

    def site(self, name: str) -> SiteLog:
        """Return a site, a new one if there is none."""
        return self.sites.setdefault(name, SiteLog())

    @property
    def merged(self) -> int:
        """Return the last round that was merged, 0 before the first."""
        return max((n for n, one in self.rounds.items() if one.merged is not None), default=0)

    @property
    def open(self) -> RoundLog | None:
        """Return the round under way: begun, and not evaluated yet."""
        last = max(self.rounds, default=0)
        found = self.rounds.get(last)
        return found if found is not None and found.evaluated is None else None

    def _round_event(self, event: Event) -> None:
        one = self.round(event.round)
        if event.kind == "round_started":
            one.started = one.started or event.time
            one.asked = event.sites
            one.trained, one.failed = {}, {}
            one.summing = one.sum = None
        elif event.kind == "round_aggregated":
            one.merged = event
            for name in event.sites:
                self.site(name).counted.add(event.round)
        else:
            one.evaluated = event
