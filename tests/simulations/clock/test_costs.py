"""Seconds, joules and draws, as arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.simulations.clock.costs import (
    compute_s,
    grams,
    joules,
    lognormal,
    records_used,
    spent,
    transfer_s,
    uniform,
)
from anabranch.simulations.clock.fairness import gini, jain, participation

PARTS = st.tuples(*[st.floats(0, 1e4)] * 3)
COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=20).map(np.array)

# Laws


@given(parts=PARTS, elapsed=st.floats(0, 4e4))
def test_what_was_done_is_a_beginning_of_the_whole(
    parts: tuple[float, float, float], elapsed: float
) -> None:
    done = spent(parts, elapsed)

    assert all(0 <= a <= b for a, b in zip(done, parts, strict=True))
    assert sum(done) == pytest.approx(min(elapsed, sum(parts)), abs=1e-9)
    assert done[1] == 0 or done[0] == parts[0]  # one after the other
    assert done[2] == 0 or done[1] == parts[1]


@given(records=st.integers(0, 50), batch=st.integers(1, 20), steps=st.integers(0, 40))
def test_records_are_used_as_epochs_use_them(records: int, batch: int, steps: int) -> None:
    left, used = 0, 0
    for _ in range(steps if records else 0):
        left = left or records
        taken = min(batch, left)
        left, used = left - taken, used + taken

    assert records_used(records, batch, steps) == used


@given(seed=st.integers(0, 2**63 - 1), purpose=st.integers(0, 9), number=st.integers(0, 10**6))
def test_a_draw_is_the_same_for_one_client_and_for_many(
    seed: int, purpose: int, number: int
) -> None:
    clients = np.array([0, 1, 7, 10**6], np.uint64)
    together = uniform(seed, purpose, number, clients)

    assert together.tolist() == [uniform(seed, purpose, number, int(i)) for i in clients]
    assert ((together >= 0) & (together < 1)).all()


def test_draws_are_uniform_and_differ_by_seed_purpose_round_and_client() -> None:
    clients = np.arange(20_000, dtype=np.uint64)
    drawn = [
        uniform(*key, clients) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2)]
    ]
    for one in drawn:
        counts = np.histogram(one, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi², 19 degrees: 1 in 10,000
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


@given(counts=COUNTS)
def test_fairness_is_within_its_bounds_and_equal_counts_are_fair(counts: np.ndarray) -> None:
    pairs = np.abs(counts[:, None] - counts[None, :]).sum()
    expected = pairs / (2 * len(counts) * counts.sum()) if counts.sum() else 0.0

    assert gini(counts) == pytest.approx(expected)
    assert 0 <= gini(counts) < 1
    assert 1 / len(counts) - 1e-12 <= jain(counts) <= 1 + 1e-12
    equal = np.full_like(counts, 3)
    assert (gini(equal), jain(equal)) == (0.0, 1.0)


# Examples


def test_seconds_joules_and_grams() -> None:
    assert transfer_s(1_000_000, 4e6) == 2.0
    assert compute_s(5e9, 2.5) == 2.0
    assert joules(2.0, 3.0, 5.0, 1.0) == 13.0
    assert grams(3.6e6, 481.0) == 481.0
    arrays = compute_s(np.array([1e9, 2e9]), np.array([1.0, 4.0]))
    assert arrays.tolist() == [1.0, 0.5]


def test_a_lognormal_draw_has_median_one_and_the_given_spread() -> None:
    draws = [lognormal(0.5, uniform(0, 1, i, 0), uniform(0, 2, i, 0)) for i in range(4000)]

    assert np.log(draws).mean() == pytest.approx(0.0, abs=0.04)
    assert np.log(draws).std() == pytest.approx(0.5, abs=0.03)
    assert lognormal(0.0, 0.3, 0.7) == 1.0


def test_one_client_with_everything_and_classes_apart() -> None:
    counts, kind = np.array([0, 0, 0, 8]), np.array([0, 0, 1, 1], np.int16)
    found = participation(counts, kind, ("phone", "hospital", "laptop"))

    assert (found["gini"], found["jain"], found["never"]) == (0.75, 0.25, 0.75)
    assert found["by_class"] == {
        "phone": {"clients": 2, "share_of_clients": 0.5, "share_of_merged": 0.0, "never": 1.0},
        "hospital": {"clients": 2, "share_of_clients": 0.5, "share_of_merged": 1.0, "never": 0.5},
    }


def test_where_nothing_was_merged_all_have_the_same() -> None:
    found = participation(np.zeros(3, np.int64), np.zeros(3, np.int16), ("phone",))
    assert (found["gini"], found["jain"], found["never"]) == (0.0, 1.0, 1.0)
