"""A chain of events that fixes its own past, for the privacy ledgers of sites and devices.

    h_0 = 64 zeros
    h_i = SHA-256("h_{i-1}\\ni\\nkind\\nbody"), hex          i = 1, 2, …

`body` is JSON, and the text that was written is the text that is hashed. An event is only ever
added, so the head h_n fixes all n of them. A witness, kept elsewhere, says how far a chain had
come: what it saw must be a beginning of the chain that is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec

from anabranch.protocols.tables import Count

GENESIS = "0" * 64
Hash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Identity = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Mechanism = Literal["poisson-subsampled-gaussian"]
Neighbouring = Literal["add-or-remove-one-record"]
Body = TypeVar("Body")


class BrokenChain(ValueError):
    """These events are not a chain that a ledger has written."""


class Witness(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a ledger was when somebody looked: `head` is the hash of event `count`."""

    ledger: Identity
    path: str  # where the ledger was
    count: Count
    head: Hash

    def saw(self, ledger: str, heads: Sequence[str]) -> bool:
        """Return whether the witness saw a beginning of the chain with these hashes."""
        return self.contradiction(ledger, heads) is None

    def contradiction(self, ledger: str, heads: Sequence[str]) -> str | None:
        """Return what is wrong with a chain of these hashes; None if its beginning was seen.

        `{seen}` stands where the reader names the witness.
        """
        if self.ledger != ledger:
            return (
                f"another privacy ledger was here: {{seen}} speaks of ledger {self.ledger[:12]}…, "
                f"this one is {ledger[:12]}…"
            )
        if self.count > len(heads):
            return (
                f"this privacy ledger was rolled back or cut: it has {len(heads)} events, "
                f"{{seen}} saw {self.count}"
            )
        if heads[self.count - 1] != self.head:
            return (
                f"this privacy ledger was rewritten: its event {self.count} is not the one that "
                "{seen} saw"
            )
        return None


@dataclass(frozen=True)
class Link:
    """One event: `text` is the body as it was written and hashed."""

    id: int
    kind: str
    text: str
    hash: str

    def read(self, kinds: Mapping[str, type[Body]]) -> Body:
        """Return the body; raise BrokenChain if no such kind or body exists."""
        try:
            return msgspec.json.decode(self.text, type=kinds[self.kind])
        except (KeyError, msgspec.DecodeError, UnicodeError) as error:
            raise BrokenChain(f"event {self.id} ({self.kind}) cannot be read: {error}") from None


def following(previous: Link | None, kind: str, text: str) -> Link:
    """Return the event of this kind and text that comes after `previous`."""
    number = 1 if previous is None else previous.id + 1
    before = GENESIS if previous is None else previous.hash
    return Link(number, kind, text, link_hash(before, number, kind, text))


def link_hash(previous: str, number: int, kind: str, text: str) -> str:
    """Return h_i."""
    return hashlib.sha256(f"{previous}\n{number}\n{kind}\n{text}".encode()).hexdigest()


def require_link(previous: str, number: int, event: Link) -> None:
    """Raise BrokenChain unless `event` is number `number`, written after the hash `previous`."""
    if event.id != number:
        raise BrokenChain(f"event {number} is missing: after it comes event {event.id}")
    if event.hash != link_hash(previous, number, event.kind, event.text):
        raise BrokenChain(f"event {number} ({event.kind}) is not what was written")
