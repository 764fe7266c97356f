from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from anabranch.cli.main import run
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.spool import Spool
from anabranch.edge.runtime.transport import Gateway
from tests.edge.gateways import FakeGateway, enrolled_at, invitation_of, new_authority, served


@pytest.mark.parametrize("verb", ["sync", "pull", "status"])
def test_a_device_that_is_not_enrolled_says_what_to_do(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["edge", verb, "--home", str(tmp_path)]) == 1
    assert "anabranch edge enroll TOKEN" in capsys.readouterr().err


def test_enroll_refuses_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["edge", "enroll", "nonsense", "--home", str(tmp_path)]) == 1
    assert "HOST:PORT/FINGERPRINT/SECRET" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(tmp_path: Path) -> None:
    assert run(["edge", "enroll"]) == 2
    assert run(["edge", "sync", "--engine", "steam", "--home", str(tmp_path)]) == 2


def test_enroll_then_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake, home = FakeGateway(new_authority(tmp_path / "ca")), str(tmp_path / "home")
    with served(fake, mutual=False):
        token = invitation_of(fake).text()
        assert run(["edge", "enroll", token, "--home", home, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "d-1"
    assert run(["edge", "status", "--home", home, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["gateway"] == fake.address
    assert (shown["task"], shown["waiting"], shown["bundles"]) == (None, [], [])


def test_sync_without_data_sends_what_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, home = FakeGateway(new_authority(tmp_path / "ca")), Home(tmp_path / "home")
    deadline = int(time.time()) + 3600
    Spool(home.spool).put("t-1", b"delta", examples=3, steps=2, deadline_unix=deadline)
    with enrolled_at(fake, home):
        arguments = ["--home", str(home.folder), "--once", "--ignore-conditions"]
        assert run(["edge", "sync", *arguments]) == 0
    assert "delta of task t-1 accepted" in capsys.readouterr().err
    assert len(fake.committed) == 1
    assert Spool(home.spool).entries() == []
    assert [(one.resume_task, one.capabilities.examples) for one in fake.asked] == [("t-1", 3)]


def test_sync_says_that_the_gateway_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gateway, "wait", lambda self, failures: None)
    fake, home = FakeGateway(new_authority(tmp_path / "ca")), Home(tmp_path / "home")
    with enrolled_at(fake, home):
        pass
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "b"}\n')
    arguments = ["--home", str(home.folder), "--once", "--ignore-conditions", "--data", str(data)]
    assert run(["edge", "sync", *arguments]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
