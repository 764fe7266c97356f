"""Which aggregation rule, in which situation: SST-2 and MedQuAD on MiniLM, rules side by side.

    run.py                    run what is missing of the grid for --minutes, then all figures
    run.py --tables           tables, plots and figures from the files alone; nothing is trained
    run.py --quick            MedQuAD cut down, one seed, few rounds: same figures, no meaning

What is compared and how: docs/benchmarks/aggregation.md. Figures:

    exactness.*     exactness.py       merge.*    merge.py       mixed_ranks.*, uplink.*  gains.py
    robust.*        robustness.py
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere
os.environ["OMP_NUM_THREADS"] = "1"  # two workers: more threads would wait for each other
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch

from benchmarks.aggregation import data, exactness, gains, merge, plots, robustness, runner, tables
from benchmarks.aggregation.federation import Outcome, Prepared, config_for, federate, prepare
from benchmarks.aggregation.grid import SEEDS, Job, Variant, equalised, first, plan
from benchmarks.harness import ROOT, Figure, header, report, write_between_markers

PACKAGES = ("torch", "opacus", "transformers", "numpy")
PAGE = ROOT / "docs" / "benchmarks" / "aggregation.md"
IMAGES = ROOT / "docs" / "images"
WORKERS = 2
LABELS = 15  # question types of MedQuAD
QUICK_RECORDS, QUICK_ROUNDS, QUICK_RATE = 400, 6, 1e-2


def figures(results: dict[Job, Outcome], quick: bool, partition: str = "iid") -> list[Figure]:
    """Return every figure that the results allow, and those that need none."""
    labels = tuple(f"type {i}" for i in range(LABELS))
    config = config_for(robustness.cell("iid", SEEDS[0]), labels, rate=1e-2)
    return [
        *exactness.figures(quick),
        *merge.figures(quick),
        *gains.mixed_ranks(results),
        *gains.uplink(config),
        *gains.int8_loss(robustness.codec_losses(results)),
        *robustness.figures(results, partition),
    ]


def queue() -> list[Job]:
    """Return everything that is to be run, the most telling first."""
    jobs = [*map(Job, first()), *robustness.jobs(), *equalised(), *map(Job, plan())]
    return list(dict.fromkeys(jobs))


def quick_results(cache: Path) -> dict[Job, Outcome]:
    """Return the federations that the figures need, on a few hundred answers."""
    corpus = data.shortened(data.load("medquad"), QUICK_RECORDS)
    prepared = prepare(corpus, cache)
    seed = SEEDS[0]
    mixed = dataclasses.replace(robustness.cell("dirichlet-0.5", seed), ranks="mixed")
    compared = ("fedavg", "fedavg-skip", "altqr", "flexlora")
    jobs = [Job(dataclasses.replace(mixed, rule=rule)) for rule in compared]
    at = robustness.cell("iid", seed)
    jobs += [Job(at), Job(at, Variant(codec="int8"))]
    jobs += [
        Job(at, Variant(robust=robust, attack=attack))
        for robust, attack in itertools.product(("mean", *robustness.RULES), robustness.FACTORS)
    ]
    return {job: _quick(prepared, job) for job in jobs}


def _quick(prepared: Prepared, job: Job) -> Outcome:
    options = {**robustness.options(job.variant), "rounds": QUICK_ROUNDS}
    return federate(prepared, job.cell, QUICK_RATE, **options)


def write_page(folder: Path) -> None:
    """Write tables and drawings from the files in `folder`; figures are written by all.py."""
    results = runner.read_results(folder)
    for name, text in (
        ("decisions", tables.decisions(results)),
        ("summaries", tables.summaries(results)),
        ("bytes", tables.equal_bytes(results)),
        ("robust", tables_of_attacks(results)),
        ("rates", tables.rates_table(runner.read_rates(folder))),
        ("grids", tables.grids(results)),
        ("progress", progress(results)),
    ):
        write_between_markers(PAGE, name, text)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for epsilon, name in ((0.0, "aggregation"), (8.0, "aggregation_private")):
        drawing = plots.accuracy_over_uplink(results, epsilon)
        (IMAGES / f"{name}.svg").write_text(drawing + "\n")


def tables_of_attacks(results: dict[Job, Outcome]) -> str:
    """Return the loss under attack of every partition."""
    return "\n\n".join(
        f"MedQuAD, {partition}\n\n{robustness.table(results, partition)}"
        for partition in robustness.PARTITIONS
    )


def progress(results: dict[Job, Outcome]) -> str:
    """Return how much of the plan was run."""
    jobs = queue()
    done = sum(job in results for job in jobs)
    return f"{done} of {len(jobs)} planned federations were run; the others are not run yet."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="less work, within two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and figures here")
    parser.add_argument("--tables", action="store_true", help="train nothing; write the page")
    parser.add_argument("--minutes", type=float, default=20.0, help="time for missing cells")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep cached features here")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        cache = chosen.work or Path(scratch)
        results = runner.read_results(runner.FOLDER)
        if not data.available():
            print(f"no data in {data.folder()}: set ANABRANCH_DATA; figures are of earlier runs")
        elif chosen.quick:
            results = quick_results(cache)
        elif not chosen.tables:
            jobs = queue()
            runner.run(jobs, cache, runner.FOLDER, workers=WORKERS, seconds=60 * chosen.minutes)
            results = runner.read_results(runner.FOLDER)
    found = figures(results, chosen.quick)
    if not chosen.quick:
        write_page(runner.FOLDER)
    head = header("aggregation", packages=PACKAGES, threads=1, seed=SEEDS[0], quick=chosen.quick)
    report(head, found, chosen.json)


if __name__ == "__main__":
    main()
