from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.edge.runtime.backoff import (
    MAX_WINDOW_S,
    MIN_WINDOW_S,
    Backoff,
    Window,
    next_delay_s,
)

numbers = st.floats(-1e12, 1e12)


@given(st.integers(0, 10_000), st.integers())
def test_a_delay_is_at_most_the_cap_and_never_negative(failures: int, seed: int) -> None:
    backoff = Backoff(base_s=2.0, cap_s=900.0)
    assert 0 <= backoff.delay_s(failures, random.Random(seed)) <= 900.0


@given(numbers, numbers, st.integers(0, 100), st.integers())
def test_a_window_is_kept_and_bounded(low: float, high: float, failures: int, seed: int) -> None:
    window, backoff = Window(min_s=low, max_s=high), Backoff()
    assert MIN_WINDOW_S <= window.min_s <= window.max_s <= MAX_WINDOW_S
    delay = next_delay_s(failures, window, backoff, random.Random(seed))
    assert window.min_s <= delay <= max(window.max_s, backoff.cap_s)


def test_ceilings_double_up_to_the_cap() -> None:
    backoff = Backoff(base_s=2.0, cap_s=30.0)
    assert [backoff.ceiling_s(k) for k in range(6)] == [2, 4, 8, 16, 30, 30]


def test_jitter_is_full() -> None:
    rng, backoff = random.Random(0), Backoff(base_s=1.0, cap_s=8.0)
    delays = [backoff.delay_s(3, rng) for _ in range(1000)]
    assert min(delays) < 0.5
    assert max(delays) > 7.5
    assert sum(delays) / 1000 == pytest.approx(4.0, abs=0.3)


def test_success_with_a_window_waits_for_the_window_alone() -> None:
    window = Window(min_s=60, max_s=60)
    assert next_delay_s(0, window, Backoff(), random.Random(0)) == 60


@pytest.mark.parametrize(("base", "cap"), [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_refuses_a_base_that_is_not_between_0_and_the_cap(base: float, cap: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < base_s <= cap_s"):
        Backoff(base_s=base, cap_s=cap)
