"""DP-SGD on one part: clipping, noise and steps see what is trained, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.utils.module_utils import has_trainable_params
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.tuning import opacus_engine, private
from anabranch.client.tuning.active import only
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.private import private_steps
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.errors import IncompatibleAdapter, PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Clipping, Engine, Training
from tests.client.tuning.private_rig import (
    CLIPPINGS,
    ENGINES,
    SGD,
    bounded,
    examples,
    gradient_sigma,
    make,
    moved,
    plan,
    refuse,
    run,
    seeded,
    traces,
    values,
)

PARTS = [
    Part(factors="A"),
    Part(factors="B"),
    Part(factors="none"),
    Part(factors="both", dense=False),
    Part(factors="B", ranks=(1,)),
    Part(factors="A", ranks=(0,), dense=False),
    Part(ranks=(1,)),
]
LOOSE = Training(optimizer="adamw", learning_rate=0.05, weight_decay=0.3, batch_size=1000)


def trained(classifier: Classifier, part: Part) -> Tensor:
    """Return where `moved` is of what is in the part: flat, 0 or 1."""
    spec = classifier.spec
    ones = {name: np.ones(shape, np.float32) for name, shape in spec.tensors}
    spread = part.spread(spec, part.take(spec, ones))
    return torch.cat([torch.from_numpy(spread[name]).flatten() for name, _ in spec.tensors])


def clipped(
    classifier: Classifier, data: Examples, clipping: Clipping, norm: float, part: Part
) -> Tensor:
    """Return Σ ḡ_i with gradients that are zero outside the part: one record at a time."""
    parameters = list(trainable_parameters(classifier).values())
    masks = trained(classifier, part).split([p.numel() for p in parameters])
    inside = [mask.view_as(p) for mask, p in zip(masks, parameters, strict=True)]
    chosen = [i for i, mask in enumerate(inside) if mask.any()]
    total = torch.zeros_like(trained(classifier, part))
    for feature, label in zip(data.features, data.labels, strict=True):
        batch, mask = collate([feature])
        loss = functional.cross_entropy(classifier(batch, mask), label[None])
        gradients = torch.autograd.grad(loss, parameters)
        own = bounded([gradients[i] * inside[i] for i in chosen], clipping, norm)
        total[torch.cat([torch.full_like(m, i in chosen) for i, m in enumerate(masks)]) > 0] += own
    return total


# Laws


@settings(max_examples=20, deadline=None)
@given(
    part=st.sampled_from(PARTS),
    clipping=st.sampled_from(CLIPPINGS),
    norm=st.floats(0.01, 10),
    scale=st.floats(0.1, 1e4),
)
def test_no_record_contributes_more_than_the_clipping_norm(
    part: Part, clipping: Clipping, norm: float, scale: float
) -> None:
    classifier = make()
    before = values(classifier)
    config = Training(optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=1)
    of = plan(noise_multiplier=1e-6, clipping=clipping, clipping_norm=norm)

    run(classifier, examples(1, scale=scale), of, config, part=part)

    assert float(moved(classifier, before).norm()) <= norm * (1 + 1e-3)


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("norm", [0.02, 50.0])  # all are clipped, none
@pytest.mark.parametrize("engine", ENGINES)
def test_the_norm_that_is_clipped_is_that_of_what_is_trained(
    part: Part, clipping: Clipping, norm: float, engine: Engine
) -> None:
    classifier, data = make(), examples()
    before, expected = values(classifier), clipped(make(), data, clipping, norm, part) / len(data)
    of = plan(clipping=clipping, clipping_norm=norm)

    run(classifier, data, of, SGD, part=part, physical_batch=4, engine=engine)

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


def test_a_part_is_clipped_less_than_the_whole_would_be() -> None:
    part = Part(factors="B", ranks=(1,), dense=False)
    inside = trained(make(), part) > 0

    alone = clipped(make(), examples(), "flat", 0.05, part)
    whole = clipped(make(), examples(), "flat", 0.05, Part())

    assert float(alone[inside].norm()) > 1.1 * float(whole[inside].norm())


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize(
    "config",
    [LOOSE, Training(optimizer="sgd", learning_rate=0.5, weight_decay=0.3, batch_size=1000)],
    ids=["adamw", "sgd"],
)
def test_frozen_values_stay_bit_for_bit_under_noise_momentum_and_weight_decay(
    part: Part, config: Training
) -> None:
    classifier = make()
    before = values(classifier)
    of = plan(noise_multiplier=4.0, steps=5)

    run(classifier, examples(), of, config, steps=5, part=part, proximal_mu=0.2)

    change, inside = moved(classifier, before), trained(classifier, part) > 0
    assert not change[~inside].any()
    assert (change[inside] != 0).all()


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("part", [Part(factors="B"), Part(ranks=(1,))], ids=str)
def test_noise_has_the_planned_scale_on_what_is_trained(clipping: Clipping, part: Part) -> None:
    data, sigma, norm = examples(), 2.5, 0.4
    of = plan(noise_multiplier=sigma, clipping=clipping, clipping_norm=norm)
    signal, inside = clipped(make(), data, clipping, norm, part), trained(make(), part) > 0
    noises = []
    for seed in range(20):
        classifier = make()
        before = values(classifier)
        run(classifier, data, of, SGD, part=part, physical_batch=2, generator=seeded(seed))
        noises.append((-moved(classifier, before) * len(data) - signal)[inside])

    noise = torch.cat(noises).numpy() / (gradient_sigma(of, len(data)) * norm)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    for wrong in (1.5, 1 / 1.5):
        assert stats.kstest(noise * wrong, "norm").pvalue < 1e-6


def test_the_noisy_gradient_is_0_on_frozen_ranks() -> None:
    classifier, randomness = make(), Randomness.reproducible(seeded())
    of = plan(noise_multiplier=3.0)
    with (
        only(classifier, Part(ranks=(1,))) as active,
        private_steps(classifier, active, of, SGD, 11, randomness) as step,
    ):
        step(examples())
        for name, mask in active.masks.items():
            gradient = active.parameters[name].grad
            assert gradient is not None
            assert not gradient[~mask].any()
            assert (gradient[mask] != 0).all()


def test_a_step_without_records_has_all_the_noise() -> None:
    classifier = make()
    classifier.register_forward_pre_hook(lambda *_: pytest.fail("a record was drawn"))
    config = Training(optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=1)
    of, before = plan(noise_multiplier=3.0, sample_rate=0.001), values(classifier)

    run(classifier, examples(1000), of, config, generator=seeded(12))

    assert stats.kstest(moved(classifier, before).numpy() / (3.0 * 0.5), "norm").pvalue > 0.01


def test_an_empty_batch_moves_only_what_is_trained() -> None:
    classifier, part = make(), Part(factors="A", ranks=(1,))
    before = values(classifier)
    config = Training(optimizer="sgd", learning_rate=1.0, batch_size=1)
    of = plan(noise_multiplier=1.0, sample_rate=0.001, steps=4)

    run(classifier, examples(1000), of, config, steps=4, part=part, generator=seeded(12))

    change, inside = moved(classifier, before), trained(classifier, part) > 0
    assert not change[~inside].any()
    assert (change[inside] != 0).all()


# Kept tensors, hooks, FedProx


def test_kept_tensors_are_clipped_and_noised_together_with_the_part() -> None:
    apart, together = make(), make()
    of = plan(noise_multiplier=2.0, steps=3)

    both = {"part": Part(factors="A", dense=False), "kept": Part(factors="B")}
    run(apart, examples(), of, LOOSE, steps=3, **both)
    run(together, examples(), of, LOOSE, steps=3)

    for name, value in values(together).items():
        assert torch.equal(values(apart)[name], value)


def test_hooks_are_attached_to_trained_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked: list[str] = []

    class Watched(GradSampleModule):  # type: ignore[misc]
        def add_hooks(self, **options: Any) -> None:
            super().add_hooks(**options)
            modules: Any = self._module.named_modules()
            hooked.extend(name for name, m in modules if m._backward_hooks)

    monkeypatch.setattr(opacus_engine, "GradSampleModule", Watched)
    part = Part(factors="B", dense=False)

    run(make(), examples(), plan(), SGD, part=part, engine="opacus")

    assert hooked == ["base.layers.0.lora_B", "base.layers.1.lora_B"]


@pytest.mark.parametrize("part", [Part(), Part(factors="B", ranks=(0,))], ids=str)
def test_fedprox_adds_its_pull_to_the_noisy_gradient(part: Part) -> None:
    # SGD: w_1 = w_t − η g̃_1, and in step 2 the pull η μ (w_1 − w_t) is all that differs.
    config = Training(
        optimizer="sgd", momentum=0.0, learning_rate=1e-4, batch_size=1000, local_steps=1
    )
    mu, of = 3.0, plan(noise_multiplier=5.0, steps=2)
    once, free, held = make(), make(), make()
    before = values(free)

    run(once, examples(), of, config, steps=1, part=part)
    run(free, examples(), of, config, steps=2, part=part)
    run(held, examples(), of, config, steps=2, part=part, proximal_mu=mu)

    pull = moved(free, before) - moved(held, before)
    torch.testing.assert_close(pull, 1e-4 * mu * moved(once, before), rtol=0.02, atol=2e-7)


def test_a_strong_pull_keeps_private_training_near_its_start() -> None:
    config = Training(optimizer="sgd", momentum=0.0, learning_rate=0.1, batch_size=11)
    of = plan(noise_multiplier=2.0, steps=30)
    distances = []
    for mu in (0.0, 5.0):
        classifier = make()
        before = values(classifier)
        run(classifier, examples(), of, config, steps=30, proximal_mu=mu)
        distances.append(float(moved(classifier, before).norm()))

    assert distances[1] < 0.5 * distances[0]


# Refusals


def test_a_frozen_factor_need_not_move_but_a_product_of_rank_zero_is_refused() -> None:
    classifier = make()
    with torch.no_grad():
        for name, p in trainable_parameters(classifier).items():
            if name.endswith("lora_B.weight"):
                p.zero_()

    with pytest.raises(PrivacyError, match="has rank 0 after training"):
        run(classifier, examples(), plan(noise_multiplier=1.0), SGD, part=Part(factors="A"))


def test_ranks_whose_gradients_are_all_zero_are_refused() -> None:
    # Only rank 1 is trained, and its column of B is zero: every gradient of its A is zero.
    classifier = make()
    with torch.no_grad():
        for name, p in trainable_parameters(classifier).items():
            if name.endswith("lora_B.weight"):
                p[:, 1] = 0
    part = Part(factors="A", ranks=(1,), dense=False)

    with pytest.raises(PrivacyError, match="has rank 0 after training"):
        run(classifier, examples(), plan(noise_multiplier=1.0), SGD, part=part)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_refusal_puts_everything_back_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, part: Part
) -> None:
    classifier = make()
    before, start = traces(classifier), values(classifier)
    monkeypatch.setattr(private, "require_as_planned", refuse)

    with pytest.raises(PrivacyError, match="refused by the test"):
        run(classifier, examples(), plan(noise_multiplier=1.0), LOOSE, part=part)

    assert traces(classifier) == before
    assert not moved(classifier, start).any()


def test_ranks_that_are_not_there_are_refused() -> None:
    with pytest.raises(IncompatibleAdapter, match="ranks: expected"):
        run(make(), examples(), plan(), SGD, part=Part(ranks=(2,)))


def test_the_rig_has_layers_that_opacus_would_hook() -> None:
    modules: list[nn.Module] = [m for m in make().modules() if has_trainable_params(m)]

    assert len(modules) == 5
