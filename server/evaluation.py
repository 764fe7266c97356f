"""What the coordinator computes with a model of its own: the first adapter, and metrics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anabranch.client.data.records import Records
from anabranch.client.models import MODELS, Models
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.metrics import evaluate
from anabranch.client.tuning.training import predict
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Device


def require_shared_model(config: RunConfig, **records: object) -> None:
    """Raise ConfigError for `records` (validation, test) of a coordinator without a whole model.

    With fedsa or a local head, a part of every model stays at its site.
    """
    given = [name for name, one in records.items() if one is not None]
    if config.kept is not None and given:
        raise ConfigError(f"{given[0]}: {no_shared_model(config)}")


def no_shared_model(config: RunConfig) -> str:
    """Return why the coordinator cannot evaluate or release a model, and what it can do."""
    what, why = (
        ("B of every layer", 'federation.method = "fedsa"')
        if config.method == "fedsa"
        else ("the head", 'personal.head = "local"')
    )
    return (
        f"with {why}, {what} stays at each site, so the coordinator has no whole model to "
        "evaluate or release. Let the sites evaluate theirs: training.holdout above 0 and "
        "federation.client_evaluation = true"
    )


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
