"""Small encoders on disk, and configurations, for the tests of tuning.

Shapes are not square: width 24, inner width 40, 3 layers, 3 labels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Column, Contract, Federation, Lora, Model, Task, TaskKind

MakeConfig = Callable[..., RunConfig]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 34,
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(BertConfig(**SIZES, pad_token_id=0)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, pad_token_id=1)),
    "electra": lambda: ElectraModel(ElectraConfig(**SIZES, embedding_size=16, pad_token_id=0)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES, pad_token_id=1)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            vocab_size=40, dim=24, hidden_dim=40, n_layers=3, n_heads=4, max_position_embeddings=34
        )
    ),
}
COLUMNS = {
    "text-classification": {"x": Column(type="text")},
    "image-classification": {"x": Column(type="image")},
    "tabular-classification": {
        "age": Column(type="number"),
        "pressure": Column(type="number", optional=True),
        "ward": Column(type="category", values=("a", "b")),
    },
}


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """Return a function that makes a run's configuration: 3 labels, everything else small."""

    def make(
        base: str = "minilm",
        kind: TaskKind = "text-classification",
        *,
        lora: Lora | None = None,
        seed: int = 0,
        **model: Any,
    ) -> RunConfig:
        return RunConfig(
            name="test",
            task=Task(kind=kind, labels=("a", "b", "c")),
            data=Contract(columns=COLUMNS[kind] | {"y": Column(type="label")}),
            model=Model(base=base, **model),
            federation=Federation(rounds=1, method="fedavg"),
            lora=lora or Lora(),
            seed=seed,
        )

    return make


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return model type -> folder of a small random encoder with its tokenizer."""
    folders = {}
    for seed, (name, make) in enumerate(ENCODERS.items()):
        torch.manual_seed(seed)
        folders[name] = tmp_path_factory.mktemp(name)
        encoder = make()
        with torch.no_grad():  # default weights are so small that layers hardly matter
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        encoder.save_pretrained(folders[name])
        save_tokenizer(folders[name])
    return folders


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return texts of the words w0 … w34, of 1 to 12 words."""
    return [" ".join(f"w{(7 * i + 3 * j) % 35}" for j in range(1 + 5 * i % 12)) for i in range(9)]


def save_tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(35))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def randomise() -> Callable[[Classifier], None]:
    """Return a function that gives every trainable tensor random values (B is zero at first)."""

    def fill(classifier: Classifier, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trainable_parameters(classifier).values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))

    return fill
