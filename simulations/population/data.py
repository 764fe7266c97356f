"""The records of a population: one data set in memory, and what its frozen layers say of it.

Clients are rows of the data set. What lies below the cut is computed for the rows of the clients
that take part, when they first do, and kept for all that have the same rows: in memory up to
training.cache_bytes, then in a memory-mapped file (client/tuning/activations.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.data.records import Records
from anabranch.client.tuning.activations import Activations
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.prefix import CacheStats
from anabranch.client.tuning.spill import SpillFile
from anabranch.protocols.config import RunConfig

Rows = NDArray[np.int64]
SPILL_BYTES = 4 << 30  # of activations in a file, where a folder for it is given


class SharedData:
    """All records, and the activations of those that were asked for. Every thread has its own."""

    def __init__(
        self, records: Records, folder: Path | None = None, spill_bytes: int = SPILL_BYTES
    ) -> None:
        """`folder` is where activations go that do not fit into memory; None: nowhere."""
        self.records = records
        self._folder, self._spill_bytes = folder, spill_bytes
        self._local = threading.local()

    def features(self, config: RunConfig, classifier: Classifier, rows: Rows) -> Sequence[Tensor]:
        """Return the prefix outputs of `rows`, as Examples take them.

        Views of one tensor that all clients share (Dense, Ragged), as long as it fits.
        """
        held: dict[str, Activations] = self._local.__dict__.setdefault("activations", {})
        key = f"{classifier.prefix_id}:{classifier.device}:{config.training.cache_bytes}"
        activations = held.get(key)
        if activations is None:
            held.clear()  # of another base or cut: the bounds are for all there is
            spill = None if self._folder is None else SpillFile(self._folder, self._spill_bytes)
            activations = held[key] = Activations(
                classifier, self.records.inputs, config.training.cache_bytes, spill
            )
        return activations.features(rows)

    @property
    def stats(self) -> CacheStats | None:
        """Return what this thread keeps and how often it helped; None before the first use."""
        held: dict[str, Activations] = self._local.__dict__.get("activations", {})
        return next((activations.stats for activations in held.values()), None)
