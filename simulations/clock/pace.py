"""How far a client gets: its training in one round, before anybody waits for it.

Notation: n training records, batches of b, s steps, flops of one record and step; the frozen
prefix of a record is computed once in a round (or once in a run, or with every use).

    compute_s = (n · prefix + used(n, b, s) · step) / (gflops · 10⁹)

Partial work (FedProx, Li et al. 2020, arXiv:1812.06127, section 3.2): a client that could not
send its delta before the deadline does as many steps as fit, and sends that. How many they are
follows from (seed, round, client) alone, so the clock and the client agree without talking: a
Pace is a StepLimit (population/client.py), and can be pickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import RunError
from anabranch.simulations.clock.costs import (
    compute_s,
    lognormal,
    records_used,
    transfer_s,
    uniform,
)
from anabranch.simulations.clock.flops import Work

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]
Prefix = Literal["round", "run", "use"]

# Purposes of draws: never to be changed, or runs change with them.
SPEED: Final = (1, 2)
NETWORK: Final = (3, 4)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pace:
    """How fast every client is; arrays are of length N."""

    gflops: Singles
    uplink_bps: Singles
    downlink_bps: Singles
    sizes: Ints  # training records
    work: Work
    batch_size: int
    deadline_s: float
    seed: int = 0
    private: bool = False  # steps are Poisson samples, of batch_size records in the mean
    prefix: Prefix = "round"
    overhead_s: float = 0.0  # of every message, in each direction
    speed_sigma: float = 0.0  # of the logarithm, from round to round
    network_sigma: float = 0.0
    partial_work: bool = False
    bytes_down: int = 0  # that partial work reckons with; a round's own may be fewer
    bytes_up: int = 0
    index: Mapping[str, int] | None = None  # name -> client; None: client-000000 and so on

    def __call__(self, name: str, number: int, planned: int) -> int:
        """Return how many of its `planned` steps a client does in a round."""
        return self.trains(self.client(name), number, planned)

    def client(self, name: str) -> int:
        """Return a client's index; raise RunError for a name that is not of this population."""
        if self.index is not None:
            found = self.index.get(name)
        else:
            digits = name.removeprefix("client-")
            found = int(digits) if digits.isdecimal() else None
        if found is None or found >= len(self.sizes):
            raise RunError(f"{name!r} is not one of the {len(self.sizes)} clients of the clock")
        return found

    def trains(self, client: int, number: int, planned: int) -> int:
        """Return how many steps a client does: those that fit, at least one, which may be late."""
        return max(min(1, planned), self.steps(client, number, planned))

    def steps(self, client: int, number: int, planned: int) -> int:
        """Return how many steps fit before the deadline, 0 to `planned`.

        Without partial work, all of them: a client is late, or it is not.
        """
        if not self.partial_work:
            return planned
        down, up = self.network_s(client, number, self.bytes_down, self.bytes_up)
        left = (self.deadline_s - down - up) * (1 - 1e-12)  # sums are rounded
        if self.compute_s(client, number, planned) <= left:
            return planned
        if left <= 0:
            return 0
        batch = min(self.batch_size, int(self.sizes[client]))
        step = compute_s(batch * self._flops, self.speed(client, number))
        return max(0, int((left - self.compute_s(client, number, 0)) / step))

    def compute_s(self, client: int, number: int, steps: int, *, warm: bool = False) -> float:
        """Return the seconds of `steps` steps; `warm`: the prefix is known from earlier rounds."""
        size, work = int(self.sizes[client]), self.work
        if self.private:
            used = steps * min(self.batch_size, size)
        else:
            used = records_used(size, self.batch_size, steps)
        known = warm or self.prefix == "use"
        flops = used * self._flops + (0.0 if known else size * work.prefix)
        return compute_s(flops, self.speed(client, number))

    def evaluate_s(self, client: int, number: int, records: int) -> float:
        """Return the seconds of an evaluation on `records` records."""
        flops = records * (self.work.prefix + self.work.forward)
        return compute_s(flops, self.speed(client, number))

    def speed(self, client: int, number: int) -> float:
        """Return this round's GFLOP/s of a client."""
        return float(self.gflops[client]) * self._varied(SPEED, self.speed_sigma, client, number)

    def network_s(self, client: int, number: int, down: int, up: int) -> tuple[float, float]:
        """Return the seconds of (download, upload) of so many bytes, overhead included."""
        varied = self._varied(NETWORK, self.network_sigma, client, number)
        return (
            self.overhead_s + transfer_s(down, float(self.downlink_bps[client]) * varied),
            self.overhead_s + transfer_s(up, float(self.uplink_bps[client]) * varied),
        )

    def with_bytes(self, down: int, up: int) -> Pace:
        """Return this pace with the bytes that partial work reckons with."""
        return dataclasses.replace(self, bytes_down=down, bytes_up=up)

    @property
    def _flops(self) -> float:
        """Return the operations of one record in one step."""
        return self.work.step + (self.work.prefix if self.prefix == "use" else 0.0)

    def _varied(self, purpose: tuple[int, int], sigma: float, client: int, number: int) -> float:
        if not sigma:
            return 1.0
        first, second = (uniform(self.seed, one, number, client) for one in purpose)
        return lognormal(sigma, first, second)
