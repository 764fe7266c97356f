"""The product: a population, the round engine, and the cohort engine, as `simulate` runs them."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from anabranch.client.local import Learned, Local, require_frozen
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.training import fit
from anabranch.protocols.adapter import Adapter
from anabranch.server.rounds import RoundEngine
from anabranch.simulations import engines
from anabranch.simulations.cohort.engine import CohortEngine, Outcome
from anabranch.simulations.cohort.executor import CohortExecutor
from anabranch.simulations.cohort.shard import site_of
from anabranch.simulations.grid import quiet
from anabranch.simulations.population.clients import Partition, PopulationClients
from anabranch.simulations.virtual_grid import VirtualGrid
from benchmarks.simulation.gate import Gate
from benchmarks.simulation.peer import Job, evaluate, jobs
from benchmarks.simulation.workloads import SEED, Workload


def partition(workload: Workload, shared: int) -> Partition:
    """Return the first records for the first client, and so on; or draws from `shared` records."""
    count = workload.clients * workload.each
    rows = np.random.default_rng(SEED).integers(0, shared, count) if shared else np.arange(count)
    start = np.arange(workload.clients + 1) * workload.each
    return Partition(rows=rows, start=start, held=np.zeros(workload.clients, np.int64))


def run(job: Job, gate: Gate) -> None:
    """Run the rounds of a job."""
    workload = job.work
    config = workload.config(job.rounds)
    records = workload.records(job.shared or workload.clients * workload.each)
    classifier = load_classifier(config)

    def report(number: int, adapter: Adapter) -> None:
        def loss() -> float:
            load_adapter(classifier, adapter)
            x, mask = collate(classifier.encode(records.inputs))
            labels = torch.from_numpy(records.labels)
            return evaluate(
                classifier, (x, labels) if mask is None else (x, mask.sum(dim=1), labels)
            )

        gate.lap(loss, last=number == job.rounds)

    with tempfile.TemporaryDirectory() as folder, cluster(job.nodes):
        clients = PopulationClients(records, partition(workload, job.shared), Path(folder))
        adapter = read_adapter(classifier)
        gate.begin(job.loss_round)
        if job.engine == "alone":
            grid = VirtualGrid(
                CohortExecutor(site_of(clients), Alone()), workload.clients, ahead=workload.cohort
            )
            RoundEngine(grid, config, run="bench", checkpoint=report).run(adapter)
            return
        engines.run(
            job.engine,
            config,
            clients,
            adapter,
            run_name="bench",
            workers=job.workers,
            base_dtype=job.base_dtype,
            checkpoint=report,
        )


class Alone(CohortEngine):
    """Trains a cohort one after another: what the prefix cache is worth by itself.

    As local.train_alone does, but the base is checked once a round, as for any cohort.
    """

    def train(self, locals: Sequence[Local]) -> list[Outcome]:
        """Return what came of every Local, none of them private or partial."""
        outcomes: list[Outcome] = []
        for local in locals:
            load_adapter(local.classifier, local.start)
            done = fit(
                local.classifier,
                local.examples,
                local.training,
                steps=local.steps,
                schedule=local.schedule,
                seed=local.seed,
            )
            after = read_adapter(local.classifier)
            outcomes.append(Learned(after=after, steps=done.steps, loss=done.loss))
        require_frozen(locals[0].classifier)
        return outcomes


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """Start a Ray cluster of so many nodes of one core here, if any, and connect to it."""
    if not nodes:
        yield
        return
    quiet()
    import ray
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(nodes - 1):
        found.add_node(num_cpus=1)
    ray.init(address=found.address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()
        found.shutdown()


if __name__ == "__main__":
    gate = Gate()
    for job in jobs():
        run(job, gate)
