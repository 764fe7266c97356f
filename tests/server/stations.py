"""Sites behind a Flower grid in virtual time, each message with a fate of its own.

A station answers as a site's agent does: one message at a time, a message that it knows with the
answer that it gave before. What happens to each training message is its script's:

    answer S      answered after S seconds
    lost          taken by the site, and gone with it: it is idle afterwards
    lost answer   trained, the answer is gone: it is idle afterwards, and of this round
    restart S     the site's process ends, and another one reports S seconds later
    error C       Flower answers with its code C after a second
    away S        Flower says that the node is unavailable, and it is, for S seconds
    dead          nothing more is heard of it, no report either

Reports arrive every REPORT_S; those of a station that is away or dead do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from flwr.app import Context, Message, RecordDict

from anabranch.client.flower import client_app
from anabranch.protocols.config import RunConfig
from anabranch.protocols.identity.join import Report
from anabranch.server.desk import Asked, Desk, Wait
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.grid import LocalGrid, answered, error_reply, number
from tests.simulations.rig import Events, ToySite, VirtualTime, adapter, config

EPOCH = 1_800_000_000.0  # what the wall clock says when virtual time begins
REPORT_S = 3.0
FIRST = 501

Fate = tuple[str, float]


@dataclass(frozen=True)
class Said:
    """A report, and when it arrived."""

    report: Report
    at: float


@dataclass
class Station:
    """One site and its connection."""

    site: ToySite
    script: list[Fate] = field(default_factory=list)  # then every message is answered
    boots: int = 1
    since: float = 0.0  # of what it does now
    busy_until: float = 0.0
    work: tuple[str, int] = ("", 0)  # run and round that it has worked on last
    away_until: float = 0.0
    dead: bool = False
    trained: dict[bytes, Message] = field(default_factory=dict)  # what it answered
    computed: int = 0

    def report(self, now: float) -> Report:
        run, round_ = self.work
        return Report(
            boot=f"{self.boots:064x}",
            activity="training" if now < self.busy_until else "idle",
            since=EPOCH + self.since,
            run=run,
            round=round_,
        )


class Stations(LocalGrid):
    """The grid of these stations; `time` is the engine's."""

    def __init__(self, stations: Sequence[Station], time: VirtualTime) -> None:
        super().__init__()
        self.stations = dict(enumerate(stations, FIRST))
        self._time, self._due = time, dict[str, tuple[float, Message]]()
        self._said: dict[str, Said] = {}
        self._restarts: list[tuple[float, Station]] = []
        self.sent: list[tuple[float, str, str]] = []  # when, to whom, what kind
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            for node in self.stations
        }
        self._apps = {
            node: client_app(lambda context, one=one: one.site)  # type: ignore[misc]
            for node, one in self.stations.items()
        }

    def get_node_ids(self) -> list[int]:
        return [node for node, one in self.stations.items() if one.away_until <= self._time.now]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        due = [i for i in message_ids if i in self._due and self._due[i][0] <= self._time.now]
        return [self._due.pop(i)[1] for i in due]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        raise NotImplementedError

    def reports(self) -> Mapping[str, Said]:
        """Return what each site said last, as the coordinator's door has it."""
        now = self._time.now
        for at, one in [pair for pair in self._restarts if pair[0] <= now]:
            one.boots, one.since, one.busy_until, one.work = one.boots + 1, at, 0.0, ("", 0)
            self._restarts.remove((at, one))
        arrived = now - now % REPORT_S
        for one in self.stations.values():
            if not one.dead and one.away_until <= arrived:
                self._said[one.site.name] = Said(one.report(arrived), EPOCH + arrived)
        return dict(self._said)

    def _push(self, message: Message) -> str:
        name, now = number(message), self._time.now
        node = message.metadata.dst_node_id
        station, kind = self.stations[node], message.metadata.message_type
        self.sent.append((now, station.site.name, kind))
        fate: Fate = ("answer", 0.0)
        if kind == "train":
            self.reports()
            text = bytes(message.content["message"]["json"])  # type: ignore[arg-type]
            asked = msgspec.json.decode(text)
            station.work = (asked["run"], asked["round"])
            fate = station.script.pop(0) if station.script else fate
        self._befall(name, message, station, node, *fate)
        return name

    def _befall(
        self,
        name: str,
        message: Message,
        station: Station,
        node: int,
        fate: str,
        seconds: float,
    ) -> None:
        now = self._time.now
        if station.dead:
            return
        if fate == "answer":
            start = max(now, station.busy_until)
            reply = self._answer(message, station, node)
            if message.metadata.message_type == "train":
                station.busy_until = start + seconds
            self._due[name] = (start + seconds, reply)
        elif fate == "lost":
            station.work = ("", 0)
        elif fate == "lost answer":
            self._answer(message, station, node)
        elif fate == "restart":
            station.busy_until = now + 10 * seconds + 1.0
            self._restarts.append((now + seconds, station))
        elif fate == "error":
            self._due[name] = (now + 1.0, self._error(message, int(seconds)))
        elif fate == "away":
            station.away_until = now + seconds
            self._due[name] = (now + 1.0, self._error(message, 5))
        else:
            station.dead = True

    def _answer(self, message: Message, station: Station, node: int) -> Message:
        text = bytes(message.content["message"]["json"])  # type: ignore[arg-type]
        if message.metadata.message_type != "train":
            reply = answered(self._apps[node], message, self._contexts[node])
        elif text in station.trained:  # the same bytes, as a reply to this message
            reply = Message(station.trained[text].content, reply_to=message)
        else:
            reply = answered(self._apps[node], message, self._contexts[node])
            station.trained[text] = reply
            station.computed += 1
        number(reply)
        return reply

    def _error(self, message: Message, code: int) -> Message:
        reply = error_reply(message, code, "")
        number(reply)
        return reply


