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
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # two workers: more threads would wait for each other

import torch

from benchmarks.aggregation import data, exactness, gains, merge, plots, robustness, runner, tables
from benchmarks.aggregation.federation import Cell, Outcome, Prepared, config_for, federate, prepare
from benchmarks.aggregation.grid import SEEDS, Job, Variant, plan
from benchmarks.harness import ROOT, Figure, header, report, write_between_markers

PACKAGES = ("torch", "opacus", "transformers", "numpy")
PAGE = ROOT / "docs" / "benchmarks" / "aggregation.md"
IMAGES = ROOT / "docs" / "images"
WORKERS = 2
QUICK_RECORDS, QUICK_ROUNDS, QUICK_RATE = 400, 6, 1e-2


def figures(results: dict[Job, Outcome], quick: bool, partition: str = "iid") -> list[Figure]:
    """Return every figure that the results allow, and those that need none."""
    a_config = config_for(robustness.cell("iid", SEEDS[0]), _names("medquad"), 1e-2)
    return [
        *exactness.figures(quick),
        *merge.figures(quick),
        *gains.mixed_ranks(results),
        *gains.uplink(a_config),
        *gains.int8_loss(robustness.codec_losses(results)),
        *robustness.figures(results, partition),
    ]


def _names(name: str) -> data.Corpus:
    """Return a corpus without records: what a configuration needs of it."""
    none = data.Records((), data.np.zeros(0, data.np.int64), ())
    return data.Corpus(name, tuple(f"type {i}" for i in range(15)), none, none, none)


def quick_results(cache: Path) -> dict[Job, Outcome]:
    """Return the federations that the figures need, on a few hundred answers."""
    corpus = data.shortened(data.load("medquad"), QUICK_RECORDS)
    prepared = prepare(corpus, cache)
    seed = SEEDS[0]
    jobs = [
        Job(Cell(**{**_common("mixed", seed), "rule": rule}))
        for rule in ("fedavg", "fedavg-skip", "altqr", "flexlora")
    ]
    at = robustness.cell("iid", seed)
    jobs += [Job(at), Job(at, Variant(codec="int8"))]
    jobs += [
        Job(at, Variant(robust=robust, attack=attack))
        for robust, attack in itertools.product(("mean", *robustness.RULES), robustness.FACTORS)
    ]
    return {job: _quick(prepared, job) for job in jobs}


def _common(ranks: str, seed: int) -> dict[str, object]:
    return {
        "dataset": "medquad",
        "head": "fixed",
        "clients": 10,
        "partition": "dirichlet-0.5",
        "epsilon": 0.0,
        "ranks": ranks,
        "seed": seed,
    }


def _quick(prepared: Prepared, job: Job) -> Outcome:
    options = robustness.options(job.variant)
    return federate(prepared, job.cell, QUICK_RATE, rounds=QUICK_ROUNDS, **options)


def write_page(folder: Path) -> None:
    """Write tables and drawings from the files in `folder`; figures are written by all.py."""
    results = runner.read_results(folder)
    for name, text in (
        ("summaries", tables.summaries(results)),
        ("secure", tables.secure(results)),
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
    cells = plan()
    done = sum(Job(cell) in results for cell in cells)
    others = robustness.jobs()
    also = sum(job in results for job in others)
    return (
        f"{done} of {len(cells)} planned federations were run, and {also} of {len(others)} for "
        "attacks and int8. The others are shown as not run."
    )


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
            jobs = [*map(Job, plan()[:FIRST]), *robustness.jobs(), *map(Job, plan()[FIRST:])]
            runner.run(
                jobs, cache, runner.FOLDER, workers=WORKERS, seconds=60 * chosen.minutes
            )
            results = runner.read_results(runner.FOLDER)
    found = figures(results, chosen.quick)
    if not chosen.quick:
        write_page(runner.FOLDER)
    head = header(
        "aggregation", packages=PACKAGES, threads=1, seed=SEEDS[0], quick=chosen.quick
    )
    report(head, found, chosen.json)


if __name__ == "__main__":
    main()
