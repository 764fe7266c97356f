"""All engines on the same rounds, in turn: who takes part in it, and the figures that follow.

    variant         processes x threads     what it is
    plain           1 x 1                   worker_plain.py
    pfl             1 x 1                   pfl, as it runs without further settings, on one core
    pfl_ranks       2 x 1                   the same, two torch.distributed workers (gloo)
    pfl_threads     1 x 2                   the same, torch's own threads
    flower          2 actors x 1            Flower's Simulation Runtime, beside its own processes
    flower_one      1 actor x 1
    ours            1 x 1                   the product's cohort engine
    ours_two        2 workers x 1
    ours_alone      1 x 1                   one client after another: the prefix cache alone
    ours_bf16       1 x 1                   ours, frozen products in bfloat16; ours_bf16_two alike
    pfl_last        1 x 1                   pfl with the product's memory layout (cnn)
    pfl_fixed       1 x 1                   pfl with texts padded to 32 tokens (minilm)

A ratio is the median over turns; "two cores" takes the faster variant of either side.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, ratio
from benchmarks.simulation import plan
from benchmarks.simulation.peer import Job
from benchmarks.simulation.processes import Engine, Laps, peers_python
from benchmarks.simulation.workloads import WORKLOADS

FLOWER = f"flwr {metadata.version('flwr')}, ray {metadata.version('ray')}"
PFL = "pfl 0.6.0"
PLAIN = "a plain torch loop"
LOSS = 1e-3
TARGETS: Mapping[str, str] = {
    "mlp.speedup_pfl": ">= 7",
    "mlp.speedup_flower": ">= 20",
    "mlp.speedup_pfl_100": ">= 10",
    "mlp.speedup_flower_100": ">= 35",
    "cnn.speedup_pfl": ">= 1.2",
    "cnn.speedup_flower": ">= 3",
    "small.speedup_pfl": ">= 3",
    "small.speedup_flower": ">= 4",
    "minilm.speedup_pfl": ">= 1.8",
    "minilm.speedup_pfl_packed": ">= 2.5",
    "minilm.speedup_flower": ">= 2",
    "minilm.speedup_flower_bf16": ">= 2.8",
    "minilm.speedup_bf16": ">= 1.4",
    "full_depth.speedup_pfl": ">= 1",
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """The rounds of a workload: `warm` of them are not counted."""

    workload: str
    warm: int
    turns: int
    variants: tuple[str, ...]
    clients: int = 0  # 0: the workload's
    burst: int = 1  # rounds in a row: more where they last milliseconds, as in any run

    @property
    def rounds(self) -> int:
        """Return all rounds."""
        return self.warm + self.turns


def measure(works: Sequence[Work], folder: Path) -> dict[str, dict[str, Laps]]:
    """Return workload -> variant -> laps.

    An engine is one process (or group) for all its workloads, so that it starts once. Flower has as
    many nodes as the largest has clients.
    """
    for work in works:
        workload = replace(
            WORKLOADS[work.workload],
            clients=work.clients or WORKLOADS[work.workload].clients,
        )
        plan.write(_plan(work, folder), workload, work.rounds)
    names = dict.fromkeys(name for work in works for name in work.variants)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                _engine(name, [w for w in works if name in w.variants], folder)
            )
            for name in names
        }
        found = {}
        for work in works:
            taking = {name: engines[name] for name in work.variants}
            for at in range(0, work.rounds, work.burst):
                for engine in taking.values():
                    for _ in range(min(work.burst, work.rounds - at)):
                        engine.round(work.workload)
            found[work.workload] = {n: e.laps[work.workload] for n, e in taking.items()}
    return found


def _plan(work: Work, folder: Path) -> Path:
    return folder / f"{work.workload}.json"


def _engine(name: str, works: Sequence[Work], folder: Path) -> Engine:
    special: dict[str, dict[str, Any]] = {
        "pfl_threads": {"threads": 2},
        "flower": {"workers": 2},
        "ours_two": {"workers": 2},
        "ours_bf16": {"base_dtype": "bf16"},
        "ours_bf16_two": {"base_dtype": "bf16", "workers": 2},
        "ours_alone": {"engine": "alone"},
        "pfl_last": {"layout": "last"},
        "pfl_fixed": {"padding": "fixed"},
    }
    settings = special.get(name, {})
    jobs = [
        Job(
            workload=work.workload,
            rounds=work.rounds,
            loss_round=work.rounds if work.workload != "cnn" else min(3, work.rounds),
            clients=work.clients,
            plan=str(_plan(work, folder)),
            **settings,
        )
        for work in works
    ]
    kind = name.partition("_")[0]
    python = peers_python() if kind in ("plain", "pfl") else None
    ranks = 2 if name == "pfl_ranks" else 1
    return Engine(f"worker_{kind}.py", jobs, python=python, ranks=ranks)


def figures(work: Work, laps: Mapping[str, Laps]) -> list[Figure]:
    """Return the speed-ups of one workload."""
    seconds = {name: one.seconds[work.warm :] for name, one in laps.items()}
    median = {name: statistics.median(found) for name, found in seconds.items()}
    faster = {
        kind: min((n for n in median if n in names), key=lambda n: median[n], default=None)
        for kind, names in (
            ("ours", ("ours", "ours_two")),
            ("bf16", ("ours_bf16", "ours_bf16_two")),
            ("pfl", ("pfl", "pfl_ranks", "pfl_threads")),
        )
    }
    rows: list[tuple[str, str | None, str | None, str]] = [
        ("speedup_pfl", "pfl", "ours_alone" if "ours_alone" in laps else "ours", PFL),
        ("speedup_flower", "flower", faster["ours"], FLOWER),
        ("speedup_flower_bf16", "flower", faster["bf16"], FLOWER),
        ("speedup_bf16", "ours", "ours_bf16", "the same in float32"),
        ("speedup_flower_one_actor", "flower_one", "ours", FLOWER),
        ("speedup_plain", "plain", "ours", PLAIN),
        ("speedup_pfl_layout", "pfl_last", "ours", PFL),
        ("speedup_pfl_fixed", "pfl_fixed", "ours", f"{PFL}, texts padded to 32 tokens"),
    ]
    if "ours_alone" in laps:
        rows.append(("speedup_pfl_packed", "pfl", "ours", PFL))
    if faster["pfl"] != "pfl" or "pfl_ranks" in laps:
        rows.append(("speedup_pfl_two_cores", faster["pfl"], faster["ours"], PFL))
    base, _, suffix = work.workload.partition("_100")
    suffix = "_100" if work.workload.endswith("_100") else suffix
    return [
        _speedup(f"{base}.{title}{suffix}", over, under, peer, seconds, laps, work)
        for title, over, under, peer in rows
        if over in seconds and under in seconds
    ]


def _speedup(
    title: str,
    over: str,
    under: str,
    peer: str,
    seconds: Mapping[str, list[float]],
    laps: Mapping[str, Laps],
    work: Work,
) -> Figure:
    value, spread = ratio(seconds[over], seconds[under])

    def said(name: str) -> str:
        wall = 1e3 * statistics.median(seconds[name])
        cpu = 1e3 * statistics.median(laps[name].cpu[work.warm :])
        return f"{name} {wall:.4g} ms ({cpu:.4g} CPU)"

    return Figure(
        figure=title,
        value=value,
        unit="ratio",
        target=TARGETS.get(title),
        spread=spread,
        peer=peer,
        note=f"a round: {said(over)}, {said(under)}; rounds {work.warm + 1} to {work.rounds}",
    )


def losses(found: Mapping[str, Mapping[str, Laps]]) -> Figure:
    """Return losses.max_difference over the engines of each workload, bfloat16 left out."""
    spans = {}
    for workload, laps in found.items():
        known = [one.loss for n, one in laps.items() if one.loss is not None and "bf16" not in n]
        spans[workload] = (max(known) - min(known), known[0])
    return Figure(
        figure="losses.max_difference",
        value=max(span for span, _ in spans.values()),
        unit="nats",
        target=f"<= {LOSS:g}",
        peer="all engines",
        note="loss after the last round (cnn: the third): "
        + ", ".join(f"{name} {loss:.4f} ± {span:.1g}" for name, (span, loss) in spans.items()),
    )
