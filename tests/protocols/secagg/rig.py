"""A cohort of members and a coordinator in one process, and the plain sum as the oracle.

`Cohort` drives a sum stage by stage. A script says who falls silent at which stage; hooks see, and
may change, every request and every answer on its way. Everything the coordinator was ever sent is
kept in `Seen`, which knows when both secrets of one member could be combined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from anabranch.protocols.errors import ConfigError, PolicyError, ProtocolError
from anabranch.protocols.secagg import keys
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Answer, Limits, Member
from anabranch.protocols.secagg.messages import (
    STAGES,
    Delivery,
    Invite,
    Request,
    Reveal,
    Shares,
    Stage,
)
from anabranch.protocols.secagg.plan import Plan, length
from anabranch.protocols.secagg.ring import Ring
from anabranch.protocols.secagg.terms import Advert, Peer, Roster, Terms

Vector = NDArray[Any]
Names = tuple[str, ...]
Random = Callable[[int], bytes]
Refusals = (ProtocolError, PolicyError, ConfigError)

RUN, CONFIG, MODEL = "heart-1", "c0" * 32, "d0" * 32
VALUES, COUNTERS = 5, 1


def names_of(count: int) -> Names:
    """Return names in ascending order."""
    return tuple(f"site-{number:04d}" for number in range(count))


def key_of(name: str) -> Ed25519PrivateKey:
    """Return the fixed key that a name signs with."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"key " + name.encode()).digest())


def roster_of(names: Iterable[str]) -> Roster:
    """Return the roster of these names with their fixed keys."""
    return Roster.of(
        Peer(name=name, key=key_of(name).public_key().public_bytes_raw().hex()) for name in names
    )


def random_of(seed: str) -> Random:
    """Return reproducible bytes that look random: the SHAKE-256 of the seed and a counter."""
    counter = 0

    def random(size: int) -> bytes:
        nonlocal counter
        counter += 1
        return hashlib.shake_256(f"{seed} {counter}".encode()).digest(size)

    return random


def terms_of(names: Names, roster: Roster, **changes: Any) -> Terms:
    """Return terms of a small sum among these members."""
    standard: dict[str, Any] = {
        "run": RUN,
        "round": 1,
        "instance": "e0" * 32,
        "config": CONFIG,
        "model": MODEL,
        "roster": roster.digest,
        "members": names,
        "minimum": 2,
        "threshold": 0.5,
        "colluding": 0.0,
        "ring": 32,
        "limit": 1.0,
        "weight": 1024,
        "values": VALUES,
        "counters": COUNTERS,
        "keystream": "aes-256-ctr",
    }
    return Terms(**standard | changes)


def vectors_of(terms: Terms, seed: int = 0) -> dict[str, Vector]:
    """Return a vector of ring elements per member, all values of the ring among them."""
    rng = np.random.default_rng(seed)
    dtype, count = Ring(terms.ring).dtype, length(terms)
    return {
        name: rng.integers(0, 1 << terms.ring, count, dtype=np.uint64, endpoint=False).astype(dtype)
        if terms.ring < 64
        else rng.integers(0, np.iinfo(np.uint64).max, count, dtype=np.uint64, endpoint=True)
        for name in terms.members
    }


def plain_sum(vectors: Mapping[str, Vector], names: Iterable[str], bits: int) -> list[int]:
    """Return the sum of these vectors mod 2^bits, in Python's integers: the oracle."""
    rows = [vectors[name].tolist() for name in names]
    return [sum(column) % (1 << bits) for column in zip(*rows, strict=True)]


def integers(total: Vector, bits: int) -> list[int]:
    """Return a total mod 2^bits as Python integers."""
    return [int(value) % (1 << bits) for value in total.tolist()]


@dataclass
class Seen:
    """Everything a coordinator was sent in one sum, and what it can make of it."""

    adverts: dict[str, Advert] = field(default_factory=dict)
    shares: dict[str, Shares] = field(default_factory=dict)
    delivered: dict[str, set[str]] = field(default_factory=dict)  # masks with whom are in it
    masked: dict[str, bytes] = field(default_factory=dict)
    reveals: list[tuple[str, Reveal]] = field(default_factory=list)

    def note(self, name: str, answer: Answer) -> None:
        """Remember one answer."""
        reply = answer.reply
        if isinstance(reply, Advert):
            self.adverts[name] = reply
        elif isinstance(reply, Shares):
            self.shares[name] = reply
        elif isinstance(reply, Reveal):
            self.reveals.append((name, reply))
        if answer.data:
            self.masked[name] = answer.data

    def holders(self, kind: str, owner: str) -> set[str]:
        """Return who revealed a share of the owner's secret; kind: "seeds" or "keys"."""
        return {holder for holder, reveal in self.reveals if owner in getattr(reveal, kind)}

    def require_apart(self, thresholds: Mapping[str, int], colluding: Iterable[str] = ()) -> None:
        """Fail if both secrets of somebody could be combined from all that was ever sent."""
        helping = set(colluding)
        for owner, threshold in thresholds.items():
            both = [len(self.holders(kind, owner) | helping) for kind in ("seeds", "keys")]
            assert min(both) < threshold, f"both secrets of {owner}: {both}, threshold {threshold}"


