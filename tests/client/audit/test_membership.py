"""The membership test: AUC, the rate at 1 % false positives, and what pairs prove."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, logit

from anabranch.client.audit.guesses import clopper_pearson, refutation
from anabranch.client.audit.membership import (
    Floats,
    Membership,
    compare,
    losses,
    membership_epsilon,
    membership_p_value,
)


def membership_of(inside: Floats, outside: Floats, seed: int = 0) -> Membership:
    labels = [np.zeros(len(scores), np.int64) for scores in (inside, outside)]
    return compare((inside, labels[0]), (outside, labels[1]), np.random.default_rng(seed))


def test_losses_are_the_cross_entropy_of_the_label() -> None:
    logits = np.array([[0.0, 0.0], [2.0, 0.0]], np.float32)

    found = losses(logits, np.array([1, 0]))

    np.testing.assert_allclose(found, [math.log(2), math.log1p(math.exp(-2))], rtol=1e-6)


def test_members_that_stand_out_are_found() -> None:
    found = membership_of(np.linspace(2, 3, 150), np.linspace(0, 1, 200))

    assert found.auc == 1.0
    assert found.tpr == 1.0
    assert (found.tpr_low, found.tpr_high) == clopper_pearson(150, 150)
    assert found.pairs[0].correct == found.pairs[0].canaries == 150


def test_the_threshold_lets_1_percent_of_the_non_members_pass() -> None:
    outside = np.arange(200.0)  # two of them may be above 197: 198 and 199
    found = membership_of(np.array([197.5, 198.0, 197.0, 196.5]), outside)

    assert found.tpr == 0.5


def test_below_100_non_members_1_percent_is_not_measured() -> None:
    found = membership_of(np.zeros(300), np.zeros(99))

    assert (found.tpr, found.tpr_low, found.tpr_high) == (None, None, None)
    assert found.auc == 0.5


def test_equal_scores_are_no_evidence() -> None:
    found = membership_of(np.zeros(300), np.zeros(300))

    assert found.pairs[0].correct == 0
    assert membership_epsilon(found.pairs, 1e-5) == 0


def test_pairs_have_one_label() -> None:
    rng = np.random.default_rng(0)
    inside, outside = (
        (np.zeros(6), np.array([0, 0, 0, 0, 1, 2])),
        (np.ones(4), np.array([0, 1, 1, 3])),
    )

    found = compare(inside, outside, rng)

    assert found.pairs[0].canaries == 2  # one of label 0, one of label 1


def test_what_pairs_prove_is_half_of_what_coins_prove() -> None:
    """A pair is two records: ε of the run is at least half of the ε that pairs refute."""
    found = membership_of(np.ones(400), np.zeros(400))
    both = logit((0.05 / 4) ** (1 / 400))  # four shares are tried

    assert membership_epsilon(found.pairs, 0.0) == pytest.approx(both / 2, abs=0.011)


def test_the_delta_of_a_pair_is_that_of_group_privacy() -> None:
    pairs = membership_of(np.arange(-8.0, 52.0), np.zeros(60)).pairs
    epsilon, delta = 0.3, 1e-4

    found = membership_p_value(pairs, epsilon, delta)

    expected = refutation(list(pairs), 2 * epsilon, (1 + math.exp(epsilon)) * delta)
    assert found == pytest.approx(expected, rel=1e-9)
    assert refutation(list(pairs), 2 * epsilon, 2 * delta) < 0.99 * found < 0.99


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_the_bound_holds_95_times_in_100_for_a_mechanism_of_known_epsilon(epsilon: float) -> None:
    """The worst swap that (ε, 0)-DP allows: the member looks like one with odds e^2ε."""
    rng, wrong, trials = np.random.default_rng(2), 0, 300
    for _ in range(trials):
        right = rng.random(60) < expit(2 * epsilon)
        pairs = membership_of(np.where(right, 1.0, -1.0), np.zeros(60)).pairs
        wrong += membership_p_value(pairs, epsilon, 0.0) <= 0.05

    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(ValueError, match="members and non-members"):
        membership_of(np.zeros(3), np.zeros(0))
