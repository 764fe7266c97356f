"""The rounds that every engine runs: who takes part, and in which order each reads its records.

Drawn by the product's own functions (the round engine's cohorts, a site's seed and batches), and
written to a file for the peers: all engines then do the same arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from anabranch.client.site import round_seed
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.training import batches
from anabranch.server.selection import draw
from anabranch.simulations.population.clients import client_name
from benchmarks.simulation.workloads import BATCH, SEED, Workload


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One client in one round: `order` are places among its records, batch after batch."""

    client: int
    order: list[int]


def cohorts(workload: Workload, rounds: int) -> list[list[int]]:
    """Return the clients of every round, ascending, as the round engine draws them."""
    names = [client_name(i) for i in range(workload.clients)]
    place = {name: i for i, name in enumerate(names)}
    drawn = (
        draw(names, workload.cohort, 0, np.random.default_rng([SEED, number]))
        for number in range(1, rounds + 1)
    )
    return [[place[name] for name in chosen] for chosen in drawn]


def turns(workload: Workload, rounds: int) -> list[list[Turn]]:
    """Return who trains in every round, and on which records in which order."""
    classifier = load_classifier(workload.config(rounds))
    encoded = classifier.encode(workload.all_records().inputs)
    each = workload.each
    plan = []
    for number, cohort in enumerate(cohorts(workload, rounds), 1):
        clients = []
        for client in cohort:
            own = encoded[client * each : (client + 1) * each]
            examples = Examples(own, torch.zeros(each, dtype=torch.int64))
            seed = round_seed(SEED, client_name(client), number)
            drawn = batches(examples, BATCH, np.random.default_rng(seed))
            order = [i for _ in range(each // BATCH) for i in next(drawn)]
            clients.append(Turn(client=client, order=order))
        plan.append(clients)
    return plan


def write(file: Path, workload: Workload, rounds: int) -> None:
    """Write the turns for the peers."""
    file.write_bytes(msgspec.json.encode(turns(workload, rounds)))
