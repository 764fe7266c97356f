"""A run in the coordinator's state that an earlier version took, and this one's checks refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.protocols.errors import ConfigError
from anabranch.server.coordinator.child import FAILED
from anabranch.server.coordinator.page.status_text import text
from anabranch.server.coordinator.page.view import Watcher
from anabranch.server.coordinator.proposing import propose, resume, resume_with
from tests.page_cases import NOW, make, ran
from tests.runs import table_text
from tests.server.coordinator.carried_out import RUN, Coordinator
from tests.server.stations import EPOCH

OLD = (
    table_text(
        ("[federation]\n", '[federation]\nmethod = "altqr"\ncohort = 20\nweighting = "uniform"\n')
    )
    + '\n[robust]\nrule = "median"\n\n[secure_aggregation]\ngroup = 3\nminimum = 3\n'
)
WHY = r"secure_aggregation\.group"


def test_it_says_why_and_breaks_no_other(tmp_path: Path) -> None:
    federation = make(tmp_path / "heart")
    for run in ("toy-1", "toy-2"):
        ran(federation, run, rounds=1)
    federation.state.set_run("toy-1", toml=OLD)

    shown = Watcher(federation).view(NOW)

    first, second = sorted(shown.runs, key=lambda one: one.run)
    why = "no longer valid with this version: run toy-1: secure_aggregation.group"
    assert first.detail.startswith(why)
    assert (first.round, first.rounds) == (1, None)
    assert (second.round, second.rounds, second.detail) == (1, 1, "")
    federation.state.set_run("toy-1", state="stopped")
    assert why in text(Watcher(federation).view(NOW))


def test_its_process_ends_for_good_and_says_why(coordinator: Coordinator) -> None:
    coordinator.federation.state.set_run(coordinator.run, toml=OLD)

    assert coordinator.life() == FAILED
    assert "secure_aggregation.group" in coordinator.entry.detail
    assert coordinator.attached == []


def test_it_is_not_resumed_and_others_are(coordinator: Coordinator, tmp_path: Path) -> None:
    federation, state = coordinator.federation, coordinator.federation.state
    other = propose(federation, coordinator.toml, EPOCH).run
    state.set_run(coordinator.run, state="stopped", desired="stopped", toml=OLD)
    state.set_run(other, state="stopped", desired="stopped")
    log = federation.audit.path.read_bytes()
    (tmp_path / "new.toml").write_text(RUN)

    with pytest.raises(ConfigError, match=rf"cannot go on with this version: {WHY}"):
        resume(federation, coordinator.run)
    with pytest.raises(ConfigError, match=WHY):
        resume_with(federation, coordinator.run, tmp_path / "new.toml", EPOCH)

    assert federation.audit.path.read_bytes() == log
    assert coordinator.entry.state == "stopped"
    assert resume(federation, other).state == "queued"
