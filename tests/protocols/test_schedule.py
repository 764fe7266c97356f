from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.schedule import learning_rate_factor

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: list[Schedule] = ["constant", "linear", "cosine"]
totals = st.integers(1, 200)
warmups = st.floats(0, 0.9)


@given(totals, warmups, st.sampled_from(SCHEDULES))
def test_every_step_learns_and_none_faster_than_the_rate(
    total: int, warmup: float, schedule: Schedule
) -> None:
    factors = [learning_rate_factor(step, total, warmup, schedule) for step in range(total)]

    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.0


@given(totals, warmups, st.sampled_from(SCHEDULES))
def test_the_rate_rises_through_the_warmup_and_never_after(
    total: int, warmup: float, schedule: Schedule
) -> None:
    factors = [learning_rate_factor(step, total, warmup, schedule) for step in range(total)]
    top = factors.index(1.0)

    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_six_steps_with_a_third_of_warmup(schedule: Schedule, expected: list[float]) -> None:
    factors = [learning_rate_factor(step, 6, 0.3, schedule) for step in range(6)]

    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("step", [-1, 6])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=r"expected a step in \[0, 6\)"):
        learning_rate_factor(step, 6, 0.0, "linear")


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_a_warmup_that_never_ends_is_refused(warmup: float) -> None:
    with pytest.raises(ValueError, match="expected warmup"):
        learning_rate_factor(0, 6, warmup, "linear")
