"""Federations as their users run them: joining, the network path, survival, intruders, a soak.

    join.*              one site's way in, over network namespaces (joining.py)
    round.overhead_*    seconds of a round beside training, over loopback (overhead.py)
    recovery.*, kills, updates_*, soak.*    SIGKILL at random steps (survival.py)
    intruders_*         the security suite (intruders.py)

Everything is a process of the command line: a coordinator with its supervisor, SuperLink, door,
page and run, and four sites with keys of their own. --quick joins over loopback, makes one
federation for everything, and leaves out the clinical-coding task and the peer.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from anabranch.storage.dumps import DUMPABLE
from benchmarks.harness import Figure, header, options, report
from benchmarks.network import intruders, joining, overhead, survival
from benchmarks.network.federation import federation, scratch
from benchmarks.network.tasks import Task, coding, heart, heart_records
from tests.faults.killing import Storm
from tests.faults.rig import Rig

SEED, THREADS = 0, 1
PACKAGES = ("flwr", "torch", "httpx", "uvicorn", "cryptography")
STOCK = "stock SuperLink and SuperNodes, flwr"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much work."""

    wide_rounds: dict[str, int]  # size -> rounds
    peer_rounds: dict[str, int]
    kills: int
    storm_rounds: int
    soak_rounds: int


