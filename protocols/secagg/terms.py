"""What the members of one secure sum agree on before anybody sends anything.

    roster    who may be a member, each with an Ed25519 key; pinned by every member
    terms     one sum: of which run, round, model and configuration, among whom, in which numbers
    context   SHA-256 over terms and all adverts: every key of the sum is derived from it

A member that was shown another model, configuration, roster or list of members has another
context, so its masks cancel with nobody's. Thresholds and neighbours are in no message: everybody
computes them from the number of members (graph.py), so there is nothing to lie about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from anabranch.protocols.errors import MalformedMessage, ProtocolError
from anabranch.protocols.identity.proposal import Hex, Short
from anabranch.protocols.part import Rank
from anabranch.protocols.secagg.masks import Keystream
from anabranch.protocols.secagg.ring import RingBits
from anabranch.protocols.spec import shown
from anabranch.protocols.tables import Count, Fraction, Name, Positive, Share

MAX_MEMBERS = 10_000
MAX_VALUES = 1 << 28  # of one vector

ADVERT = b"anabranch secagg advert 1\0"
CONTEXT = b"anabranch secagg context 1\0"
SURVIVORS = b"anabranch secagg survivors 1\0"


class Peer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One who may be a member: its name, and the key that it signs with."""

    name: Name
    key: Hex  # Ed25519 public key


class Roster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everybody who may be a member, in ascending order of names; no name and no key twice."""

    peers: Annotated[tuple[Peer, ...], msgspec.Meta(max_length=MAX_MEMBERS)]

    def __post_init__(self) -> None:
        names, keys = [peer.name for peer in self.peers], {peer.key for peer in self.peers}
        require_ascending(names, "roster")
        if len(keys) != len(names):
            raise MalformedMessage("roster: two names have one key")

    @classmethod
    def of(cls, peers: Iterable[Peer]) -> Roster:
        """Return the roster of these peers, put in order."""
        return cls(peers=tuple(sorted(peers, key=lambda peer: peer.name)))

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON, hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    @property
    def keys(self) -> dict[str, str]:
        """Return name -> Ed25519 public key, hex."""
        return {peer.name: peer.key for peer in self.peers}


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One secure sum; `digest` is its identity."""

    run: Short
    round: Count
    instance: Hex  # random, new for each attempt
    config: Hex  # RunConfig.digest(), or what stands for it
    model: Hex  # SHA-256 of the frame that members trained from
    roster: Hex  # Roster.digest
    members: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_MEMBERS)]  # ascending
    minimum: Annotated[int, msgspec.Meta(ge=2)]  # updates in a sum that is opened, at least
    threshold: Fraction  # more than this share of a complete graph's members must stay (graph.py)
    colluding: Share  # share of the members that may tell the coordinator all they know
    ring: RingBits
    limit: Positive  # every value of an update lies in [−limit, limit]
    weight: Count  # the heaviest member's
    values: Annotated[int, msgspec.Meta(ge=1, le=MAX_VALUES)]  # of an update
    counters: Annotated[int, msgspec.Meta(ge=0, le=4096)]  # sums of integers beside it
    keystream: Keystream
    group: Annotated[int, msgspec.Meta(ge=2)] | None = None  # members of a group; None: one group
    # Who trained some of the rank indices alone, and which; not in the JSON if nobody did.
    ranks: dict[Name, tuple[Rank, ...]] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        require_ascending(self.members, "members")

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON, hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


class Advert(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A member's fresh keys for one sum, signed with the key that the roster has."""

    name: Name
    sealing: Hex  # X25519 public key: shares are sealed with it
    masking: Hex  # X25519 public key: masks are derived from it
    signature: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]

    def signed_bytes(self, terms: str) -> bytes:
        """Return what the signature is of; `terms` is Terms.digest."""
        keys = bytes.fromhex(terms) + bytes.fromhex(self.sealing) + bytes.fromhex(self.masking)
        return ADVERT + keys + self.name.encode()


def advertise(
    name: str, sealing: bytes, masking: bytes, terms: str, key: Ed25519PrivateKey
) -> Advert:
    """Return a member's signed advert."""
    blank = Advert(name=name, sealing=sealing.hex(), masking=masking.hex(), signature="0" * 128)
    signature = key.sign(blank.signed_bytes(terms)).hex()
    return msgspec.structs.replace(blank, signature=signature)


def require_signed(advert: Advert, terms: str, keys: Mapping[str, str]) -> None:
    """Raise ProtocolError unless the peer of that name signed the advert.

    `terms` is Terms.digest, `keys` are Roster.keys.
    """
    _require_signature(advert.name, advert.signature, advert.signed_bytes(terms), keys, "keys")


def context_of(terms: Terms, adverts: Iterable[Advert]) -> bytes:
    """Return the context of a sum among those whose adverts these are, ascending (32 bytes)."""
    digest = hashlib.sha256(CONTEXT + bytes.fromhex(terms.digest))
    for advert in adverts:
        name = advert.name.encode()
        digest.update(len(name).to_bytes(2, "big") + name)
        digest.update(bytes.fromhex(advert.sealing) + bytes.fromhex(advert.masking))
    return digest.digest()


def survivor_bytes(context: bytes, survivors: Iterable[str]) -> bytes:
    """Return what members sign to agree on who is in the sum."""
    digest = hashlib.sha256()
    for name in survivors:
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(2, "big") + encoded)
    return SURVIVORS + context + digest.digest()


def require_agreed(name: str, signature: str, signed: bytes, keys: Mapping[str, str]) -> None:
    """Raise ProtocolError unless that peer signed exactly this survivor set (survivor_bytes)."""
    _require_signature(name, signature, signed, keys, "survivor set")


def require_ascending(names: Iterable[str], what: str) -> None:
    """Raise MalformedMessage unless names are in strictly ascending order."""
    bad = next(((one, other) for one, other in pairwise(names) if one >= other), None)
    if bad is not None:
        raise MalformedMessage(
            f"{what}: expected names in ascending order, each once, got {shown(bad[0])!r} before "
            f"{shown(bad[1])!r}"
        )


def _require_signature(
    name: str, signature: str, signed: bytes, keys: Mapping[str, str], what: str
) -> None:
    if name not in keys:
        raise ProtocolError(f"{what} of {shown(name)}: it is not on the roster")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(keys[name]))
        key.verify(bytes.fromhex(signature), signed)
    except (InvalidSignature, ValueError):
        raise ProtocolError(
            f"{what} of {shown(name)}: not signed with its key on the roster; nothing is sent"
        ) from None
