"""Letters under way to Flower's nodes, and the replies to them.

Only `get_node_ids`, `push_messages` and `pull_messages` of a Grid are used. They never wait, so
that every wait is the engine's own, with a deadline. (`sample_nodes` waits for ever,
`send_and_receive` cannot be left before its time.)

A reply is matched by the id of the message it answers, never by its source: error replies
("node unavailable", "app crashed") carry the coordinator's own node id.

A letter is sent once, or again with the same content while it may have been lost:

    send ─► open ─► a reply to any of its copies ─► answered: given out, once
             │  ▲
             ▼  └── sent again, once its node is connected, at most every AGAIN_S
            lost    the site's process is another one than when it was sent (report.boot);
                    the site says it is idle LOST_S after that, and not of this round;
                    the same of this round, ANSWER_LOST_S after that: its answer was lost;
                    or Flower says that message, reply, node or app are gone

A site answers a letter that it knows with the same bytes, so asking again changes no result.
Without reports (`Desk.holds`) letters are never sent again, and what Flower says is the answer.

Nobody waits for a letter after its `until`. One that was lost is forgotten then, and its node
has nothing left to answer; one that may still be answered keeps its node busy until the time to
live is over, which is twice as long: a lost message keeps nobody busy for half a day.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from anabranch.server.desk import ALONE, Desk, Reported
from anabranch.server.flower import FLOWER_ERRORS, Failure, Letter

AGAIN_S = 5.0
LOST_S = 10.0
ANSWER_LOST_S = 30.0
LOOK_S = 1.0  # reports are read no more often
LEAST_TTL_S = 60.0
GONE = frozenset({3, 4, 5, 8})  # Flower's codes for what may come back


@dataclass(eq=False)
class _Sent:
    """A letter that nobody has answered."""

    letter: Letter
    content: RecordDict | None  # None: it is never sent again
    until: float  # nobody waits for it then
    ttl: float
    at: float = 0.0  # seconds since 1970, when it was sent last
    boot: str | None = None  # of the site's process then; None: not known
    copies: set[str] = field(default_factory=set)  # Flower's ids of those under way


class Mailbox:
    """Open letters, and the replies to them; each letter is answered once."""

    def __init__(
        self,
        grid: Grid,
        *,
        deadline_s: float,
        run: str = "",
        desk: Desk = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid, self._run, self._desk, self._clock = grid, run, desk, clock
        self._ttl = ttl_of(deadline_s)
        self._sent: dict[str, _Sent] = {}  # by the id of each copy
        self._lost: list[_Sent] = []  # without a copy under way
        self._answered: dict[str, float] = {}  # copies of answered letters -> when they expire
        self._waiting: dict[int, int] = {}  # node -> open letters, where there are any
        self._ids: Sequence[int] | None = None  # what the grid said last of the nodes
        self._nodes: frozenset[int] = frozenset()
        self._undelivered: list[tuple[Letter, RecordDict | Failure]] = []
        self._looked = -math.inf

    def nodes(self) -> frozenset[int]:
        """Return the ids of the nodes that are connected now; the same object while they are."""
        ids = self._grid.get_node_ids()
        own = ids if isinstance(ids, range) else list(ids)
        if own != self._ids:
            self._ids, self._nodes = own, frozenset(own)
        return self._nodes

    def busy(self) -> Set[int]:
        """Return the nodes that have not answered a letter yet."""
        return self._waiting.keys()

    def send(
        self,
        letters: Sequence[tuple[Letter, RecordDict]],
        *,
        until: float = math.inf,
        ttl_s: float | None = None,
    ) -> None:
        """Push the letters; one that Flower does not take is lost, or comes back as a Failure."""
        again = self._desk.holds is not None
        ttl = self._ttl if ttl_s is None else ttl_s
        sent = [
            _Sent(letter, content if again else None, until, ttl) for letter, content in letters
        ]
        for one in sent:
            self._waiting[one.letter.node] = self._waiting.get(one.letter.node, 0) + 1
        self._push([(one, content) for one, (_, content) in zip(sent, letters, strict=True)])

    def receive(self) -> list[tuple[Letter, RecordDict | Failure]]:
        """Return the answers that are there; each letter is answered once."""
        arrived, self._undelivered = self._undelivered, []
        ids = [*self._sent, *self._answered]
        for reply in self._grid.pull_messages(ids) if ids else ():
            name = reply.metadata.reply_to_message_id
            self._answered.pop(name, None)
            sent = self._sent.pop(name, None)
            if sent is None:  # an answer to nothing that is still open
                continue
            sent.copies.discard(name)
            if self._may_come_back(sent, reply):
                if not sent.copies:
                    self._lost.append(sent)
                continue
            self._close(sent)
            arrived.append((sent.letter, _outcome(sent.letter, reply)))
        return arrived

    def again(self) -> list[tuple[Letter, RecordDict, str]]:
        """Send lost letters again; return each with its content, and why it was sent.

        Those that nobody waits for any more are forgotten instead.
        """
        holds, now = self._desk.holds, self._desk.now()
        if holds is None or not (self._sent or self._lost) or now < self._looked + LOOK_S:
            return []
        self._looked = now
        reports, clock, here = holds(), self._clock(), self.nodes()
        found: list[tuple[_Sent, RecordDict, str]] = []
        for sent in [*dict.fromkeys(self._sent.values()), *self._lost]:
            why = self._why_lost(sent, self._report(sent, reports))
            if why is None or sent.content is None:
                continue
            if clock >= sent.until:
                self._close(sent)
            elif now >= sent.at + AGAIN_S and sent.letter.node in here:
                found.append((sent, sent.content, why))
        chosen = {id(sent) for sent, _, _ in found}
        self._lost = [sent for sent in self._lost if id(sent) not in chosen]
        self._push([(sent, content) for sent, content, _ in found])
        self._answered = {name: end for name, end in self._answered.items() if end > clock}
        return [(sent.letter, content, why) for sent, content, why in found]

    def _push(self, letters: Sequence[tuple[_Sent, RecordDict]]) -> None:
        """Push one copy of every letter."""
        pushed = [
            Message(
                content,
                sent.letter.node,
                sent.letter.kind,
                ttl=sent.ttl,
                group_id=str(sent.letter.round),
            )
            for sent, content in letters
        ]
        if not pushed:
            return
        reports = None if self._desk.holds is None else self._desk.holds()
        taken = set(self._grid.push_messages(pushed)) - {""}
        for (sent, _), message in zip(letters, pushed, strict=True):
            name = message.metadata.message_id
            if reports is not None:
                report = self._report(sent, reports)
                sent.at = self._desk.now()
                sent.boot = None if report is None else report.report.boot
            if name in taken:
                sent.copies.add(name)
                self._sent[name] = sent
            elif reports is not None:
                if not sent.copies:
                    self._lost.append(sent)
            else:
                self._close(sent)
                failure = Failure("flower", "the message could not be handed to the node")
                self._undelivered.append((sent.letter, failure))

    def _report(self, sent: _Sent, reports: Mapping[str, Reported]) -> Reported | None:
        """Return what the letter's site said last."""
        names = self._desk.names
        name = sent.letter.site or (None if names is None else names(sent.letter.node))
        return None if name is None else reports.get(name)

    def _why_lost(self, sent: _Sent, reported: Reported | None) -> str | None:
        """Return why a letter may be lost; None: it is under way, or being worked on."""
        if not sent.copies:
            return "Flower could not deliver it, or not the answer"
        if reported is None:
            return None
        report, letter = reported.report, sent.letter
        of_this = (report.run, report.round) == (self._run, letter.round)
        idle = report.activity == "idle"
        if sent.boot is None:  # the first word since it was sent
            sent.boot = report.boot
        if report.boot != sent.boot:
            if of_this and not idle and report.activity != "starting":
                sent.boot = report.boot  # another copy of it is being worked on
                return None
            return "the site was started anew"
        if idle and reported.at > sent.at + (ANSWER_LOST_S if of_this else LOST_S):
            return "the site says it has nothing to do"
        return None

    def _may_come_back(self, sent: _Sent, reply: Message) -> bool:
        """Whether Flower says no for now: another copy is under way, or may be sent."""
        gone = reply.has_error() and reply.error.code in GONE and sent.content is not None
        return gone and (bool(sent.copies) or self._clock() < sent.until)

    def _close(self, sent: _Sent) -> None:
        """Wait for this letter no longer; what still comes to its copies is dropped."""
        for name in sent.copies:
            self._sent.pop(name, None)
            self._answered[name] = self._clock() + sent.ttl
        sent.copies.clear()
        if sent in self._lost:
            self._lost.remove(sent)
        left = self._waiting.pop(sent.letter.node) - 1
        if left:
            self._waiting[sent.letter.node] = left


def ttl_of(wait_s: float) -> float:
    """Return the time to live of a message whose answer is waited for so long, in seconds."""
    return max(LEAST_TTL_S, 2 * wait_s)


def _outcome(letter: Letter, reply: Message) -> RecordDict | Failure:
    if reply.has_error():
        code = reply.error.code
        return Failure("flower", f"Flower error {code}: {FLOWER_ERRORS.get(code, 'unknown code')}")
    if reply.metadata.src_node_id != letter.node:
        return Failure("rejected", "the answer comes from another node")
    return reply.content
