"""A site's peer key: it signs for the site towards other sites, in secure sums.

    proof        Ed25519 (RFC 8032) of PROOF ‖ SHA-256 of the authority's certificate ‖ SHA-256 of
                 the certificate request (PEM). The request is signed with the site's other key, so
                 whoever sends both holds both, and a proof is of no use to another site or in
                 another federation.
    fingerprint  SHA-256(FINGERPRINT ‖ key), its first 128 bits in eight groups of four digits: what
                 the owners of two sites read to each other

The coordinator sees public keys and passes them on; that a name has the right one is for the run's
author, who signs the roster, and for each site, which pins what it has seen (docs/policy.md).
"""

from __future__ import annotations

import hashlib

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.identity.proposal import Hex, Signature

PROOF = b"anabranch peer key 1\0"
FINGERPRINT = b"anabranch peer fingerprint 1\0"
DIGITS, GROUP = 32, 4  # of a fingerprint: hex digits, and how many stand together


class Announced(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A site's peer key, and the proof that the site holds it."""

    key: Hex  # Ed25519 public key
    proof: Signature


def announce(key: Ed25519PrivateKey, request: bytes, authority: str) -> Announced:
    """Return the announcement that goes with a certificate request (PEM).

    `authority` is the fingerprint of the federation's authority, hex.
    """
    return Announced(key=public_hex(key), proof=key.sign(_proved(request, authority)).hex())


def require_possessed(announced: Announced, request: bytes, authority: str) -> str:
    """Return the announced key, hex; raise ProtocolError unless its holder made the request."""
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(announced.key))
        public.verify(bytes.fromhex(announced.proof), _proved(request, authority))
    except (InvalidSignature, ValueError):
        raise ProtocolError(
            "peer key: its holder did not sign this certificate request; nothing was taken over"
        ) from None
    return announced.key


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public key that belongs to a private one, hex."""
    return key.public_key().public_bytes_raw().hex()


def fingerprint(key: str) -> str:
    """Return what people compare of a public key (hex): eight groups of four hex digits."""
    digits = hashlib.sha256(FINGERPRINT + bytes.fromhex(key)).hexdigest()[:DIGITS]
    return " ".join(digits[at : at + GROUP] for at in range(0, DIGITS, GROUP))


def _proved(request: bytes, authority: str) -> bytes:
    return PROOF + bytes.fromhex(authority) + hashlib.sha256(request).digest()
