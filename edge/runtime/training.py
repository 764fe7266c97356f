"""Training on a device: the same work as a site's round, by the same [training] table.

Notation: n records, w_i the class weight of record i's label, ℓ_i its cross-entropy, B a batch.

    step      batch loss  Σ_B w_i ℓ_i / Σ_B w_i, its gradient from the engine
              optimizer.py: proximal term, part, clipping, SGD or AdamW
    private   Σ_B of gradients clipped to norm C, one batch of records from `PrivateSteps`, which
              adds the noise and divides; no clipping of the whole after that

The order of records is that of a site with the same seed: every epoch a new one, records of like
length together (of texts under a trained head alone a site keeps vectors of one length, and
does not sort). Everything is deterministic, so a training that was killed and goes on from its
state ends with the same bits as one that was not. (Private training draws batches and noise from
the operating system: there a repeated step is another step.)
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime import optimizer
from anabranch.edge.runtime import state as states
from anabranch.edge.runtime.data import Records
from anabranch.edge.runtime.engine import Engine
from anabranch.edge.runtime.steps import (
    Fit,
    Interrupted,
    PrivateSteps,
    Schedule,
    batches,
    joined,
    params_of,
    take_step,
)
from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.errors import DeviceError, PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Training
from anabranch.protocols.wire import digest, encode

SAVE_EVERY = 10  # steps


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often the state of a training is saved, and what it belongs to."""

    folder: Path
    about: Mapping[str, str]  # bundle, engine, precision: what the engine cannot tell
    every: int = SAVE_EVERY


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """What a training did. Losses are of single batches and must not leave a private one."""

    before: Adapter
    adapter: Adapter
    delta: Delta
    losses: NDArray[np.float64]  # (steps,): mean cross-entropy of the batch
    steps: int
    seconds: float  # of this call
    resumed_at: int  # step at which this call took over; 0: from the start
    note: str | None  # why a state that was there was not used


def num_steps(records: int, training: Training) -> int:
    """Return the optimiser steps that [training] asks of a device with so many records."""
    if training.local_steps is not None:
        return training.local_steps
    return training.local_epochs * math.ceil(records / training.batch_size)


def train(
    engine: Engine,
    records: Records,
    training: Training,
    *,
    steps: int | None = None,
    seed: int,
    schedule: Schedule | None = None,
    part: Part = WHOLE,
    proximal_mu: float = 0.0,
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    private: PrivateSteps | None = None,
) -> Trained:
    """Train the engine's adapter on the records, from where it stands or from a saved state.

    Guarantees: the same arguments give the same bits, also after a kill and a restart at any
    step; what is not in `part` is the same afterwards, bit for bit. `should_stop` is asked
    before every micro-batch. The state stays on disk until `state.discard` removes it, so that
    a kill after the last step costs nothing either. The engine holds the result.

    Raises Interrupted when `should_stop` says so, with the state saved; DeviceError for a
    damaged state, a loss that is not finite, or too little memory; IncompatibleAdapter for a
    part that the adapter does not have. After any of them the engine holds the adapter it had.
    """
    if not len(records):
        raise DeviceError("there are no records to train on")
    count = num_steps(len(records), training) if steps is None else steps
    if count < 1:
        raise ValueError(f"expected at least one step, got {count}")
    if private is not None and training.class_weights != "none":
        raise PrivacyError("private training on a device has no class weights")
    started = time.perf_counter()
    start = engine.params()
    masks = optimizer.masks_of(engine.spec, part)
    place = schedule or Schedule(total_steps=count)
    fit = Fit(engine, records, training, start, masks, place, proximal_mu, should_stop, private)
    about = _about(checkpoints, fit, seed, part, count)
    found, note = _resume(checkpoints, about)
    if found is None:
        moments = optimizer.fresh(training, masks, start)
        found = states.State(about, 0, np.zeros(0), joined(start, moments))
    try:
        last = _run(fit, found, count, seed, checkpoints)
    except BaseException:
        engine.set_params(start)
        raise
    before, after = Adapter(engine.spec, start), Adapter(engine.spec, params_of(last.arrays))
    return Trained(
        before=before,
        adapter=after,
        delta=after.minus(before, num_examples=len(records), part=part, steps=count),
        losses=last.losses,
        steps=count,
        seconds=time.perf_counter() - started,
        resumed_at=found.step,
        note=note,
    )


def _run(
    fit: Fit, found: states.State, count: int, seed: int, checkpoints: Checkpoints | None
) -> states.State:
    """Take the steps that are left; save now and then, and when told to stop."""
    now, saved = found, found.step
    order = batches(fit.records, fit.training.batch_size, seed)
    if fit.private is None:
        for _ in range(found.step):
            next(order)
    if checkpoints is not None and not found.step:
        states.save(checkpoints.folder, found)  # what was reserved for it is known from here on
    while now.step < count:
        try:
            now = take_step(fit, now, order, count)
        except Interrupted:
            if checkpoints is not None and saved < now.step:
                states.save(checkpoints.folder, now)
            raise
        due = now.step == count or now.step - saved >= (checkpoints.every if checkpoints else 0)
        if checkpoints is not None and due:
            states.save(checkpoints.folder, now)
            saved = now.step
    fit.engine.set_params(params_of(now.arrays))
    return now


def _about(
    checkpoints: Checkpoints | None, fit: Fit, seed: int, part: Part, count: int
) -> dict[str, str]:
    """Return what a state of this training says that it belongs to."""
    if checkpoints is None:
        return {}
    settings = (fit.training, part, fit.schedule.first_step, fit.schedule.total_steps, count)
    limits = getattr(fit.engine, "limits", None)  # they decide how batches are cut
    config = msgspec.json.encode(
        [*settings, fit.proximal_mu, fit.private is not None, limits], enc_hook=str
    )
    return {
        **checkpoints.about,
        "adapter": digest(encode(Adapter(fit.engine.spec, fit.start))),
        "configuration": hashlib.sha256(config).hexdigest(),
        "records": fit.records.digest(),
        "seed": str(seed),
    }


def _resume(
    checkpoints: Checkpoints | None, about: Mapping[str, str]
) -> tuple[states.State | None, str | None]:
    """Return the saved state, if it is of this training; else a sentence on why not."""
    if checkpoints is None:
        return None, None
    found = states.read(checkpoints.folder)
    if found is None:
        return None, None
    other = states.difference(about, found.about)
    if other is None:
        return found, None
    return None, f"a saved state was not used: it is of a training with another {other}"
