"""The queue behind the grid: worker processes, and the files that remember what was run.

    tuning.csv     cell, learning rate, validation accuracy
    results.csv    cell, the rate chosen, test figures
    variants.csv   the same for federations with attackers, robust rules or a codec

One line per federation, appended as they come: a run that is stopped goes on where it was.
"""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from anabranch.protocols.errors import IncompatibleAdapter, PrivacyError, RunError
from benchmarks.aggregation import data
from benchmarks.aggregation.federation import Cell, Outcome, Prepared, federate, prepare
from benchmarks.aggregation.grid import (
    PLAIN,
    Job,
    Rates,
    Task,
    Variant,
    best_rate,
    situation,
    trials,
)
from benchmarks.aggregation.robustness import options

FOLDER = Path(__file__).parent
TUNING, RESULTS, VARIANTS = "tuning.csv", "results.csv", "variants.csv"
KEYS = tuple(field.name for field in dataclasses.fields(Cell))
DIFFERENCES = tuple(field.name for field in dataclasses.fields(Variant))
FIGURES = tuple(field.name for field in dataclasses.fields(Outcome))

Results = dict[Job, Outcome]
Work = Callable[[Task, Path], Outcome]


def read_rates(folder: Path) -> dict[tuple[object, ...], dict[float, float]]:
    """Return the trials that were run."""
    found: dict[tuple[object, ...], dict[float, float]] = {}
    for row in _rows(folder / TUNING):
        found.setdefault(situation(_cell(row)), {})[float(row["rate"])] = float(row["accuracy"])
    return found


def read_results(folder: Path) -> Results:
    """Return the federations that were run, plain ones and variants."""
    found: Results = {}
    for name in (RESULTS, VARIANTS):
        for row in _rows(folder / name):
            variant = Variant(**{k: row.get(k, getattr(PLAIN, k)) for k in DIFFERENCES})
            figures = {figure: float(row[figure]) for figure in FIGURES}
            found[Job(_cell(row), variant)] = Outcome(**figures)
    return found


def run(jobs: Sequence[Job], cache: Path, folder: Path, *, workers: int, seconds: float) -> int:
    """Run what is missing, in order, until it is done or the time is up; return what is missing.

    Trials of a situation come right before its first cell. Tasks that run when the time is up
    are finished.
    """
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    rates, done = read_rates(folder), read_results(folder)
    waiting = [job for job in jobs if job not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running: dict[Future[Outcome], Task] = {}
        asked: set[Task] = set()
        while (waiting and time.monotonic() < deadline) or running:
            if time.monotonic() < deadline:
                for task in _next(waiting, rates, asked, workers - len(running)):
                    running[pool.submit(work, task, cache)] = task
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task, outcome = running.pop(future), future.result()
                if task.tuning:
                    rates.setdefault(situation(task.job.cell), {})[task.rate] = outcome.accuracy
                append(folder, task, outcome)
    return len(waiting)


def _next(waiting: list[Job], rates: Rates, asked: set[Task], count: int) -> Iterator[Task]:
    """Yield up to `count` tasks: the first jobs whose rate is known, or trials they wait for."""
    for job in list(waiting):
        if count <= 0:
            return
        rate = best_rate(rates, job.cell)
        if rate is not None:
            waiting.remove(job)
            count -= 1
            yield Task(job, rate)
            continue
        tried = rates.get(situation(job.cell), {})
        for trial in trials(job.cell):
            if count > 0 and trial.rate not in tried and trial not in asked:
                asked.add(trial)
                count -= 1
                yield trial


_PREPARED: dict[str, Prepared] = {}  # of this process


def work(task: Task, cache: Path) -> Outcome:
    """Run one task; its corpus stays in this process. Divergence is an accuracy of 0."""
    torch.set_num_threads(1)
    cell = task.job.cell
    if cell.dataset not in _PREPARED:
        _PREPARED[cell.dataset] = prepare(data.load(cell.dataset), cache)
    try:
        return federate(
            _PREPARED[cell.dataset],
            cell,
            task.rate,
            held="validation" if task.tuning else "test",
            **options(task.job.variant),
        )
    except (RunError, PrivacyError, IncompatibleAdapter) as error:
        print(f"{task}: {error}", flush=True)
        return Outcome(**dict.fromkeys(FIGURES, 0.0))


def append(folder: Path, task: Task, outcome: Outcome) -> None:
    """Add one line to the file that this task belongs to."""
    figures = {name: f"{getattr(outcome, name):.6g}" for name in FIGURES}
    variant: dict[str, str] = {}
    file = folder / RESULTS
    if task.tuning:
        file = folder / TUNING
        figures = {name: figures[name] for name in ("accuracy", "cpu_seconds")}
    elif task.job.variant != PLAIN:
        file, variant = folder / VARIANTS, dataclasses.asdict(task.job.variant)
    cell = dataclasses.asdict(task.job.cell)
    row = {**cell, **variant, "rate": f"{task.rate:g}", **figures}
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as source:
        return list(csv.DictReader(source))


def _cell(row: Mapping[str, str]) -> Cell:
    values: dict[str, Any] = {name: row[name] for name in KEYS}
    for name in ("clients", "seed"):
        values[name] = int(values[name])
    return Cell(**{**values, "epsilon": float(values["epsilon"])})
