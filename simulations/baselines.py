"""What a federation must beat, and what it cannot: majority, linear probe, alone, pooled.

All of them see the same records and are chosen on the same validation records; test
records are touched once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anabranch.client.data.records import Records
from anabranch.client.memory import give_back
from anabranch.client.models import Models
from anabranch.client.site import round_seed
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.metrics import evaluate
from anabranch.client.tuning.training import Schedule, fit, predict, steps_per_round
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Device, Federation, Lora, Personal, Uplink
from anabranch.server.evaluation import initial_adapter

PENALTIES = (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 1e-1)  # L2 weights tried by the linear probe

Logits = NDArray[np.float32]


def majority(train: Records, test: Records, num_labels: int) -> Logits:
    """Return logits (n, labels) that always choose the most frequent training label."""
    counts = train.label_counts(num_labels)
    return np.tile(np.log(np.maximum(counts, 1e-9)).astype(np.float32), (len(test), 1))


def linear_probe(
    config: RunConfig,
    train: Records,
    validation: Records,
    test: Records,
    models: Models,
    device: Device = "cpu",
) -> Logits:
    """Return test logits of multinomial logistic regression on the frozen embeddings.

    Full-batch L-BFGS; the L2 penalty with the best validation accuracy is taken.
    """
    frozen = msgspec.structs.replace(without_federation(config), lora=Lora(rank=0))
    classifier = models.classifier(frozen, device)
    cache = models.cache(frozen)
    parts = [
        torch.stack(list(cache.prepare(classifier, part.inputs))).cpu()
        for part in (train, validation, test)
    ]
    x, x_validation, x_test = parts
    labels = torch.from_numpy(train.labels)
    best = (-1.0, np.zeros((0, 0), np.float32))
    weight = torch.zeros(len(config.task.labels), x.shape[1] + 1)
    for penalty in sorted(PENALTIES, reverse=True):  # each start is the stiffer solution
        weight = _logistic_regression(x, labels, weight, penalty)
        guess = _logits(x_validation, weight).argmax(1).numpy()
        accuracy = float((guess == validation.labels).mean())
        if accuracy > best[0]:
            best = (accuracy, _logits(x_test, weight).numpy())
    return best[1]


def train_alone(
    config: RunConfig,
    name: str,
    train: Records,
    validation: Records,
    models: Models,
    device: Device = "cpu",
    on_round: Callable[[int, dict[str, float]], None] = lambda _, __: None,
) -> Adapter:
    """Return the adapter trained on `train` alone for as many rounds as the federation has.

    The round with the best validation accuracy is taken, as in the federation. How a federation
    merges does not matter here: the adapter is that of [lora].
    """
    config = without_federation(config)
    classifier = models.classifier(config, device)
    load_adapter(classifier, initial_adapter(config))
    cache = models.cache(config)
    examples = Examples(cache.prepare(classifier, train.inputs), torch.from_numpy(train.labels))
    held = cache.prepare(classifier, validation.inputs)
    steps = steps_per_round(len(train), config.training)
    rounds = config.federation.rounds
    best, adapter = -1.0, read_adapter(classifier)
    for number in range(1, rounds + 1):
        fit(
            classifier,
            examples,
            config.training,
            steps=steps,
            schedule=Schedule(first_step=(number - 1) * steps, total_steps=rounds * steps),
            seed=round_seed(config.seed, name, number),
        )
        give_back()
        metrics = evaluate(predict(classifier, held), validation.labels)
        on_round(number, metrics)
        if metrics["accuracy"] > best:
            best, adapter = metrics["accuracy"], read_adapter(classifier)
    return adapter


def without_federation(config: RunConfig) -> RunConfig:
    """Return `config` with the tables that say how sites' deltas travel and are merged left out."""
    rounds = Federation(rounds=config.federation.rounds, method="fedavg")
    return msgspec.structs.replace(
        config, federation=rounds, server=None, robust=None, uplink=Uplink(), personal=Personal()
    )


def _logistic_regression(x: Tensor, labels: Tensor, start: Tensor, penalty: float) -> Tensor:
    weight = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(_logits(x, weight), labels)
        loss = loss + penalty * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T + b for weight = [W | b] of shape (labels, d + 1)."""
    return x @ weight[:, :-1].T + weight[:, -1]
