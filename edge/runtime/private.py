"""DP-SGD on a device: the plan decides, the ledger counts, the end checks.

One step (Abadi et al. 2016, arXiv:1607.00133, algorithm 1), over n records:

    B ~ every record with chance q, independently                  Poisson sampling
    ḡ_i = g_i · min(1, C / ‖g_i‖)                                   the bundle's clipped graph
    g̃ = (Σ_{i in B} ḡ_i + σC · N(0, 1)) / (q n)                    then SGD or AdamW

The steps are those of the sites (client/tuning/private.py) with flat clipping: an empty batch is
a step of noise alone; q, n, σ and C are the plan's and do not depend on the batch; a record whose
gradient is not finite counts as 0. Sampling and noise come from a ChaCha20 stream with a fresh
key of the operating system, never from a run's seed. Noise is added in float32: sums and noise
are NOT hardened against attacks on the low bits of floating-point numbers.

    entry, done = saved_reservation(folder)                       of a training that was cut off
    with run_privately(ledger, plan, …, entry=entry, done=done) as private:
        about = {…, RESERVATION: str(private.entry)}              reserved, and on disk
        trained = train(…, Checkpoints(folder, about), private=private.steps)
    private.released(trained)                                     settled: it may leave now

A block that is left by an exception settles nothing: what was reserved counts, and nothing may
leave. The same reservation can be taken up again (`entry`, `done`): state that was saved after
step k goes on with step k. A reservation is settled once, so what leaves has seen exactly the
steps that were reserved; a step that was lost between two saves never leaves, and is drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime import state as states
from anabranch.edge.runtime.device_file import Budget
from anabranch.edge.runtime.engine import Floats
from anabranch.edge.runtime.ledger import DeviceLedger, Limit
from anabranch.edge.runtime.private_plan import (
    DevicePlan,
    delta_for,
    plan_for,
    plan_given,
    require_countable,
    require_private,
)
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.randomness import Randomness
from anabranch.protocols.spend import LARGEST_EPSILON, Spend
from anabranch.storage.chain import spend_of

__all__ = [
    "RESERVATION",
    "DevicePlan",
    "PrivateRun",
    "PrivateSteps",
    "plan_for",
    "plan_given",
    "require_private",
    "run_privately",
    "saved_reservation",
]

RESERVATION = "reservation"  # what a saved state calls the entry of the ledger
SLACK = 1e-3  # relative, of a norm that was computed in float32

Value = TypeVar("Value")


class PrivateSteps:
    """Batches and noise of one training; notes what ran. Made by run_privately.

    Every step is sampled, then finished, in order; the first one is at most `done`, the steps
    that a saved state has behind it. Raises PrivacyError for any other order, and for a step
    beyond what was reserved.
    """

    def __init__(
        self,
        plan: DevicePlan,
        steps: int,
        num_examples: int,
        randomness: Randomness,
        done: int = 0,
    ) -> None:
        self._plan = plan
        self._steps = steps
        self._records = num_examples
        self._randomness = randomness
        self._done = done  # steps behind what is being trained
        self._begun = False
        self._batch: int | None = None  # records of the open step

    @property
    def clipping_norm(self) -> float:
        """Return C."""
        return self._plan.clipping_norm

    @property
    def ran(self) -> Spend | None:
        """Return what the steps behind the trained adapter spent; None if there are none."""
        return self._plan.spend(self._done) if self._done and self._batch is None else None

    def sample(self, step: int) -> NDArray[np.int64]:
        """Return the rows of a step's batch, ascending; there may be none. Each with chance q."""
        known = step == self._done or (0 <= step < self._done and not self._begun)
        if self._batch is not None or not known or step >= self._steps:
            raise PrivacyError(
                f"step {step} cannot be sampled: {self._done} of {self._steps} reserved steps ran"
                + (", and the next one is open" if self._batch is not None else "")
            )
        rows = self._randomness.sample(self._records, self._plan.sample_rate)
        self._done, self._begun, self._batch = step, True, len(rows)
        return np.array(rows, dtype=np.int64)

    def finish(self, sums: Mapping[str, Floats], step: int) -> dict[str, Floats]:
        """Return the noisy mean (Σ ḡ_i + σC · N(0, 1)) / (q n) of the step that was sampled.

        `sums` are Σ ḡ_i of all trained tensors, zeros for an empty batch. Every value gets noise
        of its own. Raises PrivacyError if a sum is not finite, or larger than so many clipped
        gradients can add up to: the engine does not clip, and no noise hides that.
        """
        if self._batch is None or step != self._done:
            raise PrivacyError(f"step {step} was not sampled: {self._done} steps ran")
        _require_clipped(sums, self._batch * self.clipping_norm)
        scale = np.float32(self._plan.noise_multiplier * self.clipping_norm)
        expected = np.float32(self._plan.sample_rate * self._records)
        noisy = {}
        for name, array in sums.items():
            noise = self._randomness.normal(array.size).reshape(array.shape)
            noise *= scale
            noise += array
            noise /= expected
            noisy[name] = noise
        self._done, self._batch = step + 1, None
        return noisy


