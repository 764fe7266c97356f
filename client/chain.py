"""What a ledger holds, as data: a chain of events, and what they add up to.

How events are chained: protocols/chain.py.

    kind      when                                       what it means for a row's ε
    opened    once, at the beginning
    imported  beside `opened`: from a ledger of format 1  charged to every row there is or will be
    data      a data set trains for the first time
    reserve   before a round trains                       charged to the rows of its data set
    settle    before the round's update is released       nothing more: `reserve` counts alone
    adopted   the owner accepts a restored ledger

A reserve without a settle is a round that was cut off: its update may have left, so it counts.
Of noise that the members of a secure sum make together (protocols/secagg/noise.py) a reserve says
`skellam`, and what is protected is a record, or the site as one client with all its records: these
two are two columns of one book, and make two ε. Events without the field are Gaussian, as ever.
Names of fields and kinds are never taken away, nor is their meaning changed; a reader refuses
what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from anabranch.protocols.chain import (
    GENESIS,
    BrokenChain,
    Hash,
    Identity,
    Link,
    Mechanism,
    Neighbouring,
    require_link,
)
from anabranch.protocols.spend import Skellam, Spend, Unit
from anabranch.protocols.tables import Count, Fraction, Positive
from anabranch.storage import chain
from anabranch.storage.chain import Adopted, Settle, spend_of

SiteMechanism = Literal["poisson-subsampled-gaussian", "poisson-subsampled-skellam"]
SiteNeighbouring = Literal["add-or-remove-one-record", "zero-out-one-client"]


class Opened(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ledger begins."""

    format: Literal[2]
    ledger: Identity  # random
    key: Hash  # SHA-256 of the key under which rows are hashed; the key is not in the chain
    time: str  # of all events: UTC, ISO 8601


class Imported(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A spend of a ledger of format 1, which did not know the rows."""

    data: str  # the fingerprint as it was
    run: str
    round: Count
    state: Literal["reserved", "settled"]
    noise_multiplier: Positive
    sample_rate: Fraction
    steps: Count
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


class DataSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A set of rows; its fingerprint is the SHA-256 over their sorted keyed digests."""

    data: Hash
    rows: Count
    time: str


class Reserve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a round is about to spend on every row of its data set."""

    data: Hash
    run: str
    round: Count
    noise_multiplier: Positive
    sample_rate: Fraction
    steps: Count
    time: str
    mechanism: SiteMechanism = "poisson-subsampled-gaussian"
    neighbouring: SiteNeighbouring = "add-or-remove-one-record"
    skellam: Skellam | UnsetType = UNSET

    def __post_init__(self) -> None:
        """Refuse a mechanism that is said twice, differently."""
        if (self.mechanism == "poisson-subsampled-skellam") != isinstance(self.skellam, Skellam):
            raise ValueError(f"{self.mechanism}: skellam belongs to Skellam noise, and only there")
        if self.unit == "client" and self.sample_rate != 1:
            raise ValueError(f"a client's round has sample_rate 1, got {self.sample_rate}")

    @classmethod
    def of(cls, spend: Spend, *, data: str, run: str, round: int, time: str) -> Reserve:
        """Return the event of a round that is about to spend this."""
        noised = spend.skellam is not None
        return cls(
            data=data,
            run=run,
            round=round,
            noise_multiplier=spend.noise_multiplier,
            sample_rate=spend.sample_rate,
            steps=spend.steps,
            time=time,
            mechanism="poisson-subsampled-skellam" if noised else "poisson-subsampled-gaussian",
            neighbouring=(
                "zero-out-one-client" if spend.unit == "client" else "add-or-remove-one-record"
            ),
            skellam=UNSET if spend.skellam is None else spend.skellam,
        )

    @property
    def unit(self) -> Unit:
        """Return what the noise protects."""
        return "client" if self.neighbouring == "zero-out-one-client" else "record"


Body = Opened | Imported | DataSet | Reserve | Settle | Adopted
KINDS: Mapping[str, type[Body]] = {
    "opened": Opened,
    "imported": Imported,
    "data": DataSet,
    "reserve": Reserve,
    "settle": Settle,
    "adopted": Adopted,
}


@dataclass(frozen=True)
class Event(Link):
    """One link of a site's chain."""

    @property
    def body(self) -> Body:
        """Return the body; raise BrokenChain if no such kind or body exists."""
        return self.read(KINDS)


@dataclass(frozen=True, kw_only=True)
class State(chain.State[Opened, Reserve]):
    """What a chain adds up to."""

    imported: tuple[Imported, ...] = ()
    sets: Mapping[str, DataSet] = field(default_factory=dict)  # by fingerprint

    @property
    def witnessed(self) -> bool:
        """Return whether a ledger that came this far has had witnesses."""
        return bool(self.sets)

    def spends(
        self,
        data: Iterable[str] | None = None,
        run: str | None = None,
        unit: Unit = "record",
    ) -> list[Spend]:
        """Return all that was spent, oldest first; on some data sets, or in one run, if given.

        Imported spends are on every data set. Those of the other unit are never among them.
        """
        wanted = None if data is None else frozenset(data)
        events: list[Imported | Reserve] = [*self.imported, *self.reserved.values()]
        return [
            spend_of(event)
            for event in events
            if event.unit == unit
            and (run is None or event.run == run)
            and (wanted is None or isinstance(event, Imported) or event.data in wanted)
        ]


def replay(events: Sequence[Link]) -> State:
    """Check every link and return what the events add up to. Raises BrokenChain."""
    previous = GENESIS
    opened: list[Opened] = []
    imported: list[Imported] = []
    sets: dict[str, DataSet] = {}
    reserved: dict[int, Reserve] = {}
    settled: set[int] = set()
    for number, event in enumerate(events, 1):
        require_link(previous, number, event)
        previous = event.hash
        match event.read(KINDS):
            case Opened() as body if number == 1:
                opened.append(body)
            case Imported() as body if opened and not sets:
                imported.append(body)
            case DataSet() as body if opened and body.data not in sets:
                sets[body.data] = body
            case Reserve() as body if body.data in sets:
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
        imported=tuple(imported),
        sets=sets,
        reserved=reserved,
        settled=frozenset(settled),
    )
