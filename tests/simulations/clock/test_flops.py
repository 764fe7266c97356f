"""Operations and memory of one record, against those counted by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError
from anabranch.simulations.clock.flops import Work, work_of

LABELS = 3


def classifier_of(kind: str, model: dict[str, Any], lora: dict[str, Any]) -> Classifier:
    column = {"x0": {"type": "image"}} if kind == "image" else {}
    numbers = {f"x{i}": {"type": "number"} for i in range(5)} if kind == "tabular" else {}
    file = {
        "name": "work",
        "task": {"kind": f"{kind}-classification", "labels": list("abc")},
        "data": {"columns": {**column, **numbers, "y": {"type": "label"}}},
        "model": model,
        "lora": lora,
        "federation": {"rounds": 1},
    }
    return load_classifier(msgspec.convert(file, RunConfig))


def perceptron(**lora: Any) -> Work:
    classifier = classifier_of("tabular", {"base": "mlp", "hidden": [16, 8]}, lora)
    return work_of(classifier, classifier.encode(np.zeros((4, 5), np.float32)))


def test_a_head_alone_costs_its_weights_forward_and_again_backward() -> None:
    """Everything else is below the cut: 2 W each; the head has no input that asks."""
    work = perceptron(rank=0)

    assert work.prefix == 2 * (5 * 16 + 16 * 8)
    assert work.forward == 2 * 8 * LABELS
    assert work.backward == 2 * 8 * LABELS
    assert work.step == work.forward + work.backward


def test_low_rank_layers_cost_two_more_products_and_their_gradients() -> None:
    """Rank 2 on the second of two layers; nothing below it asks for a gradient."""
    work = perceptron(rank=2, targets=["hidden.1"])
    frozen, low_a, low_b, head = 16 * 8, 16 * 2, 2 * 8, 8 * LABELS

    assert work.prefix == 2 * 5 * 16
    assert work.forward == 2 * (frozen + low_a + low_b + head)
    # of weights: A, B, head; of inputs: the head's and B's, not those of the layer
    assert work.backward == 2 * (low_a + low_b + head) + 2 * (head + low_b)


def test_a_layer_between_costs_the_gradient_of_its_input() -> None:
    """Both layers adapted: the gradient goes through the frozen weight of the second."""
    work = perceptron(rank=2, targets=["hidden.*"])
    one, two, head = 2 * (5 + 16), 2 * (16 + 8), 8 * LABELS

    assert work.prefix == 0
    assert work.forward == 2 * (5 * 16 + one + 16 * 8 + two + head)
    inputs = head + 16 * 8 + two + 2 * 16  # head, frozen and low rank of the second, B of the first
    assert work.backward == 2 * (one + two + head) + 2 * inputs


def test_attention_costs_four_t_squared_d_forward() -> None:
    model = {"base": "vit", "width": 16, "depth": 2, "heads": 2}
    classifier = classifier_of("image", model, {"rank": 0})
    work = work_of(classifier, classifier.encode(np.zeros((2, 1, 8, 8), np.float32)))
    tokens, width = 16, 16
    block = 4 * width**2 + 4 * width**2  # query, key, value, output; up and down, twice as wide

    patches = 2 * 4 * width * tokens
    assert work.prefix == patches + 2 * (2 * block * tokens + 4 * tokens**2 * width)


def test_the_backward_pass_of_a_model_trained_in_full_is_twice_its_forward_pass() -> None:
    model = {"base": "vit", "width": 16, "depth": 4, "heads": 2}
    lora = {"rank": 0, "modules_to_save": ["blocks.*"]}
    classifier = classifier_of("image", model, lora)
    work = work_of(classifier, classifier.encode(np.zeros((2, 1, 8, 8), np.float32)))

    assert work.forward > 0
    assert 1.85 < work.backward / work.forward <= 2.0  # nothing below the first block asks


def test_memory_is_weights_moments_and_what_a_batch_keeps() -> None:
    classifier = classifier_of("tabular", {"base": "mlp", "hidden": [16, 8]}, {"rank": 0})
    encoded = classifier.encode(np.zeros((4, 5), np.float32))
    frozen, head = 5 * 16 + 16 + 16 * 8 + 8, 8 * LABELS + LABELS

    assert work_of(classifier, encoded).fixed_bytes == 4 * (frozen + 4 * head)
    assert work_of(classifier, encoded, "sgd").fixed_bytes == 4 * (frozen + 3 * head)
    work = Work(prefix=0, forward=1, backward=2, fixed_bytes=100, bytes_per_record=10.0)
    assert work.memory(32) == 420.0
    wide = perceptron(rank=2, targets=["hidden.*"])
    assert wide.bytes_per_record >= 4 * (5 + 16 + 8)  # at least every layer's input


def test_counting_leaves_the_classifier_as_it_was() -> None:
    classifier = classifier_of("tabular", {"base": "mlp"}, {"rank": 2, "targets": ["hidden.*"]})
    before, modes = read_adapter(classifier), [m.training for m in classifier.modules()]
    state = torch.get_rng_state()
    work_of(classifier, classifier.encode(np.ones((2, 5), np.float32)))

    after = read_adapter(classifier)
    assert all((after.arrays[n] == a).all() for n, a in before.arrays.items())
    assert all(p.grad is None for p in classifier.parameters())
    assert [m.training for m in classifier.modules()] == modes
    assert (torch.get_rng_state() == state).all()


def test_without_records_there_is_nothing_to_count() -> None:
    classifier = classifier_of("tabular", {"base": "logistic"}, {"rank": 0})
    with pytest.raises(DataError, match="expected records to count the operations of"):
        work_of(classifier, [])
