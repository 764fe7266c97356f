"""Attack: find a seed whose mask is the victim's, among all that the generator can tell apart.

Flower's SecAgg+ (1.42.0, its issue 7522) folds a secret of 32 bytes with XOR into 32 bits, and
seeds NumPy's Mersenne Twister with them: 2^32 masks in all, so that one is found in minutes, and
two secrets with one mask among 2^20 of them. The fold is written anew here from that description.

Why it fails: the key of 32 bytes goes whole into AES-256 or ChaCha20. Among the same 2^20 secrets
no two masks begin alike, and every bit of the key changes the mask.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import secrets
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from anabranch.client.sums.noised import NoisedSum
from anabranch.protocols.secagg.masks import KEYSTREAMS, Expander, Keystream, cipher
from anabranch.protocols.secagg.member import Member
from anabranch.protocols.secagg.ring import Ring

SEEDS = 1 << 20
ROOT = Path(__file__).parents[2]
SUMMING = [
    *sorted((ROOT / "protocols" / "secagg").glob("*.py")),
    *sorted((ROOT / "client" / "sums").glob("*.py")),
]


def secrets_of(count: int) -> NDArray[np.uint8]:
    """Return secrets (count, 32) that look random."""
    data = hashlib.shake_256(b"secrets").digest(32 * count)
    return np.frombuffer(data, np.uint8).reshape(count, 32)


def folded(secrets: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the XOR of the eight words of 32 bits of every secret."""
    words = np.ascontiguousarray(secrets).view(">u4")
    return np.asarray(np.bitwise_xor.reduce(words, axis=1), np.uint32)


def twister(secret: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """Return the mask of a folded secret."""
    generator = np.random.RandomState(int(folded(secret[None])[0]))
    return generator.randint(0, 1 << 32, count, dtype=np.int64)


def collision(values: NDArray[np.uint32]) -> tuple[int, int] | None:
    """Return the places of two equal values."""
    order = np.argsort(values, kind="stable")
    same = np.flatnonzero(values[order][1:] == values[order][:-1])
    return (int(order[same[0]]), int(order[same[0] + 1])) if len(same) else None


def test_two_secrets_with_one_mask_are_found_where_seeds_are_folded() -> None:
    secrets = secrets_of(SEEDS)
    found = collision(folded(secrets))

    assert found is not None
    one, other = secrets[list(found)]
    assert one.tobytes() != other.tobytes()
    assert np.array_equal(twister(one, 1000), twister(other, 1000))


@pytest.mark.parametrize("keystream", KEYSTREAMS)
def test_no_two_of_as_many_keys_have_masks_that_begin_alike(keystream: Keystream) -> None:
    """16 bytes each: among 2^20 random strings two are equal with probability 2^-89."""
    data, zeros = secrets_of(SEEDS).tobytes(), bytes(16)
    seen = {
        cipher(keystream, data[at : at + 32]).encryptor().update(zeros)
        for at in range(0, len(data), 32)
    }

    assert len(seen) == SEEDS


@pytest.mark.parametrize("keystream", KEYSTREAMS)
def test_keys_that_differ_in_one_bit_have_unrelated_masks(keystream: Keystream) -> None:
    """256 neighbours of one key; half of the bits differ, within 7 standard deviations."""
    count = 1024
    expander = Expander(keystream, Ring(32), count)
    key = int.from_bytes(hashlib.sha256(b"key").digest())
    mask = np.frombuffer(expander.keystream(key.to_bytes(32)), np.uint8)
    bits = 32 * count
    for place in range(256):
        other = np.frombuffer(expander.keystream((key ^ 1 << place).to_bytes(32)), np.uint8)
        differing = int(np.unpackbits(mask ^ other).sum())
        assert abs(differing - bits / 2) < 7 * (bits / 4) ** 0.5


def test_a_fold_forgets_most_of_the_key() -> None:
    """The same bit changed in two words: the mask stays."""
    secret = secrets_of(1)[0].copy()
    changed = secret.copy()
    changed[[3, 31]] ^= 16

    assert np.array_equal(twister(secret, 100), twister(changed, 100))
    expander = Expander("aes-256-ctr", Ring(32), 100)
    assert expander.keystream(secret.tobytes()) != expander.keystream(changed.tobytes())


@pytest.mark.parametrize("file", SUMMING, ids=lambda file: file.stem)
def test_no_secret_comes_from_a_generator_with_a_seed(file: Path) -> None:
    """Neither NumPy's nor Python's: what nobody names comes from the operating system."""
    text = file.read_text()
    assert not re.search(r"(np|numpy)\W+random|import_?_? ?.?random|from random|default_rng", text)


def test_a_member_that_is_given_no_source_asks_the_operating_system() -> None:
    for of in (Member, NoisedSum):
        assert inspect.signature(of).parameters["random"].default is secrets.token_bytes
