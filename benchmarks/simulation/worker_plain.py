"""The plain loop: one client after another on one module, their mean, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.simulation.gate import Gate
from benchmarks.simulation.peer import Job, Peer, jobs, put, values


def run(job: Job, gate: Gate) -> None:
    """Run the rounds of a job."""
    peer = Peer(job)
    now = values(peer.parameters)

    def loss() -> float:
        put(peer.parameters, now)
        return peer.loss()

    gate.begin(job.loss_round)
    for number, turns in enumerate(peer.plan, 1):
        total = {name: torch.zeros_like(value) for name, value in now.items()}
        for client, order in turns:
            put(peer.parameters, now)
            peer.train(client, order)
            for name, parameter in peer.parameters.items():
                total[name] += parameter.detach() - now[name]
        now = {name: value + total[name] / len(turns) for name, value in now.items()}
        gate.lap(loss, last=number == job.rounds)


if __name__ == "__main__":
    gate = Gate()
    for job in jobs():
        run(job, gate)
