"""One client in a cohort of private training, with its own plan, noise and accountant.

Every client draws from its own randomness, in the order of client/tuning/private.fit_private: a
sample, then the noise, step after step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.local import Local
from anabranch.client.private_round import PrivateRound
from anabranch.client.tuning.active import union
from anabranch.client.tuning.noisy import add_noise, perturb
from anabranch.client.tuning.private import (
    first_norm,
    new_accountant,
    require_planned,
    require_separable,
)
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.spec import require_same_spec
from anabranch.protocols.tables import Training
from anabranch.simulations.cohort.private_records import ROWS, Index, tokens_of

COHORT_VALUES = 1 << 24  # K × P: a cohort holds some six matrices of that size

Masks = Mapping[str, NDArray[np.bool_] | None]


@dataclass(eq=False)
class Member:
    """One client in a cohort."""

    place: int  # in the sequence that was asked for
    local: Local
    round: PrivateRound
    masks: Masks  # name -> where it is trained, None: all of it
    norm: float  # C of the next step
    randomness: Randomness
    accountant: Any = field(default_factory=new_accountant)
    drawn: bool = False  # a record
    learned: bool = False  # a gradient was not 0

    @classmethod
    def of(cls, place: int, local: Local) -> Member:
        """Check what fit_private checks. Raises PrivacyError or IncompatibleAdapter."""
        round, first = local.private, local.schedule.first_step
        assert round is not None  # can_batch says so
        require_same_spec(local.classifier.spec, local.start.spec)
        records = len(local.examples)
        require_planned(round.plan, local.training, records, local.steps, first)
        masks = union(local.classifier.spec, local.part, local.kept)
        require_separable(local.classifier)
        norm = first_norm(round.plan, round.clipping_norm)
        randomness = round.randomness or Randomness.fresh()
        return cls(place, local, round, masks, norm, randomness)

    @property
    def alike(self) -> tuple[object, ...]:
        """Return what clients of one cohort share."""
        return id(self.local.classifier), tuple(self.masks), self.round.plan.clipping

    @property
    def pace(self) -> tuple[Training, int, int]:
        """Return what decides the optimiser and its learning rates."""
        return self.local.training, self.round.plan.steps, self.local.schedule.first_step

    @property
    def expected_batch(self) -> float:
        """Return q n."""
        return self.round.plan.sample_rate * len(self.local.examples)

    def sample(self) -> Index:
        """Return the records of the next step."""
        rate = self.round.plan.sample_rate
        sampled = self.randomness.sample(len(self.local.examples), rate)
        self.drawn = self.drawn or bool(sampled)
        return np.asarray(sampled, np.int64)

    def release(self, total: Tensor, inside: float) -> None:
        """Add this step's noise to the clipped sum (P,), tell the accountant, move C."""

        def noise(values: Tensor, sigma: float) -> float:
            perturb(values, sigma, self.norm, self.randomness)
            return sigma

        plan = self.round.plan
        used, self.norm = add_noise(
            total,
            inside,
            plan,
            self.randomness,
            expected_batch=self.expected_batch,
            clipping_norm=self.norm,
            perturb=noise,
        )
        self.accountant.step(noise_multiplier=used, sample_rate=plan.sample_rate)


def cohorts_of(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Yield members that can be trained together, of one pace side by side."""
    groups: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(member.alike, []).append(member)
    for group in groups.values():
        paces = {pace: i for i, pace in enumerate(dict.fromkeys(m.pace for m in group))}
        group.sort(key=lambda m: (paces[m.pace], -m.local.steps))
        shapes = group[0].local.classifier.spec.shapes
        size = sum(int(np.prod(shapes[name])) for name in group[0].masks)
        yield from _cut(group, size)


def _cut(group: Sequence[Member], size: int) -> Iterator[list[Member]]:
    """Yield cohorts of about equally many rows, in order; each client trains `size` values."""
    rows = [member.expected_batch * tokens_of(member.local) for member in group]
    goal = sum(rows) / max(1, math.ceil(sum(rows) / ROWS))
    most = max(1, COHORT_VALUES // size)
    cohort: list[Member] = []
    total = 0.0
    for member, more in zip(group, rows, strict=True):
        if cohort and (total + more / 2 > goal or len(cohort) == most):
            yield cohort
            cohort, total = [], 0.0
        cohort.append(member)
        total += more
    yield cohort
