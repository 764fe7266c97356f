"""One client's local training, without privacy: epochs over prepared examples, in place.

Notation: w the values that are trained, w_t what they were when the round began, μ the FedProx
weight, P a further penalty (personal.py).

    minimise  F(w) + μ/2 · ‖w − w_t‖² + P(w)    (FedProx; Li et al. 2020, arXiv:1812.06127, eq. 2)

What is trained is one part of the adapter (active.py), by default all of it.
Examples hold the classifier's prefix output, so an epoch costs the trainable part alone. A fit
that was stopped goes on from its last state (checkpoint.py), with the same result bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.tuning.active import Active, only
from anabranch.client.tuning.checkpoint import Progress, State, put_back, tensors_of
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate, fetch, lengths
from anabranch.client.tuning.lora import HEAD
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import DataError, RunError
from anabranch.protocols.part import Part
from anabranch.protocols.schedule import learning_rate_factor
from anabranch.protocols.tables import Training

BUCKET = 8  # batches that are sorted by length together: less padding, order still random
PREDICT_BATCH = 64  # records


class Diverged(RunError):
    """Training came to values or a loss that are not finite."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where this round's steps stand in the whole run."""

    first_step: int = 0
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a round of local training did."""

    steps: int
    loss: float | None  # mean cross-entropy over the records of the last epoch; None: no step
    seconds: float


def steps_per_round(num_examples: int, training: Training) -> int:
    """Return the optimiser steps of one round on a site with `num_examples` records."""
    if training.local_steps is not None:
        return training.local_steps
    return training.local_epochs * math.ceil(num_examples / training.batch_size)


def fit(
    classifier: Classifier,
    examples: Examples,
    training: Training,
    *,
    steps: int,
    schedule: Schedule,
    seed: int,
    proximal_mu: float = 0.0,
    part: Part = WHOLE,
    kept: Part | None = None,
    penalty: Callable[[], Tensor] | None = None,
    progress: Progress | None = None,
    to_the_end: bool = False,
) -> Fit:
    """Train what is in `part` or `kept`, in place, for `steps` steps.

    Every other value is the same afterwards, bit for bit, and adds nothing to the norm that
    is clipped. `penalty` is added to the loss of every step; the reported loss is without it.
    No steps change nothing. `progress` is told of every step and says where to go on from; what
    it raises ends the fit. Raises Diverged if a loss is not finite, at once or, `to_the_end`, after
    the last step, so that no time tells of it; DataError for steps without records,
    IncompatibleAdapter for a part that the adapter does not have. Either way all tensors of the
    adapter can be trained afterwards.
    """
    started = time.perf_counter()
    if steps and not len(examples):
        raise DataError(f"{steps} steps, but no records to train on")
    with only(classifier, part, kept) as active:
        losses = _run(
            classifier,
            examples,
            training,
            active,
            steps=steps,
            schedule=schedule,
            seed=seed,
            proximal_mu=proximal_mu,
            penalty=penalty,
            progress=progress,
            to_the_end=to_the_end,
        )
    if not all(math.isfinite(loss) for loss, _ in losses):
        raise diverged([loss for loss, _ in losses], steps, training)
    loss = _mean(losses[-math.ceil(len(examples) / training.batch_size) :]) if steps else None
    return Fit(steps=steps, loss=loss, seconds=time.perf_counter() - started)


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    """Return the mean over records of (mean, records) pairs."""
    return sum(x * n for x, n in losses) / sum(n for _, n in losses)


def _run(
    classifier: Classifier,
    examples: Examples,
    training: Training,
    active: Active,
    *,
    steps: int,
    schedule: Schedule,
    seed: int,
    proximal_mu: float,
    penalty: Callable[[], Tensor] | None,
    progress: Progress | None,
    to_the_end: bool,
) -> list[tuple[float, int]]:
    """Take the steps that are left; return (mean cross-entropy, records) of every batch."""
    device = classifier.device
    optimizer = make_optimizer(active.parameters, training)
    weights = class_weights(examples.labels, classifier.num_labels, training)
    order = batches(examples, training.batch_size, np.random.default_rng(seed))
    losses: list[tuple[float, int]] = []

    def state() -> State:
        tensors = tensors_of(active.parameters, optimizer)
        return State(step=len(losses), tensors=tensors, losses=tuple(losses))

    if progress is not None and (before := progress.resumed()) is not None:
        put_back(before.tensors, active.parameters, optimizer)
        losses += before.losses
        for _ in losses:  # one per step: the order is wound forward
            next(order)
    for step in range(len(losses), steps):
        batch = examples.take(next(order))
        features, mask = collate(batch.features)
        labels = batch.labels.to(device)
        logits = classifier(features.to(device), None if mask is None else mask.to(device))
        loss = weighted_cross_entropy(logits, labels, weights)
        optimizer.zero_grad(set_to_none=True)
        (loss if penalty is None else loss + penalty()).backward()
        active.pull(proximal_mu)
        active.mask_gradients()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(active.parameters.values(), training.max_grad_norm)
        _set_rate(optimizer, training, schedule, step)
        optimizer.step()
        active.hold()
        losses.append((float(loss.detach()), len(labels)))
        if not to_the_end and not math.isfinite(losses[-1][0]):
            break
        if progress is not None:
            progress.after(step + 1, steps, state)
    return losses


def diverged(
    losses: Sequence[float] | NDArray[np.float64], steps: int, training: Training
) -> Diverged:
    """Return the error of a fit of so many steps for its first loss that is not finite."""
    step = int(np.flatnonzero(~np.isfinite(losses))[0])
    return Diverged(
        f"training loss is {losses[step]} at step {step + 1} of {steps}: lower "
        f"training.learning_rate (now {training.learning_rate}) or set max_grad_norm"
    )


def predict(classifier: Classifier, features: Sequence[Tensor]) -> NDArray[np.float32]:
    """Return logits (n, labels) of prepared features, in their order."""
    device = classifier.device
    sizes = lengths(features)
    order = sorted(range(len(features)), key=lambda i: sizes[i])
    result = np.zeros((len(features), classifier.num_labels), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), PREDICT_BATCH):
            chosen = order[start : start + PREDICT_BATCH]
            x, mask = collate(fetch(features, chosen))
            logits = classifier(x.to(device), None if mask is None else mask.to(device))
            result[chosen] = logits.float().cpu().numpy()
    return result


def make_optimizer(named: Mapping[str, nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Return the configured optimiser with fresh state; the head has its own learning rate."""
    head_rate = training.head_learning_rate or training.learning_rate
    head = [p for name, p in named.items() if name.startswith(f"{HEAD}.")]
    rest = [p for name, p in named.items() if not name.startswith(f"{HEAD}.")]
    rates = ((rest, training.learning_rate), (head, head_rate))
    groups = [{"params": params, "lr": rate} for params, rate in rates if params]
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            groups, momentum=training.momentum, weight_decay=training.weight_decay
        )
    return torch.optim.AdamW(groups, weight_decay=training.weight_decay)


