"""The largest difference of a trained value: a cohort trained together, and client by client."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anabranch.client.local import Learned, Local, train_alone
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.messages import Assignment
from anabranch.simulations.cohort.engine import CohortEngine
from anabranch.simulations.population.clients import PopulationClients
from benchmarks.harness import Figure
from benchmarks.simulation import private_round
from benchmarks.simulation.worker_ours import partition
from benchmarks.simulation.workloads import SEED, WORKLOADS, Workload

NAMES = ("mlp", "small", "minilm")


def figure(clients: int) -> Figure:
    """Return equality.max_error over cohorts of `clients`, and over a private one."""
    found = {name: _difference(WORKLOADS[name], clients) for name in NAMES}
    work = private_round.workload(64)
    alone = [train_alone(local) for local in work.again()]
    found["private"] = largest(CohortEngine().train(work.again()), alone)
    return Figure(
        figure="equality.max_error",
        value=max(found.values()),
        unit="value",
        target="<= 1e-5",
        peer="the same clients, trained one after another",
        note=", ".join(f"{name} {value:.2g}" for name, value in found.items()),
    )


def largest(
    together: Sequence[Learned | AnabranchError], alone: Sequence[Learned | AnabranchError]
) -> float:
    """Return the largest difference of a value of any client; RuntimeError if one failed."""
    worst = 0.0
    for one, other in zip(together, alone, strict=True):
        if not (isinstance(one, Learned) and isinstance(other, Learned)):
            raise RuntimeError(f"a client failed: {one}, {other}")
        for name, values in one.after.arrays.items():
            worst = max(worst, float(np.abs(values - other.after.arrays[name]).max()))
    return worst


def _difference(workload: Workload, clients: int) -> float:
    locals = _locals(workload, clients)
    return largest(CohortEngine().train(locals), [train_alone(local) for local in locals])


def _locals(workload: Workload, clients: int) -> list[Local]:
    """Return the first clients of a round, with values that none of them begins at zero."""
    config = workload.config(rounds=1)
    rng = np.random.default_rng(SEED)
    start = read_adapter(load_classifier(config))
    arrays = {
        name: (values + 0.05 * rng.standard_normal(values.shape)).astype(np.float32)
        for name, values in start.arrays.items()
    }
    adapter = Adapter(start.spec, arrays)
    with tempfile.TemporaryDirectory() as folder:
        population = PopulationClients(workload.all_records(), partition(workload, 0), Path(folder))
        assignment = Assignment(run="equality", round=1, config=config)
        return [
            population.site(i).prepare(assignment, adapter).local
            for i in range(min(clients, workload.clients))
        ]
