"""anabranch coordinator: what an operator types, from init to export, without a network."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch.cli.main import run
from anabranch.protocols.identity import authority
from anabranch.protocols.identity.invitation import Invitation, secret_hash
from anabranch.protocols.identity.join import Join
from anabranch.protocols.identity.peer import fingerprint
from anabranch.server.coordinator import enrolment
from anabranch.server.coordinator.folder import Federation
from tests.runs import TABLE_RUN

Command = Callable[..., Any]


@pytest.fixture
def coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """A federation in this folder, and a function that runs one command in it with --json."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test here cuts the power
    (tmp_path / "run.toml").write_text(TABLE_RUN)
    init = ["init", "-f", str(tmp_path / "heart"), "--name", "heart", "--host", "127.0.0.1"]
    assert run(["coordinator", *init, "--contract", str(tmp_path / "run.toml")]) == 0
    assert "federation heart at 127.0.0.1:8443" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "heart")

    def command(*arguments: str, code: int = 0) -> Any:
        assert run(["coordinator", *arguments, "--json"]) == code
        said = capsys.readouterr()
        return json.loads(said.out) if said.out else said.err

    return command


@pytest.fixture
def federation(coordinator: Command) -> Federation:
    return Federation(Path())


def join(federation: Federation, invitation: str, node: int = 7) -> None:
    request = authority.certificate_request(authority.new_key()).decode()
    ask = Join(secret=Invitation.parse(invitation).secret, request=request, version="1\x1b[2J")
    enrolment.join(federation, ask, time.time(), lambda _: node)


