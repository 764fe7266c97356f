"""Our methods, chosen on held-out parts of the training records; no test record is read here.

Every candidate of a fixed grid is scored by 5-fold cross-validation over the training records
(stratified per hospital, scaled by the other four folds), repeated with other folds. The score
is the accuracy that the table shows: the mean of the four hospitals', or pooled. Among equals
the first in the grid is taken. All start at zero; 15 rounds, as published.

    shared     one model for all: FedAvg, FedAdam, FedYogi, FedNova
    personal   one of the two shared models that were chosen, then further steps at each
               hospital, held back by λ/2 · ‖w − w_shared‖² (Ditto's objective; Li et al. 2021,
               arXiv:2012.04221, eq. 1); that model stays at the hospital
    alone      the same further steps from zero, without a federation
    private    one model for all, DP gradient descent on full batches (q = 1) at ε = 1

Rates are those of the product's two logits: twice as large for one logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import msgspec
import numpy as np

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Privacy, Server, Training
from benchmarks.fed_heart.data import Floats, Split, Table, folds
from benchmarks.fed_heart.federation import (
    RUN,
    changed,
    counts,
    federated,
    sizes,
    trained,
    with_mean,
    zero_start,
)
from benchmarks.fed_heart.published import DELTA

FOLDS = 5
BATCH = 32
FULL_BATCH = 1000  # more than any hospital has: q = 1
MEAN, POOLED = 4, 5  # columns of the table

C = TypeVar("C")
Score = Callable[[Split, int], Floats]  # (split, seed) -> records classified right, as `counts`


@dataclass(frozen=True, kw_only=True)
class Personal:
    """Steps at each hospital after the last round."""

    base: RunConfig | None  # what made the shared model; None: zero
    training: Training
    pull: float  # λ


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What validation chose; `validation` holds field -> its row of validation accuracies."""

    for_mean: RunConfig  # one model, by the mean of four
    for_pooled: RunConfig  # one model, by the pooled accuracy
    personal: Personal  # on top of one of them, by the mean of four
    alone: Personal  # by the mean of four
    private: RunConfig  # ε = 1, by the mean of four
    validation: dict[str, Floats]


def shared_grid() -> list[RunConfig]:
    """Return the candidates without privacy: one model for all."""
    weightings = ("examples", "uniform")
    plain = [
        shared(rate, steps, weighting)
        for weighting in weightings
        for steps in (10, 50)
        for rate in (0.01, 0.03, 0.1, 0.3)
    ]
    adaptive = [
        msgspec.structs.replace(
            shared(0.03, 10, weighting),
            server=Server(optimizer=kind, learning_rate=rate, beta2=0.99, tau=1e-3),
        )
        for kind in ("adam", "yogi")
        for weighting in weightings
        for rate in (0.01, 0.03, 0.1)
    ]
    nova = [
        changed(
            RUN,
            training={"learning_rate": rate, "batch_size": 8, "local_epochs": 1},
            federation={"normalize_steps": True},
        )
        for rate in (0.01, 0.03, 0.1)
    ]
    return [*plain, *adaptive, *nova]


def shared(rate: float, steps: int, weighting: str) -> RunConfig:
    """Return FedAvg with SGD of `steps` steps per round."""
    return changed(
        RUN,
        training={"learning_rate": rate, "batch_size": BATCH, "local_steps": steps},
        federation={"weighting": weighting},
    )


def personal_grid(bases: Sequence[RunConfig | None]) -> list[Personal]:
    """Return the candidates for the steps after the last round."""
    return [
        Personal(
            base=base,
            training=msgspec.structs.replace(
                RUN.training, learning_rate=rate, batch_size=BATCH, local_steps=steps
            ),
            pull=pull,
        )
        for base in bases
        for pull in (1.0, 0.1, 0.0)
        for steps in (10, 50, 250)
        for rate in (0.03, 0.3)
    ]