class PrivateRun:
    """One reserved training: its steps, and the gate through which its result leaves."""

    def __init__(self, entry: int, steps: PrivateSteps) -> None:
        self.entry = entry  # to be saved with the training's state before the first step
        self.steps = steps
        self.head: str | None = None  # of the ledger, when settled

    def released(self, value: Value) -> Value:
        """Return `value`, what was trained. Raises PrivacyError unless the training is settled."""
        if self.head is None:
            raise PrivacyError(
                f"training {self.entry} of the privacy ledger is not settled: nothing may leave"
            )
        return value


@contextmanager
def run_privately(
    ledger: DeviceLedger,
    plan: DevicePlan,
    *,
    run: str,
    steps: int,
    num_examples: int,
    budget: Budget | None = None,
    entry: int | None = None,
    done: int = 0,
    randomness: Randomness | None = None,
) -> Iterator[PrivateRun]:
    """Reserve `steps` steps, yield what takes them, check that they ran, and settle.

    `run` names whose budget it is beside the device's, `num_examples` is n. With `entry`, an
    open reservation of the same training is taken up after `done` steps and nothing is reserved.
    `randomness` makes batches and noise reproducible and thereby VOIDS the guarantee: it is for
    tests.

    Raises PrivacyError before anything is trained if a budget would be exceeded, the ledger
    cannot be trusted, or `entry` is not open or of another training; at the end if what ran is
    not what was planned. Then nothing is settled, and `released` refuses.
    """
    if not 1 <= steps <= plan.steps:
        raise PrivacyError(f"{steps} steps are not within the plan's {plan.steps}")
    require_countable(delta_for(plan.delta, num_examples), steps)
    spend = plan.spend(steps)
    if entry is None:
        if done != 0:
            raise PrivacyError(f"{done} steps ran before, but no reservation of them is given")
        entry = ledger.reserve(spend, run, num_examples, _limits(plan, run, budget))
    else:
        _require_same(ledger, entry, spend, run, num_examples, done)
    source = Randomness.fresh() if randomness is None else randomness
    private = PrivateRun(entry, PrivateSteps(plan, steps, num_examples, source, done))
    yield private
    ran = private.steps.ran
    if ran != spend:
        raise PrivacyError(
            f"planned (σ, q, steps) = {_values(spend)}, ran "
            f"{_values(ran) if ran else 'nothing'}: what was trained is discarded"
        )
    private.head = ledger.settle(entry, spend)


def saved_reservation(folder: Path) -> tuple[int | None, int]:
    """Return (entry, done) of the training whose state lies in `folder`; (None, 0) without one.

    Whoever trains saves `entry` in the state (Checkpoints.about, under RESERVATION), so that no
    state is ever used with another reservation. Raises DeviceError for a damaged state.
    """
    found = states.read(folder)
    entry = "" if found is None else found.about.get(RESERVATION, "")
    if found is None or not entry.isdecimal():
        return None, 0
    return int(entry), found.step


def _limits(plan: DevicePlan, run: str, budget: Budget | None) -> list[Limit]:
    limits = [Limit(epsilon=LARGEST_EPSILON, delta=plan.delta, name="the most that is counted")]
    if plan.budget is not None:
        name = f"the budget of run {run!r}"
        limits.append(Limit(epsilon=plan.budget, delta=plan.delta, name=name, run=run))
    if budget is not None:
        name = "the [budget] of device.toml"
        limits.append(Limit(epsilon=budget.epsilon, delta=budget.delta, name=name))
    return limits


def _require_same(
    ledger: DeviceLedger, entry: int, spend: Spend, run: str, num_examples: int, done: int
) -> None:
    """Raise PrivacyError unless the open reservation is of this training."""
    found = ledger.reservation(entry)
    kept, now = (found.run, found.records, spend_of(found)), (run, num_examples, spend)
    if kept != now:
        raise PrivacyError(
            f"entry {entry} of the privacy ledger reserved (run, records, spend) = {kept}, this "
            f"training has {now}: begin it anew; what was reserved counts"
        )
    if not 0 <= done <= spend.steps:
        raise PrivacyError(f"{done} steps ran before, of {spend.steps} that entry {entry} has")


def _require_clipped(sums: Mapping[str, Floats], most: float) -> None:
    """Raise PrivacyError unless the norm of the sums is at most `most`."""
    squares = (float(np.square(array, dtype=np.float64).sum()) for array in sums.values())
    if not sums or not math.sqrt(sum(squares)) <= most * (1 + SLACK):
        raise PrivacyError(
            "a sum of gradients is missing, not finite, or larger than clipped gradients add up "
            "to: the bundle's graph does not clip. What was trained is discarded; get the bundle "
            "anew"
        )


def _values(spend: Spend) -> tuple[float, float, int]:
    return spend.noise_multiplier, spend.sample_rate, spend.steps
