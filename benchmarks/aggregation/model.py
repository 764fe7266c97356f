"""MiniLM of which one matrix is adapted, with everything before it computed once and kept on disk.

The adapted layer is `encoder.layer.5.output.dense` (1536 -> 384, not square), the last linear
layer of the encoder. For a token with input x of that layer:

    h = LayerNorm(y + s · B A x)      y = W x + b + residual, frozen, like x
    logits = head(scale(mean over tokens of h))

x (1536) and y (384) do not depend on what is trained: they are cached per token as float16, in one
file that all processes map. A step costs A, B, LayerNorm and the head, about a tenth of the
last transformer layer. Spec, names and logits are those of the product's TextClassifier with
LoRA on the same layer (tests/benchmarks/test_aggregation_bench.py), so adapters fit both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import LoraLinear, adapt
from anabranch.client.tuning.text import TextClassifier, pool
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task
from benchmarks.aggregation.data import MAX_TOKENS, Corpus, Records

LAYER = "encoder.layer.5.output"
TARGET = f"{LAYER}.dense"
INNER, WIDTH = 1536, 384
TOKENS_PER_BATCH = 2048


class LastMatrix(Classifier):
    """The last linear layer of MiniLM, its LayerNorm, mean pooling, and a head.

    Stage 0 is what is cached; stage 1 holds the adapted matrix, stage 2 pools.
    """

    unit_features = True

    def __init__(self, whole: TextClassifier) -> None:
        """Take the two modules out of a product's classifier whose base is not adapted."""
        base = nn.Module()
        place = base
        for name in LAYER.split("."):
            place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        layer = whole.base.get_submodule(LAYER)
        place.add_module("dense", layer.get_submodule("dense"))
        place.add_module("LayerNorm", layer.get_submodule("LayerNorm"))
        super().__init__(
            base,
            width=WIDTH,
            num_labels=whole.num_labels,
            base_digest=whole.base_digest,
            tokenizer_digest=whole.tokenizer_digest,
            function="last-matrix",
        )

    @property
    def num_stages(self) -> int:
        """Return 3."""
        return 3

    def stage_of(self, name: str) -> int:
        """Return 1: whatever is trained is in the adapted matrix."""
        return 1

    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        """Return pooled vectors (B, 384) for cached features (B, T, 1536 + 384)."""
        if (start, stop) != (1, 3):
            raise ValueError(f"only stages 1 and 2 are here, got {start} to {stop}")
        layer = self.base.get_submodule(LAYER)
        h = h.float()
        x, y = h[..., :INNER], h[..., INNER:]
        dense = layer.get_submodule("dense")
        if isinstance(dense, LoraLinear):
            y = y + dense.scaling * dense.lora_B(dense.lora_A(x))
        return self.scale(pool(layer.get_submodule("LayerNorm")(y), mask, "mean"))

    def encode(self, inputs: Sequence[str] | NDArray[np.float32]) -> list[Tensor]:
        """Refuse: features come from the cache."""
        raise NotImplementedError("features of this classifier come from `features`")


def config_for(dataset: str, labels: tuple[str, ...], lora: Lora) -> RunConfig:
    """Return the run whose model is MiniLM on this data set."""
    return RunConfig(
        name="aggregation",
        task=Task(kind="text-classification", labels=labels),
        data=Contract(columns={"text": Column(type="text"), "label": Column(type="label")}),
        model=Model(base="minilm", max_tokens=MAX_TOKENS[dataset]),
        federation=Federation(rounds=1),
        lora=lora,
    )


def whole(corpus: Corpus) -> TextClassifier:
    """Return the product's classifier, not adapted."""
    classifier = load_classifier(config_for(corpus.name, corpus.labels, Lora(rank=0)))
    assert isinstance(classifier, TextClassifier)  # the task is text
    return classifier


def classifier(source: TextClassifier, lora: Lora, seed: int) -> LastMatrix:
    """Return the benchmark's classifier with `lora.rank` ranks on the matrix, and a zero head."""
    made = LastMatrix(source)
    adapt(made, lora, seed=seed)
    return made


@dataclass(frozen=True, eq=False)
class Cached:
    """Features of many records in one mapped array; `take` copies out what a batch needs."""

    values: NDArray[np.float16]  # (all tokens, 1536 + 384)
    starts: NDArray[np.int64]  # (n + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        first, last = self.starts[index], self.starts[index + 1]
        return torch.from_numpy(self.values[first:last])

    def subset(self, indices: Sequence[int]) -> list[Tensor]:
        """Return views (tokens, 1536 + 384) of some records; nothing is copied."""
        return [self[int(i)] for i in indices]


def features(source: TextClassifier, records: Records, file: Path) -> Cached:
    """Return the cached features of `records`, computed into `file` (.npy) if it is not there."""
    if not file.exists():
        _write(source, records, file)
    values = np.load(file, mmap_mode="c")  # private pages: torch wants them writable
    return Cached(values, np.load(_starts(file)))


def _starts(file: Path) -> Path:
    return file.with_name(f"{file.stem}-starts.npy")


def _write(source: TextClassifier, records: Records, file: Path) -> None:
    encoded = source.encode(records.texts)
    starts = np.cumsum([0, *map(len, encoded)])
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.part.npy")
    values = np.lib.format.open_memmap(partial, "w+", np.float16, (int(starts[-1]), INNER + WIDTH))
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    while order:
        size = max(1, TOKENS_PER_BATCH // len(encoded[order[-1]]))
        chosen, order = order[-size:], order[:-size]
        for i, row in zip(chosen, compute(source, [encoded[i] for i in chosen]), strict=True):
            values[starts[i] : starts[i + 1]] = row
    values.flush()
    np.save(_starts(file), starts)
    partial.rename(file)


def compute(source: TextClassifier, encoded: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    """Return x beside y of every token, (T, 1536 + 384) per record, as a forward pass has them."""
    seen: list[Tensor] = []
    layer = source.base.get_submodule(LAYER)
    hooks = [
        layer.get_submodule("dense").register_forward_pre_hook(lambda _, at: seen.append(at[0])),
        layer.get_submodule("LayerNorm").register_forward_pre_hook(
            lambda _, at: seen.append(at[0])
        ),
    ]
    try:
        with torch.inference_mode():
            ids, mask = collate(list(encoded))
            source.run(ids, mask, 0, source.num_stages - 1)
    finally:
        for hook in hooks:
            hook.remove()
    rows = torch.cat(seen, dim=-1).numpy()
    return [row[: len(ids)] for row, ids in zip(rows, encoded, strict=True)]


def examples(cached: Cached, records: Records, indices: Sequence[int] | None = None) -> Examples:
    """Return records as the training loops take them; all of them without `indices`."""
    chosen = range(len(records)) if indices is None else indices
    labels = torch.from_numpy(records.labels[np.asarray(chosen, np.int64)])
    return Examples(cached.subset(list(chosen)), labels)
