"""DP-SGD against references that clip one record at a time, with plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy import stats
from torch.nn import functional

from anabranch.client.privacy import Spend
from anabranch.client.tuning import private
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import Clipping, Engine, Training
from tests.client.tuning.private_rig import (
    CLIPPINGS,
    ENGINES,
    LABELS,
    SGD,
    Sequences,
    clipped_sum,
    encoded,
    examples,
    gradient_sigma,
    lora_of,
    make,
    moved,
    plan,
    refuse,
    run,
    seeded,
    traces,
    values,
)

# Laws


@settings(max_examples=20, deadline=None)
@given(
    clipping=st.sampled_from(CLIPPINGS),
    norm=st.floats(0.01, 10),
    scale=st.floats(0.1, 1e4),
    weight=st.floats(0.1, 1e6),
)
def test_no_record_contributes_more_than_the_clipping_norm(
    clipping: Clipping, norm: float, scale: float, weight: float
) -> None:
    classifier = make()
    before = values(classifier)
    config = Training(
        optimizer="sgd",
        momentum=0.0,
        learning_rate=1.0,
        class_weights=(weight,) * LABELS,
        batch_size=1,
    )

    run(
        classifier,
        examples(1, scale=scale),
        plan(noise_multiplier=1e-6, clipping=clipping, clipping_norm=norm),
        config,
    )

    assert float(moved(classifier, before).norm()) <= norm * (1 + 1e-3)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("norm", [0.05, 1.2, 50.0])  # all are clipped, some, none
@pytest.mark.parametrize("physical_batch", [1, 4, 64])
@pytest.mark.parametrize("engine", ENGINES)
def test_clipped_sums_are_those_of_records_taken_one_at_a_time(
    clipping: Clipping, norm: float, physical_batch: int, engine: Engine
) -> None:
    classifier, data = make(), examples()
    before, expected = values(classifier), clipped_sum(make(), data, clipping, norm) / len(data)

    of = plan(clipping=clipping, clipping_norm=norm)
    run(classifier, data, of, SGD, physical_batch=physical_batch, engine=engine)

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_class_weights_are_inside_the_clipping(clipping: Clipping) -> None:
    classifier, data, weights = make(), examples(), (0.2, 1.0, 30.0)
    config = Training(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=11, class_weights=weights
    )
    expected = clipped_sum(make(), data, clipping, 0.5, weights) / len(data)
    before = values(classifier)

    run(classifier, data, plan(clipping=clipping), config)

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "kind", "model"),
    [
        ("mlp", "tabular-classification", {"hidden": (6, 5)}),
        ("vit", "image-classification", {"width": 24, "depth": 2, "heads": 3}),
        ("bert", "text-classification", {"max_tokens": 16}),
        ("distilbert", "text-classification", {"max_tokens": 16}),
    ],
)
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_real_bases_have_the_clipped_sums_of_records_taken_one_at_a_time(
    make_config: Callable[..., Any],
    encoders: dict[str, Any],
    texts: list[str],
    base: str,
    kind: str,
    model: dict[str, Any],
    clipping: Clipping,
) -> None:
    config = make_config(str(encoders.get(base, base)), kind, lora=lora_of(base), **model)
    classifier = load_classifier(config)
    data = encoded(classifier, kind, texts)
    with torch.no_grad():
        for parameter in trainable_parameters(classifier).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded()))
    before = values(classifier)
    expected = clipped_sum(classifier, data, clipping, 0.5) / len(data)
    digest = classifier.compute_base_digest()

    run(classifier, data, plan(clipping=clipping), SGD, physical_batch=4)

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-3, atol=1e-5)
    assert classifier.compute_base_digest() == digest


# The noise


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_noise_has_standard_deviation_sigma_times_the_clipping_norm(clipping: Clipping) -> None:
    data, sigma, norm = examples(), 2.5, 0.4
    of = plan(noise_multiplier=sigma, clipping=clipping, clipping_norm=norm)
    signal = clipped_sum(make(), data, clipping, norm)
    noises = []
    for seed in range(20):
        classifier = make()
        before = values(classifier)
        run(classifier, data, of, SGD, physical_batch=2, generator=seeded(seed))
        noises.append(-moved(classifier, before) * len(data) - signal)

    noise = torch.cat(noises).numpy() / (gradient_sigma(of, len(data)) * norm)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    for wrong in (1.5, 1 / 1.5):
        assert stats.kstest(noise * wrong, "norm").pvalue < 1e-6


def test_noise_does_not_depend_on_the_physical_batch() -> None:
    results = []
    for physical_batch in (1, 3, 64):
        classifier = make()
        before = values(classifier)
        run(classifier, examples(), plan(noise_multiplier=3.0), SGD, physical_batch=physical_batch)
        results.append(moved(classifier, before))

    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-6)


def test_sites_and_rounds_do_not_share_noise() -> None:
    # Clients built in the same second would share a stream seeded with the time.
    noises = []
    for _ in range(2):
        classifier = make()
        before = values(classifier)
        run(classifier, examples(), plan(noise_multiplier=50.0), SGD, generator=None)
        noises.append(moved(classifier, before).numpy())

    # 7 standard deviations; the same noise has 1
    assert abs(np.corrcoef(noises[0], noises[1])[0, 1]) < 0.75


def test_empty_batches_take_a_step_of_noise() -> None:
    classifier, data = make(), examples(1000)
    calls: list[int] = []
    classifier.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    config = Training(optimizer="sgd", learning_rate=1.0, batch_size=1)
    before = values(classifier)

    spend = run(
        classifier,
        data,
        plan(noise_multiplier=1.0, sample_rate=0.001, steps=4),
        config,
        steps=4,
        generator=seeded(12),
    )

    assert len(calls) < 4  # at least one of the four batches was empty
    assert spend.steps == 4
    assert float(moved(classifier, before).std()) == pytest.approx(0.5 * 3.5, rel=0.5)


# One logical step


def test_physical_batches_are_bounded_and_count_as_one_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accountants: list[PRVAccountant] = []

    class Remembered(PRVAccountant):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            accountants.append(self)

    monkeypatch.setattr(private, "new_accountant", Remembered)
    classifier, rows = make(), []
    classifier.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))

    spend = run(
        classifier,
        examples(),
        plan(noise_multiplier=1.5, steps=2),
        SGD,
        steps=2,
        physical_batch=4,
    )

    assert rows == [4, 4, 3] * 2
    assert accountants[0].history == [(1.5, 1.0, 2)]
    assert spend == Spend(noise_multiplier=1.5, sample_rate=1.0, steps=2)


def test_the_sum_is_divided_by_the_expected_batch_whatever_came() -> None:
    data, config = examples(), Training(optimizer="sgd", learning_rate=1.0, batch_size=4)
    classifier, rows = make(), []
    classifier.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    chosen = Randomness.reproducible(seeded()).sample(11, 4 / 11)
    expected = clipped_sum(make(), data.take(chosen), "flat", 0.5) / 4
    before = values(classifier)

    run(classifier, data, plan(sample_rate=4 / 11), config)

    assert rows == [len(chosen)] != [4]
    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


# Optimisers and schedule


def test_the_head_has_its_own_learning_rate() -> None:
    config = Training(optimizer="sgd", learning_rate=1.0, head_learning_rate=0.25, batch_size=11)
    slow, fast = make(), make()
    before = values(slow)

    run(slow, examples(), plan(), config)
    run(fast, examples(), plan(), SGD)

    for name, start in before.items():
        rate = 0.25 if name.startswith("head.") else 1.0
        torch.testing.assert_close(values(slow)[name] - start, rate * (values(fast)[name] - start))


def test_the_schedule_runs_over_the_whole_run_not_the_round() -> None:
    config = Training(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=11, schedule="linear"
    )
    first, last = make(), make()
    before = values(first)

    run(first, examples(), plan(steps=8), config)
    run(last, examples(), plan(steps=8), config, step_offset=6)

    torch.testing.assert_close(moved(last, before), 0.25 * moved(first, before))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_private_training_learns_what_the_records_say(optimizer: str) -> None:
    classifier = make()
    data = examples(300)
    targets = [int(f.mean(0)[:LABELS].argmax()) for f in data.features]
    data = Examples(data.features, torch.tensor(targets))
    config = Training(
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=0.02 if optimizer == "adamw" else 1.0,
        batch_size=100,
    )
    of = plan(noise_multiplier=1.0, clipping_norm=1.0, sample_rate=1 / 3, steps=60)
    batch, mask = collate(data.features)

    def loss() -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(classifier(batch, mask), data.labels))

    before = loss()
    run(classifier, data, of, config, steps=60)

    assert loss() < 0.8 * before


def test_the_same_generator_gives_the_same_adapter() -> None:
    a, b = make(), make()
    of = plan(noise_multiplier=2.0, sample_rate=4 / 11, steps=3)
    config = Training(batch_size=4)

    run(a, examples(), of, config, steps=3)
    run(b, examples(), of, config, steps=3)

    assert all(
        torch.equal(x, y) for x, y in zip(values(a).values(), values(b).values(), strict=True)
    )


# What is left behind


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_an_engine_stays_behind(
    monkeypatch: pytest.MonkeyPatch, fails: bool, engine: Engine
) -> None:
    classifier = make()
    before, start = traces(classifier), values(classifier)
    memory = {n: p.data_ptr() for n, p in trainable_parameters(classifier).items()}

    if fails:
        monkeypatch.setattr(private, "require_as_planned", refuse)
        with pytest.raises(PrivacyError, match="refused by the test"):
            run(classifier, examples(), plan(), SGD, engine=engine)
        monkeypatch.undo()
        assert not moved(classifier, start).any()
    else:
        run(classifier, examples(), plan(), SGD, engine=engine)

    assert traces(classifier) == before
    assert memory == {n: p.data_ptr() for n, p in trainable_parameters(classifier).items()}
    assert type(classifier) is Sequences
    run(classifier, examples(), plan(), SGD, engine=engine)  # and it can be trained again
