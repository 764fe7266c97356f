"""What the coordinator computes with a model of its own: the first adapter, and metrics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anabranch.client.data.records import Records
from anabranch.client.site import MODELS, Models
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.metrics import evaluate
from anabranch.client.tuning.training import predict
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import Device, RunConfig


def initial_adapter(config: RunConfig) -> Adapter:
    """Return the adapter that every run of `config` starts from: seeded A, zero B and head."""
    return read_adapter(load_classifier(config))


def evaluator(
    config: RunConfig, records: Records, models: Models = MODELS, device: Device = "cpu"
) -> Callable[[Adapter], dict[str, float]]:
    """Return a function from an adapter to its metrics on the coordinator's `records`."""

    def measure(adapter: Adapter) -> dict[str, float]:
        return evaluate(logits(config, adapter, records, models, device), records.labels)

    return measure


def logits(
    config: RunConfig,
    adapter: Adapter,
    records: Records,
    models: Models = MODELS,
    device: Device = "cpu",
) -> NDArray[np.float32]:
    """Return the logits (n, labels) of `adapter` on `records`."""
    classifier = models.classifier(config, device)
    load_adapter(classifier, adapter)
    return predict(classifier, models.cache(config).prepare(classifier, records.inputs))
