"""What a round costs beside training, and how long it takes until there is a first one."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.harness import Figure, ratio
from benchmarks.simulation.comparison import FLOWER
from benchmarks.simulation.memory import MIB, Peak
from benchmarks.simulation.peer import Job
from benchmarks.simulation.processes import Engine

NAME = "orchestration"


def figures(clients: int, rounds: int) -> list[Figure]:
    """Return orchestration.speedup_flower and .memory_ratio_flower.

    The first round is dropped. Memory is looked at in the last one, which is not timed: looking
    costs time.
    """
    peaks: dict[str, int] = {}
    job: dict[str, Any] = {"workload": NAME, "rounds": rounds, "clients": clients, "workers": 2}
    jobs = {"ours": Job(**job), "flower": Job(**job, engine="ray")}
    engines = {name: Engine("worker_orchestration.py", [one]) for name, one in jobs.items()}
    with engines["ours"], engines["flower"]:
        for _ in range(rounds - 1):
            for engine in engines.values():
                engine.round(NAME)
        seconds = {name: engine.laps[NAME].seconds[1:] for name, engine in engines.items()}
        for name, engine in engines.items():
            with Peak(engine.pid) as peak:
                engine.round(NAME)
            peaks[name] = peak.bytes
    value, spread = ratio(seconds["flower"], seconds["ours"])
    median = {name: statistics.median(found) for name, found in seconds.items()}
    return [
        Figure(
            figure="orchestration.speedup_flower",
            value=value,
            unit="ratio",
            target=">= 20",
            spread=spread,
            peer=FLOWER,
            note=f"{median['flower']:.3g} / {median['ours']:.3g} s per round of {clients:,} "
            f"clients, 100 KB each way; {rounds - 2} rounds",
        ),
        Figure(
            figure="orchestration.memory_ratio_flower",
            value=peaks["ours"] / peaks["flower"],
            unit="ratio",
            target="<= 0.333",
            peer=FLOWER,
            note=f"peak {peaks['ours'] / MIB:.0f} / {peaks['flower'] / MIB:.0f} MiB",
        ),
    ]


def startup(plan: str, repeats: int, clients: int) -> Figure:
    """Return startup.ratio_flower: from the start of the process to the end of the first round."""
    job: dict[str, Any] = {"workload": "mlp", "rounds": 1, "plan": plan, "clients": clients}
    seconds: dict[str, list[float]] = {"ours": [], "flower": []}
    for _ in range(repeats):
        for name, script, workers in (
            ("ours", "worker_ours.py", 1),
            ("flower", "worker_flower.py", 2),
        ):
            with Engine(script, [Job(**job, workers=workers)]) as engine:
                engine.round("mlp")
                seconds[name].append(time.perf_counter() - engine.started)
    value, spread = ratio(seconds["ours"], seconds["flower"])
    median = {name: statistics.median(found) for name, found in seconds.items()}
    return Figure(
        figure="startup.ratio_flower",
        value=value,
        unit="ratio",
        target="<= 0.2",
        spread=spread,
        peer=FLOWER,
        note=f"{median['ours']:.3g} / {median['flower']:.3g} s from nothing to one round, mlp",
    )


def two_nodes(rounds: int) -> Figure:
    """Return ray_two_nodes.speedup: two actors on two nodes over one, work that fills a core."""
    name = "full_depth"
    engines = {
        actors: Engine(
            "worker_ours.py",
            [Job(workload=name, rounds=rounds, engine="ray", nodes=2, workers=actors,
                 loss_round=rounds)],
        )
        for actors in (1, 2)
    }  # fmt: skip
    with engines[1], engines[2]:
        for _ in range(rounds):
            for engine in engines.values():
                engine.round(name)
        laps = {actors: engine.laps[name] for actors, engine in engines.items()}
    value, spread = ratio(laps[1].seconds[1:], laps[2].seconds[1:])
    losses = [found.loss for found in laps.values()]
    return Figure(
        figure="ray_two_nodes.speedup",
        value=value,
        unit="ratio",
        target=">= 1.5",
        spread=spread,
        peer="one actor on the same cluster",
        note=f"full_depth, two local nodes of one core; losses {losses[0]:.6f} and {losses[1]:.6f}",
    )
