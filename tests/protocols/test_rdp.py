"""The devices' accountant: what others compute, the laws it keeps, and what it refuses."""

from __future__ import annotations

import math
import warnings
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from anabranch.client import accountant, privacy
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.rdp import (
    ORDERS,
    WHOLE_ORDERS,
    converted,
    divergences,
    epsilon_of,
    least_noise,
    repeats_within,
    require_budget,
)
from anabranch.protocols.spend import LARGEST_EPSILON, PRECISION, Spend

WHOLE = np.isin(ORDERS, WHOLE_ORDERS)


def spend(sigma: float = 1.2, rate: float = 0.064, steps: int = 10) -> Spend:
    return Spend(noise_multiplier=sigma, sample_rate=rate, steps=steps)


sigmas = st.floats(0.4, 20)
rates = st.one_of(st.just(1.0), st.floats(1e-5, 1))
spends = st.builds(spend, sigmas, rates, st.integers(1, 500))
deltas = st.sampled_from([1e-3, 1e-5, 1e-8])

# Oracles


@settings(max_examples=40, deadline=None)
@given(sigmas, rates)
def test_divergences_at_whole_orders_are_those_of_opacus(sigma: float, rate: float) -> None:
    expected = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(WHOLE_ORDERS))

    # Opacus adds up terms that are near 1 and loses what is below 1e-16 of them.
    assert divergences(sigma, rate)[WHOLE] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(sigmas, st.one_of(st.just(1.0), st.floats(1e-3, 0.99)))
def test_divergences_between_whole_orders_are_above_the_true_ones(
    sigma: float, rate: float
) -> None:
    between = ORDERS[~WHOLE]
    with np.errstate(all="ignore"):
        true = np.asarray(
            compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=between.tolist())
        )

    ours = divergences(sigma, rate)[~WHOLE]
    known = np.isfinite(true)
    assert (ours[known] >= true[known] * (1 - 1e-6) - 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(sigmas, rates, st.integers(1, 1000), deltas)
def test_the_conversion_is_that_of_opacus(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    total = steps * divergences(sigma, rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order may be the first or the last
        expected, _ = get_privacy_spent(orders=ORDERS.tolist(), rdp=total, delta=delta)

    assert converted(ORDERS, total, delta) == pytest.approx(max(expected, 0.0), rel=1e-6, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(spends, min_size=1, max_size=3), deltas)
def test_epsilon_at_whole_orders_is_that_of_dp_accounting(
    history: list[Spend], delta: float
) -> None:
    accountant = RdpAccountant(orders=list(WHOLE_ORDERS))
    for one in history:
        step = dp_accounting.GaussianDpEvent(one.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(one.sample_rate, step)
        accountant.compose(sampled, one.steps)
    expected = accountant.get_epsilon(delta)

    total = sum(s.steps * divergences(s.noise_multiplier, s.sample_rate) for s in history)
    ours = converted(ORDERS[WHOLE], np.asarray(total)[WHOLE], delta)
    # Near 0 dp_accounting knows a better bound, by the total variation.
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6) or expected < ours < 0.1
    assert epsilon_of(history, delta) <= ours * (1 + 2e-9) or ours > LARGEST_EPSILON


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.builds(
            spend,
            st.sampled_from([0.7, 1.3, 2.5, 6.0]),
            st.sampled_from([0.01, 0.1, 0.5, 1.0]),
            st.integers(1, 30),
        ),
        max_size=3,
    ),
    st.sampled_from([1e-4, 1e-6]),
)
def test_epsilon_is_never_below_what_the_prv_accountant_finds(
    history: list[Spend], delta: float
) -> None:
    low, high = privacy.epsilon_bounds(history, delta)

    assert epsilon_of(history, delta) >= low
    # `high` holds the accountant's own error of up to 0.01, which the truth does not.
    assert epsilon_of(history, delta) >= high - 2 * accountant.EPSILON_ERROR


@settings(max_examples=15, deadline=None)
@given(st.floats(1, 30), st.integers(1, 50), st.sampled_from([1e-3, 1e-5]))
def test_full_batches_are_gaussian_mechanisms(sigma: float, steps: int, delta: float) -> None:
    # Their exact curve: Balle and Wang 2018, arXiv:1805.06530, theorem 8.
    mu = math.sqrt(steps) / sigma
    epsilon = epsilon_of([spend(sigma, 1.0, steps)], delta)
    if not math.isfinite(epsilon):
        return

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    exact = normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)
    assert exact <= delta


# Laws


@settings(max_examples=40, deadline=None)
@given(st.lists(spends, max_size=4), deltas, st.data())
def test_order_of_spends_does_not_matter(
    history: list[Spend], delta: float, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(history))

    assert epsilon_of(history, delta) == epsilon_of(shuffled, delta)


@settings(max_examples=40, deadline=None)
@given(sigmas, rates, st.integers(1, 200), st.integers(1, 200), deltas)
def test_division_into_trainings_does_not_matter(
    sigma: float, rate: float, first: int, second: int, delta: float
) -> None:
    parts = [spend(sigma, rate, first), spend(sigma, rate, second)]

    assert epsilon_of(parts, delta) == epsilon_of([spend(sigma, rate, first + second)], delta)


@settings(max_examples=40, deadline=None)
@given(st.lists(spends, max_size=3), spends, deltas)
def test_every_spend_costs(history: list[Spend], more: Spend, delta: float) -> None:
    assert epsilon_of([*history, more], delta) >= epsilon_of(history, delta)


