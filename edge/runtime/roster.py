"""The roster of a gateway's devices, signed by who signs its bundles.

    signature   Ed25519 (RFC 8032) of PREFIX ‖ SHA-256 of the gateway's authority ‖ SHA-256 of the
                roster, in the form of manifest.sig (trust.py)

An unsigned roster is the gateway's word: it may hold devices that the gateway made up, whose
updates it knows. A signed one is the publisher's word, who looked at it somewhere else; it is of
no use to another gateway. It has no date: an old one stays valid (docs/gateway.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.edge.runtime.trust import sign, verify_signature
from anabranch.protocols.errors import BundleError, PolicyError

PREFIX = b"anabranch device roster 1\0"


def sign_roster(digest: str, authority: str, key: Ed25519PrivateKey) -> bytes:
    """Return the signature of the roster with this digest (hex) for one gateway."""
    return sign(_signed(digest, authority), key, prefix=PREFIX)


def require_roster(digest: str, authority: str, signature: bytes, trusted: Sequence[bytes]) -> None:
    """Raise PolicyError unless a trusted key signed this roster for this gateway."""
    if not signature:
        raise PolicyError(
            "roster: it is not signed, so the gateway alone says who is in a sum; ask its "
            "operator for one that the bundles' publisher signed"
        )
    try:
        verify_signature(_signed(digest, authority), signature, trusted, PREFIX, "the roster")
    except BundleError as error:
        raise PolicyError(f"roster: {error}") from None


def _signed(digest: str, authority: str) -> bytes:
    return bytes.fromhex(authority) + bytes.fromhex(digest)
