"""What the chains of all ledgers have in common: how they are read, and what they add up to.

How events are chained: protocols/chain.py. Which kinds of events there are beside these two, and
which may follow which, is for each ledger to say.

    kind      when                                 what it costs
    settle    before what was trained may leave    nothing more: the reservation counts alone
    adopted   the owner accepts a restored ledger

A reservation without a settle is a training that was cut off: it counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import msgspec

from anabranch.protocols.chain import Link, Witness, following
from anabranch.protocols.spend import Skellam, Spend, Unit
from anabranch.protocols.tables import Count

Kinds = Mapping[str, type[msgspec.Struct]]


class Settle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training of event `reserve` ran as reserved; what it made may leave now."""

    reserve: Count
    time: str  # of all events: UTC, ISO 8601


class Adopted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner accepts the chain before this event, though `witnesses` knew another."""

    witnesses: tuple[Witness, ...]
    time: str


class Beginning(Protocol):
    """The first event of a chain."""

    @property
    def ledger(self) -> str:
        """Return the ledger's own name."""


class Spending(Protocol):
    """An event that spends."""

    @property
    def noise_multiplier(self) -> float:
        """Return σ."""

    @property
    def sample_rate(self) -> float:
        """Return q."""

    @property
    def steps(self) -> int:
        """Return the number of steps."""

    @property
    def skellam(self) -> Skellam | msgspec.UnsetType:
        """Return what decides Skellam noise beside σ; UNSET: the noise is Gaussian."""

    @property
    def unit(self) -> Unit:
        """Return what the noise protects."""


First = TypeVar("First", bound=Beginning, covariant=True)
Reserved = TypeVar("Reserved", bound=Spending, covariant=True)


@dataclass(frozen=True, kw_only=True)
class State(Generic[First, Reserved]):
    """What a chain adds up to."""

    opened: First
    heads: tuple[str, ...]  # heads[i] is the hash of event i + 1
    reserved: Mapping[int, Reserved] = field(default_factory=dict)  # by event
    settled: frozenset[int] = frozenset()  # events of kind reserve

    @property
    def head(self) -> str:
        """Return the hash of the last event."""
        return self.heads[-1]

    @property
    def count(self) -> int:
        """Return the number of events."""
        return len(self.heads)

    @property
    def open(self) -> frozenset[int]:
        """Return the reserve events without a settle."""
        return frozenset(self.reserved) - self.settled

    @property
    def witnessed(self) -> bool:
        """Return whether a ledger that came this far has had witnesses."""
        return bool(self.reserved)


def spend_of(event: Spending) -> Spend:
    """Return what an event spends."""
    return Spend(
        noise_multiplier=event.noise_multiplier,
        sample_rate=event.sample_rate,
        steps=event.steps,
        skellam=event.skellam if isinstance(event.skellam, Skellam) else None,
        unit=event.unit,
    )


def link(previous: Link | None, kinds: Kinds, body: msgspec.Struct) -> Link:
    """Return the event with `body` that follows `previous`; its type is one of `kinds`."""
    (kind,) = (kind for kind, struct in kinds.items() if struct is type(body))
    return following(previous, kind, msgspec.json.encode(body).decode())
