"""Which records every client of a cohort trains on in every step.

The order is that of `training.batches`: same seed, same batches. Blocks of steps are laid out
together,

    ids     (S, K, B)   index of every record among the cohort's records, client after client
    share   (S, K, B)   what a record's loss counts: w_y / Σ w_y over its client's batch

where a client whose batch is smaller than B fills it with a record of its own that counts 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.local import Local
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import (
    Dense,
    Examples,
    Ragged,
    collate,
    fetch,
    is_sequence,
    lengths,
)
from anabranch.client.tuning.training import batches, class_weights

BLOCK = 64  # steps that are laid out together

Indices = NDArray[np.int64]


class Records:
    """The records of all clients of a cohort, client after client."""

    def __init__(self, locals: Sequence[Local], num_labels: int) -> None:
        self.parts = [local.examples.features for local in locals]
        sizes = [len(local.examples.labels) for local in locals]
        self.first: Indices = np.cumsum([0, *sizes[:-1]])
        self.labels = np.concatenate([local.examples.labels.cpu().numpy() for local in locals])
        self.weights = _weights(locals, num_labels)

    @cached_property
    def features(self) -> Sequence[Tensor]:
        """Return all features as one sequence."""
        return join(self.parts)


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's records of K clients, client after client."""

    records: Records
    clients: int  # K
    sizes: tuple[int, ...] | None  # records of every client; None: as many of each
    ids: Tensor  # (n,) int64 on the CPU, into the records of the cohort
    labels: Tensor  # (n,) int64
    share: Tensor  # (n,) float32


class Joined(Sequence[Tensor]):
    """The features of several clients as one sequence."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices: use take
        return self.take([index])[0]

    @property
    def lengths(self) -> list[int]:
        """Return the length of axis 0 of every feature."""
        return [n for part in self._parts for n in lengths(part)]

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the features at `indices`, in that order; one call for a run of one client."""
        at = np.asarray(indices)
        owner = np.searchsorted(self._ends, at, side="right")
        runs = np.split(np.arange(len(at)), np.flatnonzero(np.diff(owner)) + 1)
        found: list[Tensor] = []
        for run in runs:
            if len(run):
                part = self._parts[owner[run[0]]]
                first = self._ends[owner[run[0]]] - len(part)
                found += fetch(part, (at[run] - first).tolist())
        return found


