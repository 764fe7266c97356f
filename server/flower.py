"""What sites are asked, and their answers, checked on arrival; mailbox.py carries both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec
from flwr.app import RecordDict

from anabranch.client.flower import unpack_described, unpack_evaluated, unpack_trained
from anabranch.client.sums.stages import unpack_kept
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import IncompatibleAdapter, MalformedMessage, ProtocolError
from anabranch.protocols.identity.join import plain
from anabranch.protocols.messages import Evaluated, Refused, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec, shown
from anabranch.protocols.tables import Uplink

R = TypeVar("R", bound=msgspec.Struct)

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
    peer_key: str | None = None  # Ed25519, hex: its key in secure sums; None: it takes part in none


@dataclass(frozen=True)
class Failure:
    """Why a site's answer does not count.

    `reason` is a word of protocols.messages.Reason (the site refused), or "deadline" (no answer
    in time), "flower" (Flower answered in its stead), "rejected" (its answer breaks a rule),
    "surplus" (the round had its deltas before; federation.over_selection), "roster" (its node is
    not, or no longer, on the coordinator's roster under its name).
    """

    reason: str
    message: str
    site: str = ""  # only where the site is not known otherwise
    accused: tuple[str, ...] = ()  # whose boxes, of a secure sum, it could not open, as it says


@dataclass(frozen=True)
class Letter:
    """One message under way to a node."""

    kind: str  # Flower's message type
    round: int
    node: int
    site: str  # "" while its name is not known
    attempt: int = 0  # of a round's secure sum, from 1


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
    limit_s: float | None = None  # for an answer; None: federation.deadline_s
    attempt: int = 0  # of a round's secure sum, from 1: what is late belongs to an earlier one
    bytes_up: int = 0
    bytes_down: int = 0

    def expects(self, letter: Letter) -> bool:
        """Whether an answer to this letter still counts."""
        of = (letter.kind, letter.round, letter.attempt)
        return of == (self.kind, self.round, self.attempt) and not self.heard(letter.site)

    def heard(self, site: str) -> bool:
        """Whether a site has answered, one way or another."""
        return site in self.reports or site in self.failed


def read_described(answer: RecordDict | Failure, node: int) -> Peer | Failure:
    """Return the site behind a node, or why it cannot take part."""
    if isinstance(answer, Failure):
        return answer
    try:
        described = unpack_described(answer)
    except ProtocolError as error:
        return Failure("rejected", str(error))
    if isinstance(described, Refused):
        return refusal(described)
    return Peer(
        described.site,
        node,
        described.num_examples,
        described.held_out,
        described.max_rank,
        described.peer_key,
    )


def unfit_for_sums(peer: Peer, listed: Mapping[str, str] | None) -> Failure | None:
    """Return why a site cannot be a member of a run's secure sums; None: it can.

    `listed`: name -> key of the roster that the run was proposed with; None: there is no such.
    """
    if peer.peer_key is None:
        text = (
            "it has no peer key, and [secure_aggregation] sums the updates of sites that have "
            "one: update anabranch there"
        )
        return Failure("protocol", text, peer.name)
    if listed is not None and listed.get(peer.name) != peer.peer_key:
        known = "with another peer key" if peer.name in listed else "without this site"
        text = f"the run was proposed {known}: propose it again if the site is to take part"
        return Failure("roster", text, peer.name)
    return None


def read_kept(
    answer: RecordDict | Failure, peer: Peer, *, private: bool
) -> tuple[Trained, None] | Failure:
    """Return what a site says of the delta that it keeps for a secure sum, or why there is none.

    What only the sum may show is not in it: a report with numbers of one site's records is
    rejected. `private`: its steps are those of run.toml, and are said.
    """
    if isinstance(answer, Failure):
        return answer
    try:
        trained = unpack_kept(answer)
        if isinstance(trained, Refused):
            return refusal(trained)
        _require_name(trained.site, peer)
        if trained.num_examples or trained.loss is not None or (trained.steps and not private):
            raise MalformedMessage(
                "kept for a secure sum: expected no numbers of the site's records beside it"
            )
    except ProtocolError as error:
        return Failure("rejected", str(error))
    return trained, None


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
            return refusal(got)
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
            return refusal(got)
        _require_name(got.site, peer)
        _require_count(got.num_examples, peer.held_out, "held-out")
        for name, value in got.metrics.items():
            if not math.isfinite(value):
                raise MalformedMessage(f"metric {shown(name)}: {value} is not finite")
    except ProtocolError as error:
        return Failure("rejected", str(error))
    return got, None


def refusal(refused: Refused) -> Failure:
    """Return what a site said when it refused."""
    return Failure(refused.reason, plain(refused.message, MAX_TEXT), plain(refused.site, 64))


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
