"""The accountant of Skellam noise bounds exact divergences, and meets the Gaussian's."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols import rdp
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spend import PRECISION, Skellam, Spend, merged

DELTA = 1e-5


@cache
def log_masses(variance: float, last: int) -> np.ndarray:
    """Return ln P[X = k], k = 0 … last, by the ratios I_k / I_(k−1), downwards."""
    start = last + 60 + int(6 * math.sqrt(variance))
    ratio, ratios = 0.0, np.zeros(start + 1)
    for k in range(start, 0, -1):
        ratio = 1 / (2 * k / variance + ratio)
        ratios[k] = ratio
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios[1:]))])
    found: np.ndarray = logs - np.logaddexp.reduce(np.concatenate([logs, logs[1:]]))
    return found[: last + 1]


def pair(variance: float, shift: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ln p₁ and ln p₀ on one support: noise around `shift`, and around 0."""
    reach = int(25 * math.sqrt(variance)) + order * shift + 100
    support = np.arange(-reach, reach + 1)
    logs = log_masses(variance, reach + shift)
    return logs[np.abs(support - shift)], logs[np.abs(support)]


def divergence(p: np.ndarray, q: np.ndarray, order: int) -> float:
    return float(np.logaddexp.reduce(order * p + (1 - order) * q)) / (order - 1)


def bound(variance: float, l1: float, l2: float, order: int) -> float:
    sigma = math.sqrt(variance) / l2
    return float(rdp.skellam_divergences(sigma, l1, l2)[order - 2])


def spend(sigma: float = 3.0, q: float = 1.0, steps: int = 10, **more: float) -> Spend:
    sensitivities = Skellam(**({"l1": 1e4, "l2": 1e2} | more))
    return Spend(noise_multiplier=sigma, sample_rate=q, steps=steps, skellam=sensitivities)


@pytest.mark.parametrize("variance", [1, 2, 10, 50, 1000, 20_000])
@pytest.mark.parametrize("shift", [1, 2, 7, 30])
@pytest.mark.parametrize("order", [2, 3, 8, 64, 256])
def test_the_bound_is_above_the_exact_divergence(variance: int, shift: int, order: int) -> None:
    p, q = pair(variance, shift, order)
    if shift > variance:
        assert bound(variance, shift, shift, order) == math.inf
    else:
        found = divergence(p, q, order)
        assert bound(variance, shift, shift, order) >= found
        if variance >= 1000 and order * shift < variance / 10:
            assert bound(variance, shift, shift, order) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("shifts", [(1,) * 30, (3, 1, 1, 0), (5, 4), (10, 1, 1, 1, 1)])
@pytest.mark.parametrize("order", [2, 5, 32])
def test_the_bound_holds_for_vectors(shifts: tuple[int, ...], order: int) -> None:
    variance = 60.0
    exact = sum(divergence(*pair(variance, shift, order), order) for shift in shifts if shift)
    l1, l2 = float(sum(shifts)), math.sqrt(sum(s * s for s in shifts))
    assert bound(variance, l1, l2, order) >= exact


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.7])
@pytest.mark.parametrize(("variance", "shift"), [(4, 1), (30, 3), (400, 25)])
@pytest.mark.parametrize("order", [2, 3, 9, 32])
def test_sampling_is_bounded_both_ways(rate: float, variance: int, shift: int, order: int) -> None:
    p1, p0 = pair(variance, shift, order)
    mixed = np.logaddexp(math.log1p(-rate) + p0, math.log(rate) + p1)
    sigma = math.sqrt(variance) / shift
    cumulants = rdp._skellam_cumulants(sigma, rate, float(shift), float(shift))
    at = int(np.flatnonzero(order == rdp.ORDERS)[0])
    found = float(cumulants[at]) / (order - 1)
    added, removed = divergence(mixed, p0, order), divergence(p0, mixed, order)
    assert found >= added * (1 - 1e-9)
    assert found >= removed * (1 - 1e-9)
    assert added >= removed * (1 - 1e-9)  # as for the Gaussian: the involution argument


