"""What tests of bad machines do to them, and what they look at afterwards."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.killing import accounts, undisturbed
from tests.faults.rig import COMMAND, Rig
from tests.runs import table_text, write_table

SITES = ("east", "north", "south")
ROUND_S = 60.0


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


def records(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    return {name: write_table(folder / f"{name}.csv", seed=i) for i, name in enumerate(SITES)}


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


def damage(file: Path) -> bytes:
    """Overwrite the middle of a file; return what it was."""
    before = file.read_bytes()
    mode = file.stat().st_mode
    middle = len(before) // 2
    file.write_bytes(before[:middle] + b"\0damaged\0" + before[middle + 9 :])
    file.chmod(mode)
    return before


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


def refused(rig: Rig, *words: str) -> str:
    """Run a command that is to fail; return what it says."""
    done = subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, env=rig.env, timeout=120
    )
    assert done.returncode
    return done.stdout + done.stderr
