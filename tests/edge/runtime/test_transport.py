from __future__ import annotations

import datetime
from pathlib import Path

import grpc
import msgspec
import pytest

from anabranch.edge.gateway.authority import Authority
from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime.enrol import Enrolled
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.transport import (
    GatewayRefused,
    GatewayUnavailable,
    NotAdmitted,
    connect,
    tls_channel,
)
from anabranch.protocols.errors import DeviceError
from tests.edge.gateways import (
    QUICK,
    FakeGateway,
    enrolled_at,
    gateway_of,
    new_authority,
    served,
    write_identity,
)

CODE = grpc.StatusCode
LATER = [
    CODE.UNAVAILABLE, CODE.DEADLINE_EXCEEDED, CODE.ABORTED, CODE.DATA_LOSS, CODE.OUT_OF_RANGE,
    CODE.RESOURCE_EXHAUSTED, CODE.CANCELLED, CODE.INTERNAL, CODE.UNKNOWN,
]  # fmt: skip
CLOSED = [CODE.PERMISSION_DENIED, CODE.UNAUTHENTICATED, CODE.UNIMPLEMENTED]
REFUSED = [CODE.NOT_FOUND, CODE.INVALID_ARGUMENT, CODE.FAILED_PRECONDITION, CODE.ALREADY_EXISTS]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def fake(authority: Authority) -> FakeGateway:
    return FakeGateway(authority)


def check_in() -> edge_pb2.CheckInRequest:
    return edge_pb2.CheckInRequest()


def test_every_status_has_one_meaning(fake: FakeGateway) -> None:
    with gateway_of(fake) as gateway:
        for kind, codes in (
            (GatewayUnavailable, LATER),
            (NotAdmitted, CLOSED),
            (GatewayRefused, REFUSED),
        ):
            for code in codes:
                fake.codes = [code] * 3
                with pytest.raises(DeviceError, match=f"{code.name}: as the test wants") as caught:
                    gateway.check_in(check_in())
                assert type(caught.value) is kind, code


def test_idempotent_calls_are_repeated_only_where_that_may_help(fake: FakeGateway) -> None:
    with gateway_of(fake) as gateway:
        fake.codes = [CODE.UNAVAILABLE, CODE.DEADLINE_EXCEEDED]
        gateway.check_in(check_in())
        assert len(fake.asked) == 1
        fake.codes = [CODE.INTERNAL, CODE.INTERNAL]
        with pytest.raises(GatewayUnavailable):
            gateway.check_in(check_in())
        assert fake.codes == [CODE.INTERNAL]


def test_mutual_tls(fake: FakeGateway, tmp_path: Path) -> None:
    with enrolled_at(fake, Home(tmp_path)) as gateway:
        gateway.check_in(check_in())
    assert len(fake.asked) == 1


def test_nobody_is_served_without_a_certificate(fake: FakeGateway) -> None:
    from anabranch.edge.runtime.transport import Gateway

    with (
        served(fake) as address,
        Gateway(tls_channel(address, fake.authority.pem), patience=QUICK) as gateway,
        pytest.raises(GatewayUnavailable),
    ):
        gateway.check_in(check_in())
    assert fake.asked == []


def test_another_authority_is_not_the_gateway(fake: FakeGateway, tmp_path: Path) -> None:
    home, other = Home(tmp_path / "home"), new_authority(tmp_path / "other")
    write_identity(other, home)
    with served(fake) as address:
        home.gateway.write_bytes(msgspec.json.encode(Enrolled(device="d-1", address=address)))
        with (
            connect(home, patience=QUICK) as gateway,
            pytest.raises(NotAdmitted, match="not one of the certificate authority"),
        ):
            gateway.check_in(check_in())
    assert fake.asked == []


def test_an_expired_certificate_is_noticed_before_a_call(
    fake: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=100)
    with monkeypatch.context() as patch:
        patch.setattr("anabranch.edge.gateway.authority._now", lambda: past)
        write_identity(fake.authority, home)
    home.gateway.write_bytes(msgspec.json.encode(Enrolled(device="d-1", address="127.0.0.1:9")))
    with pytest.raises(DeviceError, match=r"certificate ended on .*--force"):
        connect(home)


def test_a_device_with_half_an_identity_says_so(fake: FakeGateway, tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(DeviceError, match="not enrolled"):
        connect(home)
    home.gateway.write_bytes(msgspec.json.encode(Enrolled(device="d-1", address="127.0.0.1:9")))
    with pytest.raises(DeviceError, match="identity cannot be read"):
        connect(home)