def test_sites_are_listed_with_fingerprints_that_owners_can_compare(
    coordinator: Command, federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    for node, name in enumerate(("north", "south")):
        join(federation, coordinator("invite", name)["invitation"], node)
    federation.state.set_site("north", peer_key="ab" * 32)
    assert [one["peer_key"] for one in coordinator("sites")["sites"]] == ["ab" * 32, None]
    assert run(["coordinator", "sites"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "peer key" in lines["site"]
    assert fingerprint("ab" * 32) in lines["north"]
    assert "none yet" in lines["south"]


def test_an_operator_goes_from_init_to_export(
    coordinator: Command, federation: Federation, tmp_path: Path
) -> None:
    invited = coordinator("invite", "north", "--hours", "2")
    assert Invitation.parse(invited["invitation"]).address == "127.0.0.1:8443"
    join(federation, invited["invitation"])
    (there,) = coordinator("sites")["sites"]
    assert (there["name"], there["status"], there["node"]) == ("north", "active", 7)

    proposed = coordinator("run", "../run.toml")
    assert proposed["state"] == "queued"
    assert coordinator("stop", "tiny")["desired"] == "stopped"
    assert coordinator("resume", "tiny")["desired"] == "running"
    (listed,) = coordinator("runs")["runs"]
    assert listed == {**proposed, "state": "queued"}
    shown = coordinator("status")
    assert shown["federation"] == "heart"
    assert [one["name"] for one in shown["sites"]] == ["north"]
    assert [one["run"] for one in shown["runs"]] == [proposed["run"]]

    coordinator("stop", "tiny")
    folder = federation.run_folder(proposed["run"])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "round-0001.adapter").write_bytes(b"adapter")
    (folder / "run.toml").write_text(TABLE_RUN)
    assert coordinator("export", "tiny", "../out")["files"] == [
        "audit.jsonl", "audit.pub", "checkpoints/round-0001.adapter", "proposal.json", "run.toml",
    ]  # fmt: skip
    (tmp_path / "run.toml").write_text(TABLE_RUN.replace("rounds = 2", "rounds = 9"))
    continued = coordinator("resume", proposed["run"], "--config", "../run.toml")
    assert continued["continues"] == proposed["run"]

    assert coordinator("revoke", "north", "--reason", "gone") == {
        "revoked": "north",
        "reason": "gone",
    }
    assert coordinator("sites")["sites"][0]["status"] == "revoked"
    assert coordinator("log", "verify")["ok"] is True
    kinds = [json.loads(line)["kind"] for line in Path("audit.jsonl").read_text().splitlines()]
    assert kinds == [
        "opened", "federation-made", "invited", "joined", "proposed", "stop-asked", "resume-asked",
        "stop-asked", "exported", "proposed", "revoked",
    ]  # fmt: skip


def test_a_secret_is_printed_once_and_kept_nowhere(
    coordinator: Command, federation: Federation
) -> None:
    secret = Invitation.parse(coordinator("invite", "north")["invitation"]).secret
    others = [coordinator(verb) for verb in ("sites", "runs", "status", "token")]
    assert secret not in json.dumps(others)
    for path in Path().rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def test_an_invitation_in_a_file_is_for_its_owner_alone_and_not_printed(
    coordinator: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coordinator("invite", "north", "--file", "../north.txt")["file"] == "../north.txt"
    assert Invitation.parse(Path("../north.txt").read_text()).port == 8443
    coordinator("invite", "south", "--file", "../south.svg")
    assert b"<svg" in Path("../south.svg").read_bytes()
    for name in ("../north.txt", "../south.svg"):
        assert stat.S_IMODE(Path(name).stat().st_mode) == 0o600
    said = coordinator("invite", "north", "--file", "../north.txt", code=1)
    assert "exists; name another file" in said
    first = Path("../north.txt").read_text()
    secret = secret_hash(Invitation.parse(first).secret)
    assert Federation(Path()).state.redeem(secret, time.time()) == "north"  # still the open one


def test_a_qr_code_is_printed_above_its_string(
    coordinator: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["coordinator", "invite", "north", "--qr"]) == 0
    *blocks, text = capsys.readouterr().out.rstrip("\n").splitlines()
    Invitation.parse(text)
    assert len(blocks) > 20
    assert set("".join(blocks)) <= set(" █▀▄")


def test_what_peers_say_does_not_move_the_cursor(
    coordinator: Command, federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    join(federation, coordinator("invite", "north")["invitation"])
    federation.state.set_site("north", reason="\x1b[31mred\r\u202e")
    for verb in ("sites", "runs", "status"):
        assert run(["coordinator", verb]) == 0
        text = capsys.readouterr().out
        assert not {"\x1b", "\r", "\u202e"} & set(text)
    assert "north" in text


def test_the_page_is_opened_by_the_printed_address(coordinator: Command) -> None:
    url = coordinator("token")["url"]
    assert url == f"http://127.0.0.1:8444/?token={Path('page.token').read_text().strip()}"


def test_a_log_that_was_edited_is_found(coordinator: Command) -> None:
    file = Path("audit.jsonl")
    file.write_text(file.read_text().replace('"federation":"heart"', '"federation":"other"'))
    said = coordinator("log", "verify", code=1)
    assert said["ok"] is False
    assert coordinator("log", "verify", "audit.jsonl", code=1)["ok"] is False


def test_a_state_is_put_back(coordinator: Command, federation: Federation) -> None:
    join(federation, coordinator("invite", "north")["invitation"])
    federation.state.close()
    for name in ("state.sqlite", "state.sqlite-wal", "state.sqlite-shm"):
        Path(name).unlink(missing_ok=True)
    assert "restore-state" in coordinator("sites", code=1)
    assert coordinator("restore-state") == {"sites": 1, "aside": None}
    assert [one["name"] for one in coordinator("sites")["sites"]] == ["north"]


def test_a_unit_is_printed_and_nothing_served(
    coordinator: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["coordinator", "serve", "--print-unit"]) == 0
    unit = capsys.readouterr().out
    here = Path().absolute()
    assert (
        f"ExecStart={sys.executable} -m anabranch.cli.main coordinator serve --folder {here}\n"
        in unit
    )
    assert f"\nReadWritePaths={here} -" in unit
    assert "\nNoNewPrivileges=yes\n" in unit
    assert "\nCapabilityBoundingSet=\n" in unit
    assert not Path("logs").exists()


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1), ("stopped", 0)])
def test_a_run_is_followed_until_it_is_over(
    state: Any,
    code: int,
    coordinator: Command,
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def passes(seconds: float) -> None:
        (entry,) = federation.state.runs()
        federation.state.set_run(entry.run, state=state, detail="that is why")

    monkeypatch.setattr("anabranch.cli.coordinator.time.sleep", passes)
    assert run(["coordinator", "run", "../run.toml", "--follow"]) == code
    said = capsys.readouterr()
    assert f"{state}. that is why" in said.out
    assert "queued" in said.err


@pytest.mark.parametrize(
    "arguments",
    [["sites"], ["invite", "north"], ["run", "x.toml"], ["status"], ["log", "verify"], ["token"]],
)
def test_outside_a_federation_every_verb_says_where_one_is_made(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["coordinator", *arguments]) == 1
    assert "anabranch coordinator init" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


LIGHT = """
import sys
import anabranch.cli.coordinator
heavy = {"torch", "flwr", "opacus", "transformers", "starlette", "cryptography"} & set(sys.modules)
assert not heavy, heavy
from pathlib import Path
from anabranch.cli.main import run
assert run(["coordinator", "invite", "south", "--json"]) == 0
assert run(["coordinator", "revoke", "south"]) == 1
assert not {"torch", "opacus", "transformers"} & set(sys.modules)
"""


def test_small_verbs_do_not_wait_for_torch(coordinator: Command) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
