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

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from anabranch.protocols.chain import (
    GENESIS,
    BrokenChain,
    Identity,
    Link,
    Mechanism,
    Neighbouring,
    require_link,
)
from anabranch.protocols.spend import Spend, Unit
from anabranch.protocols.tables import Count, Fraction, Positive
from anabranch.storage import chain
from anabranch.storage.book import Format
from anabranch.storage.chain import Adopted, Settle, spend_of

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
    def skellam(self) -> msgspec.UnsetType:
        """Return that the noise is Gaussian."""
        return msgspec.UNSET

    @property
    def unit(self) -> Unit:
        """Return that records are protected."""
        return "record"


KINDS: Mapping[str, type[Opened | Reserve | Settle | Adopted]] = {
    "opened": Opened,
    "reserve": Reserve,
    "settle": Settle,
    "adopted": Adopted,
}


@dataclass(frozen=True, kw_only=True)
class State(chain.State[Opened, Reserve]):
    """What a chain adds up to."""

    def spends(self, run: str | None = None) -> list[Spend]:
        """Return all that was spent, oldest first; in one run, if given."""
        return [spend_of(event) for event in self.reserved.values() if run in (None, event.run)]


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


def _begin(db: sqlite3.Connection, ledger: str, time: str) -> Opened:
    return Opened(ledger=ledger, time=time)


DEVICE = Format(
    name="privacy ledger of a device",
    training="training",
    adopt="anabranch edge ledger --adopt",
    application_id=0x416E6544,  # "AneD": not a site's ledger
    version=1,
    kinds=KINDS,
    begin=_begin,
    replay=replay,
)