def join(parts: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """Return the features of several clients as one sequence, of rows of one tensor if they are."""
    first = parts[0]
    if isinstance(first, Dense) and all(
        isinstance(p, Dense) and p.data is first.data for p in parts
    ):
        return Dense(first.data, torch.cat([p.at for p in parts if isinstance(p, Dense)]))
    if isinstance(first, Ragged) and all(
        isinstance(p, Ragged) and p.values is first.values for p in parts
    ):
        ragged = [p for p in parts if isinstance(p, Ragged)]
        start, length = (torch.cat([getattr(p, f) for p in ragged]) for f in ("start", "length"))
        return Ragged(first.values, start, length)
    if all(isinstance(part, list) for part in parts):
        return [feature for part in parts for feature in part]
    return Joined(parts)


def gather(features: Sequence[Tensor], ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return features as one batch; sequences are padded to the longest, with their mask.

    The mask is None where nothing is padded.
    """
    if isinstance(features, Dense):
        return features.data.index_select(0, features.at[ids].to(features.data.device)), None
    found = fetch(features, ids.tolist())
    if is_sequence(found[0]) and len({len(feature) for feature in found}) == 1:
        return torch.stack(found), None
    return collate(found)


class Order:
    """The batches of one client, in the order of `training.batches`, as arrays."""

    def __init__(self, examples: Examples, batch_size: int, seed: int) -> None:
        self.records, self.size = len(examples), min(batch_size, len(examples))
        self._rng = np.random.default_rng(seed)
        self._lists = None if _even(examples) else batches(examples, batch_size, self._rng)
        self._left: Indices = np.empty((0, self.size), np.int64)

    def take(self, steps: int) -> Indices:
        """Return the next batches (steps, B); −1 fills up those that are smaller."""
        if self._lists is not None:
            return _rows([next(self._lists) for _ in range(steps)], self.size)
        while len(self._left) < steps:
            epoch = self._epoch()
            self._left = np.concatenate([self._left, epoch]) if len(self._left) else epoch
        taken, self._left = self._left[:steps], self._left[steps:]
        return taken

    def _epoch(self) -> Indices:
        """Return one epoch, all records of one length: the sort in `batches` changes nothing."""
        count = -(-self.records // self.size)
        order = self._rng.permutation(self.records)
        if count * self.size > self.records:
            order = np.concatenate([order, np.full(count * self.size - self.records, -1)])
        chunks: Indices = order.reshape(count, self.size)[self._rng.permutation(count)]
        return chunks


def _even(examples: Examples) -> bool:
    features = examples.features
    return isinstance(features, Dense) or len(set(lengths(features))) == 1


def _rows(lists: Sequence[Sequence[int]], size: int) -> Indices:
    rows = np.full((len(lists), size), -1, np.int64)
    for row, batch in zip(rows, lists, strict=True):
        row[: len(batch)] = batch
    return rows


class Steps:
    """The batches of a cohort. `locals` have at least one step, most steps first."""

    def __init__(self, locals: Sequence[Local], classifier: Classifier, *, filled: bool) -> None:
        """`filled`: every client has as many records in a batch as the one that has most."""
        self._stops = np.array([local.steps for local in locals])
        self._device, self._filled = classifier.device, filled
        self._orders = [
            Order(local.examples, local.training.batch_size, local.seed) for local in locals
        ]
        self._records = Records(locals, classifier.num_labels)
        self.counts = np.zeros((self._stops[0], len(locals)), np.int64)  # records, (steps, K)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batch of every step, of the clients that still train."""
        for start in range(0, int(self._stops[0]), BLOCK):
            yield from self._block(start, min(BLOCK, int(self._stops[0]) - start))

    def _block(self, start: int, steps: int) -> Iterator[Batch]:
        records, counts = self._records, self.counts[start : start + steps]
        ids, real = self._ids(start, steps)
        counts[:] = real.sum(2)
        weights = real.astype(np.float32)
        if records.weights is not None:
            weights *= records.weights[ids]
        total = weights.sum(2, keepdims=True)
        share = weights / np.where(total > 0, total, 1)
        parts = ids, records.labels[ids], share
        clients = (self._stops > np.arange(start, start + steps)[:, None]).sum(1).tolist()
        widths = counts.max(1).tolist()
        for step, (k, width) in enumerate(zip(clients, widths, strict=True)):
            sizes = None
            if self._filled:
                taken = [x[step, :k, :width].reshape(-1) for x in parts]
            else:
                sizes = tuple(counts[step, :k].tolist())
                taken = [x[step, :k][real[step, :k]] for x in parts]
            chosen, labels, shares = (torch.from_numpy(x) for x in taken)
            yield Batch(records, k, sizes, chosen, labels.to(self._device), shares.to(self._device))

    def _ids(self, start: int, steps: int) -> tuple[Indices, NDArray[np.bool_]]:
        """Return ids (S, K, B) and which of them are real."""
        width = max(order.size for order in self._orders)
        local = np.full((steps, len(self._orders), width), -1, np.int64)
        for k, (order, stop) in enumerate(zip(self._orders, self._stops.tolist(), strict=True)):
            own = min(steps, stop - start)
            if own > 0:
                local[:own, k, : order.size] = order.take(own)
        real = local >= 0
        if not real.all():
            local = np.where(real, local, np.maximum(local[:, :, :1], 0))
        return local + self._records.first[None, :, None], real


def _weights(locals: Sequence[Local], num_labels: int) -> NDArray[np.float32] | None:
    """Return the class weight of every record; None if all are 1."""
    if all(local.training.class_weights == "none" for local in locals):
        return None
    found = []
    for local in locals:
        labels = local.examples.labels.cpu()
        weights = class_weights(labels, num_labels, local.training)
        found.append(torch.ones(len(labels)) if weights is None else weights[labels])
    return torch.cat(found).numpy()
