"""The verbs of `anabranch site` for a federation: what they print, and with which exit code."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest

from anabranch.cli.main import run
from anabranch.client.agent import agent as agent_module
from anabranch.client.agent.identity import joined
from tests.client.agent.doors import Coordinator, everything


@pytest.fixture
def invitation(door: Coordinator, tmp_path: Path) -> Path:
    """Return the file of an invitation."""
    file = tmp_path / "invitation"
    file.write_text(door.invite().text())
    return file


@pytest.fixture
def site(invitation: Path, records: Path, tmp_path: Path) -> Path:
    """Return the folder of a site that has joined by the command."""
    folder = tmp_path / "site"
    assert (
        run(["site", "join", str(invitation), "--data", str(records), "--folder", str(folder)]) == 0
    )
    return folder


def test_one_command_makes_a_site_that_is_ready(
    invitation: Path,
    records: Path,
    door: Coordinator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = tmp_path / "site"
    command = ["site", "join", f"@{invitation}", "--data", str(records), "--folder", str(site)]
    assert run(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("joined heart as cardiology, in ")
    assert door.root.fingerprint in out
    assert f"{site}: site.toml, policy.toml, contract.toml, identity/" in out
    assert "  ok  data         40 records keep the contract\n" in out
    assert "s per round, and " in out
    assert out.endswith(f"ready: start with `anabranch site serve --folder {site}`\n")


def test_an_invitation_on_standard_input_is_in_no_argument(
    door: Coordinator,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    invitation = door.invite()
    monkeypatch.setattr(sys, "stdin", io.StringIO(invitation.text() + "\n"))
    folder = str(tmp_path / "s")
    assert run(["site", "join", "-", "--data", str(records), "--folder", folder, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["ready"], found["site"], found["federation"]) == (True, "cardiology", "heart")
    assert invitation.secret not in out + err
    assert invitation.secret.encode() not in everything(tmp_path)


def test_bad_records_join_and_end_with_1_and_the_reason(
    invitation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, folder = tmp_path / "records.csv", tmp_path / "site"
    records.write_text("a,b,y\n1,zebra,yes\n")
    command = ["site", "join", str(invitation), "--data", str(records), "--folder", str(folder)]
    assert run(command) == 1
    out, err = capsys.readouterr()
    assert joined(folder)
    assert "b: not a number: row 1" in out
    assert f"not ready (data): mend that, then `anabranch site preflight --folder {folder}`" in out
    assert "zebra" not in out + err
    records.write_text("a,b,y\n1,2,yes\n3,4,no\n")
    assert run(["site", "preflight", "-f", str(folder)]) == 0
    assert "ready: start with" in capsys.readouterr().out


def test_a_used_invitation_says_what_to_do(
    site: Path, invitation: Path, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(site.parent / "other")
    assert run(["site", "join", str(invitation), "--data", str(records), "--folder", other]) == 1
    error = capsys.readouterr().err
    assert error.startswith("anabranch: coordinator 127.0.0.1:")
    assert "ask the coordinator's operator for another one" in error
    assert invitation.read_text().rpartition("/")[2] not in error


def test_preflight_is_machine_readable(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["site", "preflight", "-f", str(site), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ready"] is True
    assert {"name", "ok", "value", "sentence"} == set(found["checks"][0])


def test_serve_hands_over_to_the_agent(
    site: Path, records: Path, door: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Path] = []
    monkeypatch.setattr(agent_module, "serve", served.append)
    assert run(["site", "serve", "-f", str(site)]) == 0
    second = tmp_path / "second"
    command = ["site", "join", door.invite().text(), "--data", str(records)]
    assert run([*command, "--folder", str(second), "--serve"]) == 0
    assert served == [site, second]


def test_a_unit_holds_the_limits_of_the_policy(
    site: Path, state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = site / "policy.toml"
    policy.write_text(policy.read_text().replace("# memory_mb = 8192", "memory_mb = 2048"))
    capsys.readouterr()
    assert run(["site", "serve", "-f", str(site), "--print-unit"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("[Unit]\nDescription=Anabranch site cardiology of heart\n")
    assert "MemoryMax=2048M\n" in out
    assert f"ReadWritePaths={site} {state_home / 'anabranch'}\n" in out


def test_status_says_that_the_agent_is_not_running(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["site", "status", "-f", str(site)]) == 1
    out = capsys.readouterr().out
    assert f"not running; start it with `anabranch site serve --folder {site}`" in out
    assert run(["site", "status", "-f", str(site), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["running"] is False


def test_status_is_watched_until_it_is_stopped(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stop)
    capsys.readouterr()
    run(["site", "status", "-f", str(site), "--watch"])
    assert "cardiology of heart" in capsys.readouterr().out


def test_leave_is_told_and_can_be_repeated(
    site: Path, door: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["site", "leave", "-f", str(site), "--reason", "moved"]) == 0
    assert "the coordinator took note" in capsys.readouterr().out
    assert door.seen[-1].path == "/site/leave"
    assert run(["site", "leave", "-f", str(site), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["was_joined"] is False
    assert run(["site", "status", "-f", str(site)]) == 1
    assert "has not joined a federation" in capsys.readouterr().err


def test_the_audit_log_is_verified_offline(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["site", "log", "verify", "-f", str(site)]) == 0
    assert "whole: " in capsys.readouterr().out
    log = site / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"joined"', b'"jointd"'))
    assert run(["site", "log", "verify", str(log)]) == 1
    assert "not whole: " in capsys.readouterr().out


def test_policy_is_one_of_the_verbs(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["site", "policy", "-f", str(site)]) == 0
    assert "0 runs wait for an answer" in capsys.readouterr().out
