"""The task of every figure: sentiment of SST-2 sentences, MiniLM, LoRA r = 8 on q and v, head.

64 tokens at most. Records are real: 6,920 sentences to train on, 1,821 to test on, from the
folder that ANABRANCH_DATA names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import (
    Column,
    Contract,
    Federation,
    Lora,
    Model,
    Task,
    Training,
)
from benchmarks.harness import ROOT

SEED = 0
TOKENS = 64
RANK = 8
LABELS = ("negative", "positive")
BATCH = 16
LEARNING_RATE = 1e-3
FILES = {"train": "stsa.binary.train", "test": "stsa.binary.test"}


def config() -> RunConfig:
    """Return the run that the bundle is made of."""
    columns = {"text": Column(type="text"), "label": Column(type="label")}
    return RunConfig(
        name="sentiment",
        seed=SEED,
        task=Task(kind="text-classification", labels=LABELS),
        data=Contract(columns=columns),
        model=Model(base="minilm", max_tokens=TOKENS),
        lora=Lora(rank=RANK, targets=("query", "value")),
        training=Training(learning_rate=LEARNING_RATE, batch_size=BATCH),
        federation=Federation(rounds=1),
    )


def records(part: str, limit: int | None = None) -> tuple[list[str], np.ndarray]:
    """Return texts and labels of "train" or "test", shuffled by SEED; `limit` cuts them."""
    default = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("ANABRANCH_DATA", default)) / "sst2"
    path = folder / FILES[part]
    if not path.is_file():
        raise SystemExit(f"{path} is missing: set ANABRANCH_DATA to the folder that holds it")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    order = np.random.default_rng(SEED).permutation(len(lines))[:limit]
    chosen = [lines[i] for i in order]
    labels = np.array([int(line[0]) for line in chosen], np.int64)
    return [line[1:].strip() for line in chosen], labels


def write_records(path: Path, texts: list[str], labels: np.ndarray) -> None:
    """Write records as a device reads them: one JSON object per line."""
    rows = [{"text": t, "label": LABELS[y]} for t, y in zip(texts, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
