"""Both engines take the same steps; adaptive clipping, canaries, and which engine runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from anabranch.client.privacy import Spend
from anabranch.client.tuning import per_record
from anabranch.client.tuning.active import only
from anabranch.client.tuning.clipping import LEARNING_RATE
from anabranch.client.tuning.lora import adapt, trainable_parameters
from anabranch.client.tuning.noisy import PrivateStep
from anabranch.client.tuning.private import private_steps
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Clipping, Engine, Lora, Training
from tests.client.tuning.private_rig import (
    CLIPPINGS,
    ENGINES,
    INNER,
    SGD,
    WIDTH,
    Sequences,
    bounded,
    clipped_sum,
    examples,
    fit,
    gradient_sigma,
    make,
    moved,
    plan,
    run,
    seeded,
    values,
)

ADAM = Training(optimizer="adamw", learning_rate=0.02, batch_size=4, class_weights=(0.5, 1.0, 3.0))


class Convolved(Sequences):
    """A trained layer that the fast path does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.base.filters = nn.Conv1d(WIDTH, WIDTH, 1).requires_grad_(False)

    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        if start == 0:
            h = self.base.filters(h.mT).mT  # type: ignore[operator]
        return super().run(h, mask, start, stop)


def convolved() -> Convolved:
    torch.manual_seed(0)
    classifier = Convolved()
    adapt(classifier, Lora(rank=2, targets=("layers.*",), modules_to_save=("filters",)), seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(classifier).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return classifier


class Canaries:
    """Canaries with one fixed gradient each, and all that was observed."""

    def __init__(self, gradients: Tensor) -> None:
        self.count = len(gradients)
        self.rows = gradients
        self.drawn: list[int] = []
        self.seen: list[tuple[int, dict[str, Tensor]]] = []

    def gradients(self, drawn: Sequence[int], size: int) -> Tensor:
        assert size == self.rows.shape[1]
        self.drawn += drawn
        return self.rows[list(drawn)]

    def observe(self, records: int, gradients: Mapping[str, Tensor]) -> None:
        self.seen.append((records, dict(gradients)))


# Laws


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("part", [WHOLE, Part(factors="A"), Part(ranks=(1,))], ids=str)
def test_engines_take_the_same_noisy_steps(clipping: Clipping, part: Part) -> None:
    of = plan(noise_multiplier=0.7, clipping=clipping, sample_rate=4 / 11, steps=6)
    results, norms = [], []
    for engine in ENGINES:
        classifier = make()
        before = values(classifier)
        done = fit(
            classifier, examples(), of, ADAM, steps=6, part=part, engine=engine, physical_batch=2
        )
        assert done.engine == engine
        norms.append(done.clipping_norm)
        results.append(moved(classifier, before))

    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)
    assert norms[0] == norms[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_one_step_leaves_the_noisy_mean_as_the_gradient(engine: Engine, clipping: Clipping) -> None:
    classifier, data = make(), examples()
    expected = clipped_sum(make(), data, clipping, 0.5) / len(data)
    of, source = plan(clipping=clipping), Randomness.reproducible(seeded())

    with (
        only(classifier, WHOLE) as active,
        private_steps(
            classifier, active, of, SGD, len(data), source, engine=engine, physical_batch=4
        ) as step,
    ):
        assert step(data)
        gradients = [p.grad for p in trainable_parameters(classifier).values()]
        found = torch.cat([g.flatten() for g in gradients if g is not None])
        assert step.drawn == [pytest.approx(of.noise_multiplier)]
        assert not step(data.take([]))

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in classifier.parameters())


def test_one_failed_batch_leaves_the_classifier_as_it_was() -> None:
    classifier, data = make(), examples()
    before = values(classifier)
    data.features[2].resize_(1, WIDTH + 1)

    with pytest.raises((RuntimeError, PrivacyError)):
        fit(classifier, data, plan(), SGD)

    assert not moved(classifier, before).any()
    assert all("forward" not in vars(module) for module in classifier.modules())


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_tensors_that_are_not_packed_are_clipped_together_all_the_same(
    clipping: Clipping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_record, "PACKED_VALUES", 0)  # as with many values, or a ghost
    classifier, data = make(), examples()
    before, expected = values(classifier), clipped_sum(make(), data, clipping, 0.05) / len(data)

    run(classifier, data, plan(clipping=clipping, clipping_norm=0.05), SGD)

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


