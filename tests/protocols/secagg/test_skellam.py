"""Skellam noise is what it says: against exact probabilities, at table borders, in its tails."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ive

from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.secagg.skellam import (
    CHUNK,
    DISTANCE,
    HIGH,
    LOW,
    MOST_VARIANCE,
    drawn,
    skellam,
    table_of,
)

LEVEL = 1e-6  # of every chi-square test; keys are fixed, so a result is the same for ever


def keyed(seed: int) -> Callable[[int], bytes]:
    """Return a source of keys for tests: anybody can draw them again."""
    state = [seed]

    def random(size: int) -> bytes:
        state[0] += 1
        return hashlib.shake_256(f"skellam {seed} {state[0]}".encode()).digest(size)

    return random


def no_more(size: int) -> bytes:
    raise AssertionError(f"{size} further bytes were drawn")


def exact(variance: int, last: int) -> list[Decimal]:
    """Return P[X = k], k = 0 … last, by the power series of I_k, to 60 digits."""
    half = Decimal(variance) / 2
    with localcontext() as context:
        context.prec = 120
        found = []
        first = (-Decimal(variance)).exp()  # (v/2)^k / k!
        for k in range(last + 1):
            if k:
                first = first * half / k
            term, total, j = first, Decimal(0), 0
            while term > total * Decimal(10) ** -90:
                total += term
                j += 1
                term = term * half * half / (j * (j + k))
            found.append(total)
    return found


def p_value(values: np.ndarray, variance: int, edges: list[int]) -> float:
    """Return the chi-square p-value of values in the bins (−∞, e_0], (e_0, e_1], …, (e_n, ∞)."""
    reach = 12 * int(variance**0.5) + 12
    support = np.arange(-reach, reach + 1)
    masses = ive(np.abs(support).astype(float), float(variance))
    bins = np.searchsorted(edges, support)
    expected = np.bincount(bins, weights=masses, minlength=len(edges) + 1)
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
    return float(stats.chisquare(counts, expected / expected.sum() * len(values)).pvalue)


def edges_of(variance: int) -> list[int]:
    deviation = variance**0.5
    return sorted({round(deviation * x / 4) for x in range(-12, 13)})


@pytest.mark.parametrize("variance", [1, 2, 7, 40])
def test_the_table_is_the_distribution_to_the_stated_distance(variance: int) -> None:
    table = table_of(variance)
    masses = exact(variance, len(table.high) + 20)
    with localcontext() as context:
        context.prec = 120
        total, distance, before = masses[0], Decimal(0), Decimal(0)
        for k in range(len(table.high)):
            here = Decimal(table.bound(k)) / 2 ** (HIGH + LOW)
            distance += abs((here - before) - masses[k] * (1 if k == 0 else 2))
            before = here
        total = masses[0] + 2 * sum(masses[1:])
        tail = 2 * sum(masses[len(table.high) :])
        assert abs(total - 1) < Decimal(2) ** -200
        assert tail < Decimal(2) ** -169
        assert (distance + tail + (1 - before)) / 2 < Decimal(DISTANCE)


@pytest.mark.parametrize("variance", [1, 3, 50, 10_000, 2**20])
def test_bounds_ascend_to_one(variance: int) -> None:
    table = table_of(variance)
    bounds = [table.bound(k) for k in range(len(table.high))]
    assert bounds == sorted(bounds)
    assert 2 ** (HIGH + LOW) - bounds[-1] <= 2


@pytest.mark.parametrize("variance", [1, 2, 9, 100, 12_345, 2**22])
def test_draws_pass_chi_square_and_a_variance_off_by_a_tenth_does_not(variance: int) -> None:
    values = skellam(variance, 400_000, keyed(variance))
    edges = edges_of(variance)
    assert p_value(values, variance, edges) > LEVEL
    wrong = max(variance + 1, round(1.1 * variance))
    assert p_value(skellam(wrong, 400_000, keyed(variance)), variance, edges) < LEVEL


@pytest.mark.parametrize(("variance", "count"), [(6, 5), (1000, 10), (2**20, 3)])
def test_the_sum_of_shares_is_skellam_of_the_whole_variance(variance: int, count: int) -> None:
    random = keyed(variance + count)
    total = sum(skellam(variance // count, 300_000, random) for _ in range(count))
    assert isinstance(total, np.ndarray)
    assert p_value(total, variance // count * count, edges_of(variance)) > LEVEL


@pytest.mark.parametrize("variance", [1, 30, 10**4, 2**26])
def test_the_moments(variance: int) -> None:
    n = 500_000
    values = skellam(variance, n, keyed(7)).astype(float)
    kurtosis = 3 + 1 / variance
    assert abs(values.mean()) < 5 * (variance / n) ** 0.5
    assert abs(values.var() / variance - 1) < 5 * ((kurtosis - 1) / n) ** 0.5
    assert (values**4).mean() / variance**2 == pytest.approx(kurtosis, abs=0.05 * kurtosis)


@pytest.mark.parametrize("variance", [1, 4, 300, 70_000])
@given(data=st.data())
def test_a_word_means_the_value_that_a_plain_search_finds(
    variance: int, data: st.DataObject
) -> None:
    table = table_of(variance)
    k = data.draw(st.integers(0, len(table.high) - 2))
    number = int(table.high[k]) + data.draw(st.sampled_from([-1, 0, 1]))
    number = min(max(number, 0), 2**HIGH - 1)
    sign = data.draw(st.integers(0, 1))
    rest = data.draw(
        st.one_of(
            st.integers(0, 2**LOW - 1),
            st.sampled_from([0, 2**LOW - 1]),
            st.integers(-1, 1).map(
                lambda by: min(max(int.from_bytes(table.low[k]) + by, 0), 2**LOW - 1)
            ),
        )
    )
    words = np.array([number << 1 | sign], np.uint64)
    found = int(drawn(table, words, lambda size: rest.to_bytes(size))[0])
    bounds = [table.bound(i) for i in range(len(table.high))]
    size = bisect_right(bounds, number << LOW | rest)
    assert found == (-size if sign else size)


def test_further_bits_are_drawn_at_borders_alone() -> None:
    table = table_of(100)
    near = np.array([int(high) + 1 << 1 for high in table.high[:40]], np.uint64)
    assert drawn(table, near, no_more).tolist() == list(range(1, 41))
    with pytest.raises(AssertionError, match="16 further bytes"):
        drawn(table, np.array([int(table.high[3]) << 1], np.uint64), no_more)


def test_far_tails_are_found_without_walking_there() -> None:
    table = table_of(2**26)
    words = np.array([(2**HIGH - 2**at) << 1 for at in range(1, 50)], np.uint64)
    bounds = table.high
    assert drawn(table, words, lambda size: bytes(size)).tolist() == [
        int(np.searchsorted(bounds, int(word) >> 1)) for word in words
    ]


@given(st.integers(1, 2**20), st.integers(0, 300))
def test_a_key_decides_the_draw_and_is_asked_for_once(variance: int, count: int) -> None:
    asked: list[int] = []

    def random(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    variance = 1 << variance.bit_length() // 2  # few tables
    first, second = (skellam(variance, count, random) for _ in range(2))
    assert asked == [32, 32]
    assert first.dtype == np.int64
    assert np.array_equal(first, second)


def test_a_long_draw_begins_as_a_short_one() -> None:
    long, short = (skellam(50, count, keyed(1)) for count in (CHUNK + 5, CHUNK))
    assert np.array_equal(long[:CHUNK], short)
    assert not np.array_equal(long[:CHUNK], skellam(50, CHUNK, keyed(2)))


@pytest.mark.parametrize("variance", [0, -1, MOST_VARIANCE + 1, 1.5, float("nan"), float("inf")])
def test_what_cannot_be_drawn_is_refused(variance: float) -> None:
    with pytest.raises(PrivacyError, match="expected a whole number of 1 … 4294967296"):
        skellam(variance, 1, keyed(0))  # type: ignore[arg-type]
