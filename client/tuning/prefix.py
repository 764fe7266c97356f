"""Frozen-prefix cache: what the frozen layers below the cut say of a record is computed once.

With L layers of which the last m are trained, a training step costs about 2m of L + m parts
when the prefix is cached, so epochs and rounds after the first run up to (L + m) / 2m times
as fast. The values are those of `Classifier.prefix`, to rounding: nothing in the prefix is
trained, and nothing in it is random.

Entries are found by (what the prefix computes, SHA-256 of the encoded record). Memory is
limited: first come, first kept. What no longer fits goes into a memory-mapped file where the
caller allows one (spill.py), bit for bit the same; what fits into neither is computed again every
time it is asked for. Nothing is evicted for other records of the same prefix: an epoch visits all
of them once, and an LRU of a cyclic scan would keep nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate, is_sequence
from anabranch.client.tuning.spill import SpillFile

log = logging.getLogger(__name__)

# Rows (tokens, patches, table rows) per call of the prefix: enough to fill the matrix kernels,
# few enough for activations to stay in the CPU's cache.
ROWS_PER_BATCH = 1024
RECORDS_PER_BATCH = 256


@dataclass(frozen=True)
class CacheStats:
    """What is in a PrefixCache, and how often it helped, in records."""

    cached: int
    bytes: int
    limit_bytes: int
    hits: int  # asked for and found
    computed: int  # asked for and computed
    too_many: int  # computed and not kept, for lack of room
    spilled: int = 0  # of `cached`: in the file
    spilled_bytes: int = 0
    spill_limit_bytes: int = 0


class PrefixCache:
    """Prefix outputs by record, up to `limit_bytes`. For one thread at a time."""

    def __init__(self, limit_bytes: int, spill: SpillFile | None = None) -> None:
        """`spill` takes what does not fit into memory; None: that is computed again."""
        if limit_bytes < 0:
            raise ValueError(f"expected limit_bytes >= 0, got {limit_bytes}")
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._spill = spill
        self._spilled = 0  # entries in the file, all of one prefix
        self._spilled_of: str | None = None  # that prefix
        self._entries: dict[str, dict[bytes, Tensor]] = {}  # prefix -> record -> output
        self._hits = self._computed = self._too_many = 0
        self._warned = False

    @property
    def stats(self) -> CacheStats:
        """Return the counters as they are now."""
        return CacheStats(
            cached=sum(len(entries) for entries in self._entries.values()),
            bytes=self._bytes,
            limit_bytes=self._limit_bytes,
            hits=self._hits,
            computed=self._computed,
            too_many=self._too_many,
            spilled=self._spilled,
            spilled_bytes=0 if self._spill is None else self._spill.used_bytes,
            spill_limit_bytes=0 if self._spill is None else self._spill.limit_bytes,
        )

    def clear(self) -> None:
        """Forget all entries, and delete the file."""
        self._entries.clear()
        self._bytes = 0
        self._delete_file()

    def prepare(
        self, classifier: Classifier, inputs: Sequence[str] | NDArray[np.float32]
    ) -> Sequence[Tensor]:
        """Return the prefix output of every input, in order, on the classifier's device.

        A list when all of them fit. Otherwise a `Features`, which computes what is missing when
        it is asked for: fetch batches with `take` (Examples.take does).
        """
        encoded = classifier.encode(inputs)
        if classifier.cut == 0:
            return [x.to(classifier.device) for x in encoded]
        features = Features(self, classifier, encoded)
        missing = self._missing(features, range(len(encoded)))
        for batch in _batches(encoded, missing):
            if not self._store(features, batch, self._compute(features, batch)):
                self._warn(len(encoded))
                return features
        self._hits += len(encoded) - len(missing)
        entries = self._entries.get(features.prefix_id, {})
        return [entries[key] for key in features.keys]

    def take(self, features: Features, indices: Sequence[int]) -> list[Tensor]:
        """Return outputs at `indices`: cached ones, and what is missing computed in batches."""
        entries = self._entries.get(features.prefix_id, {})
        found = {i: entries[k] for i in indices if (k := features.keys[i]) in entries}
        missing = self._missing(features, indices)
        self._hits += len(found)
        self._too_many += len(missing)
        for batch in _batches(features.encoded, missing):
            found |= zip(batch, self._compute(features, batch), strict=True)
        if missing:  # the same record may have been asked for at several indices
            by_key = {features.keys[i]: output for i, output in found.items()}
            return [by_key[features.keys[i]] for i in indices]
        return [found[i] for i in indices]

    def _missing(self, features: Features, indices: Sequence[int]) -> list[int]:
        """Return one index for each different record at `indices` that is not cached."""
        entries = self._entries.get(features.prefix_id, {})
        return list({k: i for i in indices if (k := features.keys[i]) not in entries}.values())

    def _compute(self, features: Features, batch: Sequence[int]) -> list[Tensor]:
        classifier = features.classifier
        self._computed += len(batch)
        x, mask = collate([features.encoded[i] for i in batch])
        device = classifier.device
        with torch.inference_mode(False):  # what is kept may be trained on later
            h = classifier.prefix(x.to(device), None if mask is None else mask.to(device))
        if mask is None or not is_sequence(h[0]):
            return [row.clone() for row in h]
        # Clones, so that the padding is not kept alive.
        return [row[: len(features.encoded[i])].clone() for i, row in zip(batch, h, strict=True)]

    def _store(self, features: Features, batch: Sequence[int], outputs: Sequence[Tensor]) -> bool:
        """Keep `outputs`; return False when one of them did not fit."""
        for i, output in zip(batch, outputs, strict=True):
            size = output.numel() * output.element_size()
            self._make_room(size, features.prefix_id)
            kept: Tensor | None = output
            if self._bytes + size <= self._limit_bytes:
                self._bytes += size
            else:
                kept = self._spill_over(output, features.prefix_id)
            if kept is None:
                return False
            self._entries.setdefault(features.prefix_id, {})[features.keys[i]] = kept
        return True

    def _spill_over(self, output: Tensor, prefix_id: str) -> Tensor | None:
        """Return `output` as it lies in the file; None if there is no file, or no room in it."""
        if self._spill is None:
            return None
        if self._spilled_of != prefix_id:  # memory is full, so no other prefix has entries left
            self._delete_file()
            self._spilled_of = prefix_id
        at = self._spill.append(output)
        if at is None:
            return None
        self._spilled += 1
        return self._spill.view(at, output).to(output.device)

    def _delete_file(self) -> None:
        if self._spill is not None:
            self._spill.close()
        self._spilled, self._spilled_of = 0, None

    def _make_room(self, size: int, prefix_id: str) -> None:
        """Drop entries of other prefixes (another base, another cut), oldest first, if needed."""
        for other in [name for name in self._entries if name != prefix_id]:
            if self._bytes + size <= self._limit_bytes:
                return
            dropped = self._entries.pop(other).values()
            self._bytes -= sum(t.numel() * t.element_size() for t in dropped)
            if other == self._spilled_of:
                self._bytes += 0 if self._spill is None else self._spill.used_bytes
                self._delete_file()

    def _warn(self, records: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "prefix cache is full: %d of %d records in %d bytes, the others are computed in "
                "every epoch; raise training.cache_bytes to avoid that",
                self.stats.cached,
                records,
                self._limit_bytes,
            )


class Features(Sequence[Tensor]):
    """Prefix outputs of which some are computed on demand. Made by PrefixCache.prepare."""

    def __init__(
        self, cache: PrefixCache, classifier: Classifier, encoded: Sequence[Tensor]
    ) -> None:
        self._cache = cache
        self.classifier = classifier
        self.encoded = encoded
        self.prefix_id = f"{classifier.prefix_id}:{classifier.device}"
        self.keys = [_key(x) for x in encoded]
        self.lengths = [len(x) for x in encoded]  # the prefix keeps the length of sequences

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices: use take
        return self.take([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the outputs at `indices`; those not cached are computed together."""
        return self._cache.take(self, indices)


def _key(x: Tensor) -> bytes:
    head = f"{x.dtype}{tuple(x.shape)}".encode()
    return hashlib.sha256(head + x.contiguous().numpy().tobytes()).digest()


def _batches(encoded: Sequence[Tensor], indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield `indices` in batches of similar length, longest first: little padding."""
    rows = [len(x) if is_sequence(x := encoded[i]) else 1 for i in indices]
    for batch in similar_batches(rows):
        yield [indices[i] for i in batch]


def similar_batches(rows: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of `rows` (per record) in batches of similar numbers, largest first.

    Every batch has at most RECORDS_PER_BATCH records, and padded to its longest at most
    ROWS_PER_BATCH rows, or one record.
    """
    order = sorted(range(len(rows)), key=lambda i: -rows[i])
    at = 0
    while at < len(order):
        longest = max(rows[order[at]], 1)
        size = max(1, min(RECORDS_PER_BATCH, ROWS_PER_BATCH // longest))
        yield order[at : at + size]
        at += size
