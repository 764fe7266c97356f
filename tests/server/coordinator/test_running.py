"""The process of a run: killed anywhere and started again, it ends as one that never was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import RunError
from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.progress_file import ProgressFolder
from anabranch.server.coordinator.proposing import propose, resume, resume_with, stop
from anabranch.server.coordinator.running import AGAIN, FAILED, FINISHED, STOPPED, carry_out
from anabranch.server.coordinator.state import SiteEntry, Wait
from anabranch.server.coordinator.watching import Outside
from anabranch.server.superlink import SuperLinkGone
from anabranch.storage.audit_log import verify
from tests.runs import table_text
from tests.server.stations import EPOCH, FIRST, Fate, Station, Stations
from tests.simulations.rig import SIZES, ToySite, VirtualTime, adapter

RUN = table_text(("local_epochs = 2", "local_epochs = 2\nholdout = 0.2"))


class Killed(BaseException):
    """The process ends here, and nothing of it goes on."""


class Attached(Stations):
    """Stations as a Flower run of their own; `gone` says when the SuperLink is away."""

    flower_run = 0
    gone: Callable[[], bool] = staticmethod(lambda: False)

    def pull_messages(self, message_ids: Any) -> Any:
        if self.gone():
            raise SuperLinkGone("the SuperLink went: connection refused")
        return super().pull_messages(message_ids)


class Coordinator:
    """A federation on disk with toy sites, whose run's process is called in this one."""

    def __init__(
        self, folder: Path, *, toml: str = RUN, scripts: dict[str, list[Fate]] | None = None
    ) -> None:
        self.federation = Federation.create(folder / "federation", "heart", ["localhost"], 8443)
        self.time, self.attached = VirtualTime(), list[int | None]()
        toys = [ToySite(name, n) for name, n in sorted(SIZES.items())]
        self.stations = [Station(one, list((scripts or {}).get(one.name, ()))) for one in toys]
        for node, site in enumerate(toys, FIRST):
            entry = SiteEntry(
                name=site.name, key=f"{node:064x}", public_key=f"key {node}", node=node,
                joined=EPOCH, expires=EPOCH + 1e7, serial="1", version="1",
            )  # fmt: skip
            self.federation.state.add_site(entry)
        self.toml = folder / "run.toml"
        self.toml.write_text(toml)
        self.run = propose(self.federation, self.toml, EPOCH).run
        self.ended = False
        self.gone: Callable[[], bool] = lambda: False
        self.first: Callable[[Any], Adapter] = lambda config: adapter()
        self.sleeps: list[Callable[[], None]] = []

    @property
    def folder(self) -> Path:
        return self.federation.run_folder(self.run)

    @property
    def entry(self) -> Any:
        return self.federation.state.run(self.run)

    def attach(self, stale: int | None) -> AbstractContextManager[Attached]:
        @contextmanager
        def attached() -> Iterator[Attached]:
            if self.gone():
                raise SuperLinkGone("the SuperLink does not answer")
            self.attached.append(stale)
            grid = Attached(self.stations, self.time)
            grid.gone, grid.flower_run = self.gone, 70 + len(self.attached)
            yield grid

        return attached()

    def sleep(self, seconds: float) -> None:
        for hook in self.sleeps:
            hook()
        self.time.sleep(seconds)

    def life(self) -> int:
        """Call the run's process; return its exit code."""
        return carry_out(
            self.federation,
            self.run,
            Outside(
                attach=self.attach,
                ended=lambda: self.ended,
                first=self.first,
                clock=self.time.clock,
                now=lambda: EPOCH + self.time.now,
                sleep=self.sleep,
                poll_s=1.0,
            ),
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def audited(self) -> list[str]:
        lines = (self.federation.folder / "audit.jsonl").read_text().splitlines()
        verify(self.federation.folder / "audit.jsonl")
        return [json.loads(line)["kind"] for line in lines]

    def waits(self) -> Wait | None:
        return self.federation.state.waits().get(self.run)

    def adapters(self) -> dict[str, bytes]:
        files = (self.folder / "checkpoints").iterdir()
        return {file.name: file.read_bytes() for file in files}


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


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


def test_too_few_sites_are_a_failure_for_good(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path, toml=RUN.replace("rounds = 2", "rounds = 2\nquorum = 9"))

    assert coordinator.life() == FAILED
    assert coordinator.entry.state == "failed"
    assert "9 sites are needed, after 600 s there are 4" in coordinator.entry.detail
    assert coordinator.events("run_failed")[0]["error"] == "RunError"
    assert coordinator.audited()[-1] == "run-failed"
    assert coordinator.life() == FAILED  # and stays one
    assert coordinator.time.now == 600.0


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
