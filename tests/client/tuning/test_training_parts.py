"""Training one part of an adapter, without privacy: the rest stays as it is, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.training import Schedule, fit
from anabranch.protocols.errors import RunError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Training
from tests.client.tuning.private_rig import Sequences, examples, make, values

DECAYING = [
    Training(optimizer="adamw", learning_rate=0.05, weight_decay=0.3, batch_size=4),
    Training(optimizer="sgd", learning_rate=0.5, weight_decay=0.3, momentum=0.9, batch_size=4),
]
PARTS = [
    Part(factors="A"),
    Part(factors="B"),
    Part(factors="none"),
    Part(factors="both", dense=False),
    Part(factors="B", ranks=(1,)),
    Part(factors="A", ranks=(0,), dense=False),
    Part(ranks=(1,)),
]


def train(classifier: Sequences, training: Training, **options: Any) -> None:
    fit(
        classifier,
        examples(),
        training,
        steps=5,
        schedule=Schedule(total_steps=5),
        seed=0,
        **options,
    )


def inside(
    classifier: Sequences, part: Part, of: dict[str, Tensor]
) -> dict[str, NDArray[np.float32]]:
    return dict(part.take(classifier.spec, {name: t.numpy() for name, t in of.items()}))


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("training", DECAYING, ids=["adamw", "sgd"])
def test_what_is_not_trained_stays_bit_for_bit_and_what_is_moves(
    part: Part, training: Training
) -> None:
    classifier = make()
    before = values(classifier)

    train(classifier, training, part=part, proximal_mu=0.1)

    after = values(classifier)
    spec = classifier.spec
    ones = {name: np.ones(shape, np.float32) for name, shape in spec.tensors}
    trained = part.spread(spec, part.take(spec, ones))
    for name, start in before.items():
        moved = (after[name] != start).numpy()
        assert not moved[trained[name] == 0].any()
        if trained[name].any():
            assert moved[trained[name] == 1].mean() > 0.9
    assert all(p.grad is None or p.requires_grad for p in classifier.parameters())


def test_kept_tensors_are_trained_with_the_part_as_the_union_of_both() -> None:
    apart, together = make(), make()

    train(apart, DECAYING[0], part=Part(factors="A", dense=False), kept=Part(factors="B"))
    train(together, DECAYING[0])

    for name, value in values(together).items():
        assert torch.equal(values(apart)[name], value)


@pytest.mark.parametrize("training", DECAYING, ids=["adamw", "sgd"])
def test_no_gradient_is_computed_for_what_is_frozen(training: Training) -> None:
    classifier = make()
    asked: list[str] = []
    for name, p in trainable_parameters(classifier).items():
        p.register_hook(lambda _, name=name: asked.append(name))

    train(classifier, training, part=Part(factors="B", dense=False))

    assert set(asked) == {f"layers.{i}.lora_B.weight" for i in (0, 1)}


def test_the_norm_that_is_clipped_is_that_of_what_is_trained() -> None:
    # One SGD step of rate 1 on a gradient clipped to 0.01 moves the part by exactly 0.01.
    training = Training(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, max_grad_norm=0.01, batch_size=11
    )
    part = Part(factors="A", ranks=(1,), dense=False)
    classifier = make()
    before = inside(classifier, part, values(classifier))

    fit(
        classifier,
        examples(),
        training,
        steps=1,
        schedule=Schedule(total_steps=1),
        seed=0,
        part=part,
    )

    after = inside(classifier, part, values(classifier))
    moved = np.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in before))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_penalty_is_part_of_the_objective_and_not_of_the_reported_loss() -> None:
    training = Training(
        optimizer="sgd", momentum=0.0, learning_rate=0.1, max_grad_norm=None, batch_size=11
    )
    classifier, reference = make(), make()
    weight = classifier.head.weight
    batch, mask = collate(examples().features)
    loss = functional.cross_entropy(reference(batch, mask), examples().labels)
    loss.backward()
    gradient = reference.head.weight.grad
    assert gradient is not None
    expected = reference.head.weight - 0.1 * (gradient + 3.0)

    done = fit(
        classifier,
        examples(),
        training,
        steps=1,
        schedule=Schedule(total_steps=1),
        seed=0,
        penalty=lambda: 3.0 * weight.sum(),
    )

    torch.testing.assert_close(classifier.head.weight, expected)
    assert done.loss == pytest.approx(float(loss.detach()), rel=1e-5)


def test_a_fit_that_diverges_leaves_frozen_ranks_alone_and_everything_trainable() -> None:
    classifier = make()
    before = values(classifier)
    training = Training(optimizer="sgd", learning_rate=3e38, weight_decay=0.5, batch_size=4)

    with pytest.raises(RunError, match="training loss is"):
        train(classifier, training, part=Part(factors="B", ranks=(0,)))

    for name, start in before.items():
        if name.endswith("lora_A.weight"):
            assert torch.equal(values(classifier)[name], start)
        if name.endswith("lora_B.weight"):
            assert torch.equal(values(classifier)[name][:, 1], start[:, 1])
    assert all(p.requires_grad for p in trainable_parameters(classifier).values())
