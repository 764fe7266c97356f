from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anabranch.simulations.cohort.planner import (
    ROWS,
    ROWS_WIDE,
    VALUES,
    WIDE,
    Work,
    micro_cohorts,
)

WORK = st.lists(st.builds(Work, steps=st.integers(1, 9), rows=st.integers(1, 3000)), max_size=60)


@given(WORK, st.sampled_from([16, WIDE, 384]), st.integers(1, VALUES))
def test_every_client_is_in_one_cohort_that_fits(work: list[Work], width: int, values: int) -> None:
    cohorts = micro_cohorts(work, width=width, values=values)
    assert sorted(i for cohort in cohorts for i in cohort) == list(range(len(work)))
    limit = ROWS if width < WIDE else ROWS_WIDE
    for cohort in cohorts:
        steps = [work[i].steps for i in cohort]
        assert steps == sorted(steps, reverse=True)
        if len(cohort) > 1:
            assert len(cohort) * max(work[i].rows for i in cohort) <= limit
            assert len(cohort) * values <= VALUES


def test_cohorts_of_equal_clients_are_full() -> None:
    small = [Work(steps=5, rows=10)] * 250
    sizes = [len(cohort) for cohort in micro_cohorts(small, width=128, values=9610)]
    assert sizes == [102, 102, 46]
    text = [Work(steps=2, rows=8 * 32)] * 8
    assert list(map(len, micro_cohorts(text, width=384, values=1000))) == [4, 4]
    assert list(map(len, micro_cohorts(text, width=64, values=1000))) == [8]


def test_a_client_that_fills_a_cohort_is_alone() -> None:
    work = [Work(steps=1, rows=5000), Work(steps=3, rows=5000)]
    assert micro_cohorts(work, width=64, values=10) == [[1], [0]]
    assert micro_cohorts([], width=64, values=10) == []
