"""Joining, renewing and leaving at the coordinator's own door: one command on a real federation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from anabranch.cli.main import run
from anabranch.client.agent.door import Door, Refused, renew_if_needed
from anabranch.client.agent.identity import Identity
from anabranch.client.agent.preflight import preflight
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.identity.join import Report
from anabranch.protocols.identity.peer import public_hex
from anabranch.server.coordinator import enrolment
from tests.server.coordinator.served import Served, served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("real")) as running:
        yield running


def test_a_site_joins_reports_renews_and_leaves(
    here: Served, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    invitation = enrolment.invite(here.federation, "cardiology", time.time())
    file, folder = tmp_path / "invitation", tmp_path / "site"
    file.write_text(invitation.text())
    command = ["site", "join", str(file), "--data", str(records), "--folder", str(folder)]
    assert run([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ready"], said
    entry = here.federation.state.site("cardiology")
    assert entry is not None
    assert (entry.status, entry.node is not None) == ("active", True)
    identity = Identity(folder)
    peer = public_hex(identity.peer_key())
    assert entry.peer_key == peer
    here.federation.state.set_site("cardiology", peer_key=None)  # as one that joined before
    old = identity.certificate()
    with Door(identity) as door:
        report = Report(boot="ab" * 32, activity="idle", since=time.time(), ready=True)
        assert not door.report(report).renew
        heard = door.report(msgspec.structs.replace(report, version=here.federation.version))
        assert heard.renew
        assert renew_if_needed(identity, door, time.time(), asked=heard.renew)
        after = here.federation.state.site("cardiology")
        assert after is not None
        assert after.peer_key == peer
        assert door.hello().federation == "heart"
    assert identity.certificate() != old
    assert here.federation.state.reports()["cardiology"].report.ready
    assert run(["site", "leave", "-f", str(folder), "--reason", "moved"]) == 0
    left = here.federation.state.site("cardiology")
    assert left is not None
    assert left.status == "left"


def test_a_used_invitation_and_a_revoked_site_get_nowhere(
    here: Served, records: Path, tmp_path: Path
) -> None:
    invitation = enrolment.invite(here.federation, "oncology", time.time())
    file, folder = tmp_path / "invitation", tmp_path / "site"
    file.write_text(invitation.text())
    command = ["site", "join", str(file), "--data", str(records), "--folder"]
    assert run([*command, str(folder)]) == 0
    assert run([*command, str(tmp_path / "other")]) == 1
    enrolment.revoke(here.federation, "oncology", "left the study")
    identity = Identity(folder)
    with Door(identity) as door, pytest.raises(Refused, match=r"revoked.*: left the study"):
        door.hello()
    found = preflight(folder)
    assert not found.ready
    assert any("revoked" in sentence for sentence in found.told)
    with Door(identity) as door, pytest.raises(AnabranchError, match="revoked"):
        renew_if_needed(identity, door, time.time(), asked=True)
