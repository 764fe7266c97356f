"""The one-run bound: against brute force, against closed forms, and as a law."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import binom

from anabranch.client.audit.guesses import (
    SHARES,
    Guesses,
    clopper_pearson,
    epsilon_lower,
    guess,
    p_value,
    reach,
    refutation,
)


@st.composite
def some_guesses(draw: st.DrawFn) -> Guesses:
    m = draw(st.integers(1, 300))
    r = draw(st.integers(0, m))
    return Guesses(canaries=m, guessed=r, correct=draw(st.integers(0, r)))


@given(some_guesses(), st.floats(0, 10), st.floats(0, 0.1))
def test_more_correct_guesses_never_raise_the_p_value(
    row: Guesses, epsilon: float, delta: float
) -> None:
    values = [
        p_value(Guesses(canaries=row.canaries, guessed=row.guessed, correct=v), epsilon, delta)
        for v in range(row.guessed + 1)
    ]

    assert all(0 <= p <= 1 for p in values)
    assert all(b <= a + 1e-12 for a, b in pairwise(values))


@given(some_guesses(), st.floats(0, 8), st.floats(0, 4))
def test_a_larger_epsilon_is_refuted_less_at_delta_0(
    row: Guesses, epsilon: float, more: float
) -> None:
    assert p_value(row, epsilon + more, 0.0) >= p_value(row, epsilon, 0.0) - 1e-12


@given(some_guesses(), st.floats(0, 8), st.floats(0, 0.01))
def test_a_larger_delta_is_refuted_less(row: Guesses, epsilon: float, delta: float) -> None:
    assert p_value(row, epsilon, delta) >= p_value(row, epsilon, 0.0) - 1e-12


def test_without_delta_it_is_the_tail_of_the_binomial() -> None:
    row = Guesses(canaries=50, guessed=20, correct=15)

    tail = sum(math.comb(20, k) * expit(1.0) ** k * expit(-1.0) ** (20 - k) for k in range(15, 21))

    assert p_value(row, 1.0, 0.0) == pytest.approx(tail, rel=1e-12)


def test_the_delta_term_is_that_of_the_theorem() -> None:
    m, r, v, epsilon, delta = 30, 12, 11, 1.5, 1e-3
    tail = binom.sf(v - 1, r, expit(epsilon))
    alpha = max((binom.sf(v - i - 1, r, expit(epsilon)) - tail) / i for i in range(1, m + 1))

    found = p_value(Guesses(canaries=m, guessed=r, correct=v), epsilon, delta)

    assert found == pytest.approx(tail + 2 * m * delta * alpha, rel=1e-12)


def test_guessing_all_of_many_right_proves_the_epsilon_of_the_closed_form() -> None:
    row = Guesses(canaries=1000, guessed=1000, correct=1000)  # 0.05 = (e^ε / (1 + e^ε))^1000

    assert epsilon_lower([row], 0.0) == pytest.approx(logit(0.05 ** (1 / 1000)), abs=2e-4)


@given(st.integers(1, 300), st.floats(0.6, 1))
def test_the_bound_itself_is_refuted(r: int, share: float) -> None:
    rows = [Guesses(canaries=r, guessed=r, correct=int(share * r))]

    bound = epsilon_lower(rows, 0.0)

    assert bound == 0 or refutation(rows, bound, 0.0) <= 0.05 < refutation(rows, bound + 1e-3, 0.0)


@pytest.mark.parametrize("correct", [0, 10, 20])
def test_no_guess_or_no_better_than_chance_proves_nothing(correct: int) -> None:
    assert epsilon_lower([Guesses(canaries=40, guessed=40, correct=correct)], 1e-5) == 0
    assert p_value(Guesses(canaries=40, guessed=0, correct=0), 1.0, 1e-5) == 1


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_bound_holds_for_randomised_response_95_times_in_100(
    epsilon: float, delta: float
) -> None:
    """Every coin is told truthfully with chance e^ε/(1 + e^ε), and with chance δ outright."""
    rng, m, trials = np.random.default_rng(5), 60, 1500
    p = expit(epsilon)
    right = rng.random((trials, m)) < delta + (1 - delta) * p
    bounds: dict[int, float] = {}
    for v in set(right.sum(1).tolist()):
        bounds[v] = epsilon_lower([Guesses(canaries=m, guessed=m, correct=v)], delta)
    wrong = np.mean([bounds[v] > epsilon for v in right.sum(1).tolist()])

    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_the_bound_holds_for_a_mechanism_that_tells_everything_with_chance_delta() -> None:
    m, delta, trials = 40, 0.02, 2000
    rng = np.random.default_rng(6)
    outright = rng.random(trials) < delta
    correct = np.where(outright, m, rng.binomial(m, 0.5, trials))
    refuted = [
        p_value(Guesses(canaries=m, guessed=m, correct=int(v)), 0.0, delta) <= 0.05 for v in correct
    ]

    assert np.mean(refuted) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_delta_limits_what_any_number_of_canaries_can_prove() -> None:
    assert reach(100_000, 1e-3) == pytest.approx(math.log(0.05 / (8 * 1e-3)), abs=0.4)
    assert reach(1000, 1e-6) > 4 > reach(1000, 1e-3) > reach(10, 1e-3)


def test_trying_several_shares_is_paid_for() -> None:
    """Scores that say nothing are refuted at ε = 0 at most 5 times in 100, shares and all."""
    rng = np.random.default_rng(7)
    wrong = [
        refutation(guess(rng.random(80), rng.random(80) < 0.5), 0.0, 0.0) <= 0.05
        for _ in range(1000)
    ]

    assert np.mean(wrong) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_the_highest_scores_are_said_to_be_in_and_the_lowest_out() -> None:
    included = np.array([True, False] * 10)
    scores = np.where(included, 1.0, -1.0)
    scores[0] = -5.0  # one included canary looks the least like one

    rows = guess(scores, included)

    assert [row.guessed for row in rows] == [2 * int(share * 10) for share in SHARES]
    assert [row.correct for row in rows] == [18, 9, 3, 1]
    assert guess(-scores, included)[0].correct == 2


@given(st.integers(1, 400), st.data())
def test_the_interval_of_a_rate_holds_it_and_is_exact_at_its_ends(
    trials: int, data: st.DataObject
) -> None:
    hits = data.draw(st.integers(0, trials))

    low, high = clopper_pearson(hits, trials)

    assert 0 <= low <= hits / trials <= high <= 1
    if hits:
        assert binom.sf(hits - 1, trials, low) == pytest.approx(0.025, rel=1e-6)
    if hits < trials:
        assert binom.cdf(hits, trials, high) == pytest.approx(0.025, rel=1e-6)


def test_what_is_no_count_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= correct <= guessed <= canaries"):
        Guesses(canaries=10, guessed=5, correct=6)
    with pytest.raises(ValueError, match="got 3 of 2"):
        clopper_pearson(3, 2)
    with pytest.raises(ValueError, match="coins"):
        guess(np.zeros(3), np.zeros(2, np.bool_))
    with pytest.raises(ValueError, match="not finite"):
        guess(np.array([0.0, np.nan]), np.zeros(2, np.bool_))
