"""Frozen-prefix outputs by row of one shared data set, computed when a row is first asked for.

What prefix.py is for a site, for many clients whose records are rows of one data set: nothing is
hashed, and no record costs a tensor object. Three tiers, first come, first kept:

    memory       one tensor of at most `limit_bytes`
    mapped file  at most `spill.limit_bytes` (spill.py)
    nowhere      what fits into neither is computed again every time it is asked for

Nothing is evicted: clients are sampled evenly and an epoch visits every record once, so what was
used last is not what is used next, and an LRU of a cyclic scan would keep nothing. A row is the
same in either tier, bit for bit. Texts are tokenised once, into one flat tensor.

A feature of n rows (tokens of a text; 1 for everything else) is a run of rows of its tier.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Dense, Ragged, collate, runs
from anabranch.client.tuning.prefix import CacheStats, similar_batches
from anabranch.client.tuning.spill import SpillFile

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]
NOWHERE, MEMORY, FILE = 0, 1, 2
CHUNK = 1024  # records that are encoded at a time


class Tokens:
    """Token ids of texts, made when first asked for: one flat tensor for all of them."""

    def __init__(self, classifier: Classifier, texts: list[str]) -> None:
        self._classifier, self._texts = classifier, texts
        self._values = torch.empty(0, dtype=torch.int64)
        self._used = 0
        self._start = torch.zeros(len(texts), dtype=torch.int64)
        self.length = torch.zeros(len(texts), dtype=torch.int64)  # 0: not tokenised yet

    def ragged(self, rows: Rows) -> Ragged:
        """Return the token ids of `rows`, as views of what all of them share."""
        at = torch.from_numpy(rows)
        new = torch.unique(at[self.length[at] == 0])
        if len(new):
            self._add(new)
        return Ragged(self._values, self._start[at], self.length[at])

    def _add(self, rows: Tensor) -> None:
        encoded = self._classifier.encode([self._texts[i] for i in rows.tolist()])
        length = torch.tensor([len(ids) for ids in encoded])
        total = self._used + int(length.sum())
        if total > len(self._values):  # doubled: all additions together copy every id about once
            values = torch.empty(max(total, 2 * len(self._values)), dtype=torch.int64)
            values[: self._used] = self._values[: self._used]
            self._values = values
        torch.cat(encoded, out=self._values[self._used : total])
        self._start[rows] = self._used + length.cumsum(0) - length
        self.length[rows] = length
        self._used = total


class Activations:
    """Prefix outputs of the rows of one data set. For one thread at a time."""

    def __init__(
        self,
        classifier: Classifier,
        inputs: list[str] | NDArray[np.float32],
        limit_bytes: int,
        spill: SpillFile | None = None,
    ) -> None:
        if limit_bytes < 0:
            raise ValueError(f"expected limit_bytes >= 0, got {limit_bytes}")
        self._classifier, self._inputs = classifier, inputs
        self._limit_bytes, self._spill = limit_bytes, spill
        self._tokens = Tokens(classifier, inputs) if isinstance(inputs, list) else None
        self.ragged = self._tokens is not None and classifier.cut < classifier.num_stages
        self._tier = np.zeros(len(inputs), np.int8)
        self._start = torch.zeros(len(inputs), dtype=torch.int64)  # within the tier
        self._memory: Tensor | None = None  # (rows, …)
        self._used = 0  # rows of it
        self._raw: Dense | None = None
        self._hits = self._computed = self._too_many = 0
        self._warned = False

    @property
    def stats(self) -> CacheStats:
        """Return the counters as they are now."""
        row = 0 if self._memory is None else _row_bytes(self._memory)
        return CacheStats(
            cached=int(np.count_nonzero(self._tier)),
            bytes=self._used * row,
            limit_bytes=self._limit_bytes,
            hits=self._hits,
            computed=self._computed,
            too_many=self._too_many,
            spilled=int(np.count_nonzero(self._tier == FILE)),
            spilled_bytes=0 if self._spill is None else self._spill.used_bytes,
            spill_limit_bytes=0 if self._spill is None else self._spill.limit_bytes,
        )

    def features(self, rows: Rows) -> Dense | Ragged | Mixed:
        """Return the prefix outputs of `rows`, as Examples take them.

        Views of the tensor in memory if all of them lie there; otherwise a `Mixed`, which
        gathers every batch from where its records are. Computes what has not been seen yet.
        """
        if self._classifier.cut == 0:
            return self._encoded(rows)
        if len(rows) == 0:
            return Dense(torch.zeros(0, 1))
        missing = np.unique(rows[self._tier[rows] == NOWHERE])
        self._hits += len(rows) - len(missing)
        full = self._warned  # nothing more is kept: leave it to the batches that need it
        if not full:
            for batch in self._batches(missing):
                self._keep(batch, self._compute(batch))
        at = torch.from_numpy(rows)
        if self._memory is None or (self._tier[rows] != MEMORY).any():
            return Mixed(self, rows)
        if self.ragged:
            return Ragged(self._memory, self._start[at], self.lengths(rows))
        return Dense(self._memory, self._start[at])

    @property
    def height(self) -> int:
        """Return the length of axis 0 of every feature that is not ragged; 0 before the first."""
        return 0 if self._memory is None else self._memory.shape[1]

    def lengths(self, rows: Rows) -> Tensor:
        """Return the length of axis 0 of the features of `rows`, (n,) int64."""
        if self.ragged:
            assert self._tokens is not None  # only texts are ragged
            return self._tokens.ragged(rows).length
        return torch.ones(len(rows), dtype=torch.int64)

    def gather(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the features of `rows` one after the other, and how many rows each has."""
        length = self.lengths(rows)
        target = length.cumsum(0) - length
        found: list[tuple[Tensor, Tensor]] = []  # (where to, what)
        for tier, source in ((MEMORY, self._memory), (FILE, self._mapped())):
            here = torch.from_numpy(np.flatnonzero(self._tier[rows] == tier))
            if len(here) and source is not None:
                where = self._start[torch.from_numpy(rows)[here]]
                taken = source.index_select(0, runs(where, length[here]).to(source.device))
                found.append((runs(target[here], length[here]), taken))
        found += self._again(rows, target)
        assert self._memory is not None  # `features` has kept, or tried to keep, all of them
        shape = (int(length.sum()), *self._memory.shape[1:])
        out = torch.empty(shape, device=self._classifier.device)
        for where, what in found:
            out[where.to(out.device)] = what.to(out.device)
        return out, length

    def _again(self, rows: Rows, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is kept nowhere: (where to, what), computed once per different row."""
        at = np.flatnonzero(self._tier[rows] == NOWHERE)
        missing = np.unique(rows[at])
        self._too_many += len(missing)
        places: dict[int, list[int]] = {}
        for i in at.tolist():
            places.setdefault(int(rows[i]), []).append(int(target[i]))
        for batch in self._batches(missing):
            length = self.lengths(batch).tolist()
            parts = self._compute(batch).split(length)
            for row, size, part in zip(batch.tolist(), length, parts, strict=True):
                for place in places[row]:
                    yield torch.arange(place, place + size), part

    def _encoded(self, rows: Rows) -> Dense | Ragged:
        """Return the records as stage 0 takes them: nothing lies below the cut."""
        if self._tokens is not None:
            return self._tokens.ragged(rows)
        if self._raw is None:
            self._raw = Dense(self._stacked())
        return self._raw.subset(rows)

    def _stacked(self) -> Tensor:
        """Return all records as stage 0 takes them, as one tensor."""
        encode, inputs = self._classifier.encode, self._inputs
        out = torch.empty((len(inputs), *encode(inputs[:1])[0].shape))
        for first in range(0, len(inputs), CHUNK):
            chunk = inputs[first : first + CHUNK]
            torch.stack(encode(chunk), out=out[first : first + len(chunk)])
        return out

    def _batches(self, rows: Rows) -> Iterator[Rows]:
        """Yield `rows` in batches of similar length, longest first: little padding."""
        if len(rows) == 0:
            return
        lengths = [1] * len(rows) if self._tokens is None else self._tokens.ragged(rows).lengths
        for batch in similar_batches(lengths):
            yield rows[batch]

    def _compute(self, rows: Rows) -> Tensor:
        """Return the prefix outputs of `rows`, one after the other, without padding."""
        classifier = self._classifier
        self._computed += len(rows)
        if self._tokens is None:
            encoded: Sequence[Tensor] = classifier.encode(self._inputs[rows])
        else:
            encoded = list(self._tokens.ragged(rows))
        x, mask = collate(encoded)
        mask = None if mask is None else mask.to(classifier.device)
        with torch.inference_mode(False):  # what is kept may be trained on later
            h = classifier.prefix(x.to(classifier.device), mask)
        return h[mask] if self.ragged else h

    def _keep(self, rows: Rows, values: Tensor) -> None:
        """Store what fits: in memory first, then in the file."""
        if self._memory is None:
            self._memory = self._allocate(values)
        length = self.lengths(rows)
        ends = length.cumsum(0)
        room = len(self._memory) - self._used
        fit = int(torch.searchsorted(ends, room, right=True))  # records
        size = int(ends[fit - 1]) if fit else 0
        self._memory[self._used : self._used + size] = values[:size]
        self._place(rows[:fit], MEMORY, self._used + (ends - length)[:fit])
        self._used += size
        for row, part in zip(rows[fit:], values[size:].split(length[fit:].tolist()), strict=True):
            at = None if self._spill is None else self._spill.append(part)
            if at is None:
                self._warn()
                return
            self._place(np.array([row]), FILE, torch.tensor([at // _row_bytes(part)]))

    def _place(self, rows: Rows, tier: int, start: Tensor) -> None:
        self._tier[rows] = tier
        self._start[torch.from_numpy(rows)] = start

    def _allocate(self, values: Tensor) -> Tensor:
        """Return an empty tensor for all rows, or as many as are allowed.

        The system gives memory to the pages that are written to, not before.
        """
        tokens = getattr(self._classifier, "max_tokens", 1) if self.ragged else 1
        rows = min(self._limit_bytes // _row_bytes(values), tokens * len(self._tier))
        return values.new_empty((rows, *values.shape[1:]))

    def _mapped(self) -> Tensor | None:
        """Return the file as rows, None if nothing is there."""
        if self._spill is None or self._spill.used_bytes == 0 or self._memory is None:
            return None
        used = self._spill.whole[: self._spill.used_bytes].view(self._memory.dtype)
        return used.view(-1, *self._memory.shape[1:])

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "no room for more activations: %d of %d records are kept in %d bytes of memory and "
                "%d of a file, the others are computed whenever they are used; raise "
                "training.cache_bytes to avoid that",
                self.stats.cached,
                len(self._tier),
                self._limit_bytes,
                self.stats.spill_limit_bytes,
            )


class Mixed(Sequence[Tensor]):
    """Features of which some lie in memory, some in the file and some nowhere."""

    def __init__(self, store: Activations, rows: Rows) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices: use take
        return self.take([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Return the length of axis 0 of every feature."""
        if self._store.ragged:
            found: list[int] = self._store.lengths(self._rows).tolist()
            return found
        return [self._store.height] * len(self)

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the features at `indices`; those kept nowhere are computed together."""
        values, length = self._store.gather(self._rows[np.asarray(indices, np.int64)])
        return list(values.split(length.tolist())) if self._store.ragged else list(values)

    def packed(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features at `indices` (b,) one after the other, and their lengths (b,)."""
        return self._store.gather(self._rows[indices.numpy()])

    def rows(self, indices: Tensor) -> Tensor:
        """Return the features at `indices` (b,) as `Dense.rows` and `Ragged.rows` do."""
        return self.packed(indices)[0]


def _row_bytes(values: Tensor) -> int:
    """Return the bytes of one row."""
    return values.element_size() * math.prod(values.shape[1:])
