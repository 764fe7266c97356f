"""One site's training in one round as a value: all of it decided, nothing trained yet.

    Site.prepare ─► Local ─► Learned ─► Site.finish
                       └ train_alone here, or many together in simulations/cohort

Whoever trains gives the same numbers: batches, learning rates, the part and the noise are the
Local's. So a simulator may train a cohort at once, and everything before and after it (the data
contract, the ledger, codecs, what a site keeps) is the site's own code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anabranch.client.private_round import PrivateRound
from anabranch.client.refusals import Tells, excuse, failures
from anabranch.client.tuning.checkpoint import Progress
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.distributed import Unnoised, fit_unnoised
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.private import PrivateFit, engine_for, first_norm, fit_private
from anabranch.client.tuning.training import Diverged, Schedule, fit
from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.errors import DataError, IncompatibleAdapter, ModelError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Training


@dataclass(frozen=True, kw_only=True, eq=False)
class Local:
    """What one site is about to train. Locals of one classifier object may be trained together."""

    name: str  # of the site
    classifier: Classifier  # the frozen base and the place of the adapter, shared by a thread
    start: Adapter  # the values that training begins from
    examples: Examples
    training: Training
    steps: int  # optimiser steps of this round
    schedule: Schedule
    seed: int  # of the order of batches
    proximal_mu: float = 0.0
    part: Part = WHOLE
    kept: Part | None = None
    private: PrivateRound | None = None
    progress: Progress | None = None  # of `train_alone`; a cohort is trained without
    tells: Tells = "all"  # what may leave if training fails on the records
    failed: Exception | None = None  # preparing them did, where nothing is told: see Site.prepare


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What came of a Local."""

    after: Adapter
    steps: int
    loss: float | None = None  # mean training loss of the last epoch; None: private, or no step
    private: PrivateFit | Unnoised | None = None

    def delta(self, local: Local) -> Delta:
        """Return what was learned, of the part that was trained.

        Raises IncompatibleAdapter, or what may leave in its place, if it is not finite.
        """
        try:
            return self._delta(local)
        except IncompatibleAdapter as error:
            return nothing_learned(local, error)._delta(local)

    def _delta(self, local: Local) -> Delta:
        count = len(local.examples)
        if not isinstance(self.private, Unnoised):
            return self.after.minus(
                local.start, num_examples=count, part=local.part, steps=self.steps
            )
        arrays = local.part.take(local.start.spec, self.private.update)
        return Delta(local.start.spec, arrays, count, part=local.part, steps=self.steps)


def train_alone(local: Local) -> Learned:
    """Train one site on its own classifier.

    No steps learn nothing: the loss is None. Raises RunError for a loss or values that are not
    finite, unless `local.tells` nothing; DataError for steps without records, PrivacyError if
    privacy cannot be established, IncompatibleAdapter for a part that is not there, ModelError if
    the frozen base changed.
    """
    learned = train_unchecked(local)
    require_frozen(local.classifier)
    return learned


def train_unchecked(local: Local) -> Learned:
    """Train one site as `train_alone` does; whoever calls it checks the frozen base."""
    if local.failed is not None:
        return nothing_learned(local, local.failed)
    load_adapter(local.classifier, local.start)
    try:
        return _fit(local) if local.private is None else _fit_private(local, local.private)
    except failures(local.tells, Diverged) as error:
        return nothing_learned(local, error)


def nothing_learned(local: Local, error: Exception) -> Learned:
    """Return an update of zeros for training that failed with `error`, or raise what may leave.

    In a private round it is one of as many steps as were planned: they are paid.
    """
    excuse(local.name, local.tells, error)
    return Learned(after=local.start, steps=local.steps, private=_nothing_private(local))


def _nothing_private(local: Local) -> PrivateFit | Unnoised | None:
    round = local.private
    if round is None:
        return None
    spend = round.plan.spend(local.steps)
    engine = engine_for(round.engine, local.classifier, local.part, local.kept)
    if round.plan.together is not None:
        zeros = {name: np.zeros(shape, np.float32) for name, shape in local.start.spec.tensors}
        return Unnoised(update=zeros, spend=spend, engine=engine)
    norm = first_norm(round.plan, round.clipping_norm)
    return PrivateFit(spend=spend, engine=engine, clipping_norm=norm)


def require_frozen(classifier: Classifier) -> None:
    """Raise ModelError if something wrote to a frozen weight."""
    if classifier.compute_base_digest() != classifier.spec.base:
        raise ModelError("the frozen base changed during training: nothing is sent")


def require_records(local: Local) -> None:
    """Raise DataError for steps without a record to take them on."""
    if local.steps and not len(local.examples):
        raise DataError(f"{local.name}: {local.steps} steps, but no records to train on")


def _fit(local: Local) -> Learned:
    require_records(local)
    result = fit(
        local.classifier,
        local.examples,
        local.training,
        steps=local.steps,
        schedule=local.schedule,
        seed=local.seed,
        proximal_mu=local.proximal_mu,
        part=local.part,
        kept=local.kept,
        progress=local.progress,
        to_the_end=local.tells == "nothing",
    )
    try:
        after = read_adapter(local.classifier)
    except IncompatibleAdapter as error:  # not finite
        return nothing_learned(local, error)
    return Learned(after=after, steps=result.steps, loss=result.loss)


def _fit_private(local: Local, round: PrivateRound) -> Learned:
    if round.plan.together is not None:
        apart = fit_unnoised(
            local.classifier,
            local.examples,
            round.plan,
            local.training,
            step_offset=local.schedule.first_step,
            part=local.part,
            engine=round.engine,
            randomness=round.randomness,
        )
        return Learned(after=local.start, steps=1, private=apart)
    done = fit_private(
        local.classifier,
        local.examples,
        round.plan,
        local.training,
        steps=local.steps,
        step_offset=local.schedule.first_step,
        proximal_mu=local.proximal_mu,
        part=local.part,
        kept=local.kept,
        engine=round.engine,
        clipping_norm=round.clipping_norm,
        randomness=round.randomness,
        progress=local.progress,
        silent=local.tells == "nothing",
    )
    try:
        after = read_adapter(local.classifier)
    except IncompatibleAdapter as error:  # not finite
        return nothing_learned(local, error)
    return Learned(after=after, steps=local.steps, private=done)
