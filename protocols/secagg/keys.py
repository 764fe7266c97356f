"""Keys of one secure sum: X25519 (RFC 7748), HKDF-SHA-256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439).

Every derivation names its purpose and the sum's context (terms.py), so that a key of one sum,
round, model or purpose is of no use in another.

    mask of u and v     HKDF(X25519(s_u, S_v), "mask" ‖ context ‖ lower name ‖ higher name)
    self-mask of u      HKDF(b_u, "self" ‖ context ‖ u)
    box from u to v     HKDF(X25519(c_u, C_v), "seal" ‖ context ‖ u ‖ v), for one message only
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg.shamir import SHARE_BYTES
from anabranch.protocols.spec import shown

KEY_BYTES = 32
COMMITMENT = b"anabranch secagg commitment 1\0"
NONCE = bytes(12)  # every box has a key of its own

Private = bytes | X25519PrivateKey


def loaded(private: bytes) -> X25519PrivateKey:
    """Return the key of 32 bytes as an object: loading costs as much as an exchange, so once."""
    return X25519PrivateKey.from_private_bytes(private)


def public_of(private: bytes) -> bytes:
    """Return the X25519 public key of a private one, 32 bytes each."""
    return loaded(private).public_key().public_bytes_raw()


def require_point(public: bytes, name: str) -> None:
    """Raise ProtocolError for a public key of small order: no secret can be agreed with it."""
    _exchanged(b"\1" * KEY_BYTES, public, name)


def mask_key(private: Private, public: bytes, context: bytes, one: str, other: str) -> bytes:
    """Return the key of the mask that two members share; ProtocolError for a weak public key."""
    low, high = sorted((one, other))
    return _derived(_exchanged(private, public, other), b"mask", context, low, high)


def self_key(seed: bytes, context: bytes, name: str) -> bytes:
    """Return the key of a member's own mask."""
    return _derived(seed, b"self", context, name)


def seal(
    private: Private, public: bytes, context: bytes, sender: str, holder: str, shares: bytes
) -> bytes:
    """Return both shares in a box that only `holder` can open."""
    key = _derived(_exchanged(private, public, holder), b"seal", context, sender, holder)
    return ChaCha20Poly1305(key).encrypt(NONCE, shares, None)


def unseal(
    private: Private, public: bytes, context: bytes, sender: str, holder: str, box: bytes
) -> tuple[bytes, bytes]:
    """Return (share of the seed, share of the masking key) of `sender` at `holder`.

    Raises ProtocolError for a box that the sender did not make for this holder and sum.
    """
    key = _derived(_exchanged(private, public, sender), b"seal", context, sender, holder)
    try:
        shares = ChaCha20Poly1305(key).decrypt(NONCE, box, None)
    except InvalidTag:
        raise ProtocolError(
            f"share of {shown(sender)}: not sealed by it for this member and this sum"
        ) from None
    return shares[:SHARE_BYTES], shares[SHARE_BYTES:]


def commitment(seed: bytes) -> str:
    """Return the SHA-256 by which a combined self-mask seed is checked, hex."""
    return hashlib.sha256(COMMITMENT + seed).hexdigest()


def _exchanged(private: Private, public: bytes, peer: str) -> bytes:
    key = loaded(private) if isinstance(private, bytes) else private
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError(f"key of {shown(peer)}: a point of small order, no key") from None


def _derived(secret: bytes, purpose: bytes, context: bytes, *names: str) -> bytes:
    encoded = [name.encode() for name in names]
    info = b"anabranch secagg 1 " + purpose + b"\0" + context
    info += b"".join(len(name).to_bytes(2, "big") + name for name in encoded)
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)
