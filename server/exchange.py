"""Letters to sites and their answers, every wait with a deadline; no aggregation in this file.

    connect   wait until enough sites are there
    ask       send every site its content; the answers are taken into one `Question`
    until     listen until something holds, or the deadline; the desk is told of the wait
    miss      its time is over: a site that has not been heard has failed, with a reason
    over      nothing is waited for any more

Several questions may be open at a time. An answer belongs to the question of its kind and
round; one that belongs to none is recorded as late and dropped. A site that is struck off the
roster is waited for no longer, and what it says is dropped. Time is an argument.
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
from anabranch.protocols.identity.proposal import Signed
from anabranch.protocols.secagg.terms import Roster as PeerRoster
from anabranch.server.desk import ALONE, STAGES, AskedState, Board, Desk, Waiting
from anabranch.server.flower import Failure, Letter, Peer, Question, unfit_for_sums
from anabranch.server.mailbox import Mailbox, ttl_of
from anabranch.server.result import SiteRow
from anabranch.server.roster import ROSTER, Roster
from anabranch.server.shortfall import too_few

NEW = SiteRow()
UNSAID = ("num_examples", "steps", "loss")
TOLD = {"train": "site_trained", "evaluate": "site_evaluated"}  # the event of an answer
OFF = "its site is not, or no longer, on the coordinator's roster"


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
        signed: Signed | None = None,
        desk: Desk = ALONE,
        retry_s: float = 5.0,
        peers: PeerRoster | None = None,
    ) -> None:
        """`peers` is the roster of secure sums that the run was proposed with; None: no such."""
        self.config, self.event, self.clock = config, event, clock
        self.peers = peers
        self.connect_s = connect_s
        self.sites: dict[str, SiteRow] = {}
        self._sleep, self._poll_s, self._desk = sleep, poll_s, desk
        deadline_s = config.federation.deadline_s
        self._mail = Mailbox(grid, deadline_s=deadline_s, run=run, desk=desk, clock=clock)
        self.roster = Roster(
            self._mail,
            pack_describe(Describe(run=run, config=config, signed=signed, roster=peers)),
            names=desk.names,
            clock=clock,
            retry_s=retry_s,
            ttl_s=ttl_of(max(connect_s, deadline_s)),
            unfit=self._unfit(),
        )
        self._open: list[Question[Any]] = []
        self._ordered = 0  # sites, when they were put in order
        self._board = Board(desk, clock)
        self._refused: dict[int, Failure] = {}  # what the events say of each node

    def connect(self, number: int) -> Mapping[str, Peer]:
        """Return the sites that have nothing left to answer, once there are enough of them.

        Raises RunError if there are fewer than the quorum after `connect_s`, or, while sites are
        there whose owner or hours are waited for, after the desk's `later_s`.
        """
        federation, secure = self.config.federation, self.config.secure_aggregation
        least = need = max(federation.quorum, 0 if secure is None else secure.minimum)
        if number == 1:  # later, a site that is gone must not cost every round `connect_s`
            need = max(need, federation.cohort or 0)
        self.retry()
        started = self.clock()
        deadline, patient = started + self.connect_s, False
        latest = started + max(self._desk.later_s, self.connect_s)

        def enough() -> bool:
            self.invite(deadline)
            return self.roster.settled() and len(self.roster.available()) >= need

        def later() -> bool:
            return self._desk.later_s > self.connect_s and bool(self._later())

        def enough_or_other() -> bool:
            return enough() or later() is not patient

        then = f"round {number} begins with those that are there, if they are {least}"
        waiting = Waiting(
            why=lambda: self._why_connecting(f"{need} sites for round {number}"),
            who=self.missing,
            then=f"{then} or more; else the run fails",
            since=started,
        )
        while True:
            self.until(enough_or_other, deadline, waiting)
            if later() is patient:
                break
            patient = not patient
            deadline = latest if patient else min(latest, self.clock() + self.connect_s)
        self.over()
        self.roster.give_up()
        peers = self.roster.available()
        if len(peers) < least:
            waited = self.connect_s if deadline <= started + self.connect_s else deadline - started
            problems = self.roster.problems()
            raise RunError(too_few(number, least, peers, problems, waited))
        return peers

    def ask(self, question: Question[Any], contents: Mapping[str, RecordDict]) -> None:
        """Send each of these sites its content; `listen` takes their answers in."""
        if question not in self._open:
            self._open.append(question)
        letters, now = [], self.clock()
        limit = question.limit_s
        until = now + (self.config.federation.deadline_s if limit is None else limit)
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
            letter = Letter(question.kind, question.round, peer.node, name, question.attempt)
            letters.append((letter, content))
            self._board.asked(name, question.kind, question.round, now, until)
        self._mail.send(letters, until=until, ttl_s=None if limit is None else ttl_of(limit))

    def retry(self) -> None:
        """Let nodes that were refused, and sites that were started anew, be asked again."""
        self.roster.retry(self._boots())

    def invite(self, until: float) -> None:
        """Ask nodes that are new, or may have changed, who they are."""
        invited = self.roster.invite()
        for node, failure in invited.refused:
            self._meet(node, failure)
        names = self._desk.names
        for node in invited.asked if names is not None else ():
            name = None if names is None else names(node)
            if name is not None:
                self._board.asked(name, DESCRIBE, 0, self.clock(), until)

    def close(self, question: Question[Any]) -> None:
        """Take nothing more in for this question."""
        if question in self._open:
            self._open.remove(question)
        if not self._open:
            self.over()

    def miss(self, question: Question[Any], site: str) -> None:
        """Its time is over: unless it has been heard, whatever the site still says is late."""
        if not question.heard(site):
            limit = question.limit_s or self.config.federation.deadline_s
            failure = Failure("deadline", f"no answer within {limit:g} s")
            self._fail(question, site, failure, "late")

    def until(self, done: Callable[[], bool], deadline: float, waiting: Waiting) -> None:
        """Listen until `done()` or the deadline; what has arrived by then is heard."""
        while True:
            self._listen()
            left = deadline - self.clock()
            if done() or left <= 0:
                return
            self._board.wait(waiting, deadline)
            self._sleep(min(self._poll_s, left))

    def over(self) -> None:
        """Say that nothing is waited for any more."""
        self._board.over()

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
                met = self.roster.hear(letter.node, answer, self._boots())
                self._meet(letter.node, met)
                continue
            if not self.roster.listed(letter.node, site):
                answer = Failure(ROSTER, OFF)
            size = 0 if isinstance(answer, Failure) else payload_bytes(answer)
            self.count(site, bytes_up=size)
            question = next((one for one in self._open if one.expects(letter)), None)
            if question is None:
                self.count(site, late=1)
                self.event("site_late", site=site, round=letter.round, asked=letter.kind)
                continue
            question.bytes_up += size
            self._take(question, site, question.read(answer, question.peers[site]))
        for letter, content, why in self._mail.again():
            self._sent_again(letter, content, why)
        if self._desk.names is not None:
            self._strike()

    def _strike(self) -> None:
        """Wait no longer for sites that are not on the roster any more."""
        for question in self._open:
            for name, peer in question.peers.items():
                if not question.heard(name) and not self.roster.listed(peer.node, name):
                    self._fail(question, name, Failure(ROSTER, OFF))

    def _sent_again(self, letter: Letter, content: RecordDict, why: str) -> None:
        names = self._desk.names
        site = letter.site or (names(letter.node) if names else None) or f"node {letter.node}"
        size = payload_bytes(content)
        if letter.site:
            self.count(site, bytes_down=size)
        for question in self._open:
            if question.expects(letter):
                question.bytes_down += size
        self.event("site_asked_again", site=site, round=letter.round, asked=letter.kind, reason=why)

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
        elif question.kind == "train":  # kept for a secure sum: its numbers are not said, not 0
            facts = {name: fact for name, fact in facts.items() if name not in UNSAID or fact}
        if question.kind in TOLD:
            self.event(TOLD[question.kind], **facts)
        self._board.state(site, "answered")

    def _fail(
        self,
        question: Question[Any],
        site: str,
        failure: Failure,
        state: AskedState = "failed",
    ) -> None:
        question.failed[site] = failure
        self.count(site, failures=1)
        self._board.state(site, state, failure.message)
        stage = STAGES.get(question.kind)
        self.event(
            "site_failed" if stage is None else "secure_dropout",
            site=site,
            round=question.round,
            **({"asked": question.kind} if stage is None else {"stage": stage}),
            reason=failure.reason,
            message=failure.message,
            **({"accused": list(failure.accused)} if failure.accused else {}),
        )

    def _unfit(self) -> Callable[[Peer], Failure | None]:
        """Return what says of a site why it cannot take part in this run's secure sums."""
        if self.config.secure_aggregation is None:
            return lambda peer: None
        listed = None if self.peers is None else self.peers.keys
        return lambda peer: unfit_for_sums(peer, listed)

    def _meet(self, node: int, met: Peer | Failure) -> None:
        if isinstance(met, Failure):
            self._board.state(met.site, "failed", met.message)
            if self._refused.get(node) != met:  # else: asked again, and nothing has changed
                self._refused[node] = met
                self.event("node_refused", node=node, reason=met.reason, message=met.message)
            return
        self._refused.pop(node, None)
        self._board.state(met.name, "answered")
        self.event(
            "site_joined",
            site=met.name,
            num_examples=met.num_examples,
            held_out=met.held_out,
            max_rank=met.max_rank,
        )

    def _boots(self) -> dict[str, str] | None:
        """Return name -> the process that each site reports, if sites report."""
        holds = self._desk.holds
        return None if holds is None else {n: one.report.boot for n, one in holds().items()}

    def missing(self) -> list[str]:
        """Return who may come and is not available, ascending."""
        known = set(self.roster.refused()) | set(self._desk.sites() if self._desk.sites else ())
        return sorted(known - self.roster.available().keys())

    def _why_connecting(self, what: str) -> str:
        here, owners = len(self.roster.available()), self.roster.waiting()
        asked = f"; {', '.join(owners)}: the owner is to approve the run" if owners else ""
        closed = self.roster.closed()
        asked += f"; {', '.join(closed)}: outside the hours of the site" if closed else ""
        return f"{what}, {here} are there{asked}"

    def _later(self) -> list[str]:
        """Return the connected sites that may come once their owners or hours allow it."""
        return self.roster.waiting() + self.roster.closed()
