"""The process of a run: killed anywhere and started again, it ends as one that never was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from anabranch.protocols.errors import RunError
from anabranch.server.coordinator.child import AGAIN, FINISHED, STOPPED
from anabranch.server.coordinator.progress_file import ProgressFolder
from anabranch.server.coordinator.proposing import resume, stop
from anabranch.server.coordinator.state import Wait
from tests.server.coordinator.carried_out import Coordinator
from tests.server.stations import EPOCH, Fate
from tests.simulations.rig import SIZES


class Killed(BaseException):
    """The process ends here, and nothing of it goes on."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    made = Coordinator(tmp_path_factory.mktemp("undisturbed"))
    assert made.life() == FINISHED
    return made.adapters()


# Laws


class Kill:
    """Ends the process at the n-th time that something is forced to the disk."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        self._sync = os.fsync

    def __enter__(self) -> Kill:
        os.fsync = self  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync = self._sync

    def __call__(self, descriptor: int) -> None:
        self.count += 1
        if self.count == self.at:
            raise Killed
        self._sync(descriptor)


def killed_at(coordinator: Coordinator, at: int) -> bool:
    """Kill the process there, and let another one end the run; return whether it got so far."""
    with Kill(at):
        try:
            code = coordinator.life()
        except Killed:
            killed = True
        else:
            killed = False
            assert code == FINISHED
    assert coordinator.life() == FINISHED
    return killed


def require_as_undisturbed(coordinator: Coordinator, undisturbed: dict[str, bytes]) -> None:
    assert coordinator.adapters() == undisturbed
    assert coordinator.entry.state == "finished"
    assert coordinator.waits() is None
    summary = json.loads((coordinator.folder / "summary.json").read_text())
    assert (summary["rounds"], summary["run"]) == (2, coordinator.run)
    assert (coordinator.folder / "report.html").is_file()
    assert all(station.computed == 2 for station in coordinator.stations)  # trained once a round
    assert coordinator.audited()[-1] == "run-finished"


@pytest.mark.parametrize("at", range(3, 59, 11))
def test_killed_at_any_write_it_ends_as_if_it_had_not_been(
    at: int, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    coordinator = Coordinator(tmp_path)
    killed_at(coordinator, at)

    require_as_undisturbed(coordinator, undisturbed)


@pytest.mark.slow
def test_killed_at_every_write_it_ends_as_if_it_had_not_been(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    at = 1
    while True:
        (tmp_path / str(at)).mkdir()
        coordinator = Coordinator(tmp_path / str(at))
        if not killed_at(coordinator, at):
            break
        require_as_undisturbed(coordinator, undisturbed)
        at += 1
    assert at > 50


@pytest.mark.parametrize("at", [1, 2, 5])
def test_stopped_and_resumed_it_ends_as_if_it_had_not_been(
    at: int, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    fates: dict[str, list[Fate]] = {name: [("answer", 3.0)] * 9 for name in SIZES}
    coordinator = Coordinator(tmp_path, scripts=fates)
    asked = [0]

    def wish() -> None:
        asked[0] += 1
        if asked[0] == at:
            stop(coordinator.federation, coordinator.run)

    coordinator.sleeps.append(wish)

    assert coordinator.life() == STOPPED
    assert coordinator.entry.state == "stopped"
    assert "stopped by its operator" in coordinator.entry.detail
    assert coordinator.waits() is None
    assert coordinator.audited()[-1] == "run-stopped"
    resume(coordinator.federation, coordinator.run)
    assert coordinator.life() == FINISHED
    require_as_undisturbed(coordinator, undisturbed)


@pytest.mark.parametrize("at", [0.0, 1.0, 4.0, 7.0])
def test_a_superlink_that_goes_in_a_run_does_not_end_it(
    at: float, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    fates: dict[str, list[Fate]] = {name: [("answer", 3.0)] * 9 for name in SIZES}
    coordinator = Coordinator(tmp_path, scripts=fates)
    coordinator.gone = lambda: at <= coordinator.time.now < at + 20.0
    shown: list[str] = []

    def look() -> None:
        wait = coordinator.waits()
        shown.append("" if wait is None else wait.why)

    coordinator.sleeps.append(look)

    assert coordinator.life() == FINISHED
    require_as_undisturbed(coordinator, undisturbed)
    assert "the SuperLink is back" in shown
    assert "" not in shown
    assert len(coordinator.events("superlink_gone")) == 1
    attached = [event["flower_run"] for event in coordinator.events("attached")]
    assert [None, *map(int, attached)][: len(coordinator.attached)] == coordinator.attached


# Examples


def test_a_run_ends_with_its_coordinator_and_goes_on_with_it(
    coordinator: Coordinator, undisturbed: dict[str, bytes]
) -> None:
    coordinator.sleeps.append(lambda: setattr(coordinator, "ended", True))

    assert coordinator.life() == STOPPED
    assert (coordinator.entry.state, coordinator.entry.desired) == ("queued", "running")
    coordinator.sleeps.clear()
    coordinator.ended = False
    assert coordinator.life() == FINISHED
    require_as_undisturbed(coordinator, undisturbed)


def test_a_superlink_that_does_not_come_back_ends_the_process_to_be_started_again(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anabranch.server.coordinator.running.AWAY_S", 60.0)
    coordinator.gone = lambda: True
    shown: list[Wait | None] = []
    coordinator.sleeps.append(lambda: shown.append(coordinator.waits()))

    assert coordinator.life() == AGAIN
    assert coordinator.time.now == pytest.approx(60.0)
    assert "the SuperLink was away for 60 s" in coordinator.entry.detail
    assert all(wait is not None and wait.until == EPOCH + 60.0 for wait in shown)
    assert coordinator.entry.state == "starting"


def test_a_full_disk_is_waited_for(
    coordinator: Coordinator, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    save = ProgressFolder.save

    def full(folder: Any, progress: Any) -> None:
        if progress.round == 2 and coordinator.time.now < 60:
            raise OSError(28, "No space left on device")
        save(folder, progress)

    monkeypatch.setattr(ProgressFolder, "save", full)
    coordinator.sleeps.append(lambda: shown.append(getattr(coordinator.waits(), "why", "")))

    assert coordinator.life() == FINISHED
    require_as_undisturbed(coordinator, undisturbed)
    assert any("room on the disk: [Errno 28] No space left" in why for why in shown)
    assert coordinator.time.now >= 60


def test_a_disk_that_stays_full_ends_the_process_to_be_started_again(
    coordinator: Coordinator, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Any, progress: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anabranch.server.coordinator.watching.ROOM_S", 30.0)
    monkeypatch.setattr(ProgressFolder, "save", full)
    assert coordinator.life() == AGAIN
    assert 30.0 <= coordinator.time.now < 60.0
    assert "nothing could be written for 30 s" in coordinator.entry.detail
    monkeypatch.undo()
    assert coordinator.life() == FINISHED
    require_as_undisturbed(coordinator, undisturbed)


def test_a_damaged_progress_costs_a_round_and_is_said(
    coordinator: Coordinator, undisturbed: dict[str, bytes]
) -> None:
    coordinator.sleeps.append(lambda: setattr(coordinator, "ended", coordinator.time.now > 0))
    coordinator.stations[0].script = [("answer", 0.0), ("answer", 5.0)]
    assert coordinator.life() == STOPPED
    coordinator.sleeps.clear()
    coordinator.ended = False
    newest = max((coordinator.folder / "progress").glob("*.progress"))
    newest.write_bytes(newest.read_bytes()[:-5])

    assert coordinator.life() == FINISHED
    require_as_undisturbed(coordinator, undisturbed)
    assert len(coordinator.events("progress_damaged")) == 1


def test_a_torn_event_is_cut_off(coordinator: Coordinator) -> None:
    coordinator.sleeps.append(lambda: setattr(coordinator, "ended", True))
    assert coordinator.life() == STOPPED
    coordinator.sleeps.clear()
    coordinator.ended = False
    with (coordinator.folder / "events.jsonl").open("ab") as file:
        file.write(b'{"at":"2026-01-0')

    assert coordinator.life() == FINISHED
    assert len(coordinator.events("run_finished")) == 1


def test_a_state_that_cannot_be_read_for_a_moment_stops_no_run(
    coordinator: Coordinator, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, failures = coordinator.federation.state, [0]
    reports = state.reports

    def busy() -> Any:
        failures[0] += 1
        if failures[0] % 2:
            raise RunError("state.sqlite: another process keeps writing")
        return reports()

    monkeypatch.setattr(state, "reports", busy)

    assert coordinator.life() == FINISHED
    require_as_undisturbed(coordinator, undisturbed)
