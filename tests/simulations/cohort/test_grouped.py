from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.vision import ImageClassifier
from anabranch.simulations.cohort.grouped import Unbatchable, grouped, why_not
from tests.client.tuning.conftest import make_config  # noqa: F401 - a fixture
from tests.simulations.cohort.cohort_rig import IMAGES, TABLES, VIT, tables_and_images

DOUBLE = torch.float64
NAMES = ["logistic", "mlp", "mlp-lora", "vit", "vit-all"]


@pytest.fixture(scope="module")
def classifiers(make_config: Any) -> dict[str, Classifier]:  # noqa: F811
    """Return name -> classifier in float64: laws hold to rounding, however steep the layers."""
    return {name: made.double() for name, made in tables_and_images(make_config).items()}


def values_of(classifier: Classifier, clients: int) -> dict[str, Tensor]:
    """Return name -> (K, *shape): different values for every client."""
    rng = torch.Generator().manual_seed(1)
    return {
        name: 0.4 * torch.randn((clients, *p.shape), generator=rng, dtype=DOUBLE)
        for name, p in trainable_parameters(classifier).items()
    }


def batch_of(classifier: Classifier, records: int) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    if classifier.cut == 0 and hasattr(classifier, "image_shape"):
        assert isinstance(classifier, ImageClassifier)
        return torch.randn((records, *classifier.image_shape), generator=rng, dtype=DOUBLE)
    shape = (4, VIT["width"]) if hasattr(classifier, "image_shape") else (5,)
    return torch.randn(records, *shape, generator=rng, dtype=DOUBLE)


def alone(
    classifier: Classifier, values: dict[str, Tensor], x: Tensor, weight: Tensor, clients: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of one client after the other."""
    parameters = trainable_parameters(classifier)
    logits, gradients = [], []
    for k, (own, w) in enumerate(zip(x.chunk(clients), weight.chunk(clients), strict=True)):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name][k])
        z = classifier(own, None)
        gradients.append(torch.autograd.grad((z * w).sum(), list(parameters.values())))
        logits.append(z.detach())
    stacked = [torch.stack(each) for each in zip(*gradients, strict=True)]
    return torch.cat(logits), dict(zip(parameters, stacked, strict=True))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_logits_and_gradients_are_those_of_one_client_at_a_time(
    classifiers: dict[str, Classifier], name: str, clients: int, records: int, data: st.DataObject
) -> None:
    classifier = classifiers[name]
    values = values_of(classifier, clients)
    trained = data.draw(st.sets(st.sampled_from(sorted(values)), min_size=1))
    x = batch_of(classifier, clients * records)
    weight = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    expected, expected_gradients = alone(classifier, values, x, weight, clients)
    gradients = {n: torch.full_like(values[n], torch.nan) for n in trained}
    with grouped(classifier) as group:
        group.bind(values, gradients)
        for _ in range(2):  # the second batch overwrites the gradients of the first
            group.begin(len(x))
            logits = classifier(x, None)
            torch.autograd.backward(logits, weight)
            group.require_complete()
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-9, atol=1e-10)
    for n in trained:
        torch.testing.assert_close(gradients[n], expected_gradients[n], rtol=1e-9, atol=1e-10)


def test_a_layer_that_is_called_twice_adds_up_its_gradients(
    classifiers: dict[str, Classifier],
) -> None:
    classifier = classifiers["logistic"]
    values = values_of(classifier, 2)
    gradients = {n: torch.zeros_like(v) for n, v in values.items()}
    x = batch_of(classifier, 4)
    weight = torch.ones(4, 3, dtype=DOUBLE)
    with grouped(classifier) as group:
        group.bind(values, gradients)
        group.begin(4)
        torch.autograd.backward(classifier.head(x) + classifier.head(2 * x), weight)
    by_client = x.view(2, 2, -1).sum(1)[:, None].expand(2, 3, -1)
    torch.testing.assert_close(gradients["head.weight"], 3 * by_client)
    torch.testing.assert_close(gradients["head.bias"], torch.full((2, 3), 4.0, dtype=DOUBLE))


def test_two_clients_by_hand(classifiers: dict[str, Classifier]) -> None:
    # x = 1, W_1 = 1, W_2 = -2 everywhere, b_1 = 0, b_2 = 10: five features.
    classifier = classifiers["logistic"]
    values = {
        "head.weight": torch.tensor([1.0, -2.0], dtype=DOUBLE)[:, None, None]
        .expand(2, 3, 5)
        .clone(),
        "head.bias": torch.tensor([0.0, 10.0], dtype=DOUBLE)[:, None].expand(2, 3).clone(),
    }
    with grouped(classifier) as group:
        group.bind(values, {})
        group.begin(2)
        logits = classifier(torch.ones(2, 5, dtype=DOUBLE), None)
    assert logits.tolist() == [[5.0] * 3, [0.0] * 3]


def fail_inside(classifier: Classifier) -> None:
    with grouped(classifier) as group:
        group.bind(values_of(classifier, 3), {})
        assert any("forward" in vars(module) for module in classifier.modules())
        raise RuntimeError("in the middle")


def test_layers_are_as_before_whatever_happens(classifiers: dict[str, Classifier]) -> None:
    for classifier in classifiers.values():
        if why_not(classifier) is not None:
            continue
        x = batch_of(classifier, 3)
        before = classifier(x, None)
        with pytest.raises(RuntimeError, match="in the middle"):
            fail_inside(classifier)
        assert not any("forward" in vars(module) for module in classifier.modules())
        assert torch.equal(classifier(x, None), before)


def test_other_rows_are_refused(classifiers: dict[str, Classifier]) -> None:
    classifier = classifiers["logistic"]
    with grouped(classifier) as group:
        group.bind(values_of(classifier, 2), {})
        group.begin(4)
        with pytest.raises(Unbatchable, match=r"head.weight was called on \(2, 5\), expected 4"):
            classifier(torch.ones(2, 5, dtype=DOUBLE), None)


def test_a_hook_on_a_trained_layer_is_unknown(make_config: Any) -> None:  # noqa: F811
    base, model, lora = TABLES["mlp"]
    classifier = load_classifier(make_config(base, "tabular-classification", lora=lora, **model))
    assert why_not(classifier) is None
    layer = classifier.get_submodule("base.hidden.1")
    assert isinstance(layer, nn.Linear)
    layer.register_forward_hook(lambda *_: None)
    reason = why_not(classifier)
    assert reason == "cohorts do not know the layers of hidden.1.bias, hidden.1.weight"


def test_every_kind_of_layer_is_tried() -> None:
    assert set(NAMES) == {*TABLES, *IMAGES} - {"cnn"}
