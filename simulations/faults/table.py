"""[faults] of an experiment: what goes wrong, drawn from rates or read from a plan.

    [faults]
    seed = 0                    of the draws; without it the experiment's
    lost_answer = 0.05          how often each kind strikes (drawing.py), or
    plan = "faults.toml"        a file with every single fault (plan.py)
    [faults.trigger]            of backdoors
    patch = 2

A run with faults is in virtual time, with [clock] or without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from anabranch.protocols.config import not_finite
from anabranch.protocols.errors import ConfigError
from anabranch.simulations.faults.conduct import Crashes, Lies, Poisoning
from anabranch.simulations.faults.drawing import Rates, draw
from anabranch.simulations.faults.inject import (
    FaultyJourneys,
    FaultyMessages,
    Struck,
)
from anabranch.simulations.faults.plan import (
    Backdoor,
    Crash,
    FaultPlan,
    Index,
    LabelFlip,
    Restart,
    Scale,
    SignFlip,
    Trigger,
    read_plan,
)
from anabranch.simulations.population.client import HONEST, Conduct
from anabranch.simulations.virtual_grid import Journeys


class FaultsTable(Rates, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[faults]."""

    seed: Index | None = None  # None: the experiment's
    plan: str | None = None  # relative to the experiment file; instead of all rates
    trigger: Trigger | None = None


@dataclass(frozen=True, eq=False)
class Faults:
    """A plan, and all that puts it into a run."""

    plan: FaultPlan
    names: Sequence[str]  # of the clients, ascending
    num_labels: int

    @cached_property
    def tampering(self) -> FaultyMessages:
        """Return what happens to messages, for engines.run."""
        return FaultyMessages(Struck(self.plan))

    @cached_property
    def restarts(self) -> tuple[Restart, ...]:
        """Return when the coordinator dies, for engines.run."""
        return tuple(self.plan.of(Restart))

    def journeys(self, inner: Journeys | None = None) -> FaultyJourneys:
        """Return `inner` with what is lost and late, for engines.run."""
        return FaultyJourneys(inner, self.tampering.struck, len(self.names))

    def conduct(self, honest: Conduct = HONEST) -> Conduct:
        """Return how the clients of a population behave: `honest`, but for what the plan says."""
        index = {name: i for i, name in enumerate(self.names)}
        poisons = any(self.plan.of(LabelFlip, Backdoor))
        lies = any(self.plan.of(SignFlip, Scale))
        dies = any(self.plan.of(Crash))
        return dataclasses.replace(
            honest,
            poisoned=Poisoning(self.plan, index, self.num_labels) if poisons else honest.poisoned,
            lies=Lies(self.plan, index) if lies else honest.lies,
            crash=Crashes(self.plan, index) if dies else honest.crash,
        )


def build(
    table: FaultsTable | FaultPlan,
    names: Sequence[str],
    *,
    rounds: int,
    num_labels: int,
    folder: Path,
    seed: int,
) -> Faults:
    """Return the faults of an experiment over clients of these `names`, ascending.

    `table` is [faults], or a plan to replay; `folder` is the experiment file's, `seed` the
    experiment's. Raises ConfigError, naming the field, for a plan that cannot be read, or
    that speaks of clients, rounds or labels that are not there.
    """
    plan = (
        table if isinstance(table, FaultPlan) else plan_of(table, len(names), rounds, folder, seed)
    )
    problem = _problem(plan, len(names), rounds, num_labels)
    if problem is not None:
        raise ConfigError(problem)
    return Faults(plan, names, num_labels)


def plan_of(table: FaultsTable, clients: int, rounds: int, folder: Path, seed: int) -> FaultPlan:
    """Return the plan that a table names or draws; raises as `build` does."""
    unbounded = not_finite(table)
    if unbounded is not None:
        raise ConfigError(f"faults.{unbounded}: expected a finite number, got NaN or infinity")
    if table.plan is None:
        seed = seed if table.seed is None else table.seed
        return draw(table, seed=seed, clients=clients, rounds=rounds, trigger=table.trigger)
    others = msgspec.structs.replace(table, plan=None)
    if others != FaultsTable():
        raise ConfigError(
            "faults.plan names every fault: leave the rates, the seed and the trigger out, or "
            "leave the plan out"
        )
    return read_plan(folder / table.plan)


def _problem(plan: FaultPlan, clients: int, rounds: int, num_labels: int) -> str | None:
    """Return what the plan speaks of that is not there, or None."""
    for i, fault in enumerate(plan.faults):
        if not isinstance(fault, Restart) and fault.client >= clients:
            return f"faults[{i}].client = {fault.client}: there are {clients}, counted from 0"
        number = getattr(fault, "round", None)
        if number is not None and number > rounds:
            return f"faults[{i}].round = {number}: the run has {rounds} rounds"
        if isinstance(fault, Backdoor) and fault.target >= num_labels:
            return f"faults[{i}].target = {fault.target}: there are {num_labels} labels"
    return None
