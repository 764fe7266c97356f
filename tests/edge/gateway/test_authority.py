from __future__ import annotations

import datetime
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from anabranch.edge.gateway.authority import (
    Authority,
    make_authority,
    new_device,
    new_token,
    open_authority,
    token_hash,
)
from anabranch.edge.gateway.refusals import Denied, Malformed
from anabranch.edge.gateway.store import Enrolment, Store, make_store
from anabranch.protocols.errors import ConfigError
from benchmarks.edge.gateway_devices import request_of


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("gateway") / "authority", "north")


def _request() -> bytes:
    return request_of(ec.generate_private_key(ec.SECP256R1()))


def test_a_certificate_names_its_device(authority: Authority) -> None:
    pem = authority.issue(_request(), "d-1", 90).public_bytes(Encoding.PEM)
    assert authority.device_of(pem) == "d-1"


def test_a_certificate_has_its_time(authority: Authority) -> None:
    pem = authority.issue(_request(), "d-1", 90).public_bytes(Encoding.PEM)
    now = datetime.datetime.now(datetime.UTC)
    for days in (-1, 91):
        with pytest.raises(Denied, match="valid until"):
            authority.device_of(pem, now + datetime.timedelta(days=days))


def test_others_certificates_are_refused(authority: Authority, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other", "north")
    pem = other.issue(_request(), "d-1", 90).public_bytes(Encoding.PEM)
    with pytest.raises(Denied, match="not one that this gateway issued"):
        authority.device_of(pem)
    _, server = authority.server_credentials(["localhost"])
    with pytest.raises(Denied, match="not one of a device"):
        authority.device_of(server)
    with pytest.raises(Denied, match="not one that this gateway issued"):
        authority.device_of(b"nonsense")


def test_the_request_decides_nothing_but_the_key(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = authority.issue(request_of(key), "d-2", 90)
    assert certificate.public_key() == key.public_key()
    assert [a.value for a in certificate.subject] == ["d-2"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_requests_that_are_none_are_refused(authority: Authority) -> None:
    with pytest.raises(Malformed, match="PKCS #10"):
        authority.issue(b"nonsense", "d", 1)
    with pytest.raises(Malformed, match="8193 bytes"):
        authority.issue(b"x" * 8193, "d", 1)
    with pytest.raises(Malformed, match="secp256r1"):
        authority.issue(request_of(rsa.generate_private_key(65537, 2048)), "d", 1)  # type: ignore[arg-type]


def test_keys_are_the_owners_alone(authority: Authority) -> None:
    authority.server_credentials(["localhost"])
    for name in ("ca.key", "server.key"):
        mode = (authority.folder / name).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    made = make_authority(tmp_path / "a", "north")
    (made.folder / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="nobody else may read it"):
        open_authority(made.folder)
    with pytest.raises(ConfigError, match="exists"):
        make_authority(made.folder, "north")


def test_the_servers_certificate_stays_until_its_hosts_change(authority: Authority) -> None:
    first = authority.server_credentials(["localhost", "10.0.0.1"])
    assert authority.server_credentials(["localhost", "10.0.0.1"]) == first
    assert authority.server_credentials(["localhost"]) != first


@pytest.fixture
def store(tmp_path: Path) -> Store:
    make_store(tmp_path / "state.sqlite")
    return Store(tmp_path / "state.sqlite")


def test_of_many_that_come_with_one_token_one_gets_a_device(store: Store) -> None:
    token = token_hash(new_token())
    store.add_token(token, time.time() + 60, "")

    def enrol(number: int) -> str | None:
        try:
            return store.enrol(
                token, Enrolment(new_device(), bytes([number]) * 32, ""), time.time()
            )
        except Denied:
            return None

    with ThreadPoolExecutor(8) as pool:
        got = [device for device in pool.map(enrol, range(24)) if device]
    assert len(got) == 1
    assert [row["id"] for row in store.devices()] == got


def test_two_processes_do_not_share_a_token(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "state.sqlite")
    token = token_hash(new_token())
    store.add_token(token, time.time() + 60, "")
    store.enrol(token, Enrolment("d-1", b"1" * 32, ""), time.time())
    with pytest.raises(Denied, match="used already"):
        other.enrol(token, Enrolment("d-2", b"2" * 32, ""), time.time())
    other.close()


def test_a_lost_answer_can_be_asked_for_again(store: Store) -> None:
    token = token_hash(new_token())
    store.add_token(token, time.time() + 60, "")
    for name in ("d-1", "d-2"):
        assert store.enrol(token, Enrolment(name, b"k" * 32, ""), time.time()) == "d-1"


def test_expired_and_unknown_tokens_are_refused(store: Store) -> None:
    token = token_hash(new_token())
    store.add_token(token, time.time() - 1, "")
    for one in (token, token_hash("never made")):
        with pytest.raises(Denied, match="unknown or expired"):
            store.enrol(one, Enrolment("d-1", b"k" * 32, ""), time.time())


def test_a_missing_state_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="restore it"):
        Store(tmp_path / "state.sqlite")
    (tmp_path / "state.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="not a gateway's state"):
        Store(tmp_path / "state.sqlite")
