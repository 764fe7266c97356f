"""A device's peer key: with it, the device signs in the secure sums of its gateway.

    peer.key    Ed25519, PKCS #8, mode 0600; made here at the first check-in, never leaves

The public key goes with every check-in, with a proof of possession that is bound to the device's
name and to the gateway's authority (protocols/identity/peer.py): it is of no use to another
device. The gateway pins the first key that it sees of a device. Who enrols anew gets a new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.edge.runtime.enrol import digest_of_pem, read_enrolled
from anabranch.edge.runtime.trust import load_private, new_key
from anabranch.protocols.errors import BundleError, DeviceError
from anabranch.protocols.identity.peer import Announced, announce

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from anabranch.edge.runtime.home import Home


def peer_key(home: Home) -> Ed25519PrivateKey:
    """Return the device's peer key; made if there is none. DeviceError if it cannot be used."""
    try:
        if not home.peer_key.exists():
            new_key(home.peer_key)
        return load_private(home.peer_key)
    except BundleError as error:
        raise DeviceError(f"{error}; or delete it, and enrol again with --force") from None


def announced(home: Home) -> Announced:
    """Return the public key of an enrolled device, with the proof for its gateway."""
    device = read_enrolled(home).device
    return announce(peer_key(home), device.encode(), authority_of(home))


def authority_of(home: Home) -> str:
    """Return the SHA-256 of the authority that the device is enrolled with, hex."""
    try:
        return digest_of_pem(home.authority.read_bytes())
    except OSError as error:
        raise DeviceError(f"{home.authority}: {error.strerror or error}; enrol again") from None
