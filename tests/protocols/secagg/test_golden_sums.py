"""Whole sums as golden vectors: recomputed by the product, and once by hand from their numbers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from tests.protocols.secagg.rig import names_of, roster_of, terms_of
from tests.vectors.secagg.create import CASES, HERE, played

PRIME = 2**256 + 297


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_golden_sum_is_recomputed_byte_for_byte(case: str) -> None:
    expected = read(HERE / f"{case}.json")

    assert json.loads(json.dumps(played(case))) == expected


def test_every_vector_of_a_sum_is_of_a_case() -> None:
    here = {path.stem for path in HERE.glob("*.json")} - {"primitives"}
    assert here == set(CASES)


# By hand, from the numbers in the vector alone


@pytest.fixture
def three() -> dict[str, Any]:
    return read(HERE / "three.json")


def letters(three: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    return {one["member"]: one for one in three["letters"] if one["stage"] == stage}


def short(name: str) -> bytes:
    return len(name).to_bytes(2, "big") + name.encode()


def hkdf(secret: bytes, purpose: bytes, context: bytes, *names: str) -> bytes:
    """RFC 5869 with SHA-256, no salt, 32 bytes."""
    info = b"anabranch secagg 1 " + purpose + b"\0" + context + b"".join(map(short, names))
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\1", "sha256")


def exchanged(private: str, public: str) -> bytes:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(private)).exchange(
        X25519PublicKey.from_public_bytes(bytes.fromhex(public))
    )


def mask(key: bytes, count: int) -> list[int]:
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return [int.from_bytes(stream[at : at + 4], "little") for at in range(0, 4 * count, 4)]


def lagrange(shares: dict[int, bytes]) -> bytes:
    secret = 0
    for i, share in shares.items():
        weight = 1
        for j in shares:
            if j != i:
                weight = weight * (j + 1) * pow(j - i, -1, PRIME) % PRIME
        secret += weight * int.from_bytes(share, "big")
    return (secret % PRIME).to_bytes(32, "big")


def test_digests_and_context_by_hand(three: dict[str, Any]) -> None:
    invite = letters(three, "advertise")["site-0000"]["request"]
    for part in ("terms", "roster"):
        text = json.dumps(invite[part], sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == three[part]
    context = hashlib.sha256(b"anabranch secagg context 1\0" + bytes.fromhex(three["terms"]))
    for name, one in letters(three, "advertise").items():
        advert = one["reply"]
        keys = bytes.fromhex(advert["sealing"] + advert["masking"])
        context.update(short(name) + keys)
        signer = Ed25519PrivateKey.from_private_bytes(
            bytes.fromhex(three["members"][name]["ed25519"])
        )
        signed = b"anabranch secagg advert 1\0" + bytes.fromhex(three["terms"]) + keys
        assert signer.sign(signed + name.encode()).hex() == advert["signature"]
    assert context.hexdigest() == three["context"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.0, "4.0"), (2 / 3, "0.6666666666666666"), (1e-5, "0.00001"), (1e-6, "1e-6"),
        (1e15, "1000000000000000.0"), (1e16, "1e16"), (1.5e16, "1.5e16"), (1.25e-7, "1.25e-7"),
    ],
)  # fmt: skip
def test_numbers_of_terms_are_written_as_the_page_says(value: float, text: str) -> None:
    """Digests are of these characters: another language may write 4 or 1e-06."""
    names = names_of(3)
    terms = terms_of(names, roster_of(names), limit=value)
    encoded = msgspec.json.encode(terms, order="sorted")
    assert f',"limit":{text},' in encoded.decode()
    assert terms.digest == hashlib.sha256(encoded).hexdigest()


def test_a_share_in_its_box_by_hand(three: dict[str, Any]) -> None:
    """Of site-0000 at site-0001, the second holder: f(2) = secret + 2 a."""
    owner, holder, context = "site-0000", "site-0001", bytes.fromhex(three["context"])
    adverts = {name: one["reply"] for name, one in letters(three, "advertise").items()}
    draws = three["members"][owner]["random"]
    shares = b""
    for secret, polynomial in (
        ("self-mask seed", "polynomial of the seed"),
        ("masking key", "of the key"),
    ):
        slope = int(draws[polynomial], 16) % PRIME
        share = (int(draws[secret], 16) + 2 * slope) % PRIME
        shares += share.to_bytes(33, "big")
    agreed = exchanged(draws["sealing key"], adverts[holder]["sealing"])
    key = hkdf(agreed, b"seal", context, owner, holder)
    box = ChaCha20Poly1305(key).encrypt(bytes(12), shares, None)
    reply = letters(three, "share")[owner]["reply"]

    assert base64.b64decode(reply["sealed"][holder]) == box
    seed = bytes.fromhex(draws["self-mask seed"])
    committed = hashlib.sha256(b"anabranch secagg commitment 1\0" + seed).hexdigest()
    assert reply["commitment"] == committed


def test_a_masked_vector_by_hand(three: dict[str, Any]) -> None:
    name, context = "site-0001", bytes.fromhex(three["context"])
    adverts = {one: letter["reply"] for one, letter in letters(three, "advertise").items()}
    own = three["members"][name]
    values = list(own["vector"])
    key = hkdf(bytes.fromhex(own["random"]["self-mask seed"]), b"self", context, name)
    assert key.hex() == own["self_mask_key"]
    for sign, other in ((1, key), *[(-1 if p < name else 1, p) for p in own["mask_keys"]]):
        if isinstance(other, str):
            agreed = exchanged(own["random"]["masking key"], adverts[other]["masking"])
            pair = hkdf(agreed, b"mask", context, *sorted((name, other)))
            assert pair.hex() == own["mask_keys"][other]
            other = pair
        stream = mask(other, len(values))
        values = [(value + sign * m) % 2**32 for value, m in zip(values, stream, strict=True)]
    masked = b"".join(value.to_bytes(4, "little") for value in values)

    assert masked.hex() == letters(three, "mask")[name]["data"]


def test_signature_reveal_and_sum_by_hand(three: dict[str, Any]) -> None:
    context, survivors = bytes.fromhex(three["context"]), ["site-0000", "site-0001"]
    listed = hashlib.sha256(b"".join(map(short, survivors))).digest()
    signed = b"anabranch secagg survivors 1\0" + context + listed
    totals: list[int] = []
    for name in survivors:
        signer = Ed25519PrivateKey.from_private_bytes(
            bytes.fromhex(three["members"][name]["ed25519"])
        )
        assert signer.sign(signed).hex() == letters(three, "agree")[name]["reply"]["signature"]
        data = bytes.fromhex(letters(three, "mask")[name]["data"])
        values = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        totals = [a + b for a, b in zip(totals or [0] * len(values), values, strict=True)]
    reveals = [letters(three, "reveal")[name]["reply"] for name in survivors]
    for name in survivors:
        shares = {i: base64.b64decode(one["seeds"][name]) for i, one in enumerate(reveals)}
        key = hkdf(lagrange(shares), b"self", context, name)
        totals = [a - b for a, b in zip(totals, mask(key, len(totals)), strict=True)]
    lost = "site-0002"
    shares = {i: base64.b64decode(one["keys"][lost]) for i, one in enumerate(reveals)}
    private = lagrange(shares).hex()
    for name in survivors:  # both are lower than the lost one, and added its masks
        public = letters(three, "advertise")[name]["reply"]["masking"]
        key = hkdf(exchanged(private, public), b"mask", context, name, lost)
        totals = [a - b for a, b in zip(totals, mask(key, len(totals)), strict=True)]
    plain = [three["members"][name]["vector"] for name in survivors]

    assert [value % 2**32 for value in totals] == three["sums"][0]["total"]
    assert three["sums"][0]["total"] == [sum(one) % 2**32 for one in zip(*plain, strict=True)]
