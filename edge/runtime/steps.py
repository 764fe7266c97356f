"""One step of training on a device; see training.py for the notation and the whole.

Private steps clip every record's gradient over the whole adapter: where less of it is trained,
that clips more than needed, never less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime import optimizer
from anabranch.edge.runtime.data import Records
from anabranch.edge.runtime.engine import Batch, Engine, Floats, Gradients
from anabranch.edge.runtime.joint import total
from anabranch.edge.runtime.state import State
from anabranch.protocols.errors import DeviceError, PrivacyError
from anabranch.protocols.schedule import learning_rate_factor
from anabranch.protocols.spec import Arrays
from anabranch.protocols.tables import Training

BUCKET = 8  # batches that are sorted by length together: less padding, order still random
Ints = NDArray[np.int64]


class Interrupted(DeviceError):
    """The conditions for training were lost; its state is saved and a later call goes on."""


class PrivateSteps(Protocol):
    """What makes a training private: which records, how much noise, and who keeps the account."""

    @property
    def clipping_norm(self) -> float:
        """Return C, the bound on one record's gradient over all values that are trained."""

    def sample(self, step: int) -> Ints:
        """Return the rows of a step's records, drawn independently; there may be none."""

    def finish(self, sums: Arrays, step: int) -> dict[str, Floats]:
        """Return (sum of clipped gradients + noise) / expected batch, for the same names."""


@runtime_checkable
class Pieces(Protocol):
    """An engine that cuts a batch itself, so that one can stop between micro-batches."""

    def pieces(self, batch: Batch, *, clipped: bool = False) -> list[Batch]:
        """Return the micro-batches of a batch."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where these steps stand in the whole run."""

    first_step: int = 0
    total_steps: int


@dataclass(frozen=True, eq=False)
class Fit:
    """What stays the same over the steps of one training."""

    engine: Engine
    records: Records
    training: Training
    start: dict[str, Floats]
    masks: optimizer.Masks
    schedule: Schedule
    proximal_mu: float
    should_stop: Callable[[], bool]
    private: PrivateSteps | None


def take_step(fit: Fit, now: State, order: Iterator[Ints], count: int) -> State:
    """Return the state after one more step."""
    params, moments = params_of(now.arrays), moments_of(now.arrays)
    fit.engine.set_params(params)
    _ask(fit)
    if fit.private is None:
        loss, gradients = _mean(fit, order)
    else:
        loss, gradients = _noisy(fit, fit.private, now.step)
    if not math.isfinite(loss):
        raise _diverged(fit, f"training loss is {loss}", now.step + 1, count)
    gradients = optimizer.pull(gradients, params, fit.start, fit.proximal_mu)
    gradients = optimizer.masked(gradients, fit.masks)
    if fit.private is None and fit.training.max_grad_norm is not None:
        gradients = optimizer.clip(gradients, fit.training.max_grad_norm)
    at = fit.schedule.first_step + now.step
    training = fit.training
    rate = learning_rate_factor(at, fit.schedule.total_steps, training.warmup, training.schedule)
    params, moments = optimizer.update(
        fit.training, params, gradients, moments, step=now.step, rate=rate
    )
    params = optimizer.hold(params, fit.start, fit.masks)
    if not all(np.isfinite(array).all() for array in params.values()):
        raise _diverged(fit, "adapter is not finite", now.step + 1, count)
    losses = np.append(now.losses, loss)
    return State(now.about, now.step + 1, losses, joined(params, moments))


def _mean(fit: Fit, order: Iterator[Ints]) -> tuple[float, Mapping[str, Floats]]:
    """Return loss and gradient of the next batch's weighted mean."""
    rows = next(order)
    labels = fit.records.labels
    factors = class_weights(labels, _num_labels(fit), fit.training)
    weights = np.ones(len(rows)) if factors is None else factors[labels[rows]].astype(np.float64)
    batch = fit.records.batch(rows, (weights / weights.sum()).astype(np.float32))
    summed = _sum(fit, batch, fit.engine.grads)
    return summed.loss, summed.arrays


