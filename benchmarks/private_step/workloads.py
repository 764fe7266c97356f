"""The three models, and one batch of real token ids for each.

name     encoder                                     batch   tokens
d64      BERT, random, width 64, 2 layers, 4 heads       8       16
d128     BERT, random, width 128, 4 layers, 4 heads      8       32
minilm   all-MiniLM-L6-v2, width 384, 6 layers, 12      32       64

LoRA of rank 8 on every linear layer of every encoder layer (query, key, value, attention
output, intermediate, output), and the head. The cut lies below the first layer, so a record is
its embeddings (T, d), computed once; the whole encoder runs in every step. Texts are diagnoses
of ICD-10-CM, joined until a record fills all T tokens: nothing is padded.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simple_icd_10_cm as icd
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from anabranch.client.tuning.bases import load_classifier, minilm_folder
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task, Training

SEED = 0
LABELS = 10
RANK = 8
TARGETS = ("query", "key", "value", "dense")
JOINED = 24  # diagnoses per record: more than enough for 64 tokens


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch, and the size of the random BERT it goes through; without layers, MiniLM."""

    batch: int
    tokens: int
    width: int = 0
    layers: int = 0
    heads: int = 0


WORKLOADS: dict[str, Workload] = {
    "d64": Workload(width=64, layers=2, heads=4, batch=8, tokens=16),
    "d128": Workload(width=128, layers=4, heads=4, batch=8, tokens=32),
    "minilm": Workload(batch=32, tokens=64),
}


def training(workload: Workload) -> Training:
    """Return the optimiser of every variant: SGD, too slow to leave the region it starts in."""
    return Training(
        optimizer="sgd",
        momentum=0.0,
        learning_rate=1e-3,
        batch_size=workload.batch,
        local_steps=1,
        max_grad_norm=None,
    )


def classifier(workload: Workload) -> Classifier:
    """Return a new classifier with values of its own; frozen weights are shared in memory.

    Equal for equal workloads. The trained values are moved off their start, where B and the
    head are zero, so that every tensor has a gradient.
    """
    base = str(_random_bert(workload)) if workload.layers else "minilm"
    loaded = load_classifier(_config(base, workload.tokens))
    rng = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in trainable_parameters(loaded).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return loaded


def batch(workload: Workload, model: Classifier) -> Examples:
    """Return the batch that every step trains on, as the classifier's prefix gives it."""
    rng = np.random.default_rng(SEED)
    codes = [code for code in icd.get_all_codes(with_dots=True) if icd.is_leaf(code)]
    chosen = rng.choice(len(codes), (workload.batch, JOINED), replace=False)
    texts = ["; ".join(icd.get_description(codes[i]) for i in row) for row in chosen]
    ids = model.encode(texts)
    found = {len(row) for row in ids}
    if found != {workload.tokens} or model.cut != 1:
        raise RuntimeError(
            f"records of {sorted(found)} tokens cut at stage {model.cut}: expected every record "
            f"to have {workload.tokens} tokens, and the cut right above the embeddings (1)"
        )
    features = model.prefix(*collate(ids))
    labels = torch.from_numpy(rng.integers(LABELS, size=workload.batch))
    return Examples(list(features.clone().unbind()), labels)


_folders: dict[Workload, Path] = {}
_root = tempfile.TemporaryDirectory(prefix="private-step-")


def _random_bert(workload: Workload) -> Path:
    """Return a folder with a random BERT that has MiniLM's tokenizer, written once per process."""
    if workload not in _folders:
        tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
        folder = Path(_root.name) / f"bert{workload.width}"
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            bert = BertModel(_bert_config(workload, len(tokenizer)))
        tokenizer.save_pretrained(folder)
        bert.config.save_pretrained(folder)
        save_file(bert.state_dict(), folder / "model.safetensors", {"format": "pt"})
        _folders[workload] = folder
    return _folders[workload]


def _bert_config(workload: Workload, vocabulary: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=workload.width,
        intermediate_size=4 * workload.width,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        max_position_embeddings=workload.tokens,
    )


def _config(base: str, tokens: int) -> RunConfig:
    return RunConfig(
        name="private-step",
        task=Task(kind="text-classification", labels=tuple(str(i) for i in range(LABELS))),
        data=Contract(columns={"text": Column(type="text"), "label": Column(type="label")}),
        model=Model(base=base, max_tokens=tokens),
        federation=Federation(rounds=1),
        lora=Lora(rank=RANK, targets=TARGETS),
        seed=SEED,
    )