FULL = Plan(
    wide_rounds={"1mb": 11, "15mb": 8},
    peer_rounds={"1mb": 4, "15mb": 3},
    kills=90,
    storm_rounds=70,
    soak_rounds=100,
)
QUICK = Plan(
    wide_rounds={"1mb": 6, "15mb": 4}, peer_rounds={}, kills=0, storm_rounds=0, soak_rounds=15
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and report."""
    chosen = options(__doc__, argv)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ[DUMPABLE] = "1"  # else only root may count a site's open files (survival.py)
    with scratch() as folder:
        found = _quick(folder, QUICK) if chosen.quick else _full(folder, FULL)
    head = header("network", packages=PACKAGES, threads=THREADS, seed=SEED, quick=chosen.quick)
    report(head, found, chosen.json)


def _full(folder: Path, plan: Plan) -> list[Figure]:
    records = heart_records(folder / "records")
    with joining.own_machines() as network:
        task = Task(name="heart", records=records, toml=heart(15))
        joins = joining.measure(folder / "heart", task, network)
        where = "loopback" if network is None else "network namespaces"
    with joining.own_machines() as network:
        task = coding(folder / "coding-records", 3)
        joins += joining.measure(folder / "coding", task, network)
    note = f"slowest of {len(joins)} joins over {where}: Fed-Heart-Disease and clinical coding"
    found = joined(joins, note)
    with federation(folder / "one", records) as rig:
        for size, rounds in plan.wide_rounds.items():
            peer = overhead.flowers(folder / f"stock-{size}", records, size, plan.peer_rounds[size])
            found.append(cost(size, overhead.ours(rig, size, rounds), peer))
        storms = survival.storms(
            rig, records, folder / "storm", plan.kills, plan.storm_rounds, SEED
        )
    with federation(folder / "two", records) as rig:
        soak = survival.soak(rig, records, folder / "soak", plan.soak_rounds, SEED)
    counted = intruders.measure(folder / "intruders", quick=False)
    return [*found, *survived([*storms, soak.storm]), *held_out(counted), *flat(soak)]


def _quick(folder: Path, plan: Plan) -> list[Figure]:
    records = heart_records(folder / "records")
    rig = Rig(folder / "one", sorted(records))
    try:
        rig.serve()
        joins = []
        for name in sorted(records):
            joins.append(joining.joined(rig, name, records[name]))
            rig.allow(name)
            rig.start(name)
        found = joined(joins, f"slowest of {len(joins)} joins over loopback: Fed-Heart-Disease")
        for size, rounds in plan.wide_rounds.items():
            found.append(cost(size, overhead.ours(rig, size, rounds), []))
        soak = survival.soak(rig, records, folder / "soak", plan.soak_rounds, SEED)
    finally:
        rig.close()
    counted = intruders.measure(folder / "intruders", quick=True)
    return [*found, *survived([soak.storm]), *held_out(counted), *flat(soak)]


def joined(joins: Sequence[joining.Join], note: str) -> list[Figure]:
    """Return the figures of joining: the most that any site took."""
    seconds = [one.seconds for one in joins]

    def most(name: str, value: int, unit: str, target: str, note: str) -> Figure:
        return Figure(figure=name, value=value, unit=unit, target=target, note=note)

    return [
        Figure(
            figure="join.seconds",
            value=max(seconds),
            unit="s",
            target="<= 60",
            spread=(min(seconds), max(seconds)),
            note=f"{note}; from the command to ready, with Python's own start",
        ),
        most(
            "join.commands", max(one.commands for one in joins), "", "<= 1", "typed at the site"
        ),
        most("join.strings", max(one.strings for one in joins), "", "<= 1", "the invitation"),
        most(
            "join.transfers", max(one.transfers for one in joins), "", "<= 0", "files moved by hand"
        ),
        most(
            "join.questions", max(one.questions for one in joins), "", "<= 0",
            "the command has no terminal: one would end it",
        ),
    ]  # fmt: skip


def cost(size: str, seconds: Sequence[float], peer: Sequence[float]) -> Figure:
    """Return the figure of the overhead at one size."""
    stock = f"{statistics.median(peer):.1f} s over {len(peer)} rounds, {STOCK}" if peer else None
    return Figure(
        figure=f"round.overhead_seconds_{size}",
        value=statistics.median(seconds),
        unit="s",
        target={"1mb": "<= 1.5", "15mb": "<= 5"}[size],
        spread=(min(seconds), max(seconds)),
        peer=stock,
        note=f"4 sites over loopback, median of {len(seconds)} rounds after the first",
    )


def survived(storms: Sequence[Storm]) -> list[Figure]:
    """Return the figures of all kills."""
    recoveries = [seconds for one in storms for seconds in one.recoveries_s]
    different = sum(not one.equal for one in storms)
    median = statistics.median(recoveries)
    return [
        Figure(
            figure="recovery.seconds_max",
            value=max(recoveries),
            unit="s",
            target="<= 30",
            spread=(min(recoveries), max(recoveries)),
            note=f"until a further round was merged; median {median:.1f} s",
        ),
        Figure(figure="kills", value=len(recoveries), unit="", target=">= 100",
               note=f"SIGKILL at random steps, in {len(storms)} runs"),
        Figure(figure="updates_lost", value=sum(one.lost for one in storms), unit="",
               target="<= 0"),
        Figure(figure="updates_double", value=sum(one.doubled for one in storms), unit="",
               target="<= 0"),
        Figure(figure="adapters_different", value=different, unit="", target="<= 0",
               note="runs whose last adapter is not that of an undisturbed run, bit for bit"),
    ]  # fmt: skip


def held_out(counted: intruders.Counted) -> list[Figure]:
    """Return the figures of the security suite."""
    return [
        Figure(figure="intruders_tried", value=counted.tried, unit="",
               note=f"cases of {intruders.SUITE}"),
        Figure(figure="intruders_in", value=counted.inside, unit="", target="<= 0"),
    ]  # fmt: skip


def flat(soak: survival.Soak) -> list[Figure]:
    """Return the figures of the soak."""
    note = (
        f"{soak.rounds} rounds, {soak.storm.kills} kills; last quarter / second quarter, all "
        "processes of coordinator and sites"
    )
    last = soak.samples[-1]
    return [
        Figure(figure="soak.memory_growth_ratio", value=soak.growth(lambda one: one.memory),
               unit="ratio", target="<= 1.1",
               note=f"{note}; {last.memory / 1e6:.0f} MB at the end"),
        Figure(figure="soak.files_growth", value=soak.growth(lambda one: one.files),
               unit="ratio", target="<= 1.1", note=f"{note}; {last.files} open at the end"),
        Figure(figure="soak.disk_growth_ratio", value=soak.growth(lambda one: one.disk),
               unit="ratio",
               note=f"{note}; {last.disk / 1e6:.1f} MB at the end, checkpoints and logs of all "
               "rounds among them"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