# Adaptive clipping


@pytest.mark.parametrize("engine", ENGINES)
def test_adaptive_clipping_goes_on_where_the_round_before_ended(engine: Engine) -> None:
    of = plan(noise_multiplier=0.5, clipping="adaptive", clipping_norm=0.05, steps=8)
    whole, halves = make(), make()
    options: dict[str, Any] = {"engine": engine}

    once = fit(whole, examples(), of, SGD, steps=2, **options)
    first = fit(halves, examples(), of, SGD, steps=1, **options)
    second = fit(
        halves, examples(), of, SGD, step_offset=1, clipping_norm=first.clipping_norm, **options
    )

    assert 0.05 < first.clipping_norm < second.clipping_norm  # almost all records were clipped
    assert first.clipping_norm == pytest.approx(0.05 * 1.1, rel=0.1)
    assert once.spend == Spend(noise_multiplier=0.5, sample_rate=1.0, steps=2)


def test_adaptive_noise_follows_the_norm_and_the_count_has_its_own() -> None:
    # Steps without records: what is left is noise, with 2.5 above the floor of 11 / 20.
    of = plan(noise_multiplier=2.5, clipping="adaptive", clipping_norm=0.4)
    classifier, randomness = make(), Randomness.reproducible(seeded())
    gradients, counts = [], []
    with (
        only(classifier, WHOLE) as active,
        private_steps(classifier, active, of, SGD, 11, randomness, clipping_norm=4.0) as step,
    ):
        for _ in range(300):
            norm = step.clipping_norm
            step(examples().take([]))
            flat = torch.cat(
                [p.grad.flatten() for p in active.parameters.values() if p.grad is not None]
            )
            gradients.append(flat * 11 / norm)
            counts.append(-math.log(step.clipping_norm / norm) * 11 / LEARNING_RATE)

    for noise, sigma in ((torch.cat(gradients).numpy(), gradient_sigma(of, 11)), (counts, 2.5)):
        drawn = np.asarray(noise, np.float64) / sigma
        assert stats.kstest(drawn, "norm").pvalue > 0.01
        for wrong in (1.5, 1 / 1.5):
            assert stats.kstest(drawn * wrong, "norm").pvalue < 1e-3


@pytest.mark.parametrize("physical_batch", [2, 64])
def test_the_count_is_of_all_micro_batches(physical_batch: int) -> None:
    of = plan(clipping="adaptive", noise_multiplier=0.01)

    for norm, share in ((1e-3, 0.0), (1e3, 1.0)):  # all are clipped, none
        done = fit(make(), examples(), of, SGD, clipping_norm=norm, physical_batch=physical_batch)
        step = -math.log(done.clipping_norm / norm) / LEARNING_RATE
        assert step == pytest.approx(share - of.target_quantile, abs=0.2)  # the noise is 0.05


def test_other_clipping_leaves_the_norm_alone() -> None:
    assert fit(make(), examples(), plan(clipping_norm=0.3), SGD).clipping_norm == 0.3
    assert fit(make(), examples(), plan(), SGD, clipping_norm=0.2).clipping_norm == 0.2


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_what_ran_is_what_was_drawn(clipping: Clipping, monkeypatch: pytest.MonkeyPatch) -> None:
    # A step that draws noise with half of the planned multiplier is told from one that does not.
    honest = PrivateStep._perturb
    monkeypatch.setattr(PrivateStep, "_perturb", lambda self, t, sigma: honest(self, t, sigma / 2))
    classifier = make()
    before = values(classifier)

    with pytest.raises(PrivacyError, match="the update is discarded"):
        fit(classifier, examples(), plan(noise_multiplier=1.0, clipping=clipping), SGD)

    assert not moved(classifier, before).any()


