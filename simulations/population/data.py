"""The records of a population: one data set in memory, and which of its rows each client has."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.data.records import Records
from anabranch.client.site import MODELS, Models
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Dense, is_sequence
from anabranch.protocols.config import RunConfig

Rows = NDArray[np.int64]


class SharedData:
    """All records, and what the frozen layers say of each of them, computed once."""

    def __init__(self, records: Records, models: Models = MODELS) -> None:
        self.records = records
        self._models = models
        self._local = threading.local()

    def features(self, config: RunConfig, classifier: Classifier, rows: Rows) -> Sequence[Tensor]:
        """Return the prefix outputs of `rows`, as Examples take them."""
        held: dict[str, Sequence[Tensor]] = self._local.__dict__.setdefault("features", {})
        key = f"{classifier.prefix_id}:{classifier.device}"
        everything = held.get(key)
        if everything is None:
            cache = self._models.cache(config)
            everything = cache.prepare(classifier, self.records.inputs)
            if isinstance(everything, list) and not is_sequence(everything[0]):
                everything = Dense(torch.stack(everything))
            held.clear()
            held[key] = everything
        if isinstance(everything, Dense):
            return everything.subset(rows.tolist())
        return [everything[i] for i in rows]
