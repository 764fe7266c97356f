"""A population as the engines see it: names, and clients made when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from anabranch.client.data.records import Records
from anabranch.protocols.tables import Device
from anabranch.simulations.population.books import SimulatedBooks
from anabranch.simulations.population.client import HONEST, Conduct, VirtualSite
from anabranch.simulations.population.data import Rows, SharedData


@dataclass(frozen=True, eq=False)
class Partition:
    """Which rows of the shared data each client has: client i has rows[start[i] : start[i + 1]].

    Of those, the last `held[i]` are held out for evaluation. A row may belong to many clients.
    """

    rows: Rows
    start: Rows  # (clients + 1,)
    held: Rows  # (clients,)

    def __len__(self) -> int:
        return len(self.held)

    def train(self, client: int) -> Rows:
        """Return the rows that a client trains on."""
        return self.rows[self.start[client] : self.start[client + 1] - self.held[client]]

    def held_out(self, client: int) -> Rows:
        """Return the rows that a client evaluates on."""
        return self.rows[self.start[client + 1] - self.held[client] : self.start[client + 1]]

    @property
    def sizes(self) -> Rows:
        """Return the training records of every client, (clients,)."""
        return np.diff(self.start) - self.held


@dataclass(frozen=True, eq=False)
class PopulationClients:
    """Clients of one partition; `folder` is where what they keep is put."""

    records: Records
    partition: Partition
    folder: Path
    device: Device = "cpu"
    max_ranks: Rows | None = None  # (clients,), 0: no limit
    books: SimulatedBooks | None = None  # of a private run
    conduct: Conduct = field(default=HONEST)

    @cached_property
    def names(self) -> Sequence[str]:
        """Return client-000000 and so on, in order."""
        return [client_name(i) for i in range(len(self.partition))]

    @cached_property
    def data(self) -> SharedData:
        """Return the shared records; made once in every process."""
        return SharedData(self.records, self.folder / "activations")

    def site(self, index: int) -> VirtualSite:
        """Return a client."""
        rank = 0 if self.max_ranks is None else int(self.max_ranks[index])
        name = client_name(index)
        return VirtualSite(
            name,
            self.data,
            self.partition.train(index),
            self.partition.held_out(index),
            folder=self.folder / name,
            device=self.device,
            max_rank=rank or None,
            books=None if self.books is None else self.books.of(name),
            conduct=self.conduct,
        )

    def weight(self, index: int) -> float:
        """Return the training records of a client."""
        start, held = self.partition.start, self.partition.held
        return float(start[index + 1] - start[index] - held[index])

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is made again in every process."""
        return {k: v for k, v in self.__dict__.items() if k not in ("data", "names")}


def client_name(index: int) -> str:
    """Return the name of a client: ascending names are ascending indices."""
    return f"client-{index:06d}"