def _noisy(fit: Fit, private: PrivateSteps, step: int) -> tuple[float, Mapping[str, Floats]]:
    """Return 0 (no loss may be told) and the noisy gradient of a sample."""
    rows = private.sample(step)
    batch = fit.records.batch(rows, np.ones(len(rows), np.float32))
    norm = private.clipping_norm
    summed = _sum(fit, batch, lambda one: clipped_sums(fit.engine, one, norm), clipped=True)
    return 0.0, private.finish(optimizer.masked(summed.arrays, fit.masks), step)


def clipped_sums(engine: Engine, batch: Batch, clipping_norm: float) -> Gradients:
    """Return Σ w_i ḡ_i of a micro-batch; a record whose gradient is not finite counts as 0.

    A refusal would tell of that record. Raises PrivacyError if the engine gives no norms.
    """
    found = engine.grads(batch, clipping_norm=clipping_norm)
    if found.norms is None or found.norms.shape != (len(batch),):
        raise PrivacyError("the engine gave no norm for every record: it does not clip")
    kept = np.isfinite(found.norms)
    if kept.all():
        return found
    feeds = {name: array[kept] for name, array in batch.feeds.items()}
    rest = Batch(feeds, batch.labels[kept], batch.weights[kept])
    return engine.grads(rest, clipping_norm=clipping_norm)


def _sum(
    fit: Fit, batch: Batch, one: Callable[[Batch], Gradients], *, clipped: bool = False
) -> Gradients:
    """Return the sums of a batch; ask before every micro-batch whether to stop."""
    pieces = [batch] if len(batch) else []
    if isinstance(fit.engine, Pieces):
        pieces = fit.engine.pieces(batch, clipped=clipped)
    parts: list[Gradients] = []
    for piece in pieces:
        if parts:
            _ask(fit)
        parts.append(one(piece))
    return total(fit.engine.spec, parts)


def _ask(fit: Fit) -> None:
    if fit.should_stop():
        raise Interrupted("training was stopped; its state is kept, and it can go on later")


def _diverged(fit: Fit, what: str, step: int, count: int) -> DeviceError:
    return DeviceError(
        f"{what} at step {step} of {count}: lower training.learning_rate "
        f"(now {fit.training.learning_rate}) or set max_grad_norm"
    )


def _num_labels(fit: Fit) -> int:
    explicit = fit.training.class_weights
    return len(explicit) if isinstance(explicit, tuple) else int(fit.records.labels.max()) + 1


def class_weights(labels: Ints, num_labels: int, training: Training) -> Floats | None:
    """Return one factor per label: n / (k · n_c) if balanced, the configured ones, or None."""
    if training.class_weights == "none":
        return None
    if training.class_weights == "balanced":
        counts = np.bincount(labels, minlength=num_labels)
        balanced = len(labels) / (np.sum(counts > 0) * np.maximum(counts, 1))
        return np.where(counts > 0, balanced, 0.0).astype(np.float32)
    return np.array(training.class_weights, np.float32)


def batches(records: Records, batch_size: int, seed: int) -> Iterator[Ints]:
    """Yield rows for ever: every epoch a new order, records of like length together."""
    sizes, rng = records.lengths, np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(records))
        chunks = []
        for first in range(0, len(order), batch_size * BUCKET):
            bucket = order[first : first + batch_size * BUCKET]
            bucket = bucket[np.argsort(sizes[bucket], kind="stable")]
            chunks += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        for i in rng.permutation(len(chunks)):
            yield chunks[i]


def joined(params: Arrays, moments: Arrays) -> dict[str, Floats]:
    """Return the arrays of a state."""
    return {f"w/{name}": a for name, a in params.items()} | dict(moments)


def params_of(arrays: Arrays) -> dict[str, Floats]:
    """Return the adapter in a state's arrays."""
    return {name[2:]: a for name, a in arrays.items() if name.startswith("w/")}


def moments_of(arrays: Arrays) -> dict[str, Floats]:
    """Return the optimiser's arrays in a state's."""
    return {name: a for name, a in arrays.items() if not name.startswith("w/")}
