"""Which federations are run, in which order, and with which learning rate.

Tuning: every rule gets the same four rates, one trial each, for every (dataset, head, ε, ranks):
ten clients, Dirichlet 0.5, a seed that is not reported, VALIDATION records. The best one is used
for all partitions and numbers of clients. Reported cells see test records once, at the end.

The plan is longer than a machine has time for: the most telling cells come first, and what was
not reached is shown as not run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.aggregation.federation import Cell, Head

SEEDS = (1, 2, 3)
TUNING_SEED = 11
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
PRIVATE_RATES = (1e-2, 3e-2, 1e-1, 3e-1)  # AdamW averages noise: larger steps pay
DATASETS = ("medquad", "sst2")
SYNTHETIC = ("dirichlet-0.5", "iid", "dirichlet-0.1")
EQUAL = ("fedavg", "altqr", "rolora", "ffa", "fedex", "flexlora", "flora", "hetlora")
MIXED = (
    "fedavg",
    "fedavg-skip",
    "altqr",
    "rolora",
    "ffa",
    "flexlora",
    "flora",
    "hetlora",
)
PRIVATE = ("fedavg", "altqr", "rolora", "ffa")  # first; the others if there is time
LEADING = ("fedavg", "altqr", "fedex", "flexlora")
NATURAL_CLIENTS = 8


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a federation differs from the plain one of its cell: see robustness.py."""

    codec: str = "fp32"
    robust: str = "mean"
    attack: str = "none"
    rounds: str = "all"  # or "half", "double"


PLAIN = Variant()


@dataclass(frozen=True)
class Job:
    """One federation to be run: a cell of a table."""

    cell: Cell
    variant: Variant = PLAIN


@dataclass(frozen=True)
class Task:
    """One federation with its learning rate: a job, or a trial for tuning."""

    job: Job
    rate: float
    tuning: bool = False


def rules(ranks: str) -> tuple[str, ...]:
    """Return the rules compared; fedex refuses mixed ranks, "skip" is for them."""
    return EQUAL if ranks == "equal" else MIXED


def situation(cell: Cell) -> tuple[object, ...]:
    """Return what a learning rate is tuned for, once per rule."""
    return cell.dataset, cell.head, cell.epsilon, cell.ranks, cell.rule


def block(
    clients: Sequence[int],
    partitions: Sequence[str],
    *,
    head: Head = "fixed",
    epsilon: float = 0.0,
    only: Sequence[str] | None = None,
) -> list[Cell]:
    """Return cells of one kind, seed by seed, so that a stop leaves whole seeds."""
    cells = []
    for seed, dataset, (count, partition) in itertools.product(
        SEEDS, DATASETS, itertools.product(clients, partitions)
    ):
        natural = partition == "natural"
        if natural and (dataset != "medquad" or count != clients[0]):
            continue
        for ranks in ("equal", "mixed"):
            cells += [
                Cell(
                    dataset=dataset,
                    head=head,
                    clients=NATURAL_CLIENTS if natural else count,
                    partition=partition,
                    epsilon=epsilon,
                    ranks=ranks,
                    rule=rule,
                    seed=seed,
                )
                for rule in rules(ranks)
                if only is None or rule in only
            ]
    return cells


TELLING = ("dirichlet-0.5", "natural")
EVERYWHERE = (*SYNTHETIC, "natural")


def first() -> list[Cell]:
    """Return what is run before anything else: ten clients, all rules; then with privacy."""
    return block((10,), TELLING) + block((10,), TELLING, epsilon=8.0, only=PRIVATE)


def equalised() -> list[Job]:
    """Return FedIT with half of the rounds, and AltQR with twice as many.

    AltQR sends half as much in a round: either way both have sent the same bytes.
    """
    half, double = Variant(rounds="half"), Variant(rounds="double")
    plain = block((10,), TELLING, only=("fedavg", "fedavg-skip"))
    private = block((10,), TELLING, epsilon=8.0, only=("fedavg",))
    ours = block((10,), TELLING, only=("altqr"))
    return [Job(cell, half) for cell in (*plain, *private)] + [Job(cell, double) for cell in ours]


def plan() -> list[Cell]:
    """Return every cell of the table, the most telling ones first."""
    blocks = [
        first(),
        block((10,), EVERYWHERE),
        block((50,), ("dirichlet-0.5",), only=LEADING),
        block((10,), TELLING, head="trained", only=("fedavg", "altqr", "flexlora")),
        block((4,), ("dirichlet-0.5",), only=LEADING),
        block((10,), TELLING, epsilon=3.0, only=("fedavg", "altqr")),
        block((10,), TELLING, epsilon=3.0, only=PRIVATE),
        block((50, 4), ("dirichlet-0.5",)),
        block((50, 4), ("dirichlet-0.1", "iid")),
        block((10,), EVERYWHERE, epsilon=8.0, only=PRIVATE),
        block((10,), EVERYWHERE, epsilon=3.0, only=PRIVATE),
        block((10,), EVERYWHERE, head="trained"),
        block((10,), EVERYWHERE, epsilon=8.0),
        block((10,), EVERYWHERE, epsilon=3.0),
        block((50, 4), SYNTHETIC, epsilon=8.0),
        block((50, 4), SYNTHETIC, epsilon=3.0),
    ]
    return list(dict.fromkeys(itertools.chain.from_iterable(blocks)))


def trials(cell: Cell) -> list[Task]:
    """Return the trials that decide the learning rate of a cell."""
    tuned = dataclasses.replace(cell, clients=10, partition="dirichlet-0.5", seed=TUNING_SEED)
    return [Task(Job(tuned), rate, tuning=True) for rate in rates_of(cell)]


def rates_of(cell: Cell) -> tuple[float, ...]:
    """Return the learning rates that every rule is tried with: four, with and without noise."""
    return PRIVATE_RATES if cell.epsilon else RATES


Rates = Mapping[tuple[object, ...], Mapping[float, float]]  # situation -> rate -> accuracy


def best_rate(rates: Rates, cell: Cell) -> float | None:
    """Return the rate of highest validation accuracy, the smaller among equals; None if unknown."""
    tried = rates.get(situation(cell), {})
    if set(tried) != set(rates_of(cell)):
        return None
    return max(sorted(tried), key=lambda rate: tried[rate])
