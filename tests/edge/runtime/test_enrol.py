from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from anabranch.edge.gateway.authority import Authority
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import enrol as enrolment
from anabranch.edge.runtime.enrol import (
    Invitation,
    digest_of_pem,
    enrol,
    read_enrolled,
    renew,
)
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.trust import read_trusted
from anabranch.protocols.errors import DeviceError
from anabranch.protocols.identity.authority import certificate_request
from anabranch.storage.files import write_atomic
from tests.edge.gateways import (
    SECRET,
    FakeGateway,
    enrolled_at,
    invitation_of,
    new_authority,
    served,
)

FILES = {"device.key", "device.pem", "ca.pem", "trusted.json", "gateway.json"}
hosts = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}|\[[0-9a-f:]{2,10}\]", fullmatch=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def fake(authority: Authority) -> FakeGateway:
    return FakeGateway(authority)


def visible(home: Home) -> set[str]:
    if not home.folder.exists():
        return set()
    return {path.name for path in home.folder.iterdir() if not path.name.startswith(".")}


@given(hosts, st.integers(1, 65535), st.binary(min_size=32, max_size=32))
def test_an_invitation_is_read_as_it_was_written(host: str, port: int, digest: bytes) -> None:
    one = Invitation(address=f"{host}:{port}", authority=digest.hex(), secret=SECRET)
    assert Invitation.parse(one.text()) == one
    assert Invitation.parse(f" {one.text()}\n") == one


@pytest.mark.parametrize(
    "text",
    ["", "host", f"host:1/{'a' * 64}/", f"host/{'a' * 64}/{SECRET}", f"h:1/{'a' * 63}/{SECRET}",
     f"h:0/{'a' * 64}/{SECRET}", f"h:70000/{'a' * 64}/{SECRET}", f"h:1/{'a' * 64}/{SECRET}/x",
     f"h:1/{'A' * 64}/{SECRET}", f"h x:1/{'a' * 64}/{SECRET}"],
)  # fmt: skip
def test_other_strings_are_no_invitation_and_are_not_repeated(text: str) -> None:
    with pytest.raises(DeviceError, match="expected HOST:PORT/FINGERPRINT/SECRET") as caught:
        Invitation.parse(text)
    assert SECRET not in str(caught.value)


def test_one_string_enrols_a_device(fake: FakeGateway, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with served(fake, mutual=False) as address:
        done = enrol(home, invitation_of(fake))
    assert (done.device, done.address) == ("d-1", address)
    assert read_enrolled(home) == done
    assert visible(home) == FILES
    assert home.device_key.stat().st_mode & 0o777 == 0o600
    assert read_trusted(home.trusted) == (b"k" * 32,)
    assert home.authority.read_bytes() == fake.authority.pem
    request = x509.load_pem_x509_csr(fake.enrolled[0].certificate_request)
    assert list(request.subject) == []
    assert fake.enrolled[0].token == SECRET
    assert b"PRIVATE" not in fake.enrolled[0].SerializeToString()


def test_the_authority_may_come_as_a_file(fake: FakeGateway, tmp_path: Path) -> None:
    with served(fake, mutual=False):
        enrol(Home(tmp_path), invitation_of(fake), authority=fake.authority.pem)
    assert digest_of_pem(fake.authority.pem) == invitation_of(fake).authority


def test_a_device_is_enrolled_once_unless_forced(fake: FakeGateway, tmp_path: Path) -> None:
    home = Home(tmp_path)
    with served(fake, mutual=False):
        enrol(home, invitation_of(fake))
        key = home.device_key.read_bytes()
        with pytest.raises(DeviceError, match="enrolled as 'd-1'; --force"):
            enrol(home, invitation_of(fake))
        assert home.device_key.read_bytes() == key
        enrol(home, invitation_of(fake), force=True)
    assert home.device_key.read_bytes() != key


def test_the_secret_is_not_sent_to_another_gateway(fake: FakeGateway, tmp_path: Path) -> None:
    home, other = Home(tmp_path / "home"), new_authority(tmp_path / "ca")
    with served(fake, mutual=False):
        wanted = replace(invitation_of(fake), authority=digest_of_pem(other.pem))
        with pytest.raises(DeviceError, match="nothing was sent"):
            enrol(home, wanted)
        with pytest.raises(DeviceError, match="not in the given file"):
            enrol(home, invitation_of(fake), authority=other.pem)
        with pytest.raises(DeviceError, match="not one of the certificate authority"):
            enrol(home, wanted, authority=other.pem)  # its certificate is not of that authority
    assert fake.enrolled == []
    assert visible(home) == set()


def test_a_refusal_leaves_nothing(fake: FakeGateway, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    fake.codes = [grpc.StatusCode.PERMISSION_DENIED]
    with (
        served(fake, mutual=False),
        pytest.raises(DeviceError, match="enrol again with a new token"),
    ):
        enrol(home, invitation_of(fake))
    assert visible(home) == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"certificate": b"x"}, "expected a certificate as PEM"),
        ({"authority": b"x"}, "expected a certificate as PEM"),
        ({"gateway": "somewhere"}, "expected host:port"),
        ({"bundle_keys": [b"short"]}, "expected 32 bytes each"),
    ],
)
def test_an_answer_that_does_not_fit_leaves_nothing(
    change: dict[str, Any], message: str, fake: FakeGateway, tmp_path: Path
) -> None:
    def changed(reply: edge_pb2.EnrollReply) -> edge_pb2.EnrollReply:
        for name in change:
            reply.ClearField(name)
        reply.MergeFrom(edge_pb2.EnrollReply(**change))
        return reply

    home, fake.reply = Home(tmp_path / "home"), changed
    with served(fake, mutual=False), pytest.raises(DeviceError, match=message):
        enrol(home, invitation_of(fake))
    assert visible(home) == set()


def test_a_certificate_for_another_key_is_refused(fake: FakeGateway, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    issued = fake.authority.issue(certificate_request(other), "d-1", 90)

    def changed(reply: edge_pb2.EnrollReply) -> edge_pb2.EnrollReply:
        from cryptography.hazmat.primitives.serialization import Encoding

        reply.certificate = issued.public_bytes(Encoding.PEM)
        return reply

    fake.reply = changed
    with served(fake, mutual=False), pytest.raises(DeviceError, match="for another key"):
        enrol(Home(tmp_path / "home"), invitation_of(fake))


def test_a_disk_that_fails_half_way_leaves_a_device_that_is_not_enrolled(
    fake: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, real = Home(tmp_path / "home"), write_atomic

    def failing(path: Path, *arguments: Any) -> None:
        if path == home.gateway:
            raise OSError("no space")
        real(path, *arguments)

    monkeypatch.setattr(enrolment, "write_atomic", failing)
    with served(fake, mutual=False), pytest.raises(OSError, match="no space"):
        enrol(home, invitation_of(fake))
    assert visible(home) == {"trusted.json"}
    with pytest.raises(DeviceError, match="not enrolled"):
        read_enrolled(home)


def test_a_certificate_is_renewed_in_its_last_third(fake: FakeGateway, tmp_path: Path) -> None:
    home = Home(tmp_path)
    with enrolled_at(fake, home) as gateway:
        before, key = home.certificate.read_bytes(), home.device_key.read_bytes()
        assert not renew(home, gateway)
        assert home.certificate.read_bytes() == before
        later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=70)
        assert renew(home, gateway, later)
    assert fake.enrolled[0].token == ""
    assert home.certificate.read_bytes() != before
    assert home.device_key.read_bytes() == key
