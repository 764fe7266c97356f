"""Flower's Simulation Runtime: its FedAvg strategy over Ray actors of one core each.

Its strategy samples the nodes; what the k-th of them trains is the k-th client of the round, so
that all engines train the same clients. Model and records stay in the actors between calls.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from anabranch.simulations.grid import quiet
from benchmarks.harness import ROOT
from benchmarks.simulation.flower_client import app, peer
from benchmarks.simulation.gate import Gate
from benchmarks.simulation.peer import Job, jobs, put, values


class Turns(FedAvg):
    """FedAvg that tells every node which turn is its own."""

    def __init__(self, job: int, **options: Any) -> None:
        super().__init__(**options)
        self._job = job

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's messages, each with its place in the round."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for place, message in enumerate(messages):
            turn = ConfigRecord({"job": self._job, "round": server_round - 1, "place": place})
            message.content = RecordDict({"arrays": arrays, "turn": turn})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the strategy's mean; RuntimeError if a client failed, which it would leave out."""
        heard = list(replies)
        for reply in heard:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
        return super().aggregate_train(server_round, heard)


def coordinate(place: int, job: Job, nodes: int, grid: Grid, gate: Gate) -> None:
    """Run the rounds of a job on `nodes` nodes: as many as it has clients, or more."""
    held, workload = peer(place), job.work

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        def loss() -> float:
            put(held.parameters, arrays.to_torch_state_dict())
            return held.loss()

        if number == 0:
            gate.begin(job.loss_round)
        else:
            gate.lap(loss, last=number == job.rounds)
        return MetricRecord({"nothing": 0.0})

    strategy = Turns(
        place,
        fraction_train=workload.cohort / nodes,
        fraction_evaluate=0.0,
        min_train_nodes=workload.cohort,
        min_evaluate_nodes=0,
        min_available_nodes=nodes,
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(values(held.parameters)),
        num_rounds=job.rounds,
        evaluate_fn=evaluate,
    )


def main() -> None:
    """Run all jobs on one simulation."""
    found = jobs()
    nodes = max(job.work.clients for job in found)
    gate = Gate()
    server = ServerApp()

    @server.main()
    def rounds(grid: Grid, context: Context) -> None:
        for place, job in enumerate(found):
            coordinate(place, job, nodes, grid, gate)

    quiet()
    os.environ["PYTHONPATH"] = str(ROOT)  # of the actors
    from flwr.simulation import run_simulation

    resources: Any = {"num_cpus": 1.0, "num_gpus": 0.0}
    ray: Any = {
        "num_cpus": found[0].workers,
        "include_dashboard": False,
        "log_to_driver": False,
        "object_store_memory": 500_000_000,
    }
    backend = {"client_resources": resources, "init_args": ray}
    run_simulation(server, app, nodes, backend_config=backend)


if __name__ == "__main__":
    main()
