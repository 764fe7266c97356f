"""Masks: the standards' keystreams, chunk by chunk, added and taken away again."""

from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.secagg.masks import (
    CHUNK_BYTES,
    KEYSTREAMS,
    Expander,
    Keystream,
    cipher,
    fastest,
)
from anabranch.protocols.secagg.ring import RINGS, Ring, RingArray

ZERO = bytes(32)
NIST_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
keys = st.binary(min_size=32, max_size=32)
rings = st.sampled_from([Ring(bits) for bits in RINGS])
keystreams = st.sampled_from(KEYSTREAMS)


def words(keystream: Keystream, key: bytes, ring: Ring, count: int) -> list[int]:
    """Expand at once and cut with Python's integers: the definition, without buffers."""
    size = ring.dtype.itemsize
    data = cipher(keystream, key).encryptor().update(bytes(count * size))
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


# Laws


@given(keystream=keystreams, ring=rings, key=keys, count=st.integers(0, 50))
def test_a_mask_is_the_keystream_in_little_endian_words(
    keystream: Keystream, ring: Ring, key: bytes, count: int
) -> None:
    total = ring.zeros(count)
    Expander(keystream, ring, count).add(key, total)

    assert total.tolist() == words(keystream, key, ring, count)


@pytest.mark.parametrize("keystream", KEYSTREAMS)
@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 1001])
def test_nothing_is_lost_or_repeated_where_chunks_meet(
    keystream: Keystream, bits: int, chunks: int, beyond: int
) -> None:
    ring = Ring(bits)  # type: ignore[arg-type]
    count = chunks * CHUNK_BYTES // ring.dtype.itemsize + beyond
    whole = cipher(keystream, NIST_KEY).encryptor().update(bytes(count * ring.dtype.itemsize))
    expander, total = Expander(keystream, ring, count), ring.zeros(count)
    expander.add(NIST_KEY, total)

    assert total.tobytes() == whole
    assert expander.keystream(NIST_KEY) == whole


@settings(max_examples=30)
@given(
    keystream=keystreams,
    ring=rings,
    one=keys,
    other=keys,
    count=st.sampled_from([0, 1, 7, CHUNK_BYTES // 2 + 3]),
)
def test_masks_cancel_in_any_order_and_one_expander_serves_many(
    keystream: Keystream, ring: Ring, one: bytes, other: bytes, count: int
) -> None:
    values = np.arange(count).astype(ring.dtype)
    total = values.copy()
    expander = Expander(keystream, ring, count)
    expander.add(one, total)
    expander.subtract(other, total)
    expander.subtract(one, total)
    expander.add(other, total)

    assert np.array_equal(total, values)


def test_the_last_chunk_does_not_stay_in_the_buffer() -> None:
    expander = Expander("chacha20", Ring(32), 100)
    expander.add(NIST_KEY, Ring(32).zeros(100))

    assert bytes(expander._buffer) == bytes(400)


def test_the_fastest_keystream_is_one_of_the_two_and_stays_the_same() -> None:
    assert fastest() in KEYSTREAMS
    assert fastest() == fastest()


# Known answers


def test_chacha20_is_that_of_rfc_8439() -> None:
    """Appendix A.1: test vectors 1 and 2 (blocks 0 and 1 of key 0), 3 (block 1), 4 (block 2)."""
    blocks = Expander("chacha20", Ring(32), 48)
    last_one = blocks.keystream(bytes(31) + b"\x01")
    second_ff = blocks.keystream(b"\x00\xff" + bytes(30))

    assert blocks.keystream(ZERO)[:128].hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert last_one[64:128].hex() == (
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"
    )
    assert second_ff[128:192].hex() == (
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096"
    )


def test_aes_ctr_is_that_of_nist_sp_800_38a() -> None:
    """Section 6.5: block j is AES of the counter j. The cipher itself: F.1.5 and AESAVS."""
    stream = Expander("aes-256-ctr", Ring(32), 4 * 300).keystream(NIST_KEY)
    block = Cipher(AES256(NIST_KEY), ECB()).encryptor()
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")

    assert block.update(plain).hex() == "f3eed1bdb5d2a03c064b5a7e3db181f8"
    for j in (0, 1, 255, 256, 299):
        assert stream[16 * j : 16 * j + 16] == block.update(j.to_bytes(16, "big"))
    zero = Expander("aes-256-ctr", Ring(32), 4).keystream(ZERO)
    assert zero.hex() == "dc95c078a2408989ad48a21492842087"


# Refusals


@pytest.mark.parametrize("size", [0, 16, 31, 33])
@pytest.mark.parametrize("keystream", KEYSTREAMS)
def test_a_key_of_another_size_is_refused_and_shows_no_byte_of_it(
    keystream: Keystream, size: int
) -> None:
    total = Ring(32).zeros(4)

    with pytest.raises(ValueError, match=f"a mask key of 32 bytes, got {size}") as refusal:
        Expander(keystream, Ring(32), 4).add(b"\xaa" * size, total)
    assert "aa" not in str(refusal.value)
    assert total.tolist() == [0, 0, 0, 0]


def test_a_vector_of_another_length_or_dtype_is_refused_and_unchanged() -> None:
    expander = Expander("chacha20", Ring(24), 4)
    wrong: list[tuple[RingArray, str]] = [
        (np.zeros(5, np.uint32), "a vector of 4 values, got 5"),
        (np.zeros(4, np.uint64), "a vector of uint32"),
        (np.zeros((4, 1), np.uint32), "a vector of uint32"),
    ]
    uses: list[Callable[..., None]] = [expander.add, expander.subtract]
    for total, message in wrong:
        for use in uses:
            with pytest.raises(ValueError, match=message):
                use(ZERO, total)
            assert not total.any()


def test_an_unknown_keystream_is_refused() -> None:
    with pytest.raises(ValueError, match="one of aes-256-ctr, chacha20, got 'rc4'"):
        cipher("rc4", ZERO)  # type: ignore[arg-type]


def test_the_expander_shows_no_key() -> None:
    expander = Expander("aes-256-ctr", Ring(32), 4)
    expander.add(NIST_KEY, Ring(32).zeros(4))

    assert NIST_KEY.hex() not in repr(expander) + repr(vars(expander))
    assert repr(NIST_KEY) not in repr(expander) + repr(vars(expander))
