"""A BERT of two layers over real English words, and classifiers of every kind around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task
from tests.edge.made import Made, make

WORDS = "acute chronic fracture of the left right femur heart failure infarction type with and"
LABELS = ("bone", "heart", "other")


def write_wordpiece(folder: Path, *, lowercase: bool = True, **changes: Any) -> Path:
    """Write tokenizer files of a small WordPiece tokenizer; `changes` go into its JSON."""
    from tokenizers import BertWordPieceTokenizer

    letters = [chr(c) for c in range(0x21, 0x7F)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokens += [f"##{c}" for c in letters if c.isalnum()] + WORDS.split() + ["é", "東"]
    tokenizer = BertWordPieceTokenizer(
        {token: i for i, token in enumerate(dict.fromkeys(tokens))}, lowercase=lowercase
    )
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(tokenizer.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(state))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT (width 24, 2 layers) and its tokenizer."""
    from transformers import BertConfig, BertModel

    folder = write_wordpiece(tmp_path_factory.mktemp("bert") / "tiny-bert")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wordpiece_folder() -> Callable[..., Path]:
    """Return `write_wordpiece`."""
    return write_wordpiece


@pytest.fixture(scope="session")
def make_config(tiny_bert: Path) -> Callable[..., RunConfig]:
    """Return a function from a kind of task to a small configuration."""

    def make(kind: str, **changes: Any) -> RunConfig:
        label = {"y": Column(type="label")}
        numbers = {f"x{i}": Column(type="number") for i in range(5)}
        columns, model, lora = {
            "text": (
                {"text": Column(type="text")},
                Model(base=str(tiny_bert), max_tokens=24),
                Lora(rank=3),
            ),
            "image": (
                {"image": Column(type="image")},
                Model(base="vit", width=24, depth=2, heads=3, image_size=12, patch=4),
                Lora(rank=3),
            ),
            "tabular": (
                numbers,
                Model(base="mlp", hidden=(11, 7)),
                Lora(rank=3, targets=("hidden.*",)),
            ),
            "logistic": (numbers, Model(base="logistic"), Lora(rank=0)),
        }[kind]
        task: Any = f"{'tabular' if kind == 'logistic' else kind}-classification"
        fields: dict[str, Any] = {
            "name": f"tiny-{kind}",
            "task": Task(kind=task, labels=LABELS),
            "data": Contract(columns=columns | label),
            "model": model,
            "lora": lora,
            "federation": Federation(rounds=2),
            "seed": 5,
        }
        return RunConfig(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def make_classifier(make_config: Callable[..., RunConfig]) -> Callable[..., Classifier]:
    """Return a function from a kind of task to a classifier whose adapter is not zero."""

    def make(kind: str, std: float = 0.2) -> Classifier:
        classifier = load_classifier(make_config(kind))
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in classifier.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=std, generator=rng)
        return classifier

    return make


@pytest.fixture(scope="session")
def made(
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Made]:
    """Return a function from a kind of task to a bundle of it, made once: do not change it."""
    bundles: dict[str, Made] = {}

    def bundle(kind: str) -> Made:
        if kind not in bundles:
            folder = tmp_path_factory.mktemp("made") / kind
            bundles[kind] = make(kind, folder, make_classifier, make_config)
        return bundles[kind]

    return bundle
