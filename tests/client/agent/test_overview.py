"""state.json and what `site status` makes of it and of a site's other files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.agent.join import audit_log, join_site
from anabranch.client.agent.overview import ZEROS, overview, tail
from anabranch.client.agent.status import (
    STALE_S,
    AgentState,
    agent_state,
    alive,
    read_state,
    running,
    write_state,
)
from anabranch.client.policy.approvals import Approvals
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.identity.join import Report
from anabranch.protocols.identity.proposal import Proposal
from anabranch.storage.audit_log import AuditLog
from tests.client.agent.doors import Coordinator
from tests.runs import table_run

REPORT = Report(
    boot="ab" * 32, activity="training", since=900.0, run="r1", round=3, step=4, steps=9
)
NOW = 1000.0


@pytest.fixture
def site(door: Coordinator, records: Path, tmp_path: Path) -> Path:
    join_site(door.invite(), records, tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture(scope="module")
def ended() -> int:
    """Return the id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def state(**about: object) -> AgentState:
    values: dict[str, object] = {"connected": True, "at": NOW, "pid": os.getpid()}
    return agent_state(REPORT, **values | about)  # type: ignore[arg-type]


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    write_state(tmp_path, state(link="no route"))
    assert read_state(tmp_path) == state(link="no route")
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / "state.json").read_text())["activity"] == "training"


@given(link=st.text(max_size=600))
def test_any_sentence_about_the_link_can_be_written(
    link: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    write_state(folder, state(link=link))
    found = read_state(folder)
    assert found is not None
    assert len(found.link) == min(len(link), 500)


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b"[]"])
def test_a_broken_state_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(text)
    with pytest.raises(ConfigError, match="delete it, the agent writes it anew"):
        read_state(tmp_path)


def test_an_agent_runs_if_its_state_is_fresh_and_its_process_there(ended: int) -> None:
    assert running(state(), NOW)
    assert running(state(), NOW + STALE_S - 1)
    assert not running(state(), NOW + STALE_S)
    assert not running(state(pid=ended), NOW)
    assert not running(None, NOW)
    assert alive(1)


def test_what_the_agent_does_is_shown(site: Path) -> None:
    write_state(site, state())
    found = overview(site, lambda: NOW)
    assert found.running
    assert "agent        training for 100 s, run r1 round 3, step 4 of 9, connected" in found.text()
    assert found.as_dict()["connected"] is True
    assert found.problems == ()
    assert "joined" in found.audit[-1]


def test_why_nothing_happens_is_shown(site: Path, ended: int) -> None:
    write_state(site, state(connected=False, link="coordinator x cannot be reached"))
    found = overview(site, lambda: NOW)
    assert "NOT connected: coordinator x cannot be reached" in found.text()
    write_state(site, state(pid=ended))
    for now in (NOW, NOW + STALE_S):
        found = overview(site, [now].pop)
        assert "agent        the agent is not running" in found.text()
        assert found.as_dict()["activity"] is None
    (site / "state.json").unlink()
    assert not overview(site, lambda: NOW).running


def test_runs_that_wait_for_the_owner_are_shown(site: Path) -> None:
    config = table_run()
    digests = dict.fromkeys(("code", "config", "contract"), "00" * 32)
    about = {"federation": "heart", "run": "r7", "author": "trial", "version": "1", "base": "mlp"}
    proposal = Proposal(**about, **digests)
    approvals = Approvals(site)
    approvals.note(proposal, "ab" * 32, config, NOW)
    found = overview(site)
    assert found.pending == (f"{proposal.digest[:12]}  r7 by trial",)
    assert f"approvals    1 pending: `anabranch site policy list --folder {site}`" in found.text()
    approvals.approve(proposal.digest, by="me", now=NOW)
    assert overview(site).pending == ()


def test_a_part_that_cannot_be_read_is_said_and_the_others_shown(site: Path) -> None:
    (site / "state.json").write_text("broken")
    (site / "approvals.json").write_text("broken")
    (site / "identity" / "site.pem").unlink()
    (site / "ledger.sqlite").write_bytes(b"broken" * 99)
    found = overview(site)
    assert len(found.problems) == 4
    assert "cardiology of heart" in found.text()
    assert found.text().count("problem      ") == 4


def test_an_update_of_zeros_is_a_problem(site: Path) -> None:
    assert overview(site).problems == ()
    audit_log(site, "cardiology", "heart").append(ZEROS, run="r1", round=3)
    assert len(overview(site).problems) == 1
    assert "problem      an update counted as zeros" in overview(site).text()


def test_the_end_of_a_long_audit_log_is_shown(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", tmp_path / "audit.key", "site a of b")
    for number in range(8):
        log.append("noted", number=number, text="x" * 30_000)
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"n": 10, "cut')
    lines = tail(tmp_path / "audit.jsonl")
    assert lines[-1].split("  ")[1:] == ["noted", f"number=7 text={'x' * 146}"]
    assert tail(tmp_path / "absent") == ()


def test_a_site_that_has_not_joined_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has not joined a federation"):
        overview(tmp_path)
