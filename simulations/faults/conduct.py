"""What clients of a population do under a plan: they die, and they lie.

A lie about records is trained on. A lie about the update is told on its way (inject.py), but with
[secure_aggregation] no delta travels: there the client itself changes it before it is masked, and
values beyond the run's range become the largest within it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anabranch.client.data.records import Records
from anabranch.protocols.adapter import Delta
from anabranch.protocols.messages import Assignment
from anabranch.simulations.faults.attacks import backdoor, label_flip, rng_of, scaled
from anabranch.simulations.faults.plan import (
    Backdoor,
    Crash,
    Fault,
    FaultPlan,
    LabelFlip,
    Scale,
    SignFlip,
)


@dataclass(frozen=True, eq=False)
class Poisoning:
    """What lying clients of a population train on (simulations/population, Conduct.poisoned)."""

    plan: FaultPlan
    index: Mapping[str, int]  # client's name -> its place
    num_labels: int

    @cached_property
    def _by_client(self) -> dict[int, list[LabelFlip | Backdoor]]:
        found: dict[int, list[LabelFlip | Backdoor]] = {}
        for fault in self.plan.of(LabelFlip, Backdoor):
            found.setdefault(fault.client, []).append(fault)
        return found

    def __call__(self, client: str, records: Records) -> Records:
        """Return what the client trains on: for an honest one, `records` itself."""
        for fault in self._by_client.get(self.index[client], ()):
            if isinstance(fault, LabelFlip):
                records = label_flip(records, self.num_labels)
            else:
                records = backdoor(
                    records,
                    self.plan.trigger,
                    target=fault.target,
                    share=fault.share,
                    rng=rng_of(self.plan.seed, "backdoor", fault.client),
                )
        return records


@dataclass(frozen=True, eq=False)
class Crashes:
    """Which clients die in training (simulations/population, Conduct.crash)."""

    plan: FaultPlan
    index: Mapping[str, int]

    @cached_property
    def _steps(self) -> dict[tuple[int, int], int]:
        return {(fault.client, fault.round): fault.steps for fault in self.plan.of(Crash)}

    def __call__(self, client: str, number: int) -> int | None:
        """Return after how many steps of this round the client dies; None: it does not."""
        return self._steps.get((self.index[client], number))


@dataclass(frozen=True, eq=False)
class Lies:
    """What lying clients of a population put into a secure sum (population, Conduct.lies)."""

    plan: FaultPlan
    index: Mapping[str, int]

    @cached_property
    def _by_client(self) -> dict[int, list[SignFlip | Scale]]:
        found: dict[int, list[SignFlip | Scale]] = {}
        for fault in self.plan.of(SignFlip, Scale):
            found.setdefault(fault.client, []).append(fault)
        return found

    def __call__(self, client: str, assignment: Assignment, delta: Delta) -> Delta:
        """Return what the client has masked: of an honest one, `delta` itself."""
        secure, number = assignment.config.secure_aggregation, assignment.round
        faults = self._by_client.get(self.index[client], ())
        factor = math.prod(factor_of(one) for one in faults if one.round in (None, number))
        if secure is None or factor == 1.0:
            return delta
        most = np.float32(secure.range)
        if float(most) > secure.range:  # beyond it the client's own software refuses
            most = np.nextafter(most, np.float32(0))
        return scaled(delta, factor, float(most))


def factor_of(fault: Fault) -> float:
    """Return what a fault multiplies a delta by."""
    match fault:
        case SignFlip():
            return -fault.factor
        case Scale():
            return fault.factor
        case _:
            return 1.0