def test_a_step_without_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateStep, "_add_noise", lambda *_: None)

    with pytest.raises(PrivacyError, match=r"ran \[\]: the update is discarded"):
        fit(make(), examples(), plan(noise_multiplier=1.0), SGD)


# Canaries


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_canaries_are_clipped_and_added_up_like_records(engine: Engine, clipping: Clipping) -> None:
    classifier, data = make(), examples()
    size = sum(p.numel() for p in trainable_parameters(classifier).values())
    rows = torch.randn(2, size, generator=seeded(5))
    probe = Canaries(rows)
    of, before = plan(clipping=clipping), values(classifier)
    shapes = [p.shape for p in trainable_parameters(classifier).values()]
    expected = clipped_sum(make(), data, clipping, 0.5)
    for row in rows:
        tensors = row.split([shape.numel() for shape in shapes])
        expected += bounded(tensors, clipping, 0.5)

    fit(classifier, data, of, SGD, probe=probe, engine=engine, physical_batch=4)

    (records, gradients), *more = probe.seen
    assert (records, more, probe.drawn) == (13, [], [0, 1])
    seen = torch.cat([gradients[name].flatten() for name in before])
    torch.testing.assert_close(seen, expected / 11, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved(classifier, before), -seen, rtol=1e-4, atol=1e-6)


def test_canaries_are_drawn_as_often_as_records() -> None:
    classifier, data = make(), examples(40)
    size = sum(p.numel() for p in trainable_parameters(classifier).values())
    probe = Canaries(torch.zeros(50, size))
    of = plan(noise_multiplier=1.0, sample_rate=0.25, steps=40)
    config = Training(optimizer="sgd", learning_rate=1e-3, batch_size=10)

    fit(classifier, data, of, config, steps=40, probe=probe)

    drawn = torch.bincount(torch.tensor(probe.drawn), minlength=50)
    assert len(probe.seen) == 40
    assert stats.binomtest(int(drawn.sum()), 50 * 40, 0.25).pvalue > 0.001
    assert float(drawn.float().var()) == pytest.approx(40 * 0.25 * 0.75, rel=0.6)


def test_canaries_of_another_size_are_refused() -> None:
    class Short(Canaries):
        def gradients(self, drawn: Sequence[int], size: int) -> Tensor:
            return self.rows[list(drawn)]

    with pytest.raises(PrivacyError, match="expected canary gradients of shape"):
        fit(make(), examples(), plan(), SGD, probe=Short(torch.zeros(1, 3)))


# Which engine runs


def test_layers_that_the_fast_path_does_not_know_go_to_opacus(
    caplog: pytest.LogCaptureFixture,
) -> None:
    classifier, data = convolved(), examples()
    before = values(classifier)
    expected = clipped_sum(convolved(), data, "flat", 0.5) / len(data)

    with caplog.at_level(logging.INFO):
        done = fit(classifier, data, plan(), SGD)

    assert done.engine == "opacus"
    assert caplog.messages == [
        "gradients per record come from Opacus: the fast path does not know the layers of "
        "filters.bias, filters.weight"
    ]
    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


def test_an_unknown_layer_outside_the_part_does_not_matter() -> None:
    part = Part(factors="both", dense=False)

    assert fit(convolved(), examples(), plan(), SGD, part=part).engine == "fast"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layernorm_trained_in_full_has_both_engines(engine: Engine) -> None:
    def with_norm() -> Sequences:
        torch.manual_seed(0)
        classifier = Sequences()
        adapt(classifier, Lora(rank=2, targets=("layers.0",), modules_to_save=("norm",)), seed=0)
        with torch.no_grad():
            for parameter in trainable_parameters(classifier).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return classifier

    classifier, data = with_norm(), examples()
    before = values(classifier)
    expected = clipped_sum(with_norm(), data, "flat", 0.5) / len(data)

    assert fit(classifier, data, plan(), SGD, engine=engine).engine == engine

    assert before["norm.weight"].shape == (INNER + 1,)
    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


def test_tensors_of_two_types_are_refused() -> None:
    classifier = make()
    classifier.head.double()

    with pytest.raises(PrivacyError, match="expected trained tensors of one type on one device"):
        fit(classifier, examples(), plan(), SGD)
