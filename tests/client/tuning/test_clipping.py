"""Clipping factors, and the bound that follows a quantile, against Opacus and by simulation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPPerLayerOptimizer
from torch import Tensor, nn

from anabranch.client.tuning.clipping import (
    RANGE,
    clipping_factors,
    count_noise,
    gradient_noise,
    joint_noise,
    next_norm,
    total_norms,
    within,
)
from anabranch.protocols.tables import Clipping
from tests.client.tuning.private_rig import CLIPPINGS, plan

NORMS = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=5)


def clipped_norm(clipping: Clipping, norms: list[float], bound: float) -> float:
    """Return the norm of one record's clipped gradient, whose tensors have these norms."""
    each = torch.tensor(norms, dtype=torch.float64)[:, None]
    if clipping == "per-layer":
        factors = clipping_factors(clipping, each, bound)
    else:
        factors = clipping_factors(clipping, total_norms(each), bound)
    return float((each * factors).norm())


# Laws


@given(
    clipping=st.sampled_from(CLIPPINGS),
    norms=NORMS,
    bound=st.floats(1e-3, 1e3),
)
def test_no_record_is_longer_than_the_clipping_norm(
    clipping: Clipping, norms: list[float], bound: float
) -> None:
    assert clipped_norm(clipping, norms, bound) <= bound * (1 + 1e-9)


@given(z=st.floats(1e-3, 1e3), expected=st.floats(0.1, 1e5))
def test_gradients_and_count_together_cost_what_the_plan_says(z: float, expected: float) -> None:
    count = count_noise(z, expected)
    gradient = gradient_noise(z, count)

    assert gradient > z  # the count is not free
    assert joint_noise(gradient, count) == pytest.approx(z, rel=1e-9)


def test_a_count_that_costs_more_than_the_plan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected count noise above 0\.5, got 0\.5"):
        gradient_noise(1.0, 0.5)


@given(counts=st.lists(st.booleans(), min_size=1, max_size=9), out=st.booleans())
def test_one_record_changes_the_count_by_a_half(counts: list[bool], out: bool) -> None:
    factors = torch.tensor([1.0 if inside else 0.5 for inside in [*counts, out]])

    assert abs(float(within(factors)) - float(within(factors[:-1]))) == 0.5


# Against Opacus


def samples() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))]
    for p in parameters:
        rows: Tensor = torch.randn(8, *p.shape, generator=rng)
        vars(p)["grad_sample"] = rows
    return parameters


def summed(optimizer: DPOptimizer, parameters: list[nn.Parameter]) -> Tensor:
    optimizer.clip_and_accumulate()
    return torch.cat([vars(p)["summed_grad"].flatten() for p in parameters])


def ours(clipping: Clipping, parameters: list[nn.Parameter], bound: float) -> Tensor:
    rows = [vars(p)["grad_sample"].flatten(1) for p in parameters]
    norms = torch.stack([r.norm(dim=1) for r in rows])
    if clipping == "per-layer":
        factors = clipping_factors(clipping, norms, bound)
        return torch.cat([f @ r for f, r in zip(factors, rows, strict=True)])
    factors = clipping_factors(clipping, total_norms(norms), bound)
    return torch.cat([factors @ r for r in rows])


def stock(kind: type[DPOptimizer], **options: Any) -> tuple[DPOptimizer, list[nn.Parameter]]:
    parameters = samples()
    inner = torch.optim.SGD(parameters, lr=1.0)
    return kind(inner, noise_multiplier=1.0, expected_batch_size=8, **options), parameters


@pytest.mark.parametrize("bound", [0.5, 3.5, 50.0])  # all are clipped, some, none
def test_flat_clipping_is_that_of_opacus(bound: float) -> None:
    optimizer, parameters = stock(DPOptimizer, max_grad_norm=bound)

    expected = summed(optimizer, parameters)

    torch.testing.assert_close(ours("flat", samples(), bound), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bound", [0.5, 3.5, 50.0])
def test_per_layer_clipping_is_that_of_opacus(bound: float) -> None:
    each = bound / math.sqrt(2)
    optimizer, parameters = stock(DPPerLayerOptimizer, max_grad_norm=[each, each])

    expected = summed(optimizer, parameters)

    assert optimizer.max_grad_norm == pytest.approx(bound)  # the sensitivity of the noise
    torch.testing.assert_close(ours("per-layer", samples(), bound), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bound", [0.5, 3.5, 50.0])
def test_adaptive_clipping_counts_and_moves_as_opacus_does(bound: float) -> None:
    optimizer, parameters = stock(
        AdaClipDPOptimizer,
        max_grad_norm=bound,
        target_unclipped_quantile=0.3,
        clipbound_learning_rate=0.2,
        max_clipbound=1e9,
        min_clipbound=1e-9,
        unclipped_num_std=1.0,
    )
    expected = summed(optimizer, parameters)
    norms = torch.stack([vars(p)["grad_sample"].flatten(1).norm(dim=1) for p in samples()])
    inside = within(clipping_factors("adaptive", total_norms(norms), bound))
    optimizer.update_max_grad_norm()  # without noise, and all eight expected records came

    moved = next_norm(bound, plan(clipping_norm=bound, target_quantile=0.3), float(inside), 8.0)

    torch.testing.assert_close(ours("adaptive", samples(), bound), expected, rtol=1e-5, atol=1e-6)
    assert float(inside) + 4 == float(optimizer.unclipped_num)
    assert moved == pytest.approx(float(optimizer.max_grad_norm), rel=1e-6)


# Where it leads


@pytest.mark.parametrize("start", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_bound_goes_to_the_quantile_it_is_meant_to_follow(
    start: float, quantile: float
) -> None:
    # Flower's rule has the sign of this one wrong: it runs to 0 or to infinity.
    rng = torch.Generator().manual_seed(0)
    of, norm = plan(clipping="adaptive", clipping_norm=start, target_quantile=quantile), start
    seen = []
    for _ in range(300):
        norms = torch.rand(200, generator=rng) * 10
        count = float(within(clipping_factors("adaptive", norms, norm)))
        noisy = count + 10 * float(torch.randn((), generator=rng))
        norm = next_norm(norm, of, noisy, 200.0)
        seen.append(norm)

    assert sum(seen[-100:]) / 100 == pytest.approx(10 * quantile, rel=0.1)


def test_noise_cannot_carry_the_bound_away() -> None:
    of, norms = plan(clipping="adaptive", clipping_norm=2.0), [2.0, 2.0]
    for _ in range(50):
        norms = [
            next_norm(norm, of, sign * 1e6, 1.0) for norm, sign in zip(norms, (1, -1), strict=True)
        ]

    assert norms == [pytest.approx(2.0 / RANGE), pytest.approx(2.0 * RANGE)]
