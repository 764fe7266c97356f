"""Machines that misbehave: full disks, wrong clocks, damaged files, certificates, other versions.

Of each fault: what people see, and that the run goes on, or says why not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from anabranch.server.coordinator.state import SiteEntry, State
from tests.faults.machines import (
    LONG,
    ROUND_S,
    SITES,
    back,
    damage,
    fill,
    finished,
    merges,
    problems,
    records,
    refused,
    restart,
    site_status,
    small_disk,
    toml,
    whole,
    without,
)
from tests.faults.rig import Rig
from tests.runs import write_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Yield a federation whose own folder and whose site `south` lie on small disks.

    A site asks for 1 GiB when it joins.
    """
    folder = tmp_path_factory.mktemp("machines")
    data = records(folder / "records")
    with (
        small_disk(folder / "large", 64) as large,
        small_disk(folder / "small", 1100) as small,
    ):
        rig = Rig(folder / "rig", SITES, disks={"federation": large, "south": small})
        try:
            rig.gather(lambda name: data[name])
            yield rig
        finally:
            rig.close()


@pytest.fixture(autouse=True)
def mended(rig: Rig) -> Iterator[None]:
    """Have everything run again, as it is, after a test."""
    yield
    if not rig.coordinator.alive:
        rig.coordinator.start()
    for name in SITES:
        if not rig.agents[name].alive:
            rig.agents[name].env = rig.env
            rig.start(name)


# Disks


def test_a_site_s_full_disk_is_its_reason_and_it_is_back_when_there_is_room(rig: Rig) -> None:
    run = rig.begin(LONG)
    rig.until_merged(run, 1, ROUND_S)

    filler = fill(rig.site("south"))
    rig.until(lambda: bool(problems(rig, run, "south")), ROUND_S)
    rig.until_merged(run, rig.merged(run) + 1, ROUND_S)
    filler.unlink()

    back(rig, run)
    assert any("cannot be written" in one for one in problems(rig, run, "south"))
    assert ["east", "north"] in without(rig, run)


def test_a_coordinator_s_full_disk_is_waited_for(rig: Rig, tmp_path: Path) -> None:
    text = toml(6)
    run = rig.begin(text)
    rig.until_merged(run, 2, ROUND_S)

    filler = fill(rig.federation)
    merged = rig.merged(run)
    time.sleep(8.0)  # a fault that lasts
    shown = rig.do("coordinator", "status", "-f", str(rig.federation), ok=False)
    assert "PROBLEM: coordinator" in shown
    assert "make room" in shown
    assert rig.merged(run) <= merged + 1
    filler.unlink()

    whole(rig, run, text, tmp_path)


# Clocks


def test_a_site_s_clock_that_is_hours_off_keeps_it_out_until_it_is_set(rig: Rig) -> None:
    """Both sides compare clocks: Flower takes signatures of the last five minutes alone."""
    run = rig.begin(LONG)
    rig.until_merged(run, 1, ROUND_S)

    restart(rig, "east", ANABRANCH_SKEW_S="10800")
    restart(rig, "north", ANABRANCH_SKEW_S="-10800")
    for name, said in (("east", "ahead of"), ("north", "behind")):
        named = f"s {said} the coordinator's: set it"
        state = rig.site(name) / "state.json"
        rig.until(lambda: named in state.read_text(), ROUND_S, why="it is not named")  # noqa: B023
    assert "ahead of the coordinator's: set it" in site_status(rig, "east")["reason"]
    rig.until_merged(run, rig.merged(run) + 1, 2 * ROUND_S)
    restart(rig, "east")
    restart(rig, "north")

    back(rig, run)
    assert ["south"] in without(rig, run)


# Files


def test_a_damaged_state_is_refused_and_put_back_from_its_copy(rig: Rig, tmp_path: Path) -> None:
    text = toml(6)
    run = rig.begin(text)
    rig.until_merged(run, 2, ROUND_S)
    rig.kill_coordinator()
    rig.coordinator.start()  # which makes a copy of the state as it is now
    rig.until_merged(run, 3, ROUND_S)
    rig.kill_coordinator()
    rig.state.close()

    state = rig.federation / "state.sqlite"
    for part in (state, state.with_name("state.sqlite-wal")):
        if part.exists():
            part.write_bytes(b"\x07" * part.stat().st_size)
    said = refused(rig, "coordinator", "serve", "-f", str(rig.federation))
    restored = rig.do("coordinator", "restore-state", "-f", str(rig.federation))
    rig.state = State(state)
    rig.coordinator.start()

    assert "damaged" in said
    assert "restore-state" in said
    assert "state restored: 3 active sites; every invitation is withdrawn" in restored
    whole(rig, run, text, tmp_path)


def test_a_damaged_superlink_database_is_put_aside_and_sites_are_asked_again(
    rig: Rig, tmp_path: Path
) -> None:
    text = toml(5)
    run = rig.begin(text)
    rig.until_merged(run, 2, ROUND_S)
    rig.kill_coordinator()

    database = rig.federation / "superlink" / "state.db"
    database.write_bytes(b"\x07" * database.stat().st_size)
    rig.coordinator.start()

    whole(rig, run, text, tmp_path)
    log = rig.federation / "audit.jsonl"
    rig.until(lambda: bool(list(database.parent.glob("state.db.damaged-*"))), ROUND_S)
    rig.until(lambda: "superlink-state-damaged" in log.read_text(), ROUND_S)


