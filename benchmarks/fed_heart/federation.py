"""One run over the hospitals with the product's own parts, without its transport.

    rule_for(config)            what the coordinator does
    fit, fit_private            what a hospital does; plan_for decides the noise
    round_seed                  the order of a hospital's records in a round

The model is the product's table classifier "logistic": two logits z_0, z_1, softmax. FLamby has
one logit u and a sigmoid. With z_1 − z_0 = u and z_0 = −z_1 at the start both give the same
probabilities, and each of z_0, z_1 gets ± half of what moves u:

    SGD on u at rate η          = SGD on z at rate η / 2           FedProx: μ becomes 2 μ
    Adam, Yogi, Adagrad at η, τ = the same on z at η / 2, τ / 2    (on client or server)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np
import torch

from anabranch.client.privacy import plan_for
from anabranch.client.site import round_seed
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.private import fit_private
from anabranch.client.tuning.training import Schedule, fit, predict, steps_per_round
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task, Training
from anabranch.server.aggregation.choose import rule_for
from benchmarks.fed_heart.data import HOSPITALS, NUM_FEATURES, Floats, Split

PHYSICAL_BATCH = 1000  # records: more than any hospital has
FEATURES = {f"x{i:02}": Column(type="number") for i in range(NUM_FEATURES)}
RUN = RunConfig(
    name="fed-heart",
    task=Task(kind="tabular-classification", labels=("healthy", "disease")),
    data=Contract(columns=FEATURES | {"label": Column(type="label")}),
    model=Model(base="logistic"),
    lora=Lora(rank=0),
    federation=Federation(rounds=15),
    training=Training(optimizer="sgd", momentum=0.0, max_grad_norm=None),
)


@lru_cache(maxsize=1)
def classifier() -> Classifier:
    """Return logistic regression over 13 features; every function here loads what it trains."""
    return load_classifier(RUN)


def zero_start() -> Adapter:
    """Return the product's start: all zero."""
    shapes = classifier().spec.tensors
    return Adapter(classifier().spec, {name: np.zeros(s, np.float32) for name, s in shapes})


def random_start(seed: int) -> Adapter:
    """Return FLamby's start: torch's random nn.Linear(13, 1) right after manual_seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(NUM_FEATURES, 1)
    weight, bias = layer.weight.detach() / 2, layer.bias.detach() / 2
    arrays = {
        "head.bias": torch.cat([-bias, bias]).numpy(),
        "head.weight": torch.cat([-weight, weight]).numpy(),
    }
    return Adapter(classifier().spec, arrays)


def federated(config: RunConfig, hospitals: Sequence[Examples], start: Adapter) -> Adapter:
    """Return the adapter after all rounds of `config`; every hospital takes part in each."""
    rule = rule_for(config)
    state, adapter = rule.init(start)
    for number in range(1, config.federation.rounds + 1):
        sent = rule.open(state, adapter, number)
        deltas = (
            local_delta(config, sent, examples, name, number)
            for name, examples in zip(HOSPITALS, hospitals, strict=True)
        )
        state, merged = rule.merge(state, sent, deltas)
        adapter = merged.adapter
    return adapter


def local_delta(
    config: RunConfig, sent: Adapter, examples: Examples, name: str, number: int
) -> Delta:
    """Return what one hospital learns in one round, private if the configuration is."""
    model = classifier()
    load_adapter(model, sent)
    steps, seed = steps_per_round(len(examples), config.training), config.seed
    total, first = config.federation.rounds * steps, (number - 1) * steps
    if config.privacy is None:
        fit(
            model,
            examples,
            config.training,
            steps=steps,
            schedule=Schedule(first_step=first, total_steps=total),
            seed=round_seed(seed, name, number),
            proximal_mu=config.federation.proximal_mu,
        )
    else:
        # Noise from a seed makes the figures repeatable. A site never gives a generator.
        generator = torch.Generator().manual_seed(round_seed(seed, name, number) >> 1)
        plan = plan_for(config.privacy, config.training, config.federation.rounds, len(examples))
        fit_private(
            model,
            examples,
            plan,
            config.training,
            steps=steps,
            step_offset=first,
            generator=generator,
            physical_batch=PHYSICAL_BATCH,
        )
    return read_adapter(model).minus(sent, num_examples=len(examples), steps=steps)


def trained(
    training: Training, examples: Examples, start: Adapter, seed: int, pull: float = 0.0
) -> Adapter:
    """Return what one place learns alone from `start`, held back by pull/2 · ‖w − start‖²."""
    model = classifier()
    load_adapter(model, start)
    steps = steps_per_round(len(examples), training)
    schedule = Schedule(total_steps=steps)
    fit(model, examples, training, steps=steps, schedule=schedule, seed=seed, proximal_mu=pull)
    return read_adapter(model)


def correct(adapter: Adapter, examples: Examples) -> int:
    """Return how many records `adapter` classifies as their label."""
    model = classifier()
    load_adapter(model, adapter)
    found = predict(model, examples.features).argmax(axis=1)
    return int((found == examples.labels.numpy()).sum())


def counts(adapters: Adapter | Sequence[Adapter], split: Split) -> Floats:
    """Return the records classified right: four hospitals' own, and pooled, shape (5,).

    One adapter for all, or one per hospital: then the pooled entry is the mean of theirs.
    """
    each = [adapters] * len(split.test) if isinstance(adapters, Adapter) else list(adapters)
    own = [correct(a, test) for a, test in zip(each, split.test, strict=True)]
    pooled = np.mean([correct(a, split.pooled_test) for a in dict.fromkeys(each)])
    return np.array([*own, pooled], np.float32)


def sizes(split: Split) -> Floats:
    """Return the number of records behind each entry of `counts`."""
    return np.array([*(len(t) for t in split.test), len(split.pooled_test)], np.float32)


def with_mean(shares: Floats) -> Floats:
    """Return (5,) shares as a row of the table, (6,): hospitals, their mean, pooled."""
    return np.array([*shares[:4], shares[:4].mean(), shares[4]], np.float32)


def changed(config: RunConfig, **tables: dict[str, object]) -> RunConfig:
    """Return `config` with fields of its tables replaced: changed(RUN, training={…})."""
    new = {
        name: msgspec.structs.replace(getattr(config, name), **fields)
        for name, fields in tables.items()
    }
    return msgspec.structs.replace(config, **new)
