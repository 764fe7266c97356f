"""What a device's ledger holds, as data: a chain of events, and what they add up to.

How events are chained: protocols/chain.py.

    kind      when                                       what it costs
    opened    once, at the beginning
    reserve   before a training                          charged to all records of the device
    settle    before its adapter or delta may leave      nothing more: `reserve` counts alone
    adopted   the owner accepts a restored ledger

A reserve without a settle is a training that was cut off: it counts. Names of fields and kinds
are never taken away, nor is their meaning changed; a reader refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from anabranch.protocols.chain import (
    GENESIS,
    BrokenChain,
    Identity,
    Link,
    Mechanism,
    Neighbouring,
    Witness,
    following,
    require_link,
)
from anabranch.protocols.spend import Spend
from anabranch.protocols.tables import Count, Fraction, Positive

RunName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Opened(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ledger begins."""

    format: Literal[1] = 1
    holder: Literal["device"] = "device"
    ledger: Identity  # random
    time: str  # of all events: UTC, ISO 8601


class Reserve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a training is about to spend on every record of the device."""

    run: RunName  # whose budget it is, beside the device's
    records: Count  # n, as the training had it
    noise_multiplier: Positive
    sample_rate: Fraction
    steps: Count
    time: str
    mechanism: Mechanism = "poisson-subsampled-gaussian"
    neighbouring: Neighbouring = "add-or-remove-one-record"

    @property
    def spend(self) -> Spend:
        """Return what it costs."""
        return Spend(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
        )


class Settle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training of event `reserve` ran as reserved; what it made may leave now."""

    reserve: Count
    time: str


class Adopted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner accepts the chain before this event, though `witnesses` knew another."""

    witnesses: tuple[Witness, ...]
    time: str


Body = Opened | Reserve | Settle | Adopted
KINDS: Mapping[str, type[Body]] = {
    "opened": Opened,
    "reserve": Reserve,
    "settle": Settle,
    "adopted": Adopted,
}
_KIND = {body: kind for kind, body in KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class State:
    """What a chain adds up to."""

    opened: Opened
    heads: tuple[str, ...]  # heads[i] is the hash of event i + 1
    reserved: Mapping[int, Reserve] = field(default_factory=dict)  # by event
    settled: frozenset[int] = frozenset()  # events of kind reserve

    @property
    def head(self) -> str:
        """Return the hash of the last event."""
        return self.heads[-1]

    @property
    def open(self) -> frozenset[int]:
        """Return the reserve events without a settle."""
        return frozenset(self.reserved) - self.settled

    def spends(self, run: str | None = None) -> list[Spend]:
        """Return all that was spent, oldest first; in one run, if given."""
        return [event.spend for event in self.reserved.values() if run in (None, event.run)]


def link(previous: Link | None, body: Body) -> Link:
    """Return the event with `body` that follows `previous`."""
    return following(previous, _KIND[type(body)], msgspec.json.encode(body).decode())


def replay(events: Sequence[Link]) -> State:
    """Check every link and return what the events add up to. Raises BrokenChain."""
    previous = GENESIS
    opened: list[Opened] = []
    reserved: dict[int, Reserve] = {}
    settled: set[int] = set()
    for number, event in enumerate(events, 1):
        require_link(previous, number, event)
        previous = event.hash
        match event.read(KINDS):
            case Opened() as body if number == 1:
                opened.append(body)
            case Reserve() as body if opened:
                reserved[number] = body
            case Settle() as body if body.reserve in reserved and body.reserve not in settled:
                settled.add(body.reserve)
            case Adopted() if opened:
                pass
            case _:
                raise BrokenChain(f"event {number} ({event.kind}) cannot follow what is before it")
    if not opened:
        raise BrokenChain("the chain is empty: not even its first event is there")
    return State(
        opened=opened[0],
        heads=tuple(event.hash for event in events),
        reserved=reserved,
        settled=frozenset(settled),
    )
