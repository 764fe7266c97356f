"""Kills in a row within one run, and what has become of it afterwards.

    storm      a run, and kills at random steps of STEPS, one after the other
    strike     one kill; what it ended is started again at once, as systemd does; wait until the
               run has merged another round, or is over

What is counted is the outcome: how long each recovery took, and which deltas of the run were lost
or counted twice. The final adapter is compared with that of the same run where nothing was killed,
which needs no federation: a run depends on its seed, records and sites alone (`undisturbed`).
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anabranch.client.app import app as site_app
from anabranch.server.app import coordinate
from anabranch.simulations.grid import InProcessGrid
from tests.faults.rig import Rig
from tests.runs import write_site

REACHED_S, RECOVERED_S = 240.0, 180.0  # to come to a step; to go on after a kill
OVER = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class Kill:
    """One kill: of whom, and when.

    who     run, superlink, door, page: a child of the coordinator. supervisor: the process over
            them. coordinator: all of these. site: one of them. sites: all. everything
    at      a label of hooks/sitecustomize.py, for the roles that it knows; or "event KIND": when
            the run says so; or "now"
    step    the so-manyth step of that label
    anew    the step is one of a new process: kill the one that is there first
    alone   wait until the run has gone on before the next kill
    """

    who: str
    at: str = "now"
    step: int = 1
    anew: bool = False
    alone: bool = True

    def __str__(self) -> str:
        return f"{self.who}, {self.at}" + (f" ({self.step})" if self.step > 1 else "")


@dataclass(frozen=True)
class Storm:
    """What came of kills in a row; `recoveries_s` in seconds, `lost` and `doubled` in deltas."""

    kills: int
    recoveries_s: tuple[float, ...]
    lost: int
    doubled: int
    equal: bool  # to the adapter of the undisturbed run, bit for bit


RUN = (
    Kill("run", "called SuperLinkGrid.begin", anew=True),
    Kill("run", "call Mailbox.send"),
    Kill("run", "called Mailbox.send"),
    Kill("run", "call Exchange._take"),
    Kill("run", "called Exchange._take", 2),
    Kill("run", "fsync *progress/*merged*"),
    Kill("run", "rename *merged.progress"),
    Kill("run", "renamed *merged.progress"),
    Kill("run", "rename *checkpoints/*"),
    Kill("run", "renamed *checkpoints/*"),
    Kill("run", "fsync *events.jsonl"),
    Kill("run", "fsynced *events.jsonl", 3),
    Kill("run", "rename *evaluated.progress"),
    Kill("run", "renamed *evaluated.progress"),
)
END = (
    Kill("run", "rename *report.html", alone=False),
    Kill("run", "rename *summary.json", alone=False),
    Kill("run", "renamed *summary.json"),
)
SITE = (
    Kill("site", "call Fleet._pull"),
    Kill("site", "called Fleet.fetch"),
    Kill("site", "call Told.train"),
    Kill("site", "rename *.begun"),
    Kill("site", "renamed *.begun"),
    Kill("site", "call Steps.after"),
    Kill("site", "called Steps.after", 5),
    Kill("site", "rename *answers/*"),
    Kill("site", "fsync *answers/*", 3),
    Kill("site", "rename *report.json"),
    Kill("site", "renamed *report.json"),
    Kill("site", "fsync *audit.jsonl"),
    Kill("site", "fsynced *audit.jsonl"),
    Kill("site", "rename *usage/*"),
    Kill("site", "call Fleet._announce"),
    Kill("site", "call Fleet._push", 2),
    Kill("site", "called Fleet._push", 3),
)
OTHERS = (
    Kill("superlink", "event round_started"),
    Kill("door", "event round_started"),
    Kill("superlink", "event site_trained"),
    Kill("supervisor", "event round_aggregated"),
    Kill("superlink", "event round_aggregated"),
    Kill("coordinator", "event round_started"),
    Kill("page"),
    Kill("sites", "event site_trained"),
    Kill("door", "event site_trained"),
    Kill("coordinator", "event site_trained"),
    Kill("everything", "event round_started"),
    Kill("everything", "event round_aggregated"),
)
STEPS = (*RUN, *SITE, *OTHERS)


def storm(
    rig: Rig, run: str, kills: int | Sequence[Kill], seed: int, undisturbed: bytes = b""
) -> Storm:
    """Kill at random steps, or at those of a list in turn, while `run` runs, and wait for its end.

    Ends earlier if the run does. AssertionError if a step is not reached, or a run does not go on.
    """
    rng = random.Random(seed)
    plan = [rng.choice(STEPS) for _ in range(kills)] if isinstance(kills, int) else kills
    recoveries: list[float] = []
    for kill in plan:
        taken = strike(rig, run, kill, rng)
        if taken is None:
            break
        recoveries.append(taken)
    entry = rig.over(run, 4 * RECOVERED_S)
    assert entry.state == "finished", f"{entry.state}: {entry.detail}\n{rig.tails()}"
    lost, doubled = accounts(rig, run)
    return Storm(
        kills=len(recoveries),
        recoveries_s=tuple(recoveries),
        lost=lost,
        doubled=doubled,
        equal=rig.adapter(run) == undisturbed,
    )


def strike(rig: Rig, run: str, kill: Kill, rng: random.Random) -> float | None:
    """Kill once; return the seconds from the restart until another round was merged, or the end.

    None if the run is over before that step comes; 0.0 if that is not waited for.
    """
    sites = _ended(rig, run, kill, rng)
    if sites is None:
        return None
    before, began = rig.merged(run), time.monotonic()
    for name in sites:
        rig.agents[name].wait()
        rig.start(name)
    if not rig.coordinator.alive:
        rig.coordinator.start()
    if not kill.alone:
        return 0.0
    rig.until(
        lambda: rig.merged(run) > before or rig.run(run).state in OVER, RECOVERED_S, why=str(kill)
    )
    return time.monotonic() - began


def _ended(rig: Rig, run: str, kill: Kill, rng: random.Random) -> list[str] | None:
    """Kill, and return the sites that are to be started again; None: the run was over before."""
    over = False

    def until(reached: object) -> bool:
        def done() -> bool:
            nonlocal over
            if reached():  # type: ignore[operator]
                return True
            over = rig.run(run).state in OVER
            return over

        rig.until(done, REACHED_S, every_s=0.02, why=f"never came to: {kill}")
        return not over

    site = rng.choice(list(rig.sites))
    if not kill.at.startswith(("event ", "now")):
        role = f"site-{site}" if kill.who == "site" else kill.who
        plan = rig.kill_at(role, kill.step, kill.at)
        if kill.anew:
            rig.kill_child(kill.who)
        if not until(lambda: not plan.exists()):
            plan.unlink(missing_ok=True)
            return None
        return [site] if kill.who == "site" else []
    if kill.at != "now":
        kind, seen = kill.at.removeprefix("event "), len(rig.events(run))
        if not until(lambda: kind in [one["kind"] for one in rig.events(run)[seen:]]):
            return None
    if kill.who in ("superlink", "door", "page", "run"):
        rig.until(lambda: rig.kill_child(kill.who), REACHED_S)
        return []
    if kill.who == "supervisor":
        rig.coordinator.kill()
        return []
    if kill.who in ("coordinator", "everything"):
        rig.kill_coordinator()
    struck = {"site": [site], "coordinator": []}.get(kill.who, list(rig.sites))
    for name in struck:
        rig.agents[name].kill(signal.SIGKILL)
    return struck


def accounts(rig: Rig, run: str) -> tuple[int, int]:
    """Return how many deltas of a finished run were lost, and how many counted more than once.

    Every site is to be in every round, once. A merge may be announced again by the process that
    goes on after it, if it is the same one.
    """
    summary = json.loads((rig.federation / "runs" / run / "summary.json").read_text())
    counted = {name: int(row["rounds"]) for name, row in summary["sites"].items()}
    wanted = {name: int(summary["rounds"]) for name in rig.sites}
    lost = sum(max(0, wanted[name] - counted.get(name, 0)) for name in wanted)
    doubled = sum(max(0, count - wanted.get(name, 0)) for name, count in counted.items())
    merges: dict[int, set[str]] = {}
    for one in rig.events(run):
        if one["kind"] == "round_aggregated":
            facts = {key: one[key] for key in ("sites", "num_examples", "update_norm")}
            merges.setdefault(one["round"], set()).add(json.dumps(facts, sort_keys=True))
            lost += len(set(wanted) - set(one["sites"]))
    lost += sum(len(wanted) for number in range(1, summary["rounds"] + 1) if number not in merges)
    doubled += sum(len(wanted) * (len(said) - 1) for said in merges.values())
    return lost, doubled


def undisturbed(folder: Path, toml: str, records: Mapping[str, Path]) -> bytes:
    """Return the final adapter of a run in this process, of sites that never ran before."""
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(toml)
    sites = [str(write_site(folder / name, name, records[name])) for name in sorted(records)]
    with InProcessGrid(site_app, sites) as grid:
        coordinate(grid, folder / "run.toml", folder / "out", poll_s=0.001)
    return sorted((folder / "out" / "checkpoints").glob("*.adapter"))[-1].read_bytes()
