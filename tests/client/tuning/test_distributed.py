"""A step without noise: the clipped sum over batch_size, and nothing else happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.privacy import DpPlan, plan_together
from anabranch.client.tuning.distributed import Unnoised, fit_unnoised
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.private import PHYSICAL_BATCH, fit_private
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.secagg.noise import DistributedNoise, plan_noise
from anabranch.protocols.tables import Engine, Privacy, Training
from tests.client.tuning.private_rig import (
    ENGINES,
    WIDTH,
    clipped_sum,
    examples,
    make,
    plan,
    values,
)

C, RATE, BATCH = 0.5, 0.1, 40


def noise(rate: float = 1.0) -> DistributedNoise:
    return plan_noise(
        "record",
        bound=RATE * C / BATCH,
        values=300,
        reach=1.0,
        epsilon=4.0,
        delta=1e-5,
        rounds=3,
        sample_rate=rate,
    )


def training(**changes: Any) -> Training:
    fields: dict[str, Any] = {"learning_rate": RATE, "batch_size": BATCH} | changes
    return Training(optimizer="sgd", momentum=0.0, local_steps=1, **fields)


def together(count: int = 11) -> DpPlan:
    return plan_together(noise(), Privacy(epsilon=4.0, clipping_norm=C), BATCH, count)


def fitted(data: Examples, engine: Engine = "fast", **changes: Any) -> Unnoised:
    config = training(**changes)
    return fit_unnoised(make(), data, together(len(data)), config, step_offset=0, engine=engine)


def flat(done: Unnoised) -> torch.Tensor:
    names = trainable_parameters(make())
    return torch.cat([torch.from_numpy(done.update[name]).flatten() for name in names])


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_the_clipped_sum_over_batch_size_whatever_the_site_has(engine: Engine) -> None:
    data = examples()  # 11 records, fewer than batch_size: the denominator is batch_size
    expected = clipped_sum(make(), data, "flat", C) * (-RATE / BATCH)
    assert torch.allclose(flat(fitted(data, engine)), expected, atol=1e-8)


def test_the_head_has_its_own_rate() -> None:
    data = examples()
    slow, fast = fitted(data), fitted(data, head_learning_rate=0.4)
    for name in slow.update:
        factor = 4 if name.startswith("head.") else 1
        assert np.allclose(fast.update[name], factor * slow.update[name], rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10), st.floats(0.1, 1e4))
def test_one_record_moves_the_update_by_no_more_than_its_bound(left_out: int, scale: float) -> None:
    data = examples(scale=scale)
    fewer = data.take([i for i in range(len(data)) if i != left_out])
    moved = (flat(fitted(data)).double() - flat(fitted(fewer)).double()).norm()
    assert float(moved) <= RATE * C / BATCH * 1.001


def test_a_large_sum_is_rounded_once() -> None:
    """Micro-batches that are alike, as a model can make records: float32 would drift with them."""
    torch.manual_seed(3)
    one = Examples([torch.randn(4, WIDTH) for _ in range(PHYSICAL_BATCH)], torch.arange(64) % 3)
    times, config = 41, training(batch_size=4096)
    updates = []
    for data in (one, one.take(list(range(PHYSICAL_BATCH)) * times)):
        of = plan_together(noise(), Privacy(epsilon=4.0, clipping_norm=C), 4096, len(data))
        updates.append(flat(fit_unnoised(make(), data, of, config, step_offset=0)).double())

    expected = times * updates[0]

    assert float((updates[1] - expected).norm()) <= 2**-23 * float(expected.norm())


def test_the_adapter_is_left_alone_and_no_gradient_stays() -> None:
    classifier = make()
    before = values(classifier)
    fit_unnoised(classifier, examples(), together(), training(), step_offset=2)
    for name, parameter in trainable_parameters(classifier).items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_part_of_the_adapter_has_a_part_of_the_update() -> None:
    done = fit_unnoised(
        make(), examples(), together(), training(), step_offset=0, part=Part(factors="B")
    )
    assert done.update
    assert not any(name.endswith("lora_A.weight") for name in done.update)


def test_batches_are_poisson_samples_of_the_key() -> None:
    data, config = examples(), training(batch_size=3)
    of = plan_together(noise(), Privacy(epsilon=4.0, clipping_norm=C), 3, 11)
    assert of.sample_rate == 3 / 11
    done = fit_unnoised(make(), data, of, config, step_offset=0, randomness=Randomness(bytes(32)))
    chosen = Randomness(bytes(32)).sample(11, 3 / 11)
    expected = clipped_sum(make(), data.take(chosen), "flat", C) * (-RATE / 3)
    assert torch.allclose(flat(done), expected, atol=1e-8)
    assert done.spend == noise().spend(1, 3 / 11)


def test_a_plan_of_the_other_kind_is_refused() -> None:
    with pytest.raises(PrivacyError, match="train with fit_unnoised"):
        fit_private(make(), examples(), together(), training(), steps=1, step_offset=0)
    own = plan(sample_rate=1.0)
    with pytest.raises(PrivacyError, match="train with fit_private"):
        fit_unnoised(make(), examples(), own, training(), step_offset=0)


def test_a_round_beyond_the_plan_is_refused() -> None:
    with pytest.raises(PrivacyError, match="not within the plan's 3"):
        fit_unnoised(make(), examples(), together(), training(), step_offset=3)


def test_a_site_with_too_few_records_is_refused() -> None:
    agreed = noise(rate=0.2)
    with pytest.raises(PrivacyError, match="This site takes no part"):
        plan_together(agreed, Privacy(epsilon=4.0), BATCH, 199)
    assert plan_together(agreed, Privacy(epsilon=4.0), BATCH, 400).sample_rate == 0.1
