"""A peer key goes with one certificate request, in one federation; people compare fingerprints."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.identity.peer import (
    FINGERPRINT,
    PROOF,
    announce,
    fingerprint,
    public_hex,
    require_possessed,
)

KEY = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
ROOT = "ab" * 32
GOOD = announce(KEY, b"request", ROOT)


@given(seed=st.binary(min_size=32, max_size=32), request=st.binary(max_size=900))
def test_who_holds_the_key_proves_it(seed: bytes, request: bytes) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    assert require_possessed(announce(key, request, ROOT), request, ROOT) == public_hex(key)


@given(bit=st.integers(0, 511))
def test_any_changed_bit_of_key_or_proof_proves_nothing(bit: int) -> None:
    for name in ("key", "proof"):
        value = bytearray.fromhex(getattr(GOOD, name))
        value[bit // 8 % len(value)] ^= 1 << bit % 8
        wrong = msgspec.structs.replace(GOOD, **{name: bytes(value).hex()})
        with pytest.raises(ProtocolError, match="did not sign this certificate request"):
            require_possessed(wrong, b"request", ROOT)


def test_a_proof_is_of_one_request_in_one_federation_and_no_other_purpose() -> None:
    for request, root in ((b"another", ROOT), (b"request", "cd" * 32)):
        with pytest.raises(ProtocolError, match="nothing was taken over"):
            require_possessed(GOOD, request, root)
    signed = bytes.fromhex(ROOT) + hashlib.sha256(b"request").digest()
    assert GOOD.proof == KEY.sign(PROOF + signed).hex()  # docs: what another program would sign
    for other in (signed, b"anabranch peer key 2\0" + signed):
        wrong = msgspec.structs.replace(GOOD, proof=KEY.sign(other).hex())
        with pytest.raises(ProtocolError):
            require_possessed(wrong, b"request", ROOT)


@given(one=st.binary(min_size=32, max_size=32), other=st.binary(min_size=32, max_size=32))
def test_a_fingerprint_is_128_bits_in_groups_that_can_be_read_out(one: bytes, other: bytes) -> None:
    said = fingerprint(one.hex())
    groups = said.split(" ")
    assert [len(group) for group in groups] == [4] * 8
    assert bytes.fromhex("".join(groups)) == hashlib.sha256(FINGERPRINT + one).digest()[:16]
    assert (fingerprint(other.hex()) == said) == (one == other)