class Watched:
    """A round engine over stations, and all that it told."""

    def __init__(
        self,
        scripts: Mapping[str, Sequence[Fate]],
        *,
        run: RunConfig | None = None,
        reports: bool = True,
        names: bool = True,
        sites: Sequence[ToySite] | None = None,
        poll_s: float = 1.0,
        later_s: float = 0.0,
        **engine: Any,
    ) -> None:
        self.time, self.events = VirtualTime(), Events()
        toys = sites or [
            ToySite(name, 10, step=float(2**i)) for i, name in enumerate(sorted(scripts))
        ]
        stations = [Station(site, list(scripts.get(site.name, ()))) for site in toys]
        self.stations = {one.site.name: one for one in stations}
        self.grid = Stations(stations, self.time)
        self.roster = {FIRST + i: site.name for i, site in enumerate(toys)}
        self.waits: list[Wait | None] = []
        self.asked: list[tuple[str, Asked]] = []
        self.unsaid: list[float] = []  # times of sleeps of which nobody was told why
        self.desk = Desk(
            names=self.roster.get if names else None,
            sites=self.roster.values if names else None,
            holds=self.grid.reports if reports else None,
            wait=self.waits.append,
            asked=lambda site, asked: self.asked.append((site, asked)),
            now=lambda: EPOCH + self.time.now,
            later_s=later_s,
        )
        self.engine = RoundEngine(
            self.grid,
            run or config(rounds=1, weighting="uniform", client_evaluation=False),
            run="toy-1",
            event=self.events,
            clock=self.time.clock,
            sleep=self.sleep,
            poll_s=poll_s,
            desk=self.desk,
            **engine,
        )

    def sleep(self, seconds: float) -> None:
        wait = self.waits[-1] if self.waits else None
        now = EPOCH + self.time.now
        if wait is None or not wait.since <= now < wait.until:
            self.unsaid.append(self.time.now)
        self.time.sleep(seconds)

    def run(self, **progress: Any) -> Result:
        return self.engine.run(adapter(), **progress)

    def value(self, result: Result) -> float:
        return float(result.adapter.arrays["head.weight"][0, 0])
