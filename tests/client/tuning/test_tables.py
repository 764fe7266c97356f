from collections.abc import Callable

import numpy as np
import pytest
import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import collate
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, ModelError
from anabranch.protocols.tables import Lora

MakeConfig = Callable[..., RunConfig]
Randomise = Callable[..., None]
TABULAR = "tabular-classification"
FEATURES = 5  # age, pressure and whether it is missing, ward a or b


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, FEATURES)).astype(np.float32)


def test_logistic_regression_is_a_head_on_the_row(
    make_config: MakeConfig, randomise: Randomise
) -> None:
    classifier = load_classifier(make_config("logistic", TABULAR))
    randomise(classifier)
    x, mask = collate(classifier.encode(rows(4)))

    logits = classifier(classifier.prefix(x, mask), mask)

    assert classifier.spec.shapes == {"head.bias": (3,), "head.weight": (3, FEATURES)}
    assert (classifier.spec.rank, classifier.spec.targets) == (0, ())
    torch.testing.assert_close(logits, x @ classifier.head.weight.T + classifier.head.bias)


@pytest.mark.parametrize(
    ("lora", "cut"),
    [
        (Lora(targets=("hidden.*",)), 0),
        (Lora(targets=("hidden.*",), layers="last:1"), 1),
        (Lora(rank=0), 2),
        (Lora(rank=0, modules_to_save=("hidden.1",)), 1),
    ],
)
def test_a_perceptron_is_its_layers_with_relu(
    make_config: MakeConfig, randomise: Randomise, lora: Lora, cut: int
) -> None:
    classifier = load_classifier(make_config("mlp", TABULAR, lora=lora, hidden=(7, 6)))
    randomise(classifier)
    x, mask = collate(classifier.encode(rows(4)))
    hidden = [classifier.base.get_submodule(f"hidden.{i}") for i in range(2)]

    logits = classifier(classifier.prefix(x, mask), mask)

    expected = classifier.head(torch.relu(hidden[1](torch.relu(hidden[0](x)))))
    assert mask is None
    assert (classifier.cut, classifier.cached_layers) == (cut, cut)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(classifier.logits(x, mask), expected)


def test_targets_of_another_base_are_refused(make_config: MakeConfig) -> None:
    message = r"lora.targets: 'query' matches nothing in the base; linear layers are hidden.\*"
    with pytest.raises(ModelError, match=message):
        load_classifier(make_config("mlp", TABULAR))


def test_rows_of_another_width_are_refused(make_config: MakeConfig) -> None:
    classifier = load_classifier(make_config("logistic", TABULAR))

    with pytest.raises(DataError, match=r"rows have shape \(4,\), the model expects \(5,\)"):
        classifier.encode(rows(2)[:, :4])
