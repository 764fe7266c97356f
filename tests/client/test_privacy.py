from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.special import ndtr

from anabranch.client.privacy import (
    LARGEST_EPSILON,
    DpPlan,
    Spend,
    epsilon_of,
    plan_for,
    require_budget,
)
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import Privacy, Training

ROUND = Spend(noise_multiplier=1.2, sample_rate=0.064, steps=10)

spends = st.builds(
    Spend,
    noise_multiplier=st.sampled_from([0.9, 1.3, 2.5]),
    sample_rate=st.sampled_from([0.01, 0.1, 1.0]),
    steps=st.integers(1, 20),
)


# Laws


@settings(max_examples=15, deadline=None)
@given(st.lists(spends, max_size=4), st.data())
def test_order_of_spends_does_not_matter(history: list[Spend], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(history))

    assert epsilon_of(history, 1e-4) == epsilon_of(shuffled, 1e-4)


@settings(max_examples=15, deadline=None)
@given(spends, st.integers(1, 19))
def test_division_into_rounds_does_not_matter(spend: Spend, at: int) -> None:
    if spend.steps <= at:
        return
    parts = [
        Spend(noise_multiplier=spend.noise_multiplier, sample_rate=spend.sample_rate, steps=steps)
        for steps in (at, spend.steps - at)
    ]

    assert epsilon_of(parts, 1e-4) == epsilon_of([spend], 1e-4)


@settings(max_examples=15, deadline=None)
@given(st.lists(spends, max_size=3), spends)
def test_every_spend_costs(history: list[Spend], more: Spend) -> None:
    assert epsilon_of([*history, more], 1e-4) >= epsilon_of(history, 1e-4)


@settings(max_examples=4, deadline=None)
@given(
    epsilon=st.floats(0.3, 6),
    num_examples=st.integers(50, 2000),
    batch_size=st.integers(8, 128),
    rounds=st.integers(1, 20),
)
def test_a_plan_never_costs_more_than_its_budget(
    epsilon: float, num_examples: int, batch_size: int, rounds: int
) -> None:
    plan = plan_for(
        Privacy(epsilon=epsilon),
        Training(batch_size=batch_size, local_steps=5),
        rounds,
        num_examples,
    )

    assert plan.epsilon <= epsilon
    assert plan.epsilon == epsilon_of([plan.spend(plan.steps)], plan.delta)
    assert plan.epsilon > 0.97 * epsilon - 0.01  # and wastes little of it


# Examples


def test_rounds_compose_and_a_fresh_accountant_per_round_hides_most_of_the_cost() -> None:
    fresh = PRVAccountant()
    fresh.history = [(1.2, 0.064, 10)]

    assert epsilon_of([ROUND] * 20, 1e-4) == pytest.approx(3.75, abs=0.01)
    assert fresh.get_epsilon(1e-4) == pytest.approx(1.004, abs=0.001)


def test_nothing_spent_is_zero() -> None:
    assert epsilon_of([], 1e-5) == 0.0


def test_planning_by_rounds_instead_of_steps_would_break_the_promise() -> None:
    # An example in use plans 15 steps and takes 15 × 100: the ε it advertises is not its own.
    planned = plan_for(Privacy(epsilon=1.0, delta=1e-4), Training(local_steps=1), 15, 200)

    assert epsilon_of([planned.spend(15)] * 100, 1e-4) > 5


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "steps", "epsilon", "noise_multiplier"),
    [
        (200, 32, 150, 1, 5.62),
        (200, 32, 150, 3, 2.32),
        (200, 32, 150, 8, 1.20),
        (1000, 64, 300, 1, 3.71),
        (1000, 64, 300, 3, 1.59),
        (1000, 64, 300, 8, 0.90),
        (5000, 256, 300, 1, 3.36),
        (5000, 256, 300, 3, 1.45),
        (5000, 256, 300, 8, 0.85),
        (20000, 512, 500, 1, 2.44),
        (20000, 512, 500, 3, 1.13),
        (20000, 512, 500, 8, 0.73),
    ],
)
def test_noise_multipliers_are_those_of_the_table(
    num_examples: int, batch_size: int, steps: int, epsilon: float, noise_multiplier: float
) -> None:
    training = Training(batch_size=batch_size, local_steps=10)

    plan = plan_for(Privacy(epsilon=epsilon), training, steps // 10, num_examples)

    assert plan.noise_multiplier == pytest.approx(noise_multiplier, rel=0.008)
    assert plan.epsilon <= epsilon
    assert plan.delta == 1 / (10 * num_examples)
    assert plan.sample_rate == batch_size / num_examples
    assert plan.steps == steps


def test_a_batch_larger_than_the_data_is_the_full_batch() -> None:
    plan = plan_for(Privacy(epsilon=3), Training(batch_size=64, local_steps=2), 5, 40)

    assert plan.sample_rate == 1.0


@pytest.mark.parametrize(("sigma", "steps"), [(10.0, 100), (3.0, 20), (20.0, 3)])
def test_full_batches_cost_what_exact_gaussian_composition_says(sigma: float, steps: int) -> None:
    spend = Spend(noise_multiplier=sigma, sample_rate=1.0, steps=steps)

    bound = epsilon_of([spend], 1e-4)

    exact = _gaussian_epsilon(math.sqrt(steps) / sigma, 1e-4)
    assert exact <= bound <= exact + 0.025


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(1.2, 0.064, 200), (0.9, 0.064, 300), (2.3, 0.16, 150)]
)
def test_an_independent_accountant_agrees_in_both_directions(
    sigma: float, rate: float, steps: int
) -> None:
    bound = epsilon_of([Spend(noise_multiplier=sigma, sample_rate=rate, steps=steps)], 1e-4)

    removed = _poisson_gaussian_epsilon(sigma, rate, steps, 1e-4, remove=True)
    added = _poisson_gaussian_epsilon(sigma, rate, steps, 1e-4, remove=False)
    assert max(removed, added) <= bound <= max(removed, added) + 0.03


