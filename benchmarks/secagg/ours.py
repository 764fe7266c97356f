"""A secure sum as it runs, in one process: every member is real, and each one's work is timed.

Seconds are CPU seconds of a member's own calls (`Member`, `Member.answer`), the encoding of its
update included. Messages stay in memory; their bytes are those of their JSON, with the masked
vector beside it. What comes out is compared with the integer sum of what the members put in.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from anabranch.protocols.secagg import member
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.fixed_point import Grid, ring_for, write_counters
from anabranch.protocols.secagg.masks import fastest
from anabranch.protocols.secagg.member import Answer, Member
from anabranch.protocols.secagg.messages import STAGES, Invite, Request, Stage
from anabranch.protocols.secagg.terms import Peer, Roster, Terms
from anabranch.protocols.tables import SecureAggregation

TABLE = SecureAggregation()  # the defaults of a run
HEAVIEST = 400  # records of a member, at most
COUNTERS = 2
DIGEST = hashlib.sha256(b"benchmark").hexdigest()
Vector = NDArray[np.float32]


@dataclass
class Cost:
    """What one member spent."""

    seconds: dict[str, float] = field(default_factory=dict)  # CPU seconds per stage
    encode: float = 0.0  # of those of "mask"
    up: int = 0  # bytes
    down: int = 0

    @property
    def total(self) -> float:
        """Return the CPU seconds of all stages."""
        return sum(self.seconds.values())


def update(index: int, values: int) -> Vector:
    """Return the update of a member: the same whatever sums it up."""
    return np.random.default_rng(index).normal(0.0, 1e-2, values).astype(np.float32)


def examples(index: int) -> int:
    """Return how many records a member has."""
    return 100 + 37 * index % (HEAVIEST - 100)


class Sum:
    """One sum among `members` of vectors with `values` values.

    `drops[stage]` are those, by index, who answer no more from that stage on. `timed` are those
    whose costs count (None: all). The others are as real, but a signature that one of them has
    checked is not checked again by the next: it is the same computation, and most of a large sum.
    """

    def __init__(
        self,
        members: int,
        values: int,
        drops: Mapping[Stage, Collection[int]] | None = None,
        timed: Collection[int] | None = None,
    ) -> None:
        names = [f"member-{index:05}" for index in range(members)]
        self._keys = {name: Ed25519PrivateKey.generate() for name in names}
        roster = Roster.of(
            Peer(name=name, key=key.public_key().public_bytes_raw().hex())
            for name, key in self._keys.items()
        )
        self.ring = ring_for(members, TABLE.value_bits)
        self._grid = Grid(self.ring, members, TABLE.range)
        self.terms = Terms(
            run="benchmark",
            round=1,
            instance=secrets.token_hex(32),
            config=DIGEST,
            model=DIGEST,
            roster=roster.digest,
            members=tuple(names),
            minimum=TABLE.minimum,
            threshold=TABLE.threshold,
            colluding=TABLE.colluding,
            ring=self.ring.bits,
            limit=TABLE.range,
            weight=HEAVIEST,
            values=values,
            counters=COUNTERS,
            keystream=fastest(),
        )
        self._index = {name: index for index, name in enumerate(names)}
        self._last = {i: STAGES.index(stage) for stage, who in (drops or {}).items() for i in who}
        self._timed = range(members) if timed is None else timed
        self._checked: set[tuple[Any, ...]] = set()
        self._members: dict[str, Member] = {}
        self._expected: NDArray[Any] | None = None
        self._in_sum: list[str] = []
        self.costs = [Cost() for _ in names]
        self.aggregation = Aggregation(self.terms, roster)

    def turns(self) -> Iterator[None]:
        """Let one member answer per turn, stage after stage, to the end."""
        while self.aggregation.stage in STAGES:
            yield from self.answering()
            self.aggregation.close()

    def run(self, until: str = "done") -> None:
        """Go on until a stage begins, or to the end."""
        while self.aggregation.stage in STAGES and self.aggregation.stage != until:
            for _ in self.answering():
                pass
            self.aggregation.close()

    def answering(self) -> Iterator[None]:
        """Let one member answer per turn; the stage stays open."""
        for name, request in self.aggregation.requests().items():
            self._turn(name, request)
            yield

    @property
    def exact(self) -> bool:
        """Whether the opened sum is that of its members' vectors, bit for bit."""
        if self._expected is None or len(self.aggregation.sums) != 1:
            return False
        found = self.aggregation.sums[0]
        right = np.array_equal(self.ring.signed(found.total), self.ring.signed(self._expected))
        return right and list(found.members) == sorted(self._in_sum)

    def _turn(self, name: str, request: Request) -> None:
        index = self._index[name]
        if STAGES.index(request.stage) >= self._last.get(index, len(STAGES)):
            return
        cost = self.costs[index]
        with nullcontext() if index in self._timed else _checking_once(self._checked):
            answer, cost.seconds[request.stage] = self._answer(index, name, request, cost)
        cost.down += len(msgspec.json.encode(request))
        cost.up += len(msgspec.json.encode(answer.reply)) + len(answer.data)
        self.aggregation.take(name, answer.reply, answer.data)

    def _answer(self, index: int, name: str, request: Request, cost: Cost) -> tuple[Answer, float]:
        if isinstance(request, Invite):
            started = time.process_time()
            self._members[name] = Member(name, self._keys[name], request)
            return Answer(self._members[name].advert), time.process_time() - started
        if request.stage != "mask":
            started = time.process_time()
            answer = self._members[name].answer(request)
            return answer, time.process_time() - started
        vector = update(index, self.terms.values)
        aside = 0.0

        def contribute() -> NDArray[Any]:
            nonlocal aside
            began = time.process_time()
            found = self._encoded(vector, examples(index))
            ended = time.process_time()
            cost.encode = ended - began
            self._expected = found.copy() if self._expected is None else self._expected + found
            self._in_sum.append(name)
            aside = time.process_time() - ended
            return found

        started = time.process_time()
        answer = self._members[name].answer(request, contribute)
        return answer, time.process_time() - started - aside

    def _encoded(self, vector: Vector, count: int) -> NDArray[Any]:
        """Return one member's values, rounded at random to the grid, and its counters."""
        values = self._grid.encode(vector, count / HEAVIEST, secrets.token_bytes)
        counters = write_counters([count] * COUNTERS, self.ring, len(self.terms.members))
        return np.concatenate([values, counters])


@contextmanager
def _checking_once(done: set[tuple[Any, ...]]) -> Iterator[None]:
    """Let members skip the signatures in `done`, and note those that were found right."""

    def once(check: Callable[..., None]) -> Callable[..., None]:
        def checked(*arguments: Any) -> None:
            signed = arguments[:-1]  # the last are the roster's keys
            if signed not in done:
                check(*arguments)
                done.add(signed)

        return checked

    module: Any = member
    signed, agreed = module.require_signed, module.require_agreed
    module.require_signed, module.require_agreed = once(signed), once(agreed)
    try:
        yield
    finally:
        module.require_signed, module.require_agreed = signed, agreed
