"""The identity of a site: whole or not there, its key for its owner alone, renewed in place."""

from __future__ import annotations

import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.agent.identity import Identity, joined, remove_identity
from anabranch.protocols.errors import ConfigError, ProtocolError
from anabranch.protocols.identity import authority
from anabranch.protocols.identity.authority import Authority
from anabranch.protocols.identity.peer import public_hex
from anabranch.storage.files import write_atomic
from tests.client.agent.doors import everything, long_ago, make_identity, rewrite


def test_what_was_written_is_read_back(tmp_path: Path, root: Authority) -> None:
    key = authority.new_key()
    made = make_identity(tmp_path, root, key=key)
    assert made.key().public_key() == key.public_key()
    assert made.root() == root.certificate
    assert made.certificate().public_key() == key.public_key()
    assert (made.name, made.federation, made.address) == ("cardiology", "heart", "127.0.0.1:1")
    assert set(made.authors) == {"trial"}


def test_the_key_is_readable_by_its_owner_alone(tmp_path: Path, root: Authority) -> None:
    made = make_identity(tmp_path, root)
    assert stat.S_IMODE(made.key_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.home.stat().st_mode) == 0o700


def test_the_peer_key_is_made_once_and_readable_by_its_owner_alone(
    tmp_path: Path, root: Authority
) -> None:
    made = make_identity(tmp_path, root)
    key = public_hex(made.peer_key())
    path = made.home / "peer.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_hex(Identity(tmp_path).peer_key()) == key
    assert key not in path.read_text()
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0640.*a private key is for its owner alone"):
        made.peer_key()
    path.chmod(0o600)
    for wrong in ("", "00", "zz" * 32, "ü" * 32):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="expected an Ed25519 key, 64 hex digits"):
            made.peer_key()
        assert path.read_text() == wrong  # nothing is made in the place of what may be mended


def test_of_many_that_ask_for_a_peer_key_all_get_one(tmp_path: Path, root: Authority) -> None:
    made = make_identity(tmp_path, root)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: public_hex(Identity(tmp_path).peer_key()), range(8)))
    assert found == {public_hex(made.peer_key())}


@pytest.fixture(scope="session")
def held(root: Authority, tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return make_identity(tmp_path_factory.mktemp("site"), root)


@given(mode=st.integers(0, 0o777).filter(lambda mode: mode & 0o077))
def test_a_key_that_others_may_read_or_change_is_refused(mode: int, held: Identity) -> None:
    path = held.home / "site.key"
    path.chmod(mode)
    try:
        with pytest.raises(ConfigError, match="a private key is for its owner alone: chmod 600"):
            held.context()
    finally:
        path.chmod(0o600)


def test_nothing_but_tls_1_3_our_authority_and_the_host_is_accepted(
    tmp_path: Path, root: Authority
) -> None:
    context = make_identity(tmp_path, root).context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    der = ssl.PEM_cert_to_DER_cert(authority.certificate_pem(root.certificate).decode())
    assert context.get_ca_certs(binary_form=True) == [der]


def test_a_site_interrupted_at_any_write_has_not_joined(
    tmp_path: Path, root: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in range(4):
        folder, done = tmp_path / str(count), list[Path]()

        def stop(path: Path, data: bytes, mode: int = 0o644) -> None:
            if len(done) == count:  # noqa: B023 - called before the next turn
                raise KeyboardInterrupt
            write_atomic(path, data, mode)
            done.append(path)  # noqa: B023

        monkeypatch.setattr(f"{Identity.__module__}.write_atomic", stop)
        with pytest.raises(KeyboardInterrupt):
            make_identity(folder, root)
        assert not joined(folder)
        with pytest.raises(ConfigError, match="has not joined a federation"):
            Identity(folder)
    assert [path.name for path in done] == ["site.key", "site.pem", "ca.pem"]


def test_an_identity_is_removed_once(tmp_path: Path, root: Authority) -> None:
    made = make_identity(tmp_path, root)
    assert remove_identity(tmp_path)
    assert not remove_identity(tmp_path)
    assert not made.home.exists()


def test_another_authority_in_its_place_is_refused(tmp_path: Path, root: Authority) -> None:
    other = authority.new_authority("heart", ["127.0.0.1"], datetime.now(UTC))
    with pytest.raises(ConfigError, match="not the authority that this site joined"):
        make_identity(tmp_path, root, trust=other).context()


def test_a_certificate_of_another_key_is_refused(tmp_path: Path, root: Authority) -> None:
    made = make_identity(tmp_path, root)
    made.key_file.write_bytes(authority.key_pem(authority.new_key()))
    with pytest.raises(ConfigError, match="cannot be used together"):
        made.context()


@pytest.mark.parametrize("text", [b"", b"{}", b'{"site": 1}', b"\xff", b"[" * 9])
def test_a_broken_coordinator_file_is_refused(text: bytes, tmp_path: Path, root: Authority) -> None:
    made = make_identity(tmp_path, root)
    (made.home / "coordinator.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"coordinator.json: .*leave and join again"):
        Identity(tmp_path)


def test_missing_files_are_named(tmp_path: Path, root: Authority) -> None:
    made = make_identity(tmp_path, root)
    for name, use in {
        "site.key": made.key,
        "site.pem": made.certificate,
        "ca.pem": made.root,
    }.items():
        (made.home / name).unlink()
        with pytest.raises(ConfigError, match=f"{name}: No such file"):
            use()


@given(share=st.floats(0, 1).filter(lambda share: abs(share - 1 / 3) > 1e-6))
def test_a_certificate_is_renewed_with_a_third_of_its_time_left(
    share: float, held: Identity
) -> None:
    begin = held.certificate().not_valid_before_utc.timestamp()
    assert held.needs_renewal(held.expires - share * (held.expires - begin)) == (share < 1 / 3)


def test_a_new_certificate_takes_the_old_ones_place_and_the_key_stays(
    tmp_path: Path, root: Authority
) -> None:
    made = make_identity(tmp_path, root, begin=long_ago())
    key, later = made.key(), datetime.now(UTC)
    new = authority.certificate_pem(root.site(key.public_key(), "cardiology", later))
    made.replace_certificate(new)
    assert made.certificate_file.read_bytes() == new
    assert made.key().private_numbers() == key.private_numbers()
    made.context()


def test_a_new_certificate_that_is_not_ours_changes_nothing(
    tmp_path: Path, root: Authority
) -> None:
    made = make_identity(tmp_path, root)
    before, now, public = everything(tmp_path), datetime.now(UTC), made.key().public_key()
    other = authority.new_authority("heart", ["127.0.0.1"], now)
    cases = {
        "for another key": root.site(authority.new_key().public_key(), "cardiology", now),
        "for site 'oncology'": root.site(public, "oncology", now),
        "not one of this federation": other.site(public, "cardiology", now),
        "not one of a site": root.server(public, ["127.0.0.1"], now),
        "before the present one": root.site(public, "cardiology", now - timedelta(days=9)),
    }
    for message, certificate in cases.items():
        with pytest.raises(ProtocolError, match=message):
            made.replace_certificate(authority.certificate_pem(certificate))
    with pytest.raises(ProtocolError, match="expected a certificate as PEM"):
        made.replace_certificate(b"nonsense")
    assert everything(tmp_path) == before


def test_another_fingerprint_is_refused(tmp_path: Path, root: Authority) -> None:
    make_identity(tmp_path, root)
    rewrite(tmp_path, authority="0" * 64)
    with pytest.raises(ConfigError, match="not the authority that this site joined"):
        Identity(tmp_path).root()
