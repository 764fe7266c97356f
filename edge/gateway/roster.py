"""roster.json: the devices that may be in a secure sum, signed by who signs the bundles.

    gateway                         where bundles are made              gateway
    write_roster ─► roster.json ─► sign_file (signing.key) ─► roster.json in the gateway's folder

Whoever signs should know from somewhere else which devices there are: that is all the signature
adds. Without the file, the gateway itself says who is in a sum, and devices whose owners require
secure sums refuse its tasks.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.edge.runtime.roster import require_roster, sign_roster
from anabranch.protocols.errors import AnabranchError, ConfigError
from anabranch.protocols.identity.proposal import Hex
from anabranch.protocols.secagg.terms import Peer, Roster
from anabranch.storage.files import write_atomic


class RosterFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """roster.json."""

    authority: Hex  # SHA-256 of the gateway's authority
    roster: Roster
    signature: str = ""  # as edge/runtime/roster.py writes it


def roster_of(peers: dict[str, bytes]) -> Roster:
    """Return the roster of devices and their keys."""
    return Roster.of(Peer(name=name, key=key.hex()) for name, key in peers.items())


def write_roster(roster: Roster, authority: str, file: Path) -> RosterFile:
    """Write an unsigned roster for the gateway with this authority (hex); return it."""
    found = RosterFile(authority=authority, roster=roster)
    write_atomic(file, msgspec.json.format(msgspec.json.encode(found)))
    return found


def sign_file(file: Path, key: Ed25519PrivateKey) -> RosterFile:
    """Sign the roster in a file, in place; return it."""
    found = read_file(file)
    signature = sign_roster(found.roster.digest, found.authority, key).decode()
    signed = msgspec.structs.replace(found, signature=signature)
    write_atomic(file, msgspec.json.format(msgspec.json.encode(signed)))
    return signed


def read_signed(file: Path, authority: str, keys: list[bytes]) -> RosterFile | None:
    """Return the signed roster, or None if there is no file.

    Raises ConfigError for a file that devices would refuse: not signed by one of the keys, or
    for another gateway.
    """
    if not file.exists():
        return None
    found = read_file(file)
    try:
        require_roster(found.roster.digest, authority, found.signature.encode(), keys)
    except AnabranchError as error:
        raise ConfigError(f"{file}: {error}; sign it with a key of bundle_keys") from None
    return found


def read_file(file: Path) -> RosterFile:
    """Return the content of a roster's file, or raise ConfigError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=RosterFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, AnabranchError) as error:
        raise ConfigError(
            f"{file}: {error}; write it with `anabranch edge gateway roster`"
        ) from None
