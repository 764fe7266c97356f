"""Flower under the round engine: letters to sites, and answers checked on arrival.

Only `get_node_ids`, `push_messages` and `pull_messages` of a Grid are used. They never wait, so
that every wait is the engine's own, with a deadline. (`sample_nodes` waits for ever,
`send_and_receive` cannot be left before its time.)

A reply is matched by the id of the message it answers, never by its source: error replies
("node unavailable", "app crashed") carry the coordinator's own node id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid

from anabranch.client.flower import unpack_described, unpack_evaluated, unpack_trained
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import IncompatibleAdapter, MalformedMessage, ProtocolError
from anabranch.protocols.messages import Evaluated, Refused, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Uplink

R = TypeVar("R", Trained, Evaluated)

MAX_TEXT = 10_000  # characters of a site's own words that are kept

# Flower's error codes. Their text is not kept: code 2 comes with a client's exception text,
# which may quote a record. (Our ClientApp never causes it; somebody else's might.)
FLOWER_ERRORS = {
    0: "unknown error",
    1: "the ClientApp could not be loaded",
    2: "the ClientApp raised an exception",
    3: "the message is no longer available",
    4: "the reply was not uploaded in time",
    5: "the node is unavailable",
    6: "a mod refused the message",
    7: "the app bundle is invalid",
    8: "the ClientApp stopped responding",
}


@dataclass(frozen=True)
class Peer:
    """A connected site."""

    name: str
    node: int  # Flower's id, random
    num_examples: int
    held_out: int
    max_rank: int | None = None  # highest LoRA rank it trains; None: no limit


@dataclass(frozen=True)
class Failure:
    """Why a site's answer does not count.

    `reason` is a word of protocols.messages.Reason (the site refused), or "deadline" (no answer
    in time), "flower" (Flower answered in its stead), "rejected" (its answer breaks a rule),
    "surplus" (the round had its deltas before; federation.over_selection).
    """

    reason: str
    message: str
    site: str = ""  # only where the site is not known otherwise


@dataclass(frozen=True)
class Letter:
    """One message under way to a node."""

    kind: str  # Flower's message type
    round: int
    node: int
    site: str  # "" while its name is not known


@dataclass(eq=False)
class Question(Generic[R]):
    """What the sites are being asked, and what they have said."""

    kind: str
    round: int
    peers: dict[str, Peer]  # by name, ascending
    read: Callable[[RecordDict | Failure, Peer], tuple[R, Delta | None] | Failure]
    reports: dict[str, R] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)  # those not summed yet
    norms: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)  # what each was told to train
    ages: dict[str, int] = field(default_factory=dict)  # rounds that a delta was late, if any
    failed: dict[str, Failure] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    def expects(self, letter: Letter) -> bool:
        """Whether an answer to this letter still counts."""
        asked = (letter.kind, letter.round) == (self.kind, self.round)
        return asked and not self.heard(letter.site)

    def heard(self, site: str) -> bool:
        """Whether a site has answered, one way or another."""
        return site in self.reports or site in self.failed


class Mailbox:
    """Open letters, and the replies to them."""

    def __init__(self, grid: Grid, *, deadline_s: float) -> None:
        self._grid = grid
        self._ttl = max(float(DEFAULT_TTL), 2 * deadline_s)  # a late reply can still be fetched
        self._open: dict[str, Letter] = {}
        self._waiting: dict[int, int] = {}  # node -> open letters, where there are any
        self._ids: Sequence[int] | None = None  # what the grid said last of the nodes
        self._nodes: frozenset[int] = frozenset()
        self._undelivered: list[tuple[Letter, RecordDict | Failure]] = []

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

    def send(self, letters: Sequence[tuple[Letter, RecordDict]]) -> None:
        """Push the letters; one that Flower does not take comes back as a Failure."""
        pushed = [
            Message(content, letter.node, letter.kind, ttl=self._ttl, group_id=str(letter.round))
            for letter, content in letters
        ]
        taken = set(self._grid.push_messages(pushed)) if pushed else set()
        for (letter, _), message in zip(letters, pushed, strict=True):
            if message.metadata.message_id in taken:
                self._open[message.metadata.message_id] = letter
                self._waiting[letter.node] = self._waiting.get(letter.node, 0) + 1
            else:
                failure = Failure("flower", "the message could not be handed to the node")
                self._undelivered.append((letter, failure))

    def receive(self) -> list[tuple[Letter, RecordDict | Failure]]:
        """Return the answers that are there; each letter is answered once."""
        arrived, self._undelivered = self._undelivered, []
        replies = self._grid.pull_messages(list(self._open)) if self._open else ()
        for reply in replies:
            letter = self._open.pop(reply.metadata.reply_to_message_id, None)
            if letter is not None:  # else: an answer to nothing that is still open
                self._answered(letter.node)
                arrived.append((letter, _outcome(letter, reply)))
        return arrived

    def _answered(self, node: int) -> None:
        left = self._waiting.pop(node) - 1
        if left:
            self._waiting[node] = left


def _outcome(letter: Letter, reply: Message) -> RecordDict | Failure:
    if reply.has_error():
        code = reply.error.code
        return Failure("flower", f"Flower error {code}: {FLOWER_ERRORS.get(code, 'unknown code')}")
    if reply.metadata.src_node_id != letter.node:
        return Failure("rejected", "the answer comes from another node")
    return reply.content


def read_described(answer: RecordDict | Failure, node: int) -> Peer | Failure:
    """Return the site behind a node, or why it cannot take part."""
    if isinstance(answer, Failure):
        return answer
    try:
        described = unpack_described(answer)
    except ProtocolError as error:
        return Failure("rejected", str(error))
    if isinstance(described, Refused):
        return _refusal(described)
    return Peer(
        described.site, node, described.num_examples, described.held_out, described.max_rank
    )


def read_trained(
    answer: RecordDict | Failure,
    peer: Peer,
    *,
    spec: AdapterSpec,
    parts: Mapping[str, Part],
    uplink: Uplink,
    counts_steps: bool = False,
) -> tuple[Trained, Delta] | Failure:
    """Return a site's delta if it may be added to the sum, or why it may not.

    It has the global adapter's spec (names, shapes, base), exactly the part that its site was
    assigned, the run's codec, and finite values. Its weight is the number of examples that
    frame, message and the site's own first description agree on; so must the steps, which
    `counts_steps` (federation.normalize_steps divides by them) wants above 0.
    """
    if isinstance(answer, Failure):
        return answer
    try:
        got = unpack_trained(answer, spec, parts[peer.name], uplink)
        if isinstance(got, Refused):
            return _refusal(got)
        trained, delta = got
        _require_name(trained.site, peer)
        _require_count(trained.num_examples, peer.num_examples, "training")
        for what in ("num_examples", "steps"):
            framed, said = getattr(delta, what), getattr(trained, what)
            if framed != said:
                raise IncompatibleAdapter(f"{what}: {framed} in the frame, {said} in the message")
        if counts_steps and trained.steps < 1:
            raise IncompatibleAdapter("steps: 0, and federation.normalize_steps divides by them")
    except ProtocolError as error:
        return Failure("rejected", str(error))
    return trained, delta


def read_evaluated(answer: RecordDict | Failure, peer: Peer) -> tuple[Evaluated, None] | Failure:
    """Return a site's metrics if they may be averaged, or why they may not."""
    if isinstance(answer, Failure):
        return answer
    try:
        got = unpack_evaluated(answer)
        if isinstance(got, Refused):
            return _refusal(got)
        _require_name(got.site, peer)
        _require_count(got.num_examples, peer.held_out, "held-out")
        for name, value in got.metrics.items():
            if not math.isfinite(value):
                raise MalformedMessage(f"metric {name!r}: expected a finite number, got {value}")
    except ProtocolError as error:
        return Failure("rejected", str(error))
    return got, None


def _refusal(refused: Refused) -> Failure:
    return Failure(refused.reason, refused.message[:MAX_TEXT], refused.site[:64])


def _require_name(name: str, peer: Peer) -> None:
    if name != peer.name:
        raise MalformedMessage(f"site: expected {peer.name!r}, got {name[:64]!r}")


def _require_count(count: int, described: int, what: str) -> None:
    """Refuse a weight that the site did not announce: it would silence the other sites."""
    if not 1 <= count <= described:
        raise MalformedMessage(
            f"num_examples: expected 1 to {described}, the {what} records that the site "
            f"described, got {count}"
        )
