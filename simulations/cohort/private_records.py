"""What a cohort of private training works on: its clients' values, and records drawn from them.

    K  clients      P  values of one client, in the order of flat.py      R  records of a chunk

A step draws a Poisson sample of every client. All of them together are cut into chunks that go
through the model at once: of like size, records of like length together, client after client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.local import Local
from anabranch.client.tuning.examples import Dense, collate, fetch, is_sequence, lengths
from anabranch.client.tuning.flat import Slot, slots_of
from anabranch.client.tuning.per_record import PACKED_VALUES
from anabranch.client.tuning.private import PHYSICAL_BATCH
from anabranch.protocols.adapter import Adapter

ROWS = 3072  # of a frozen product: below it calls cost, far above it the cache is too small

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Records that go through the model together, client after client."""

    features: Tensor  # (R, …)
    mask: Tensor | None  # (R, T) bool: real tokens
    labels: Tensor  # (R,) int64
    owner: Tensor  # (R,) int64: the client of each record, ascending
    segments: Sequence[tuple[int, int, int]]  # (client, start, stop): its records
    weights: Tensor | None = None  # (R,): what each record's loss counts

    def __len__(self) -> int:
        return len(self.owner)


class Values:
    """Tensors of one kind of K clients: row k of `rows` is client k's, in the order of flat.py.

    `scaled` are the same times s where the tensor is a factor of LoRA.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], starts: Sequence[Adapter]) -> None:
        self.slots = slots_of(shapes) if shapes else ()
        self.rows = torch.empty((len(starts), self.size))
        filled: dict[int, Tensor] = {}  # by start: clients of one round share theirs
        for row, start in zip(self.rows, starts, strict=True):
            if id(start) in filled:
                row.copy_(filled[id(start)])
                continue
            filled[id(start)] = row
            for slot, part in zip(self.slots, self.parts(row), strict=True):
                part.copy_(torch.from_numpy(start.arrays[slot.name]))

    @property
    def size(self) -> int:
        """Return the number of values of one client."""
        return self.slots[-1].stop if self.slots else 0

    def to(self, device: torch.device) -> None:
        """Move the values to a device."""
        self.rows = self.rows.to(device)

    def parts(self, row: Tensor) -> list[Tensor]:
        """Return views of a row (P,) in the shapes of the tensors, in the order of the slots."""
        return [slot.shaped(row[slot.start : slot.stop]) for slot in self.slots]

    def stacked(self, rows: Tensor) -> dict[str, Tensor]:
        """Return name -> view (K, …) of rows (K, P); a factor B stands as (K, rank, out)."""
        return {slot.name: _stacked(rows, slot) for slot in self.slots}


def _stacked(rows: Tensor, slot: Slot) -> Tensor:
    shape = slot.shape[::-1] if slot.transposed else slot.shape
    stacked: Tensor = rows[:, slot.start : slot.stop].unflatten(1, shape)
    return stacked


def tokens_of(local: Local) -> int:
    """Return about how many rows of a product one record is."""
    classifier, feature = local.classifier, local.examples.features[0]
    if classifier.cut == classifier.num_stages:
        return 1  # pooled
    if is_sequence(feature):
        return len(feature)
    return int(getattr(classifier.base, "num_patches", 1))


def chunk_limit(size: int, tokens: int) -> int:
    """Return how many records go through the model at once: rows, and memory, are bounded.

    `size` is P. There are never more gradients in memory than those of PHYSICAL_BATCH records,
    or than PACKED_VALUES values where that is more.
    """
    return max(1, min(2 * ROWS // tokens, max(PHYSICAL_BATCH, PACKED_VALUES // size)))


class Records:
    """The records of a cohort's clients."""

    def __init__(self, locals: Sequence[Local], device: torch.device) -> None:
        self.locals = locals
        self.tokens = max(tokens_of(local) for local in locals)
        self._device = device
        features = [local.examples.features for local in locals]
        tables = {id(f.data) for f in features if isinstance(f, Dense)}
        dense = len(tables) == 1 and all(isinstance(f, Dense) for f in features)
        self._lengths = [] if dense else [np.asarray(lengths(f)) for f in features]
        self._weights = self._class_weights()

    def _class_weights(self) -> Tensor | None:
        """Return (K, labels) class weights; None if no client has any."""
        given = [local.training.class_weights for local in self.locals]
        if all(weights == "none" for weights in given):
            return None
        count = self.locals[0].classifier.num_labels
        rows = [[1.0] * count if isinstance(w, str) else list(w) for w in given]
        return torch.tensor(rows, device=self._device)

    def chunks(self, samples: Mapping[int, Index], limit: int) -> Iterator[Chunk]:
        """Yield the sampled records in chunks of like size, and of like length.

        `samples` is client -> records.
        """
        owner = np.repeat(np.fromiter(samples, np.int64), [len(s) for s in samples.values()])
        record = np.concatenate([*samples.values(), np.empty(0, np.int64)])
        parts = -(-len(record) // limit)
        if parts > 1 and self._lengths:
            sizes = [self._lengths[k][i] for k, i in zip(owner, record, strict=True)]
            order = np.argsort(sizes, kind="stable")
        else:
            order = np.arange(len(record))
        for chosen in np.array_split(order, parts) if parts else []:
            chosen = np.sort(chosen)  # client after client
            yield self._chunk(owner[chosen], record[chosen])

    def _chunk(self, owner: Index, record: Index) -> Chunk:
        clients, starts = np.unique(owner, return_index=True)
        bounds = [*starts.tolist(), len(owner)]
        segments = list(zip(clients.tolist(), bounds[:-1], bounds[1:], strict=True))
        features, mask = self._features(segments, record)
        labels = torch.cat(
            [self.locals[k].examples.labels[torch.from_numpy(record[a:b])] for k, a, b in segments]
        ).to(self._device)
        owners = torch.from_numpy(owner).to(self._device)
        weights = None if self._weights is None else self._weights[owners, labels]
        return Chunk(features, mask, labels, owners, segments, weights)

    def _features(
        self, segments: Sequence[tuple[int, int, int]], record: Index
    ) -> tuple[Tensor, Tensor | None]:
        parts = [(self.locals[k].examples.features, record[a:b]) for k, a, b in segments]
        if not self._lengths:
            dense = [features for features, _ in parts if isinstance(features, Dense)]
            at = [f.at[torch.from_numpy(i)] for f, (_, i) in zip(dense, parts, strict=True)]
            batch = dense[0].data.index_select(0, torch.cat(at)).to(self._device)
            full = batch.shape[:2] if is_sequence(batch[0]) else None
            return batch, None if full is None else batch.new_ones(full, dtype=torch.bool)
        features, mask = collate([row for f, i in parts for row in fetch(f, i.tolist())])
        return features.to(self._device), None if mask is None else mask.to(self._device)
