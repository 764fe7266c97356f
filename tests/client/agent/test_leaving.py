"""Leaving: the key is gone, the books stay, and twice is once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from anabranch.client.agent.identity import joined
from anabranch.client.agent.join import join_site
from anabranch.client.agent.leaving import leave
from anabranch.client.agent.status import agent_state, write_state
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.identity import join
from anabranch.storage.audit_check import verify
from tests.client.agent.doors import Coordinator, everything, rewrite

KEPT = ("site.toml", "policy.toml", "approvals.json", "ledger.sqlite", "contract.toml")


@pytest.fixture
def site(door: Coordinator, records: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    join_site(door.invite(), records, folder)
    (folder / "answers").mkdir()
    (folder / "answers" / "1").touch()
    (folder / "identity" / "node").write_text("7")
    for name in ("ledger.sqlite", "approvals.json"):
        (folder / name).touch()
    door.seen.clear()
    return folder


def test_the_coordinator_is_told_and_the_key_destroyed(site: Path, door: Coordinator) -> None:
    left = leave(site, "moved\x1b away")
    assert (left.told, left.was_joined) == (True, True)
    assert [one.path for one in door.seen] == ["/site/leave"]
    assert join.decode(door.seen[0].body, join.Leave).reason == "moved  away"
    assert not joined(site)
    assert not (site / "identity").exists()
    assert not (site / "answers").exists()
    assert all((site / name).exists() for name in KEPT)
    assert verify(site / "audit.jsonl").entries == 3  # opened, joined, left


def test_leaving_twice_is_leaving_once(site: Path, door: Coordinator) -> None:
    leave(site)
    before, calls = everything(site), len(door.seen)
    again = leave(site)
    assert (again.was_joined, again.told) == (False, False)
    assert everything(site) == before
    assert len(door.seen) == calls


def test_without_the_coordinator_nothing_is_removed_unless_asked_for(
    site: Path, closed_port: int
) -> None:
    rewrite(site, address=f"127.0.0.1:{closed_port}")
    before = everything(site)
    with pytest.raises(RunError, match=r"nothing was removed: .*--offline"):
        leave(site)
    assert everything(site) == before
    left = leave(site, offline=True)
    assert not left.told
    assert "ask its operator to revoke this site" in left.sentence
    assert not joined(site)


def test_an_answer_that_is_lost_is_asked_for_again(
    site: Path, door: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{leave.__module__}.PAUSE_S", 0.0)
    gone = join.Refusal(code="left", message="this site was left by the coordinator")
    answers = [(403, join.encode(gone)), (0, b"")]
    door.answers[join.LEAVE] = lambda body: answers.pop()
    assert leave(site).told
    assert answers == []
    assert not joined(site)


def test_offline_tells_nobody(site: Path, door: Coordinator) -> None:
    leave(site, offline=True)
    assert door.seen == []


def test_who_was_revoked_can_still_leave(site: Path, door: Coordinator) -> None:
    door.refusal = (403, join.Refusal(code="revoked", message="this site is revoked"))
    left = leave(site)
    assert left.told
    assert "does not know this site any more" in left.sentence
    assert not joined(site)


def test_a_running_agent_is_to_be_stopped_first(site: Path) -> None:
    report = join.Report(boot="ab" * 32, activity="idle", since=1.0)
    write_state(site, agent_state(report, connected=True, at=time.time(), pid=os.getpid()))
    with pytest.raises(ConfigError, match="the agent is running; stop it first"):
        leave(site)
    assert joined(site)
    (site / "state.json").write_text("broken")
    leave(site)
    assert not (site / "state.json").exists()


def test_what_an_interrupted_join_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "site.key").touch()
    assert "unfinished identity was removed" in leave(tmp_path).sentence
    assert list(tmp_path.iterdir()) == []
