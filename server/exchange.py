"""Letters to sites and their answers, every wait with a deadline; no aggregation in this file.

    connect   wait until enough sites are there
    ask       send every site its content; the answers are taken into one `Question`
    until     listen until something holds, or the deadline
    miss      its time is over: a site that has not been heard has failed, with a reason

Several questions may be open at a time. An answer belongs to the question of its kind and
round; one that belongs to none is recorded as late and dropped. Time is an argument.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
from flwr.app import RecordDict
from flwr.serverapp import Grid

from anabranch.client.flower import DESCRIBE, Describe, pack_describe, payload_bytes
from anabranch.protocols.adapter import Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import RunError
from anabranch.server.flower import Failure, Letter, Mailbox, Peer, Question
from anabranch.server.result import SiteRow
from anabranch.server.roster import Roster

NEW = SiteRow()


class Events(Protocol):
    """Where the engine tells what happens, as it happens; server/store.py writes it down."""

    def __call__(self, kind: str, **fields: Any) -> None:
        """Take one event."""


class Exchange:
    """All that is said between the coordinator and its sites in one run."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        *,
        run: str,
        event: Events,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        poll_s: float = 0.02,
        connect_s: float = 60.0,
    ) -> None:
        self.config, self.event, self.clock = config, event, clock
        self.connect_s = connect_s
        self.sites: dict[str, SiteRow] = {}
        self._sleep, self._poll_s = sleep, poll_s
        self._mail = Mailbox(grid, deadline_s=config.federation.deadline_s)
        self.roster = Roster(self._mail, pack_describe(Describe(run=run, config=config)))
        self._open: list[Question[Any]] = []
        self._ordered = 0  # sites, when they were put in order

    def connect(self, number: int) -> Mapping[str, Peer]:
        """Return the sites that have nothing left to answer, once there are enough of them.

        Raises RunError if there are fewer than the quorum after `connect_s`.
        """
        federation = self.config.federation
        need = federation.quorum
        if number == 1:  # later, a site that is gone must not cost every round `connect_s`
            need = max(need, federation.cohort or 0)
        self.roster.retry()

        def enough() -> bool:
            self.roster.invite()
            return self.roster.settled() and len(self.roster.available()) >= need

        self.until(enough, self.clock() + self.connect_s)
        self.roster.give_up()
        peers = self.roster.available()
        if len(peers) < federation.quorum:
            raise RunError(self.too_few(number, peers))
        return peers

    def ask(self, question: Question[Any], contents: Mapping[str, RecordDict]) -> None:
        """Send each of these sites its content; `listen` takes their answers in."""
        if question not in self._open:
            self._open.append(question)
        letters = []
        sizes: dict[int, int] = {}
        for name, content in contents.items():
            size = sizes.get(id(content))
            if size is None:  # many sites share one content
                size = sizes[id(content)] = payload_bytes(content)
            question.bytes_down += size
            peer, row = question.peers[name], self.sites.get(name, NEW)
            self.sites[name] = msgspec.structs.replace(
                row, bytes_down=row.bytes_down + size, max_rank=peer.max_rank
            )
            letters.append((Letter(question.kind, question.round, peer.node, name), content))
        self._mail.send(letters)

    def close(self, question: Question[Any]) -> None:
        """Take nothing more in for this question."""
        if question in self._open:
            self._open.remove(question)

    def miss(self, question: Question[Any], site: str) -> None:
        """Its time is over: unless it has been heard, whatever the site still says is late."""
        if not question.heard(site):
            limit = self.config.federation.deadline_s
            self._fail(question, site, Failure("deadline", f"no answer within {limit:g} s"))

    def until(self, done: Callable[[], bool], deadline: float) -> None:
        """Listen until `done()` or the deadline; what has arrived by then is heard."""
        while True:
            self._listen()
            left = deadline - self.clock()
            if done() or left <= 0:
                return
            self._sleep(min(self._poll_s, left))

    def count(self, site: str, **counts: float) -> None:
        """Add to a site's row."""
        self.sites[site] = self.sites.get(site, NEW).plus(**counts)

    def rows(self) -> dict[str, SiteRow]:
        """Return a copy of all rows, ascending by site."""
        if len(self.sites) != self._ordered:
            self.sites, self._ordered = dict(sorted(self.sites.items())), len(self.sites)
        return dict(self.sites)

    def _listen(self) -> None:
        """Take in every answer that is there."""
        for letter, answer in self._mail.receive():
            site = letter.site
            if letter.kind == DESCRIBE:
                self._meet(letter.node, self.roster.hear(letter.node, answer))
                continue
            size = 0 if isinstance(answer, Failure) else payload_bytes(answer)
            self.count(site, bytes_up=size)
            question = next((one for one in self._open if one.expects(letter)), None)
            if question is None:
                self.count(site, late=1)
                self.event("site_late", site=site, round=letter.round, asked=letter.kind)
                continue
            question.bytes_up += size
            self._take(question, site, question.read(answer, question.peers[site]))

    def _take(
        self, question: Question[Any], site: str, got: tuple[Any, Delta | None] | Failure
    ) -> None:
        if isinstance(got, Failure):
            self._fail(question, site, got)
            return
        report, delta = got
        question.reports[site] = report
        facts = {"round": question.round, **msgspec.structs.asdict(report)}
        if delta is not None:
            question.deltas[site] = delta
            facts["norm"] = question.norms[site] = delta.norm()
        self.event("site_trained" if question.kind == "train" else "site_evaluated", **facts)

    def _fail(self, question: Question[Any], site: str, failure: Failure) -> None:
        question.failed[site] = failure
        self.count(site, failures=1)
        self.event(
            "site_failed",
            site=site,
            round=question.round,
            asked=question.kind,
            reason=failure.reason,
            message=failure.message,
        )

    def _meet(self, node: int, met: Peer | Failure) -> None:
        if isinstance(met, Failure):
            self.event("node_refused", node=node, reason=met.reason, message=met.message)
            return
        self.event(
            "site_joined",
            site=met.name,
            num_examples=met.num_examples,
            held_out=met.held_out,
            max_rank=met.max_rank,
        )

    def too_few(self, number: int, peers: Mapping[str, Peer]) -> str:
        """Return what to say when too few sites are connected."""
        return (
            f"round {number}: {self.config.federation.quorum} sites are needed, after "
            f"{self.connect_s:g} s there are {len(peers)}{_listed(peers)}; start the missing "
            "clients, or lower federation.quorum" + _lines(self.roster.problems())
        )

    def below_quorum(self, question: Question[Any]) -> str:
        """Return what to say of a round that has fewer deltas than its quorum."""
        lines = [f"{name}: {f.reason}: {f.message}" for name, f in question.failed.items()]
        return (
            f"round {question.round}: {len(question.reports)} of {len(question.peers)} sites sent "
            f"a delta that counts{_listed(question.reports)}, "
            f"{self.config.federation.quorum} are needed" + _lines(lines)
        )


def _listed(names: Mapping[str, object]) -> str:
    return f" ({', '.join(sorted(names))})" if names else ""


def _lines(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in sorted(lines))