def test_a_damaged_progress_file_gives_way_to_the_one_before(rig: Rig, tmp_path: Path) -> None:
    text = toml(5)
    run = rig.begin(text)
    rig.until_merged(run, 2, ROUND_S)
    rig.kill_coordinator()

    newest = max((rig.federation / "runs" / run / "progress").glob("*.progress"))
    damage(newest)
    rig.coordinator.start()

    whole(rig, run, text, tmp_path)
    (said,) = [e for e in rig.events(run) if e["kind"] == "progress_damaged"]
    assert said["message"] == "its checksum does not match: it was damaged or cut"


@pytest.mark.parametrize("name", ["approvals.json", "policy.toml"])
def test_what_a_site_allows_fails_closed_when_it_is_damaged(rig: Rig, name: str) -> None:
    run = rig.begin(LONG)
    rig.until_merged(run, 1, ROUND_S)

    file = rig.site("east") / name
    whole_file = damage(file)
    rig.until(lambda: bool(problems(rig, run, "east")), ROUND_S)
    rig.until_merged(run, rig.merged(run) + 1, ROUND_S)
    file.write_bytes(whole_file)

    back(rig, run)
    assert any(one.startswith(f"policy: {name}: ") for one in problems(rig, run, "east"))
    assert ["north", "south"] in without(rig, run)


def test_a_damaged_answer_is_not_sent_and_not_made_twice(rig: Rig) -> None:
    run = rig.begin(toml(4, quorum=2))
    plan = rig.kill_at("site-east", 2, "renamed *report.json")  # round 2: done, and not sent
    rig.until(lambda: not plan.exists(), 2 * ROUND_S)

    (frame,) = [
        one.parent / "frame"
        for one in (rig.site("east") / "answers").glob("*/result.json")
        if json.loads(one.read_text())["run"] == run and json.loads(one.read_text())["round"] == 2
    ]
    damage(frame)
    rig.agents["east"].wait()
    rig.start("east")

    finished(rig, run)
    assert any("in the site's folder" in one for one in problems(rig, run, "east"))
    counted = {e["round"]: e["sites"] for e in merges(rig, run)}
    assert counted[2] == ["north", "south"]
    assert counted[4] == list(SITES)


def test_a_cut_audit_log_is_told_and_says_so_for_ever(rig: Rig, tmp_path: Path) -> None:
    text = toml(2)
    log = rig.site("north") / "audit.jsonl"
    rig.agents["north"].kill()
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-2]))

    said = refused(rig, "site", "log", "verify", "--folder", str(rig.site("north")))
    rig.start("north")
    run = rig.begin(text)

    whole(rig, run, text, tmp_path)
    assert f"{len(lines)}" in said
    assert b'"kind":"gap"' in log.read_bytes()


# Versions


def test_a_site_of_another_version_is_refused_with_both_named(rig: Rig) -> None:
    run = rig.begin(LONG)
    rig.until_merged(run, 1, ROUND_S)

    restart(rig, "east", ANABRANCH_OTHER_VERSION="9.9.9")
    rig.until(lambda: bool(problems(rig, run, "east")), ROUND_S)
    restart(rig, "east")

    back(rig, run)
    assert any("9.9.9" in one for one in problems(rig, run, "east"))


def test_a_coordinator_of_a_newer_version_goes_on_with_what_was_approved(
    rig: Rig, tmp_path: Path
) -> None:
    text = toml(5)
    run = rig.begin(text)
    rig.until_merged(run, 2, ROUND_S)
    rig.kill_coordinator()

    rig.coordinator.env = {**rig.env, "ANABRANCH_OTHER_VERSION": "9.9.9"}
    rig.coordinator.start()
    try:
        whole(rig, run, text, tmp_path)
    finally:
        rig.coordinator.kill()
        rig.coordinator.env = rig.env


# Certificates


def test_a_certificate_is_renewed_in_the_middle_of_a_run_and_ends_while_its_agent_is_off(
    rig: Rig, tmp_path: Path
) -> None:
    rig._set(rig.federation / "coordinator.toml", site_days="0.0006")  # 52 s
    rig.kill_coordinator()
    rig.coordinator.start()
    rig.join("west", write_table(tmp_path / "west.csv", seed=9))
    rig.allow("west")
    rig.start("west")

    def entry() -> SiteEntry:
        found = rig.state.site("west")
        assert found is not None
        return found

    run = rig.begin(LONG)
    rig.approve("west", run)
    first = entry().serial
    everyone = sorted([*SITES, "west"])
    rig.until(lambda: entry().serial != first, 2 * ROUND_S, why="it is not renewed")
    seen = len(rig.events(run))
    rig.until(lambda: everyone in [e.get("sites") for e in merges(rig, run, seen)], 2 * ROUND_S)
    assert "certificate-renewed" in (rig.site("west") / "audit.jsonl").read_text()

    rig.agents["west"].kill()
    rig.stop(run)
    rig.until(lambda: time.time() > entry().expires + 1.0, 2 * ROUND_S)
    rig.start("west")
    state = rig.site("west") / "state.json"
    said = "this site's certificate has expired; nothing was done. Ask the coordinator's operator"
    rig.until(lambda: said in state.read_text(), ROUND_S, why="it does not say why")
    rig.agents["west"].kill()
    rig._set(rig.federation / "coordinator.toml", site_days="90")