@given(
    st.floats(0.5, 20),
    st.sampled_from([1.0, 0.3, 0.02]),
    st.integers(1, 200),
    st.sampled_from([1e-5, 1e-8]),
)
def test_on_a_fine_grid_it_costs_what_the_gaussian_costs(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    gaussian = Spend(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    fine = spend(sigma, rate, steps, l1=1e8, l2=1e5)
    # At q = 1 and a large ε the best order is below 2, where there is a chord alone.
    cost = rdp.epsilon_of([gaussian], delta)
    found = rdp.epsilon_of([fine], delta)
    assert found >= cost * (1 - 1e-9)
    if cost < 8:
        assert found <= cost * 1.02 + 1e-6


@given(st.floats(1, 20), st.floats(1, 30), st.sampled_from([1.0, 0.1]))
def test_a_coarse_grid_costs_more(sigma: float, l2: float, rate: float) -> None:
    coarse = rdp.epsilon_of([spend(sigma, rate, l1=l2 * l2, l2=l2)], DELTA)
    fine = rdp.epsilon_of([spend(sigma, rate, l1=1e8, l2=1e6)], DELTA)
    assert coarse >= fine * (1 - 1e-9)


@given(st.integers(1, 30), st.integers(1, 30))
def test_only_totals_count_and_kinds_compose(first: int, second: int) -> None:
    whole = [spend(steps=first + second), Spend(noise_multiplier=2, sample_rate=0.1, steps=5)]
    parts = [
        spend(steps=first),
        Spend(noise_multiplier=2, sample_rate=0.1, steps=5),
        spend(steps=second),
    ]
    assert rdp.epsilon_of(whole, DELTA) == pytest.approx(rdp.epsilon_of(parts, DELTA))
    assert rdp.epsilon_of(whole, DELTA) > rdp.epsilon_of(whole[:1], DELTA)
    assert rdp.epsilon_of(whole, DELTA) > rdp.epsilon_of(whole[1:], DELTA)


def test_slack_is_taken_off_delta() -> None:
    plain, slack = spend(steps=10), spend(steps=10, slack=5e-7)
    assert rdp.epsilon_of([slack], DELTA) > rdp.epsilon_of([plain], DELTA)
    assert rdp.epsilon_of([slack], DELTA) <= rdp.epsilon_of([plain], DELTA / 2) * (1 + 1e-3)
    assert rdp.epsilon_of([spend(steps=21, slack=5e-7)], DELTA) == math.inf


def test_what_the_sampler_may_be_off_is_charged_where_epsilon_is_large() -> None:
    # (1 + e^ε) τ is beyond 2⁻²⁰ δ from about ε = 45 on; before it is nothing
    assert rdp.epsilon_of([spend(0.35, steps=2)], DELTA) < 30
    assert rdp.epsilon_of([spend(0.2, steps=3)], DELTA) == math.inf
    gaussian = Spend(noise_multiplier=0.2, sample_rate=1.0, steps=3)
    assert rdp.epsilon_of([gaussian], DELTA) < 100


def test_too_little_noise_for_its_grid_has_no_bound() -> None:
    assert rdp.epsilon_of([spend(0.5, l1=3, l2=3)], DELTA) == math.inf  # D2 = 3 > V = 2.25


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_least_noise_is_least(rate: float) -> None:
    sensitivities = Skellam(l1=400.0, l2=20.0, slack=1e-9)
    sigma = rdp.least_noise(2.0, DELTA, rate, 40, sensitivities)

    def cost(of: float) -> float:
        one = Spend(noise_multiplier=of, sample_rate=rate, steps=40, skellam=sensitivities)
        return rdp.epsilon_of([one], DELTA)

    assert cost(sigma) <= 2.0 < cost(sigma - PRECISION)


def test_records_and_clients_make_no_common_epsilon() -> None:
    client = Spend(noise_multiplier=3, sample_rate=1.0, steps=1, unit="client")
    with pytest.raises(PrivacyError, match="spends of clients and records"):
        rdp.epsilon_of([client, spend()], DELTA)
    assert rdp.epsilon_of([client], DELTA) > 0


def test_a_gaussian_history_has_no_place_for_skellam_noise() -> None:
    with pytest.raises(ValueError, match="expected Gaussian spends"):
        merged([spend()])