def class_weights(labels: Tensor, num_labels: int, training: Training) -> Tensor | None:
    """Return one factor per label: n / (k · n_c) if balanced, the configured ones, or None."""
    if training.class_weights == "none":
        return None
    if training.class_weights == "balanced":
        counts = torch.bincount(labels, minlength=num_labels).float()
        present = counts > 0
        return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0)
    return torch.tensor(training.class_weights)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return Σ w_{y_i} ℓ_i / Σ w_{y_i} over the batch (the plain mean without weights)."""
    if weights is None:
        return functional.cross_entropy(logits, labels)
    return functional.cross_entropy(logits, labels, weight=weights.to(logits.device))


def _set_rate(
    optimizer: torch.optim.Optimizer, training: Training, schedule: Schedule, step: int
) -> None:
    factor = learning_rate_factor(
        schedule.first_step + step, schedule.total_steps, training.warmup, training.schedule
    )
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def batches(examples: Examples, batch_size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield indices for ever: every epoch a new order, records of like length together."""
    sizes = np.array(lengths(examples.features))
    while True:
        order = rng.permutation(len(examples))
        chunks = []
        for start in range(0, len(order), batch_size * BUCKET):
            bucket = order[start : start + batch_size * BUCKET]
            bucket = bucket[np.argsort(sizes[bucket], kind="stable")]
            chunks += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        for i in rng.permutation(len(chunks)):
            yield chunks[i].tolist()