def private_grid() -> list[RunConfig]:
    """Return the candidates with ε = 1: one step on all records per round."""
    return [
        msgspec.structs.replace(
            changed(
                RUN,
                training={"learning_rate": rate, "batch_size": FULL_BATCH, "local_steps": 1},
                federation={"rounds": rounds, "weighting": weighting},
            ),
            privacy=Privacy(epsilon=1.0, delta=DELTA, clipping=clipping, clipping_norm=1.0),
        )
        for weighting in ("examples", "uniform")
        for clipping in ("flat", "automatic")
        for rounds in (5, 10, 20)
        for rate in (0.25, 0.5, 1.0, 2.0)
    ]


def choose(train: Sequence[Table], repeats: int, every: int = 1) -> Choices:
    """Return what cross-validation over the training records `train` chooses.

    `every` = 3 tries every third candidate only: for a quick run.
    """
    splits = [(seed, folds(train, FOLDS, seed)) for seed in range(repeats)]
    for_mean, for_pooled = chosen(shared_grid()[::every], score_of, splits, MEAN, POOLED)
    bases = [for_mean[0], for_pooled[0]]
    (personal,) = chosen(personal_grid(bases)[::every], score_of_personal, splits, MEAN)
    (alone,) = chosen(personal_grid([None])[::every], score_of_personal, splits, MEAN)
    (private,) = chosen(private_grid()[::every], score_of, splits, MEAN)
    return Choices(
        for_mean=for_mean[0],
        for_pooled=for_pooled[0],
        personal=personal[0],
        alone=alone[0],
        private=private[0],
        validation={
            "for_mean": for_mean[1],
            "for_pooled": for_pooled[1],
            "personal": personal[1],
            "alone": alone[1],
            "private": private[1],
        },
    )


def chosen(
    grid: Sequence[C],
    score: Callable[[C], Score],
    splits: Sequence[tuple[int, Sequence[Split]]],
    *columns: int,
) -> list[tuple[C, Floats]]:
    """Return for each column of the table the best of `grid` and its validation accuracies."""
    rows = [validated(score(candidate), splits) for candidate in grid]
    first = [int(np.argmax([row[column] for row in rows])) for column in columns]
    return [(grid[i], rows[i]) for i in first]


def score_of(config: RunConfig) -> Score:
    """Return how a configuration with one model for all is scored on one split."""
    return lambda split, seed: counts(shared_model(config, split, seed), split)


def validated(score: Score, splits: Sequence[tuple[int, Sequence[Split]]]) -> Floats:
    """Return validation accuracies as a row of the table: over all folds, mean over repeats."""
    rows = []
    for seed, parts in splits:
        right = np.sum([score(split, seed) for split in parts], axis=0)
        rows.append(with_mean(right / np.sum([sizes(split) for split in parts], axis=0)))
    return np.asarray(np.mean(rows, axis=0), np.float32)


def score_of_personal(personal: Personal) -> Score:
    """Return how one model per hospital is scored on one split."""
    return lambda split, seed: counts(personal_models(personal, split, seed), split)


def shared_model(config: RunConfig, split: Split, seed: int) -> Adapter:
    """Return the one model that `config` makes of a split's training records."""
    return federated(msgspec.structs.replace(config, seed=seed), split.train, zero_start())


def personal_models(personal: Personal, split: Split, seed: int) -> list[Adapter]:
    """Return each hospital's own model, made of the shared one and its training records."""
    if personal.base is None:
        return tailored(personal, zero_start(), split, seed)
    base = _kept(msgspec.json.encode(personal.base), split, seed)
    return tailored(personal, base, split, seed)


@lru_cache(maxsize=64)
def _kept(config: bytes, split: Split, seed: int) -> Adapter:
    """Return the shared model of a configuration in JSON: many candidates begin with it."""
    return shared_model(msgspec.json.decode(config, type=RunConfig), split, seed)


def tailored(personal: Personal, model: Adapter, split: Split, seed: int) -> list[Adapter]:
    """Return each hospital's own model, made of `model` and its training records."""
    return [
        trained(personal.training, examples, model, seed, personal.pull) for examples in split.train
    ]


def with_epsilon(config: RunConfig, epsilon: float) -> RunConfig:
    """Return a private configuration with another budget."""
    return changed(config, privacy={"epsilon": epsilon})
