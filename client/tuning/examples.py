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

import torch
from torch import Tensor


@runtime_checkable
class Batched(Protocol):
    """Features that are computed when asked for, many at a time (see prefix.py)."""

    lengths: list[int]  # of axis 0 of every feature, known without computing any

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the features at `indices`, in that order."""


class Dense(Sequence[Tensor]):
    """Features of one shape: rows `at` of one tensor that many clients may share."""

    def __init__(self, data: Tensor, at: Tensor | None = None) -> None:
        """`data` is (N, …); `at` (n,) int64 says which of its rows these are, None: all."""
        self.data = data
        self.at = torch.arange(len(data)) if at is None else at

    def __len__(self) -> int:
        return len(self.at)

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

    def subset(self, indices: Sequence[int]) -> Dense:
        """Return the features at `indices` without copying them."""
        return Dense(self.data, self.at[torch.tensor(list(indices), dtype=torch.int64)])


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
        return len(self.features)

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