@settings(max_examples=60, deadline=None)
@given(sigmas, rates, st.integers(1, 500), deltas, st.floats(1.001, 4))
def test_more_noise_costs_less_and_more_of_anything_else_more(
    sigma: float, rate: float, steps: int, delta: float, factor: float
) -> None:
    epsilon = epsilon_of([spend(sigma, rate, steps)], delta)

    assert epsilon_of([spend(sigma * factor, rate, steps)], delta) <= epsilon
    if rate * factor <= 0.9:  # nearer to 1 the bound for samples lies above what all records cost
        assert epsilon_of([spend(sigma, rate * factor, steps)], delta) >= epsilon
    assert epsilon_of([spend(sigma, rate, 1 + int(steps * factor))], delta) >= epsilon
    assert epsilon_of([spend(sigma, rate, steps)], min(delta * factor, 0.5)) <= epsilon


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 20), deltas, rates, st.integers(1, 2000))
def test_the_least_noise_is_the_least(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    sigma = least_noise(epsilon, delta, rate, steps)

    assert epsilon_of([spend(sigma, rate, steps)], delta) <= epsilon
    if sigma > 2 * PRECISION:
        assert epsilon_of([spend(sigma - PRECISION, rate, steps)], delta) > epsilon


@settings(max_examples=20, deadline=None)
@given(st.lists(spends, max_size=2), spends, st.floats(0.5, 20), st.sampled_from([1, 7, 300]))
def test_as_many_fit_as_are_said_and_not_one_more(
    spent: list[Spend], unit: Spend, budget: float, most: int
) -> None:
    count = repeats_within(spent, unit, epsilon=budget, delta=1e-5, most=most)

    if count:
        assert epsilon_of([*spent, *[unit] * count], 1e-5) <= budget
    if count < most:
        assert epsilon_of([*spent, *[unit] * (count + 1)], 1e-5) > budget


# Examples


@pytest.mark.parametrize(
    ("sigma", "rate", "epochs", "published"),
    # TensorFlow Privacy's tutorial on MNIST: 60000 records, batches of 256, δ = 1e-5.
    [(1.3, 256 / 60000, 15, 1.19), (1.1, 256 / 60000, 60, 3.01), (0.7, 256 / 60000, 45, 7.10)],
)
def test_published_values_are_reached_and_the_tighter_conversion_is_below(
    sigma: float, rate: float, epochs: int, published: float
) -> None:
    steps = round(epochs / rate)
    total = steps * divergences(sigma, rate)
    as_published = (total - math.log(1e-5) / (ORDERS - 1)).min()  # Mironov 2017's conversion

    assert as_published == pytest.approx(published, abs=0.025)
    assert 0.75 * published < epsilon_of([spend(sigma, rate, steps)], 1e-5) < published


def test_a_single_step_of_whole_order_two_is_the_closed_form() -> None:
    # A_2 = 1 + q² (e^(1/σ²) − 1)
    q, sigma = 0.01, 1.5
    expected = math.log1p(q * q * math.expm1(1 / sigma**2))

    assert divergences(sigma, q)[list(ORDERS).index(2.0)] == pytest.approx(expected, rel=1e-12)


def test_tiny_rates_lose_no_digits() -> None:
    q, sigma = 1e-9, 1.0
    expected = q * q * math.expm1(1.0)  # 1.7e-18: below what sums near 1 can tell from 0

    assert divergences(sigma, q)[list(ORDERS).index(2.0)] == pytest.approx(expected, rel=1e-9)


def test_nothing_spent_is_zero() -> None:
    assert epsilon_of([], 1e-5) == 0.0


@pytest.mark.parametrize("sigma", [1e-300, 1e-3, 1e5, 1e200])
@pytest.mark.parametrize("rate", [1e-300, 1e-9, 0.5, 1 - 1e-16, 1.0])
def test_the_ends_of_floats_give_a_bound_and_no_warning(sigma: float, rate: float) -> None:
    epsilon = epsilon_of([spend(sigma, rate)], 1e-5)

    assert epsilon == math.inf if sigma < 1 else 0 <= epsilon < 0.01


def test_beyond_the_largest_epsilon_is_infinity() -> None:
    assert epsilon_of([spend(0.3, 1.0, 1000)], 1e-5) == math.inf


# Refusals


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match=r"expected delta in \(0, 1\)"):
        epsilon_of([spend()], delta)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma": 0.0}, "noise_multiplier > 0"),
        ({"sigma": math.nan}, "noise_multiplier > 0"),
        ({"sigma": math.inf}, "noise_multiplier > 0"),
        ({"rate": 0.0}, "sample_rate in"),
        ({"rate": 1.1}, "sample_rate in"),
        ({"rate": math.nan}, "sample_rate in"),
        ({"steps": 0}, "steps >= 1"),
    ],
)
def test_spends_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spend(**values)


def test_an_epsilon_out_of_reach_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.epsilon = 1e-06 .* cannot be reached with"):
        least_noise(1e-6, 1e-10, 1.0, 1_000_000)


def test_a_budget_that_would_be_exceeded_is_refused_with_what_still_fits() -> None:
    fit = repeats_within([spend()], spend(steps=1), epsilon=1.5, delta=1e-4, most=100)
    assert 0 < fit < 100

    with pytest.raises(PrivacyError, match=rf"above the budget of 1\.5: 10 steps .* {fit} of its"):
        require_budget([spend()], spend(steps=100), epsilon=1.5, delta=1e-4)