def test_a_budget_holds_for_interrupted_rounds_too() -> None:
    require_budget([ROUND] * 19, ROUND, epsilon=3.76, delta=1e-4)

    with pytest.raises(PrivacyError, match=r"epsilon from 3\.755 to 3\.852.*No such round"):
        require_budget([ROUND] * 20, ROUND, epsilon=3.76, delta=1e-4)


def test_beyond_the_largest_epsilon_infinity_is_reported() -> None:
    spend = Spend(noise_multiplier=0.5, sample_rate=0.5, steps=10_000)

    assert epsilon_of([spend], 1e-6) == math.inf > LARGEST_EPSILON


# Refusals


def test_a_delta_that_lets_records_out_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"delta = 0\.01 is not below 1/n = 0\.01"):
        plan_for(Privacy(epsilon=1, delta=0.01), Training(local_steps=1), 1, 100)


def test_an_unreachable_epsilon_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"epsilon = 0\.005 .* cannot be reached"):
        plan_for(Privacy(epsilon=0.005), Training(local_steps=1), 1, 100)


@pytest.mark.parametrize(
    ("delta", "steps"), [(5e-324, 1), (1e-51, 1), (None, 10**7), (None, 10**18)]
)
def test_what_cannot_be_accounted_for_is_refused_before_it_takes_all_memory(
    delta: float | None, steps: int
) -> None:
    training = Training(local_steps=steps, batch_size=1)
    with pytest.raises(PrivacyError, match="which is what can be accounted for"):
        plan_for(Privacy(epsilon=1e308, delta=delta), training, 2, 100)


def test_steps_must_be_fixed_in_advance() -> None:
    with pytest.raises(PrivacyError, match="local_steps is missing"):
        plan_for(Privacy(epsilon=1), Training(), 1, 100)


def test_no_records_no_plan() -> None:
    with pytest.raises(PrivacyError, match="0 records"):
        plan_for(Privacy(epsilon=1), Training(local_steps=1), 1, 0)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_must_be_a_probability(delta: float) -> None:
    with pytest.raises(PrivacyError, match="expected delta"):
        epsilon_of([ROUND], delta)


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_multiplier", 0.0), ("noise_multiplier", math.inf), ("sample_rate", 1.1), ("steps", 0)],
)
def test_spends_that_cannot_be_are_refused(field: str, value: float) -> None:
    values = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1} | {field: value}
    with pytest.raises(ValueError, match=f"expected {field}"):
        Spend(**values)  # type: ignore[arg-type]


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected clipping_norm > 0"):
        DpPlan(
            noise_multiplier=1,
            clipping="flat",
            clipping_norm=0,
            sample_rate=0.1,
            steps=1,
            delta=1e-5,
            epsilon=1,
        )


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Return ε of μ-Gaussian DP: δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)."""
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        cost = ndtr(mu / 2 - middle / mu) - math.exp(middle) * ndtr(-mu / 2 - middle / mu)
        low, high = (middle, high) if cost > delta else (low, middle)
    return high


def _poisson_gaussian_epsilon(
    sigma: float, rate: float, steps: int, delta: float, *, remove: bool
) -> float:
    """Compose the privacy loss of (1 − q) N(0, σ²) + q N(1, σ²) against N(0, σ²) by FFT."""
    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 2_000_001)
    without = np.diff(ndtr(x / sigma))
    with_record = (1 - rate) * without + rate * np.diff(ndtr((x - 1) / sigma))
    centre = (x[1:] + x[:-1]) / 2
    loss = np.log1p(rate * np.expm1((2 * centre - 1) / (2 * sigma**2)))
    mass = with_record if remove else without
    loss = loss if remove else -loss
    mesh, size = 1e-4, 1 << 19  # losses in [−26, 26]
    cell = np.rint(loss / mesh).astype(int)
    cell[np.abs(cell) >= size // 2] = 0  # less than 1e-12 of the mass
    density = np.bincount(cell % size, weights=mass, minlength=size)
    total = np.clip(np.fft.irfft(np.fft.rfft(density) ** steps, size), 0, None)
    losses = mesh * np.where(np.arange(size) < size // 2, np.arange(size), np.arange(size) - size)
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        cost = float(np.sum(total * np.clip(-np.expm1(middle - losses), 0, None)))
        low, high = (middle, high) if cost > delta else (low, middle)
    return high