RequestHook = Callable[[str, Request], Request | None]
AnswerHook = Callable[[str, Answer], Answer | None]


@dataclass
class Cohort:
    """Members and their coordinator; `vectors` is what each of them adds."""

    terms: Terms
    roster: Roster
    vectors: dict[str, Vector]
    members: dict[str, Member] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)  # name -> why it refused
    seen: Seen = field(default_factory=Seen)
    limits: Limits = field(default_factory=Limits)
    random: Callable[[str], Random] = random_of
    kind: Callable[..., Member] = Member
    asking: RequestHook = lambda name, request: request
    answering: AnswerHook = lambda name, answer: answer

    def __post_init__(self) -> None:
        self.aggregation = Aggregation(self.terms, self.roster)

    @classmethod
    def of(cls, count: int, *, seed: int = 0, **changes: Any) -> Cohort:
        """Return a cohort of this many members; `changes` are of its terms."""
        names = names_of(count)
        roster = roster_of(names)
        terms = terms_of(names, roster, **changes)
        return cls(terms, roster, vectors_of(terms, seed))

    def ask(self, name: str, request: Request) -> Answer | None:
        """Return a member's answer, or None if it refuses; `errors` says why."""
        try:
            if isinstance(request, Invite):
                if name not in self.members:
                    self.members[name] = self.kind(
                        name, key_of(name), request, limits=self.limits, random=self.random(name)
                    )
                answer = Answer(self.members[name].advert)
            else:
                answer = self.members[name].answer(request, lambda: self.vectors[name].copy())
        except Refusals as error:
            self.errors[name] = error
            return None
        self.seen.note(name, answer)
        if isinstance(request, Delivery):
            self.seen.delivered[name] = set(request.sealed)
        return answer

    def step(self, silent: Iterable[str] = ()) -> None:
        """Play the present stage: who is silent does not answer. Then close it."""
        quiet = set(silent)
        for name, request in self.aggregation.requests().items():
            changed = None if name in quiet else self.asking(name, request)
            answer = None if changed is None else self.ask(name, changed)
            sent = None if answer is None else self.answering(name, answer)
            if sent is not None:
                self.aggregation.take(name, sent.reply, sent.data)
        self.aggregation.close()

    def run(self, silent: Mapping[str, Stage] | None = None) -> Aggregation:
        """Play all stages; `silent` says from which stage on a member does not answer."""
        gone: set[str] = set()
        while self.aggregation.stage in STAGES:
            gone |= {name for name, at in (silent or {}).items() if at == self.aggregation.stage}
            self.step(gone)
        return self.aggregation

    def until(self, stage: Stage, silent: Mapping[str, Stage] | None = None) -> None:
        """Play the stages before this one."""
        gone: set[str] = set()
        while self.aggregation.stage != stage:
            assert self.aggregation.stage in STAGES, self.aggregation.reason
            gone |= {name for name, at in (silent or {}).items() if at == self.aggregation.stage}
            self.step(gone)

    @property
    def plan(self) -> Plan:
        """Return the plan of those who advertised."""
        return Plan(self.terms, [self.seen.adverts[name] for name in sorted(self.seen.adverts)])

    @property
    def thresholds(self) -> dict[str, int]:
        """Return of how many shares each member's secrets are combined."""
        if not self.seen.shares:
            return {}
        return {name: group.shape.threshold for group in self.plan.groups for name in group.names}

    def require_exact(self) -> None:
        """Fail unless the sums are those of the plain integers, bit for bit."""
        bits = self.terms.ring
        assert self.aggregation.stage == "done", self.aggregation.reason
        assert self.aggregation.sums
        for one in self.aggregation.sums:
            assert integers(one.total, bits) == plain_sum(self.vectors, one.members, bits)


def expected_survivors(names: Sequence[str], silent: Mapping[str, Stage]) -> Names:
    """Return whose masked vectors arrive: all who fall silent after the mask stage, or never."""
    return tuple(name for name in names if silent.get(name) in (None, "agree", "reveal"))


def snapshot(machine: object) -> bytes:
    """Return every field of a state machine, all the way down, in a form that can be compared."""
    return repr(_plain(machine, 0)).encode()


def _plain(value: object, depth: int) -> object:
    if depth > 12:
        raise ValueError("a state machine that holds itself")
    if isinstance(value, np.ndarray):
        return ("array", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, Ed25519PrivateKey):
        return ("key", value.private_bytes_raw())
    if isinstance(value, dict):
        return [(repr(key), _plain(one, depth + 1)) for key, one in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(repr(one) for one in value)
    if isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, msgspec.Struct):
        return (type(value).__name__, msgspec.json.encode(value))
    if isinstance(value, str | bytes | int | float | None):
        return value
    if callable(value):
        return "function"
    return (type(value).__name__, _plain(dict(sorted(vars(value).items())), depth + 1))


def opened(private: bytes, box: bytes, sender: Advert, context: bytes, holder: str) -> bytes:
    """Return what is in a box, as its holder reads it."""
    public = bytes.fromhex(sender.sealing)
    return b"".join(keys.unseal(private, public, context, sender.name, holder, box))
