"""What is trained: the configurations, the records, and how many clients have how many of them.

Only what trains is imported here, so that peers in an environment of their own read it too.
Client i has records[i · n : (i + 1) · n] of a shuffled data set.

    name         base                          trained                            a round
    mlp          64-128-10 on digits           all 9,610 values                   20 of 200 clients
    mlp_100      the same                      the same                           100 of 1000
    cnn          two convolutions, 32x32x3     all 153,962 values                 20 of 200
    small        transformer, width 64,        LoRA r = 8 on query and value of   20 of 200
                 6 layers, 16 tokens           the last two layers, and head
    minilm       all-MiniLM-L6-v2, at most     the same                           8 of 40
                 32 tokens, SST-2
    full_depth   transformer, width 128,       LoRA r = 8 on query and value of   20 of 200
                 4 layers, 16 tokens           all layers, and head

50 records a client (MiniLM: 20), batches of 10, one epoch, SGD without momentum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.client.data.records import Records
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import (
    Column,
    Contract,
    Federation,
    Lora,
    Model,
    Task,
    TaskKind,
    Training,
)
from benchmarks.harness import ROOT

SEED = 0
DIGITS = tuple("0123456789")
BATCH = 10
WHOLE = Lora(rank=0, modules_to_save=("*",))
LAST_TWO = Lora(rank=8, targets=("query", "value"), layers="last:2")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One of the rows above."""

    name: str
    kind: TaskKind
    labels: tuple[str, ...]
    columns: Mapping[str, Column]
    model: Model
    lora: Lora
    clients: int
    cohort: int
    each: int  # records of a client
    rate: float  # of learning
    records: Callable[[int], Records]  # so many records

    def config(self, rounds: int, **training: Any) -> RunConfig:
        """Return the run of so many rounds."""
        fields: dict[str, Any] = {
            "optimizer": "sgd",
            "momentum": 0.0,
            "learning_rate": self.rate,
            "batch_size": BATCH,
            "max_grad_norm": None,
        }
        return RunConfig(
            name=self.name.replace("_", "-"),
            seed=SEED,
            task=Task(kind=self.kind, labels=self.labels),
            data=Contract(columns={**self.columns, "label": Column(type="label")}),
            model=self.model,
            lora=self.lora,
            training=Training(**(fields | training)),
            federation=Federation(
                rounds=rounds, cohort=self.cohort, method="fedavg", weighting="uniform"
            ),
        )

    def all_records(self) -> Records:
        """Return the records of all clients, client after client."""
        return self.records(self.clients * self.each)


def digits(count: int) -> Records:
    """Return `count` images (1, 8, 8) of handwritten digits, drawn with replacement."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    at = np.random.default_rng(SEED).integers(0, len(images), count)
    pixels = (images[at] / 16.0).astype(np.float32).reshape(count, 1, 8, 8)
    return Records(pixels, labels[at].astype(np.int64))


def digit_rows(count: int) -> Records:
    """Return the same as rows of 64 numbers."""
    records = digits(count)
    assert not isinstance(records.inputs, list)
    return Records(records.inputs.reshape(count, 64), records.labels)


def pictures(count: int) -> Records:
    """Return `count` made-up images (3, 32, 32) of ten classes: a pattern each, and noise."""
    rng = np.random.default_rng(SEED)
    labels = rng.integers(0, 10, count)
    patterns = rng.standard_normal((10, 3, 32, 32), np.float32)
    noise = rng.standard_normal((count, 3, 32, 32), np.float32)
    return Records(0.3 * patterns[labels] + noise, labels)


def sentences(count: int) -> Records:
    """Return `count` sentences of SST-2 with their sentiment; SystemExit without the data."""
    folder = Path(os.environ.get("ANABRANCH_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "sst2" / "stsa.binary.train"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: set ANABRANCH_DATA to the folder that holds it")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    order = np.random.default_rng(SEED).permutation(len(lines))[:count]
    pairs = [lines[i].split(" ", 1) for i in order]
    return Records([text for _, text in pairs], np.array([int(label) for label, _ in pairs]))


def _digits(
    name: str, model: Model, lora: Lora, clients: int = 200, rate: float = 0.05
) -> Workload:
    tabular = model.base == "mlp"
    rows = {f"p{i:02d}": Column(type="number") for i in range(64)}
    return Workload(
        name=name,
        kind="tabular-classification" if tabular else "image-classification",
        labels=DIGITS,
        columns=rows if tabular else {"image": Column(type="image")},
        model=model,
        lora=lora,
        clients=clients,
        cohort=clients // 10,
        each=50,
        rate=rate,
        records=digit_rows if tabular else digits,
    )


MLP = Model(base="mlp", hidden=(128,))
SMALL = Model(base="vit", width=64, depth=6, heads=4, patch=2, image_size=8)
WORKLOADS = {
    one.name: one
    for one in (
        _digits("mlp", MLP, WHOLE),
        _digits("mlp_100", MLP, WHOLE, clients=1000),
        Workload(
            name="cnn",
            kind="image-classification",
            labels=DIGITS,
            columns={"image": Column(type="image")},
            model=Model(base="cnn", image_size=32, channels=3),
            lora=WHOLE,
            clients=200,
            cohort=20,
            each=50,
            rate=0.1,
            records=pictures,
        ),
        _digits("small", SMALL, LAST_TWO, rate=0.1),
        Workload(
            name="minilm",
            kind="text-classification",
            labels=("negative", "positive"),
            columns={"text": Column(type="text")},
            model=Model(base="minilm", max_tokens=32),
            lora=LAST_TWO,
            clients=40,
            cohort=8,
            each=20,
            rate=0.05,
            records=sentences,
        ),
        _digits(
            "full_depth",
            Model(base="vit", width=128, depth=4, heads=4, patch=2, image_size=8),
            Lora(rank=8, targets=("query", "value")),
            rate=0.1,
        ),
    )
}
