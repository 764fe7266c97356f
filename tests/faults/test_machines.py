"""Machines that misbehave: full disks, wrong clocks, damaged files, certificates, other versions.

Of each fault: what people see, and that the run goes on, or says why not.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anabranch.server.coordinator.state import SiteEntry, State
from tests.faults.killing import accounts, undisturbed
from tests.faults.rig import COMMAND, Rig
from tests.runs import table_text, write_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SITES = ("east", "north", "south")
ROUND_S = 60.0


def records(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    return {name: write_table(folder / f"{name}.csv", seed=i) for i, name in enumerate(SITES)}


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Yield a folder that is a disk of its own. Needs root."""
    folder.mkdir(parents=True)
    options = f"size={megabytes}m,mode=700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


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


def toml(rounds: int, quorum: int = 3, deadline_s: float = 240.0, extra: str = "") -> str:
    federation = f"rounds = {rounds}\nquorum = {quorum}\ndeadline_s = {deadline_s}"
    return table_text(("rounds = 2", federation), extra=extra)


LONG = toml(200, quorum=1, deadline_s=20.0)  # to be stopped


def finished(rig: Rig, run: str) -> None:
    entry = rig.over(run, 8 * ROUND_S)
    assert entry.state == "finished", f"{entry.detail}\n{rig.tails()}"


def whole(rig: Rig, run: str, text: str, folder: Path) -> None:
    """Require that every site was in every round, and the undisturbed run's adapter."""
    finished(rig, run)
    assert accounts(rig, run) == (0, 0)
    expected = undisturbed(folder / "undisturbed", text, records(rig.folder.parent / "records"))
    assert rig.adapter(run) == expected


def back(rig: Rig, run: str) -> None:
    """Wait until a round has a delta of every site again, and stop the run."""
    seen = len(rig.events(run))

    def all_there() -> bool:
        return any(e["sites"] == list(SITES) for e in merges(rig, run, seen))

    rig.until(all_there, 3 * ROUND_S, why="a site does not come back")
    rig.stop(run)


def merges(rig: Rig, run: str, since: int = 0) -> list[dict[str, Any]]:
    """Return the merges that a run has announced since its so-manyth event."""
    return [e for e in rig.events(run)[since:] if e["kind"] == "round_aggregated"]


def without(rig: Rig, run: str) -> list[list[str]]:
    """Return whose deltas were in the rounds that lacked somebody."""
    return [e["sites"] for e in merges(rig, run) if e["sites"] != list(SITES)]


def fill(folder: Path) -> Path:
    """Write until nothing more goes in; return the file to remove."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def problems(rig: Rig, run: str, site: str) -> list[str]:
    """Return what a run's events say of why a site failed or was refused."""
    kinds = ("site_failed", "node_refused")
    return [
        f"{e['reason']}: {e['message']}"
        for e in rig.events(run)
        if e["kind"] in kinds
        and e.get("site", site) == site
        and not e["message"].startswith("waiting for the owner")
    ]


def site_status(rig: Rig, name: str) -> dict[str, Any]:
    said = rig.do("site", "status", "--folder", str(rig.site(name)), "--json", ok=False)
    return dict(json.loads(said))


def restart(rig: Rig, name: str, **env: str) -> None:
    """Start a site's agent anew, with this environment."""
    rig.agents[name].kill()
    rig.agents[name].env = {**rig.env, **env}
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


def damage(file: Path) -> bytes:
    """Overwrite the middle of a file; return what it was."""
    before = file.read_bytes()
    mode = file.stat().st_mode
    middle = len(before) // 2
    file.write_bytes(before[:middle] + b"\0damaged\0" + before[middle + 9 :])
    file.chmod(mode)
    return before


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


def refused(rig: Rig, *words: str) -> str:
    """Run a command that is to fail; return what it says."""
    done = subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, env=rig.env, timeout=120
    )
    assert done.returncode
    return done.stdout + done.stderr


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
    assert list(database.parent.glob("state.db.damaged-*"))
    assert "superlink-state-damaged" in (rig.federation / "audit.jsonl").read_text()


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
