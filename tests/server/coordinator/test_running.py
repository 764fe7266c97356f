"""The process of a run, from its beginning to its end, and what it refuses to carry out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anabranch.protocols.adapter import Adapter
from anabranch.server.coordinator.child import FAILED, FINISHED
from anabranch.server.coordinator.proposing import propose, resume_with
from tests.server.coordinator.carried_out import RUN, Coordinator
from tests.server.stations import EPOCH
from tests.simulations.rig import SIZES

# Examples


def test_a_run_is_begun_shown_and_concluded(coordinator: Coordinator) -> None:
    assert coordinator.life() == FINISHED

    assert coordinator.entry.state == "finished"
    assert coordinator.entry.flower_run == 71
    lines = (coordinator.folder / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds[:2] == ["run_started", "attached"]
    assert kinds[-1] == "run_finished"
    assert coordinator.audited()[-2:] == ["run-started", "run-finished"]
    asked = coordinator.federation.state.asking(coordinator.run)
    assert {site: one.state for site, one in asked.items()} == dict.fromkeys(SIZES, "answered")


def test_a_run_that_is_over_is_not_begun_again(coordinator: Coordinator) -> None:
    coordinator.life()
    before = (coordinator.folder / "events.jsonl").read_bytes()

    assert coordinator.life() == FINISHED
    assert (coordinator.folder / "events.jsonl").read_bytes() == before


def test_too_few_sites_are_a_failure_for_good(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path, toml=RUN.replace("rounds = 2", "rounds = 2\nquorum = 9"))

    assert coordinator.life() == FAILED
    assert coordinator.entry.state == "failed"
    assert "9 sites are needed, after 600 s there are 4" in coordinator.entry.detail
    assert coordinator.events("run_failed")[0]["error"] == "RunError"
    assert coordinator.audited()[-1] == "run-failed"
    assert coordinator.life() == FAILED  # and stays one
    assert coordinator.time.now == 600.0


def test_a_site_that_is_not_taken_in_is_in_the_audit_log(coordinator: Coordinator) -> None:
    coordinator.federation.state.set_site("cork", status="revoked", reason="left the study")

    assert coordinator.life() == FINISHED
    assert "site-refused" in coordinator.audited()
    asked = coordinator.events("round_started")[0]["sites"]
    assert asked == ["aarhus", "bergen", "delft"]


def test_a_run_goes_on_from_the_last_adapter_of_another(coordinator: Coordinator) -> None:
    coordinator.life()
    last = coordinator.adapters()["round-0002.adapter"]
    coordinator.toml.write_text(RUN.replace("rounds = 2", "rounds = 1"))
    coordinator.run = resume_with(
        coordinator.federation, coordinator.run, coordinator.toml, EPOCH
    ).run
    seen: list[bytes] = []
    train = coordinator.stations[0].site.train

    def noted(assignment: Any, before: Adapter) -> Any:
        from anabranch.protocols import wire

        seen.append(wire.encode(before))
        return train(assignment, before)

    coordinator.stations[0].site.train = noted  # type: ignore[method-assign]

    assert coordinator.life() == FINISHED
    assert seen == [last]


# Refusals


def test_a_configuration_that_was_changed_since_it_was_signed_is_refused(
    coordinator: Coordinator,
) -> None:
    coordinator.federation.state.set_run(coordinator.run, toml=RUN.replace("seed = 3", "seed = 4"))

    assert coordinator.life() == FAILED
    assert "the message has configuration" in coordinator.entry.detail
    assert coordinator.attached == []


def test_a_run_that_nobody_proposed_is_none(coordinator: Coordinator) -> None:
    coordinator.run = "other-1"

    assert coordinator.life() == FAILED


def test_progress_of_another_run_is_refused(coordinator: Coordinator) -> None:
    coordinator.life()
    first = coordinator.folder
    coordinator.run = propose(coordinator.federation, coordinator.toml, EPOCH).run
    (coordinator.folder / "progress").mkdir(parents=True)
    for file in (first / "progress").iterdir():
        (coordinator.folder / "progress" / file.name).write_bytes(file.read_bytes())
    (coordinator.folder / "run.toml").write_bytes(RUN.encode())

    assert coordinator.life() == FAILED
    assert "cannot go on from round 2 of run" in coordinator.entry.detail


def test_a_noisy_mean_that_is_not_in_the_progress_ends_a_private_run(tmp_path: Path) -> None:
    text = RUN.replace(
        "rounds = 2", 'rounds = 2\ncohort = 60\nweighting = "uniform"\nclient_evaluation = false'
    )
    text += "\n[client_privacy]\nepsilon = 20.0\npopulation = 100\n"
    coordinator = Coordinator(tmp_path, toml=text)
    assert coordinator.life() == FINISHED
    coordinator.federation.state.set_run(coordinator.run, state="queued")
    (coordinator.folder / "progress" / "000002-2-evaluated.progress").unlink()
    (coordinator.folder / "progress" / "000002-1-merged.progress").unlink()

    assert coordinator.life() == FAILED
    assert "its noisy mean is made once" in coordinator.entry.detail
