"""Keys, signatures and the floor against roll-back."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from anabranch.edge.runtime.trust import (
    MAX_SIGNATURE,
    PREFIX,
    add_trusted,
    load_private,
    new_key,
    public_bytes,
    read_trusted,
    remember_version,
    require_not_older,
    sign,
    verify_signature,
)
from anabranch.protocols.errors import BundleError

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
MANIFEST = b'{"kind":"bundle"}'
D1, D2 = "1" * 64, "2" * 64


@given(manifest=st.binary(max_size=200))
def test_what_a_trusted_key_signed_is_verified(manifest: bytes) -> None:
    trusted = [public_bytes(OTHER), public_bytes(KEY)]
    assert verify_signature(manifest, sign(manifest, KEY), trusted) == public_bytes(KEY)


@given(data=st.data())
def test_any_other_manifest_is_refused(data: st.DataObject) -> None:
    manifest = data.draw(st.binary(max_size=100))
    other = data.draw(st.binary(max_size=100).filter(lambda x: x != manifest))
    with pytest.raises(BundleError, match=r"does not fit manifest\.json"):
        verify_signature(other, sign(manifest, KEY), [public_bytes(KEY)])


def test_every_flipped_bit_of_manifest_and_signature_is_refused() -> None:
    signature, trusted = sign(MANIFEST, KEY), [public_bytes(KEY)]
    for bit in range(8 * len(signature)):
        with pytest.raises(BundleError, match=r"^signature: "):
            verify_signature(MANIFEST, flipped(signature, bit), trusted)
    for bit in range(8 * len(MANIFEST)):
        with pytest.raises(BundleError, match=r"^signature: does not fit"):
            verify_signature(flipped(MANIFEST, bit), signature, trusted)


@given(data=st.binary(max_size=MAX_SIGNATURE + 10))
def test_any_bytes_are_a_signature_or_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"^signature: "):
        verify_signature(MANIFEST, data, [public_bytes(KEY)])


def test_without_a_trusted_key_nothing_is_opened() -> None:
    with pytest.raises(BundleError, match="trusts no key"):
        verify_signature(MANIFEST, sign(MANIFEST, KEY), [])


def test_an_unknown_key_is_refused_however_right_its_signature() -> None:
    with pytest.raises(BundleError, match="does not trust"):
        verify_signature(MANIFEST, sign(MANIFEST, OTHER), [public_bytes(KEY)])


def test_a_signature_for_something_else_is_none_for_a_bundle() -> None:
    bare = sign(MANIFEST, KEY).replace(
        KEY.sign(PREFIX + MANIFEST).hex().encode(), KEY.sign(MANIFEST).hex().encode()
    )
    with pytest.raises(BundleError, match="does not fit"):
        verify_signature(MANIFEST, bare, [public_bytes(KEY)])


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s + b" ",
        lambda s: b" " + s,
        lambda s: s[:-1] + b',"more":1}',
        lambda s: s.replace(b'{"algorithm"', b'{"algorithm":"ed25519","algorithm"'),
        lambda s: s.replace(b"ed25519", b"none"),
        lambda s: s.upper(),
    ],
)
def test_a_signature_has_one_form(change: object) -> None:
    assert callable(change)
    with pytest.raises(BundleError, match=r"^signature: "):
        verify_signature(MANIFEST, change(sign(MANIFEST, KEY)), [public_bytes(KEY)])


def test_a_large_signature_file_is_not_parsed() -> None:
    with pytest.raises(BundleError, match="at most 512"):
        verify_signature(MANIFEST, b"[" * 100_000, [public_bytes(KEY)])


def test_a_new_key_signs_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "publisher.pem"
    public = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = load_private(path)
    assert public_bytes(key) == public
    assert verify_signature(MANIFEST, sign(MANIFEST, key), [public]) == public


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    new_key(path)
    before = path.read_bytes()
    with pytest.raises(BundleError, match="never overwritten"):
        new_key(path)
    assert path.read_bytes() == before


def test_keys_that_cannot_sign_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(BundleError, match="cannot be read"):
        load_private(path)
    path.write_bytes(b"no key")
    path.chmod(0o600)
    with pytest.raises(BundleError, match="private key in PEM"):
        load_private(path)
    path.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(BundleError, match="expected an Ed25519 key"):
        load_private(path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    new_key(path)
    path.chmod(0o640)
    with pytest.raises(BundleError, match="chmod 600"):
        load_private(path)


@pytest.mark.parametrize("mode", [0o666, 0o664])
def test_a_list_of_keys_that_others_can_write_trusts_nobody(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "trusted.json"
    add_trusted(path, public_bytes(KEY), "me")
    assert read_trusted(path) == (public_bytes(KEY),)
    path.chmod(mode)
    with pytest.raises(BundleError, match="chmod 644"):
        read_trusted(path)
    with pytest.raises(BundleError, match="chmod 644"):
        add_trusted(path, public_bytes(KEY))


def test_trusted_keys_are_added_once(tmp_path: Path) -> None:
    path = tmp_path / "trusted.json"
    assert read_trusted(path) == ()
    for key in (KEY, OTHER, KEY):
        add_trusted(path, public_bytes(key), "hospital")
    assert read_trusted(path) == (public_bytes(KEY), public_bytes(OTHER))
    with pytest.raises(BundleError, match="has 32 bytes"):
        add_trusted(path, b"short")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"keys":{"zz":""}}', b"[" * 5000, b"\xff"])
def test_a_damaged_list_of_keys_trusts_nobody(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trusted.json"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"trusted\.json: "):
        read_trusted(path)


def test_a_device_never_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "versions.json"
    require_not_older(path, "icd", 1, D1)
    remember_version(path, "icd", 3, D1)
    remember_version(path, "icd", 3, D1)
    remember_version(path, "other", 1, D2)
    for check in (require_not_older, remember_version):
        with pytest.raises(BundleError, match="version: icd 2 is older than 3"):
            check(path, "icd", 2, D2)
        with pytest.raises(BundleError, match="one version has one content"):
            check(path, "icd", 3, D2)
    before = path.read_bytes()
    require_not_older(path, "icd", 4, D2)
    assert path.read_bytes() == before
    remember_version(path, "icd", 4, D2)
    with pytest.raises(BundleError, match="icd 3 is older than 4"):
        require_not_older(path, "icd", 3, D1)


@given(versions=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_the_floor_is_the_highest_version_seen(
    tmp_path_factory: pytest.TempPathFactory, versions: list[int]
) -> None:
    path = tmp_path_factory.mktemp("floor") / "versions.json"
    highest = 0
    for version in versions:
        if version < highest:
            with pytest.raises(BundleError, match="is older"):
                remember_version(path, "icd", version, D1)
        else:
            remember_version(path, "icd", version, D1)
            highest = version


def test_many_writers_keep_the_floor(tmp_path: Path) -> None:
    path = tmp_path / "versions.json"

    def write(number: int) -> None:
        remember_version(path, f"bundle-{number}", number + 1, D1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    for number in range(24):
        with pytest.raises(BundleError, match="one version has one content"):
            require_not_older(path, f"bundle-{number}", number + 1, D2)


def test_a_damaged_floor_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "versions.json"
    path.write_bytes(b"{")
    with pytest.raises(BundleError, match=r"versions\.json.*restore it"):
        require_not_older(path, "icd", 1, D1)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
