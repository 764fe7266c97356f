"""Real digits as a table of 64 numbers: enough to see what liars do, in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from anabranch.client.data.records import Records
from anabranch.protocols.config import RunConfig, parse
from anabranch.server.evaluation import evaluator, initial_adapter
from anabranch.server.result import Result
from anabranch.simulations import engines
from anabranch.simulations.faults.plan import Fault, FaultPlan
from anabranch.simulations.faults.table import Faults, build
from anabranch.simulations.population.clients import Partition, PopulationClients

COLUMNS = "".join(f'p{i} = {{ type = "number" }}\n' for i in range(64))
RUN = f"""
name = "digits"
[task]
kind = "tabular-classification"
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[data.columns]
{COLUMNS}label = {{ type = "label" }}
[model]
base = "logistic"
[lora]
rank = 0
[training]
batch_size = 10
optimizer = "sgd"
learning_rate = 0.1
local_epochs = 2
[federation]
rounds = 3
client_evaluation = false
"""
CLIENTS, EACH = 10, 100


def digits() -> Records:
    """Return 1,797 records of 64 features in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    return Records((images / 16).astype(np.float32), labels.astype(np.int64))


def digits_run(extra: str = "") -> RunConfig:
    return parse(RUN + extra, source="digits")


def held_out() -> Records:
    """Return those that no client has."""
    return digits().take(np.arange(CLIENTS * EACH, 1797))


def clients(folder: Path) -> PopulationClients:
    start = np.arange(CLIENTS + 1, dtype=np.int64) * EACH
    rows = np.arange(CLIENTS * EACH, dtype=np.int64)
    return PopulationClients(digits(), Partition(rows, start, np.zeros(CLIENTS, np.int64)), folder)


def faults_of(plan: Iterable[Fault], population: PopulationClients, run: RunConfig) -> Faults:
    return build(
        FaultPlan(faults=tuple(plan)),
        population.names,
        rounds=run.federation.rounds,
        num_labels=10,
        folder=Path(),
        seed=0,
    )


def federate(
    folder: Path, plan: Iterable[Fault] = (), *, extra: str = "", engine: engines.Engine = "cohort"
) -> Result:
    """Return the result of a run of ten clients under a plan, evaluated on other digits."""
    run, population = digits_run(extra), clients(folder)
    faults = faults_of(plan, population, run)
    return engines.run(
        engine,
        run,
        dataclasses.replace(population, conduct=faults.conduct()),
        initial_adapter(run),
        run_name="digits-1",
        journeys=faults.journeys(),
        tampering=faults.tampering,
        restarts=faults.restarts,
        evaluate=evaluator(run, held_out()),
    )


def accuracy(result: Result) -> float:
    return result.history[-1].coordinator["accuracy"]
