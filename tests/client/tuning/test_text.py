from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from anabranch.client.tuning.bases import load_classifier, minilm_folder
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ModelError
from anabranch.protocols.tables import Lora

MakeConfig = Callable[..., RunConfig]
Randomise = Callable[..., None]
FAMILY = ("bert", "roberta", "electra", "mpnet", "distilbert")
DIAGNOSES = [
    "fracture of the left femur, initial encounter for closed fracture",
    "asthma",
    "",
    "unspecified atrial fibrillation and flutter",
]


def stock_vectors(folder: Path, x: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return unit vectors · sqrt(d) from the stock AutoModel, padded as its tokenizer would."""
    model = AutoModel.from_pretrained(folder)
    x = x.masked_fill(~mask, model.config.pad_token_id)
    with torch.no_grad():
        h = model(input_ids=x, attention_mask=mask.long()).last_hidden_state
    lengths = mask.sum(dim=1, keepdim=True)
    mean = (h * mask[:, :, None]).sum(dim=1) / lengths
    pooled = h[:, 0] if pooling == "cls" else mean
    vectors: Tensor = torch.nn.functional.normalize(pooled, dim=1) * pooled.shape[1] ** 0.5
    return vectors


def cuts(classifier: Classifier, x: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the logits for every place where the classifier could be cut."""
    logits = []
    for cut in range(classifier.num_stages + 1):
        classifier.cut = cut
        logits.append(classifier(classifier.prefix(x, mask), mask))
    return logits


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_minilm_equals_the_stock_model_on_padded_batches(
    make_config: MakeConfig, pooling: Literal["mean", "cls"]
) -> None:
    config = make_config("minilm", lora=Lora(layers="last:2"), pooling=pooling)
    classifier = load_classifier(config)
    x, mask = collate(classifier.encode(DIAGNOSES))
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [14, 3, 2, 10]

    h = classifier.prefix(x, mask)
    ours = classifier.run(h, mask, classifier.cut, classifier.num_stages)

    assert (classifier.cut, classifier.cached_layers) == (5, 4)
    assert h.shape == (4, 14, 384)
    assert not h.requires_grad
    stock = stock_vectors(minilm_folder(), x, mask, pooling)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", FAMILY)
def test_every_architecture_equals_its_stock_model(
    make_config: MakeConfig, encoders: dict[str, Path], texts: list[str], model_type: str
) -> None:
    config = make_config(str(encoders[model_type]), lora=Lora(rank=0), max_tokens=16)
    classifier = load_classifier(config)
    x, mask = collate(classifier.encode(texts))
    assert mask is not None
    assert not mask.all()

    stock = stock_vectors(encoders[model_type], x, mask, "mean")

    torch.testing.assert_close(classifier.prefix(x, mask), stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", FAMILY)
def test_logits_do_not_depend_on_where_the_classifier_is_cut(
    make_config: MakeConfig,
    encoders: dict[str, Path],
    texts: list[str],
    randomise: Randomise,
    model_type: str,
) -> None:
    target = "q_lin" if model_type == "distilbert" else "q" if model_type == "mpnet" else "query"
    lora = Lora(targets=(target,), layers="last:1")
    config = make_config(str(encoders[model_type]), lora=lora, max_tokens=16)
    classifier = load_classifier(config)
    randomise(classifier)
    x, mask = collate(classifier.encode(texts))
    assert mask is not None
    whole = classifier.logits(x, mask)

    assert whole.shape == (len(texts), 3)
    assert (whole.std(dim=0) > 1e-3).all()
    for logits in cuts(classifier, x, mask):
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", FAMILY)
def test_padding_does_not_change_a_records_logits(
    make_config: MakeConfig,
    encoders: dict[str, Path],
    texts: list[str],
    randomise: Randomise,
    model_type: str,
) -> None:
    config = make_config(str(encoders[model_type]), lora=Lora(rank=0), max_tokens=16)
    classifier = load_classifier(config)
    randomise(classifier)
    encoded = classifier.encode(texts)

    together = classifier.logits(*collate(encoded))

    alone = torch.cat([classifier.logits(*collate([x])) for x in encoded])
    unmasked = torch.cat([classifier.logits(x[None], None) for x in encoded])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, unmasked, atol=1e-5, rtol=0)


def test_an_architecture_that_cannot_be_cut_trains_behind_the_identity(
    make_config: MakeConfig, encoders: dict[str, Path], texts: list[str]
) -> None:
    lora = Lora(targets=("q_lin", "v_lin"), layers="last:1")
    config = make_config(str(encoders["distilbert"]), lora=lora, max_tokens=16)
    classifier = load_classifier(config)
    x, mask = collate(classifier.encode(texts))

    assert (classifier.cut, classifier.cached_layers) == (0, 0)
    assert classifier.spec.targets == (
        "transformer.layer.2.attention.q_lin",
        "transformer.layer.2.attention.v_lin",
    )
    assert torch.equal(classifier.prefix(x, mask), x)


def test_long_texts_are_cut_to_max_tokens(make_config: MakeConfig) -> None:
    classifier = load_classifier(make_config("minilm", max_tokens=8))

    (ids,) = classifier.encode(["fever " * 50])

    assert ids.dtype == torch.int64
    assert ids.tolist() == [101, *[9016] * 6, 102]
    assert classifier.encode([]) == []


@pytest.mark.parametrize(("model_type", "room"), [("bert", 34), ("roberta", 32), ("mpnet", 32)])
def test_more_tokens_than_positions_are_refused(
    make_config: MakeConfig, encoders: dict[str, Path], model_type: str, room: int
) -> None:
    target = "q" if model_type == "mpnet" else "query"
    folder, lora = str(encoders[model_type]), Lora(targets=(target,))
    load_classifier(make_config(folder, lora=lora, max_tokens=room))

    with pytest.raises(ModelError, match=f"max_tokens = {room + 1}: the base has only {room}"):
        load_classifier(make_config(folder, lora=lora, max_tokens=room + 1))
