"""Local training: what a step is, what FedProx pulls on, what a seed decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.checkpoint import Steps
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import read_adapter, trainable_parameters
from anabranch.client.tuning.training import (
    Diverged,
    Schedule,
    class_weights,
    fit,
    predict,
    steps_per_round,
)
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, RunError
from anabranch.protocols.tables import Training
from tests.runs import table_run


def problem(config: RunConfig, n: int = 24) -> tuple[Classifier, Examples]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, 2)).astype(np.float32)
    labels = torch.from_numpy((x[:, 0] > x[:, 1]).astype(np.int64))
    classifier = load_classifier(config)
    features = [torch.from_numpy(row) for row in x]
    return classifier, Examples(features, labels)


def train(
    config: RunConfig, *, proximal_mu: float = 0.0, **more: Any
) -> tuple[Classifier, Examples, float]:
    classifier, examples = problem(config)
    steps = steps_per_round(len(examples), config.training)
    done = fit(
        classifier,
        examples,
        config.training,
        steps=steps,
        schedule=Schedule(total_steps=steps),
        seed=5,
        proximal_mu=proximal_mu,
        **more,
    )
    assert done.loss is not None
    return classifier, examples, done.loss


def test_training_learns_and_leaves_the_base_as_it_was() -> None:
    config = table_run(("local_epochs = 2", "local_epochs = 40"))

    classifier, examples, loss = train(config)

    accuracy = (predict(classifier, examples.features).argmax(1) == examples.labels.numpy()).mean()
    assert loss < 0.3
    assert accuracy > 0.9
    assert classifier.compute_base_digest() == classifier.base_digest


def test_the_same_seed_gives_the_same_adapter() -> None:
    first, _, _ = train(table_run())
    second, _, _ = train(table_run())

    for name, array in read_adapter(first).arrays.items():
        np.testing.assert_array_equal(array, read_adapter(second).arrays[name])


def test_one_sgd_step_with_fedprox_is_the_gradient_of_the_written_objective() -> None:
    config = table_run(
        ("learning_rate = 0.05", 'learning_rate = 0.05\noptimizer = "sgd"\nmomentum = 0.0'),
        ("batch_size = 8", "batch_size = 24\nmax_grad_norm = 1000.0"),
    )
    mu = 0.7
    classifier, examples = problem(config)
    reference, _ = problem(config)
    anchor = [p.detach().clone() for p in trainable_parameters(reference).values()]
    parameters = list(trainable_parameters(reference).values())
    x = torch.stack(list(examples.features))
    for _ in range(2):  # in the second step w differs from w_t
        loss = functional.cross_entropy(reference(x, None), examples.labels)
        pairs = zip(parameters, anchor, strict=True)
        pull = torch.stack([((p - a) ** 2).sum() for p, a in pairs]).sum()
        gradients = torch.autograd.grad(loss + mu / 2 * pull, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(0.05 * g)

    fit(
        classifier,
        examples,
        config.training,
        steps=2,
        schedule=Schedule(total_steps=2),
        seed=0,
        proximal_mu=mu,
    )

    for name, p in trainable_parameters(classifier).items():
        torch.testing.assert_close(p, trainable_parameters(reference)[name], atol=1e-6, rtol=1e-5)


def test_a_strong_proximal_term_keeps_the_adapter_near_where_it_started() -> None:
    start = read_adapter(load_classifier(table_run()))
    free, _, _ = train(table_run())
    held, _, _ = train(table_run(), proximal_mu=10.0)

    moved = [read_adapter(c).minus(start, num_examples=1).norm() for c in (free, held)]

    assert moved[1] < 0.5 * moved[0]


def test_a_gradient_clipped_to_almost_nothing_moves_sgd_by_almost_nothing() -> None:
    config = table_run(
        ("learning_rate = 0.05", 'learning_rate = 1.0\noptimizer = "sgd"\nmomentum = 0.0'),
        ("local_epochs = 2", "local_steps = 1\nmax_grad_norm = 0.001"),
    )
    start = read_adapter(load_classifier(config))

    classifier, _, _ = train(config)

    moved = read_adapter(classifier).minus(start, num_examples=1).norm()
    assert moved == pytest.approx(0.001, rel=1e-3)


def test_every_epoch_visits_every_record_once() -> None:
    seen: list[int] = []

    class Counting(Examples):
        def take(self, indices):  # type: ignore[no-untyped-def]
            seen.extend(indices)
            return super().take(indices)

    config = table_run(("local_epochs = 2", "local_epochs = 3"))
    classifier, examples = problem(config, n=21)
    fit(
        classifier,
        Counting(examples.features, examples.labels),
        config.training,
        steps=steps_per_round(21, config.training),
        schedule=Schedule(total_steps=9),
        seed=0,
    )

    assert sorted(seen) == sorted(list(range(21)) * 3)


def test_balanced_weights_are_n_over_k_times_the_count_of_present_labels() -> None:
    labels = torch.tensor([0, 0, 0, 2])

    weights = class_weights(labels, 4, Training(class_weights="balanced"))

    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 0.0, 4 / 2, 0.0]))


def test_class_weights_change_what_is_learned() -> None:
    plain, examples, _ = train(table_run())
    config = table_run(("batch_size = 8", "batch_size = 8\nclass_weights = [1.0, 20.0]"))
    weighted, _, _ = train(config)

    def share_of_ones(classifier: Classifier) -> float:
        return float(predict(classifier, examples.features).argmax(1).mean())

    assert share_of_ones(weighted) > share_of_ones(plain)


def test_predict_keeps_the_order_of_records_of_any_length() -> None:
    class Lengths(nn.Module):
        num_labels = 1
        device = torch.device("cpu")

        def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return mask.sum(1, keepdim=True).float()

    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 30, 150)]
    features = [torch.zeros(n, 4) for n in lengths]

    logits = predict(Lengths(), features)  # type: ignore[arg-type]

    assert logits[:, 0].tolist() == lengths


def test_a_loss_that_is_not_finite_ends_training_with_the_next_step() -> None:
    config = table_run(
        ("learning_rate = 0.05", 'learning_rate = 3e38\noptimizer = "sgd"'),
        ("local_epochs = 2", "local_steps = 50"),
    )
    with pytest.raises(RunError, match=r"training loss is (nan|inf) at step \d+ of 50: lower"):
        train(config)


def test_training_that_diverges_may_take_all_its_steps_first() -> None:
    config = table_run(
        ("learning_rate = 0.05", 'learning_rate = 3e38\noptimizer = "sgd"'),
        ("local_epochs = 2", "local_steps = 50"),
    )
    told: list[tuple[str, int]] = []
    seen: list[int] = []
    for to_the_end in (False, True):
        steps = Steps(path=None, inputs="", watch=lambda what, step, of: seen.append(step))
        with pytest.raises(Diverged) as error:
            train(config, progress=steps, to_the_end=to_the_end)
        told.append((str(error.value), max(seen)))

    assert told[0][0] == told[1][0]
    assert told[0][1] < told[1][1] == 50


def test_no_steps_change_nothing_and_have_no_loss() -> None:
    config = table_run()
    classifier, examples = problem(config)
    before = read_adapter(classifier)
    for some in (examples, examples.take([])):
        done = fit(
            classifier, some, config.training, steps=0, schedule=Schedule(total_steps=0), seed=5
        )
        assert (done.steps, done.loss) == (0, None)
    for name, array in read_adapter(classifier).arrays.items():
        np.testing.assert_array_equal(array, before.arrays[name])


def test_steps_without_records_are_refused() -> None:
    config = table_run()
    classifier, examples = problem(config)
    with pytest.raises(DataError, match="3 steps, but no records to train on"):
        fit(
            classifier,
            examples.take([]),
            config.training,
            steps=3,
            schedule=Schedule(total_steps=3),
            seed=5,
        )
