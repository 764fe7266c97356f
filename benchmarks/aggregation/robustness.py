"""Two of ten clients lie: what robust rules keep of the accuracy, and what the plain mean loses.

    flip        the attackers send −1 times their delta
    flip-10     −10 times
    scale-10    10 times

Clean is the plain mean without attackers. One-factor deltas of AltQR (the product's [robust]
combine), equal ranks; the learning rate is the plain mean's, found without attackers. Each loss
is paired: same seed, same partition, same clients.

    robust.within_3_points    robust rules whose mean loss is at most 3 points under every attack
    robust.mean_loss_points   loss of the plain mean under the worst attack
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from anabranch.protocols.adapter import Delta
from anabranch.protocols.tables import Robust, Uplink
from benchmarks.aggregation.federation import ROUNDS, Cell, Outcome, Tamper
from benchmarks.aggregation.grid import PLAIN, SEEDS, Job, Variant
from benchmarks.harness import Figure

ATTACKERS = (0, 1)  # of ten clients
FACTORS = {"flip": -1.0, "flip-10": -10.0, "scale-10": 10.0}
RULES: Mapping[str, Robust] = {
    "norm-clipping": Robust(rule="norm-clipping"),
    "median": Robust(rule="median"),
    "trimmed-mean": Robust(rule="trimmed-mean", trim=0.2),
    "krum": Robust(rule="krum", byzantine=len(ATTACKERS)),
    "multi-krum": Robust(rule="multi-krum", byzantine=len(ATTACKERS)),
    "geometric-median": Robust(rule="geometric-median"),
    "centred-clipping": Robust(rule="centred-clipping"),
}
NEAR = 3.0  # points
PARTITIONS = ("iid", "dirichlet-0.5")
METHOD = "altqr"
CODEC_PARTITIONS = ("iid", "dirichlet-0.5", "dirichlet-0.1")


def cell(partition: str, seed: int) -> Cell:
    """Return the federation that is attacked."""
    return Cell(
        dataset="medquad",
        head="fixed",
        clients=10,
        partition=partition,
        epsilon=0.0,
        ranks="equal",
        rule=METHOD,
        seed=seed,
    )


def jobs() -> list[Job]:
    """Return the clean runs, every rule under every attack, and the runs with int8 deltas."""
    found = []
    for partition in CODEC_PARTITIONS:
        for seed in SEEDS:
            found += [Job(cell(partition, seed)), Job(cell(partition, seed), Variant(codec="int8"))]
    for partition in PARTITIONS:
        for seed in SEEDS:
            at = cell(partition, seed)
            for robust in ("mean", *RULES):
                found += [Job(at, Variant(robust=robust, attack=attack)) for attack in FACTORS]
    return found


def options(variant: Variant) -> dict[str, Any]:
    """Return the arguments of `federate` that make a variant."""
    if variant == PLAIN:
        return {}
    return {
        "robust": RULES.get(variant.robust),
        "uplink": Uplink(codec=variant.codec),  # type: ignore[arg-type]
        "rounds": {"half": ROUNDS // 2, "all": ROUNDS, "double": 2 * ROUNDS}[variant.rounds],
        "tamper": attack(FACTORS.get(variant.attack, 1.0)),
    }


def attack(factor: float) -> Tamper:
    """Return what the attackers do to their deltas: multiply them."""

    def tamper(client: int, delta: Delta) -> Delta:
        return delta.times(factor) if client in ATTACKERS else delta

    return tamper


def losses(results: Mapping[Job, Outcome], partition: str, robust: str, name: str) -> list[float]:
    """Return clean accuracy minus accuracy under an attack, in points, of the seeds that ran."""
    found = []
    for seed in SEEDS:
        at = cell(partition, seed)
        clean = results.get(Job(at))
        hit = results.get(Job(at, Variant(robust=robust, attack=name)))
        if clean is not None and hit is not None:
            found.append(100 * (clean.accuracy - hit.accuracy))
    return found


def figures(results: Mapping[Job, Outcome], partition: str = "iid") -> list[Figure]:
    """Return the two robustness figures of one partition; none if nothing was run."""
    worst: dict[str, float] = {}
    for robust in ("mean", *RULES):
        found = [losses(results, partition, robust, name) for name in FACTORS]
        if all(found):
            worst[robust] = max(statistics.mean(points) for points in found)
    if "mean" not in worst:
        return []
    near = sorted(name for name, loss in worst.items() if name != "mean" and loss <= NEAR)
    flips = losses(results, partition, "mean", "flip-10")
    note = f"MedQuAD, {partition}, AltQR, 2 of 10 clients, worst of {', '.join(FACTORS)}"
    return [
        Figure(
            figure="robust.within_3_points",
            value=len(near),
            unit="rules",
            target=">= 2",
            note=f"{note}: {', '.join(near) or 'none'}",
        ),
        Figure(
            figure="robust.mean_loss_points",
            value=worst["mean"],
            unit="points",
            spread=(min(flips), max(flips)),
            note=f"the plain mean; {note}; spread: seeds under flip-10",
        ),
    ]


def codec_losses(results: Mapping[Job, Outcome]) -> list[float]:
    """Return the paired accuracy losses of int8 deltas against fp32, in points."""
    found = []
    for partition in CODEC_PARTITIONS:
        for seed in SEEDS:
            plain = results.get(Job(cell(partition, seed)))
            int8 = results.get(Job(cell(partition, seed), Variant(codec="int8")))
            if plain is not None and int8 is not None:
                found.append(100 * (plain.accuracy - int8.accuracy))
    return found


def table(results: Mapping[Job, Outcome], partition: str) -> str:
    """Return mean loss in points per rule and attack as Markdown."""
    lines = [
        "| rule | " + " | ".join(FACTORS) + " |",
        "|---|" + "---|" * len(FACTORS),
    ]
    for robust in ("mean", *RULES):
        cells = []
        for name in FACTORS:
            points = losses(results, partition, robust, name)
            text = "not run"
            if points:
                mark = "**" if statistics.mean(points) <= NEAR else ""
                text = f"{mark}{statistics.mean(points):.1f}{mark}"
                if len(points) > 1:
                    text += f" ± {statistics.stdev(points):.1f}"
            cells.append(text)
        lines.append(f"| {'plain mean' if robust == 'mean' else robust} | {' | '.join(cells)} |")
    return "\n".join(lines)
