"""The roster that the bundles' publisher signs, from the operator's verbs to the devices."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.cli.main import run
from anabranch.edge.gateway.config import Limits
from anabranch.edge.gateway.operator import invite
from anabranch.edge.gateway.roster import read_file, roster_of, sign_file, write_roster
from anabranch.edge.gateway.server import Gateway
from anabranch.edge.runtime.device_file import DEVICE_FILE, read_device
from anabranch.edge.runtime.enrol import Invitation, enrol
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.secure_task import require_allowed
from anabranch.edge.runtime.transport import connect
from anabranch.edge.runtime.trust import load_private, new_key, public_bytes
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ConfigError, PolicyError
from anabranch.protocols.identity.authority import fingerprint
from tests.edge.phones import (
    QUICK,
    Made,
    Phone,
    begin,
    called,
    require_mean,
    result,
    trained,
    until_over,
)

REQUIRED = "[secure_aggregation]\nrequired = true\n"


@pytest.fixture
def signer(tmp_path: Path) -> Path:
    new_key(tmp_path / "signing.key")
    return tmp_path / "signing.key"


@pytest.fixture
def signed(phones: Made, signer: Path, tmp_path: Path) -> tuple[Gateway, list[Phone]]:
    """A gateway whose roster a trusted key signed, and devices that require it."""
    own = public_bytes(load_private(signer)).hex()
    gateway, devices = phones(3, signer=own)
    assert sign(gateway, signer, tmp_path / "roster.json") == 0
    (tmp_path / "roster.json").rename(gateway.folder.roster)
    for phone in devices:
        (phone.home.folder / DEVICE_FILE).write_text(REQUIRED)
    return gateway, devices


def sign(gateway: Gateway, key: Path, out: Path) -> int:
    folder = str(gateway.folder.folder)
    assert run(["edge", "gateway", "roster", folder, "--out", str(out)]) == 0
    return run(["edge", "gateway", "sign-roster", str(out), "--key", str(key)])


def allowed(phone: Phone) -> None:
    assert phone.task is not None
    floors = read_device(phone.home.folder).secure_aggregation
    require_allowed(phone.task, floors, phone.home)


def test_devices_that_require_a_signed_roster_are_in_a_sum_of_it(
    signed: tuple[Gateway, list[Phone]], adapter: Adapter, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway, devices = signed
    row, deltas = trained(gateway, adapter, devices)
    for phone in devices:
        allowed(phone)
    until_over(devices, gateway)
    require_mean(result(gateway, row), deltas)
    capsys.readouterr()
    folder = str(gateway.folder.folder)
    assert run(["edge", "gateway", "roster", folder, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {one["device"]: one["signed"] for one in shown["devices"]} == {
        phone.name: "yes" for phone in devices
    }


def test_a_device_that_is_not_on_the_signed_roster_gets_no_task(
    signed: tuple[Gateway, list[Phone]], adapter: Adapter, tmp_path: Path
) -> None:
    gateway, devices = signed
    home = Home(tmp_path / "late")
    enrol(home, Invitation.parse(invite(gateway.folder.folder)[0]))
    with connect(home, patience=QUICK) as channel:
        late = Phone(home, channel)
        late.ask()
        begin(gateway, adapter)
        assert not late.ask()
    assert devices[0].ask()


def test_another_roster_than_the_tasks_is_refused(
    signed: tuple[Gateway, list[Phone]], adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway makes a device up after the tasks were handed out."""
    from anabranch.edge.gateway import secure, summing
    from anabranch.protocols.errors import ProtocolError
    from anabranch.protocols.secagg.terms import Peer, Roster

    def lying(*arguments: object) -> object:
        terms, roster = honest(*arguments)  # type: ignore[arg-type]
        invented = Peer(name="d-invented", key=public_bytes(Ed25519PrivateKey.generate()).hex())
        longer = Roster.of((*roster.peers, invented))
        names = tuple(sorted((*terms.members, "d-invented")))
        return msgspec.structs.replace(terms, roster=longer.digest, members=names), longer

    honest = secure.terms_of
    monkeypatch.setattr(summing, "terms_of", lying)
    gateway, devices = signed
    trained(gateway, adapter, devices)
    called(devices)
    gateway.closer.due()
    with pytest.raises(ProtocolError, match="secure sum: roster "):
        devices[0].step()


def test_a_roster_is_for_one_gateway_and_of_a_trusted_key(
    signed: tuple[Gateway, list[Phone]], adapter: Adapter, tmp_path: Path
) -> None:
    gateway, devices = signed
    begin(gateway, adapter)
    assert devices[0].ask()
    allowed(devices[0])
    trusted = devices[0].home.trusted.read_bytes()
    devices[0].home.trusted.write_text('{"format":1,"keys":{}}')
    with pytest.raises(PolicyError, match="roster: signature: this device trusts no key"):
        allowed(devices[0])
    devices[0].home.trusted.write_bytes(trusted)
    found = read_file(gateway.folder.roster)
    elsewhere = msgspec.structs.replace(found, authority="0" * 64)
    gateway.folder.roster.write_bytes(msgspec.json.encode(elsewhere))
    sign_file(gateway.folder.roster, load_private(tmp_path / "signing.key"))
    with pytest.raises(ConfigError, match="does not fit the roster"):
        begin(gateway, adapter, 2)
    new_key(tmp_path / "other.key")
    gateway.folder.roster.unlink()
    assert sign(gateway, tmp_path / "other.key", gateway.folder.roster) == 0
    with pytest.raises(ConfigError, match="which this device does not trust"):
        begin(gateway, adapter, 2)
    gateway.folder.roster.write_text("{}")
    with pytest.raises(ConfigError, match="anabranch edge gateway roster"):
        begin(gateway, adapter, 2)


def test_what_the_owner_requires_after_the_training_counts(phones: Made, adapter: Adapter) -> None:
    gateway, devices = phones(3)
    trained(gateway, adapter, devices)
    called(devices)
    gateway.closer.due()
    (devices[0].home.folder / DEVICE_FILE).write_text(REQUIRED)
    with pytest.raises(PolicyError, match="roster: it is not signed"):
        devices[0].step()


def test_a_roster_that_fits_no_message_is_refused_before_devices_train(
    phones: Made, signer: Path, adapter: Adapter
) -> None:
    key = load_private(signer)
    small = Limits(chunk_bytes=1024, message_bytes=6000)
    gateway, devices = phones(3, signer=public_bytes(key).hex(), limits=small)
    peers = {f"d-{number:024x}": number.to_bytes(32, "big") for number in range(60)}
    authority = fingerprint(gateway.parts.authority.certificate)
    write_roster(roster_of(peers), authority, gateway.folder.roster)
    sign_file(gateway.folder.roster, key)
    with pytest.raises(ConfigError, match=r"roster\.json: 60 devices .* limits\.message_bytes"):
        begin(gateway, adapter)
    assert not devices[0].ask()
