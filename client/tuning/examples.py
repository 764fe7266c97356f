"""What the training loops eat: features, labels, and how a batch is padded.

feature          shape       dtype     sequence?
token ids        (T,)        int64     yes
prefix output    (T, d)      float32   yes    hidden states at the cut
prefix output    (d,)        float32   no     the pooled vector: only the head is trained
image            (C, H, W)   float32   no
table row        (F,)        float32   no
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@runtime_checkable
class Batched(Protocol):
    """Features that are computed when asked for, many at a time (see prefix.py)."""

    @property
    def lengths(self) -> list[int]:
        """Return the length of axis 0 of every feature, without computing any."""

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the features at `indices`, in that order."""


@runtime_checkable
class Packing(Batched, Protocol):
    """Sequences of which a whole batch is fetched at once, without padding."""

    def packed(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features at `indices` (b,) one after the other, and their lengths (b,)."""


class Dense(Sequence[Tensor]):
    """Features of one shape: rows `at` of one tensor that many clients may share."""

    def __init__(self, data: Tensor, at: Tensor | None = None) -> None:
        """`data` is (N, …); `at` (n,) int64 says which of its rows these are, None: all."""
        self.data = data
        self.at = torch.arange(len(data)) if at is None else at

    def __len__(self) -> int:
        return self.at.shape[0]  # len() of a tensor is slow

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices: use take
        return self.data[self.at[index]]

    @property
    def lengths(self) -> list[int]:
        """Return the length of axis 0 of every feature."""
        return [self.data.shape[1]] * len(self)

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the features at `indices`."""
        return list(self.rows(torch.tensor(list(indices), dtype=torch.int64)))

    def rows(self, indices: Tensor) -> Tensor:
        """Return the features at `indices` (b,) as one tensor (b, …)."""
        return self.data.index_select(0, self.at[indices])

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Dense:
        """Return the features at `indices` without copying them."""
        return Dense(self.data, self.at[_places(indices)])


class Ragged(Sequence[Tensor]):
    """Sequences of unlike length: runs of rows of one tensor that many clients may share.

    Feature i is values[start[i] : start[i] + length[i]]. Runs may lie in any order, overlap, and
    leave gaps. No feature is a tensor object of its own before it is asked for.
    """

    def __init__(self, values: Tensor, start: Tensor, length: Tensor) -> None:
        """`values` is (total, …); `start` and `length` are (n,) int64."""
        if start.shape != length.shape or start.dim() != 1:
            raise ValueError(
                f"expected one start and one length per feature, got shapes {tuple(start.shape)} "
                f"and {tuple(length.shape)}"
            )
        self.values, self.start, self.length = values, start, length

    @classmethod
    def of(cls, features: Sequence[Tensor]) -> Ragged:
        """Return a copy of a list of sequences, at least one, as runs of one tensor."""
        length = torch.tensor([len(feature) for feature in features])
        return cls(torch.cat(list(features)), length.cumsum(0) - length, length)

    def __len__(self) -> int:
        return self.start.shape[0]

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices: use take
        start = int(self.start[index])
        return self.values[start : start + int(self.length[index])]

    @property
    def lengths(self) -> list[int]:
        """Return the length of axis 0 of every feature."""
        found: list[int] = self.length.tolist()
        return found

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the features at `indices`, as views."""
        at = torch.tensor(list(indices), dtype=torch.int64)
        runs = zip(self.start[at].tolist(), self.length[at].tolist(), strict=True)
        return [self.values[start : start + length] for start, length in runs]

    def packed(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features at `indices` (b,) one after the other, and their lengths (b,).

        One gather: rows (Σ lengths, …).
        """
        length = self.length[indices]
        rows = runs(self.start[indices], length)
        return self.values.index_select(0, rows.to(self.values.device)), length

    def rows(self, indices: Tensor) -> Tensor:
        """Return the features at `indices` (b,) one after the other, without their lengths."""
        return self.packed(indices)[0]

    def subset(self, indices: Sequence[int]) -> Ragged:
        """Return the features at `indices` without copying them."""
        at = torch.tensor(list(indices), dtype=torch.int64)
        return Ragged(self.values, self.start[at], self.length[at])


def _places(indices: Sequence[int] | NDArray[np.int64]) -> Tensor:
    if isinstance(indices, np.ndarray):
        return torch.from_numpy(indices)
    return torch.tensor(list(indices), dtype=torch.int64)


def runs(start: Tensor, length: Tensor) -> Tensor:
    """Return start[0], start[0] + 1, …, one run of length[i] numbers for every i, (Σ length,)."""
    ends = length.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = (start - ends + length).repeat_interleave(length, output_size=total)
    return shift + torch.arange(total)


@dataclass(frozen=True, eq=False)
class Examples:
    """One feature and one label (an index into the task's labels) per record."""

    features: Sequence[Tensor]
    labels: Tensor  # (n,) int64

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.features),):
            raise ValueError(
                f"expected int64 labels of shape ({len(self.features)},), one per feature, "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, indices: Sequence[int]) -> Examples:
        """Return the examples at `indices`, in that order; an index may come twice."""
        rows = torch.tensor(list(indices), dtype=torch.int64, device=self.labels.device)
        return Examples(fetch(self.features, indices), self.labels[rows])


def fetch(features: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """Return the features at `indices`, in that order; one call for a batch, not one each."""
    if isinstance(features, Batched):
        return features.take(indices)
    return [features[i] for i in indices]


def lengths(features: Sequence[Tensor]) -> list[int]:
    """Return the length of axis 0 of every feature: what batches are sorted by."""
    if isinstance(features, Batched):
        return features.lengths
    return [len(feature) for feature in features]


def is_sequence(feature: Tensor) -> bool:
    """Return whether axis 0 counts tokens, so that batches need padding and a mask."""
    return feature.dim() == (2 if feature.is_floating_point() else 1)


def collate(features: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the padded batch, and the bool mask (B, T) that is True on real tokens.

    Sequences are padded with zeros on the right. The mask is None for features that are no
    sequences: images, table rows, pooled vectors.
    """
    if not features:
        raise ValueError("collate needs at least one feature")
    first = features[0]
    if not is_sequence(first):
        return torch.stack(list(features)), None
    lengths = torch.tensor([len(feature) for feature in features], device=first.device)
    batch = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    mask = torch.arange(batch.shape[1], device=first.device) < lengths[:, None]
    return batch, mask
