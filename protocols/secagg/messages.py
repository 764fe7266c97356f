"""The ten messages of a secure sum, in order; docs/secure-aggregation.md has them as a table.

Requests come from the coordinator, each answered by one member. A masked vector travels beside
its message, as bytes of the ring (ring.py). Byte strings are hex or base64 in JSON.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from anabranch.protocols.identity.proposal import Hex, Signature
from anabranch.protocols.secagg.shamir import SHARE_BYTES
from anabranch.protocols.secagg.terms import MAX_MEMBERS, Advert, Roster, Terms, require_ascending
from anabranch.protocols.tables import Name

Stage = Literal["advertise", "share", "mask", "agree", "reveal"]
STAGES: tuple[Stage, ...] = ("advertise", "share", "mask", "agree", "reveal")

SEALED_BYTES = 2 * SHARE_BYTES + 16  # both shares, and the tag
Sealed = Annotated[bytes, msgspec.Meta(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
ShareOf = Annotated[bytes, msgspec.Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
Most = msgspec.Meta(max_length=MAX_MEMBERS)


class Invite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Be a member of this sum."""

    stage: ClassVar[Stage] = "advertise"

    terms: Terms
    roster: Roster


class Adverts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of everybody who advertised; share your secrets among your neighbours."""

    stage: ClassVar[Stage] = "share"

    instance: Hex  # Terms.instance
    adverts: Annotated[tuple[Advert, ...], Most]  # ascending names

    def __post_init__(self) -> None:
        require_ascending([advert.name for advert in self.adverts], "adverts")


class Shares(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A member's secrets, in shares that only their holders can open."""

    instance: Hex
    commitment: Hex  # SHA-256 of its self-mask seed: whoever combines shares can check them
    sealed: Annotated[dict[Name, Sealed], Most]  # holder -> its two shares


class Delivery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shares that you hold; who is missing here has dropped out. Send your masked vector."""

    stage: ClassVar[Stage] = "mask"

    instance: Hex
    sealed: Annotated[dict[Name, Sealed], Most]  # of whom


class Masked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Comes with the masked vector."""

    instance: Hex


class Survivors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose masked vectors are in the sum of your group; sign it."""

    stage: ClassVar[Stage] = "agree"

    instance: Hex
    names: Annotated[tuple[Name, ...], Most]  # ascending

    def __post_init__(self) -> None:
        require_ascending(self.names, "survivors")


class Agreed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A member's signature of the survivor set."""

    instance: Hex
    signature: Signature


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who signed the survivor set that you signed; reveal."""

    stage: ClassVar[Stage] = "reveal"

    instance: Hex
    signatures: Annotated[dict[Name, Signature], Most]


class Reveal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One share of each peer's secrets: of the self-mask seed of who is in the sum, of the
    masking key of who dropped out. Never both of one peer."""

    instance: Hex
    seeds: Annotated[dict[Name, ShareOf], Most]
    keys: Annotated[dict[Name, ShareOf], Most]


Request = Invite | Adverts | Delivery | Survivors | Agreement
Reply = Advert | Shares | Masked | Agreed | Reveal

REQUESTS: dict[Stage, type[msgspec.Struct]] = {
    "advertise": Invite,
    "share": Adverts,
    "mask": Delivery,
    "agree": Survivors,
    "reveal": Agreement,
}
REPLIES: dict[Stage, type[msgspec.Struct]] = {
    "advertise": Advert,
    "share": Shares,
    "mask": Masked,
    "agree": Agreed,
    "reveal": Reveal,
}
