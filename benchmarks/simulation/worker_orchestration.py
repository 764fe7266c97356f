"""Flower's own FedAvg over trivial clients: on its Simulation Runtime, or on our VirtualGrid."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from anabranch.simulations.grid import quiet
from anabranch.simulations.virtual_grid import VirtualGrid, one_by_one
from benchmarks.harness import ROOT
from benchmarks.simulation.gate import Gate
from benchmarks.simulation.trivial_client import app

VALUES = 25_000  # float32: 100 KB


def rounds(grid: Grid, clients: int, count: int, gate: Gate) -> None:
    """Run Flower's strategy, all clients in every round."""

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        (values,) = arrays.to_numpy_ndarrays()
        if not np.allclose(values, number, rtol=1e-4):
            raise RuntimeError(f"round {number}: expected the mean {number}, got {values[0]}")
        if number == 0:
            gate.begin()
        else:
            gate.lap(lambda: 0.0, last=number == count)
        return MetricRecord({"nothing": 0.0})

    FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=clients,
        min_evaluate_nodes=0,
        min_available_nodes=clients,
    ).start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(VALUES, np.float32)]),
        num_rounds=count,
        evaluate_fn=evaluate,
    )


def main() -> None:
    """Run what the environment asks for."""
    torch.set_num_threads(1)
    asked = json.loads(os.environ["SIMULATION_JOBS"])[0]
    clients, count, gate = asked["clients"], asked["rounds"], Gate()
    quiet()
    if asked["engine"] == "cohort":
        rounds(VirtualGrid(one_by_one(app), clients), clients, count, gate)
        return
    os.environ["PYTHONPATH"] = str(ROOT)  # of the actors
    server = ServerApp()

    @server.main()
    def coordinate(grid: Grid, context: Context) -> None:
        rounds(grid, clients, count, gate)

    from flwr.simulation import run_simulation

    backend: Any = {
        "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
        "init_args": {
            "num_cpus": asked["workers"],
            "include_dashboard": False,
            "log_to_driver": False,
            "object_store_memory": 500_000_000,
        },
    }
    run_simulation(server, app, clients, backend_config=backend)


if __name__ == "__main__":
    main()
