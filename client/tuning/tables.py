"""Classifiers for table rows: logistic regression, and a multilayer perceptron.

    row (F,) ─► hidden.0, relu ─► … ─► hidden.H-1, relu ─► head
                stage 0                stage H-1

Logistic regression has no hidden layer: the head is all there is. The hidden layers of the
perceptron are random (seeded) and frozen; LoRA with targets such as "hidden.*" adapts them,
and modules_to_save = ["hidden.*"] trains them in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.client.tuning.classifier import Classifier
from anabranch.protocols.errors import DataError


class Perceptron(nn.Module):
    """The base: linear layers of the given widths, ReLU after each."""

    def __init__(self, num_features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [num_features, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, hidden, strict=False))


class TableClassifier(Classifier):
    """A perceptron over table rows; with no hidden layers, logistic regression."""

    blocks = "hidden"

    def __init__(
        self, base: Perceptron, *, num_features: int, num_labels: int, base_digest: str
    ) -> None:
        self.num_features = num_features
        layers = [layer for layer in base.hidden if isinstance(layer, nn.Linear)]
        width = layers[-1].out_features if layers else num_features
        super().__init__(base, width=width, num_labels=num_labels, base_digest=base_digest)

    @property
    def num_stages(self) -> int:
        """Return the number of hidden layers."""
        return self.num_blocks

    def stage_of(self, name: str) -> int:
        """Return i for what lies in hidden layer i."""
        return int(name.split(".")[1])

    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        """Return the output of hidden layers start … stop - 1; `mask` is not used."""
        for layer in cast(Perceptron, self.base).hidden[start:stop]:
            h = torch.relu(layer(h))
        return h

    def encode(self, inputs: Sequence[str] | NDArray[np.float32]) -> list[Tensor]:
        """Return one float32 row (F,) per record."""
        rows = torch.tensor(np.asarray(inputs, dtype=np.float32))
        if rows.shape[1:] != (self.num_features,):
            raise DataError(
                f"rows have shape {tuple(rows.shape[1:])}, the model expects "
                f"({self.num_features},): the columns of [data] give {self.num_features} features"
            )
        return list(rows)


def build(num_features: int, hidden: Sequence[int], *, seed: int) -> Perceptron:
    """Return the seeded random base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Perceptron(num_features, hidden)
