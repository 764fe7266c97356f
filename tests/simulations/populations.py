"""Small populations of real digits, for tests of engines."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from anabranch.client.data.records import Records
from anabranch.protocols.config import RunConfig, parse
from anabranch.simulations.population.client import VirtualSite
from anabranch.simulations.population.clients import Partition, PopulationClients

DIGITS_RUN = """
name = "digits"
seed = 1

[task]
kind = "image-classification"
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]

[data.columns]
image = { type = "image" }
label = { type = "label" }

[model]
base = "vit"
width = 16
depth = 2
heads = 2

[lora]
rank = 2
layers = "last:1"

[training]
batch_size = 10
optimizer = "sgd"
learning_rate = 0.05

[federation]
rounds = 2
cohort = 6
method = "fedavg"
client_evaluation = false
"""


def digits_run(*changes: tuple[str, str], extra: str = "") -> RunConfig:
    """Return the run over digits, with text replaced, and tables added."""
    text = DIGITS_RUN + extra
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse(text, source="digits")


def digits() -> Records:
    """Return the 1,797 digits of scikit-learn as images (n, 1, 8, 8) in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    return Records((images / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64))


def population(folder: Path, sizes: list[int]) -> PopulationClients:
    """Return clients with so many records each, none of them shared."""
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rows = np.random.default_rng(0).permutation(1797)[: start[-1]].astype(np.int64)
    held = np.zeros(len(sizes), np.int64)
    return PopulationClients(digits(), Partition(rows, start, held), folder)


@dataclass(frozen=True, eq=False)
class Killed(PopulationClients):
    """A population whose first client kills the process that trains it."""

    def site(self, index: int) -> VirtualSite:
        if index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().site(index)
