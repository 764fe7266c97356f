"""Merging as soon as K deltas are there: what counts when, and how much."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import RunError
from tests.simulations.federation import NAMES, POLL_S, Federation, arrays_of, value
from tests.simulations.rig import NEVER, ToySite, config

A, B, C = ToySite("a", step=1.0), ToySite("b", step=1.0), ToySite("c", step=64.0)


def half_as_much(age: int) -> float:
    return 1 / math.sqrt(1 + age)


# Laws


@settings(max_examples=20)
@given(
    delays=st.lists(st.lists(st.floats(0, 90), min_size=1, max_size=4), min_size=4, max_size=4),
    buffer=st.integers(1, 4),
)
def test_every_answer_is_merged_at_most_once_and_every_wait_ends(
    delays: list[list[float]], buffer: int
) -> None:
    federation = Federation(
        run=config(rounds=4, buffer=buffer), delays=dict(zip(NAMES, delays, strict=True))
    )
    try:
        result = federation.run()
    except RunError:
        result = None
    answered = [(e["site"], e["round"]) for e in federation.events.of("site_trained")]

    assert len(answered) == len(set(answered))  # a site trains at most once in a round
    if result is None:
        return
    merged = [(site, r.round - r.ages.get(site, 0)) for r in result.history for site in r.trained]
    assert len(merged) == len(set(merged))
    assert set(merged) <= set(answered)
    assert sum(row.rounds for row in result.sites.values()) == len(merged)
    assert federation.time.now <= POLL_S + 4 * (60 + 60 + 2 * POLL_S)  # training, evaluation


@settings(max_examples=10)
@given(order=st.permutations(NAMES))
def test_with_equal_speed_and_a_buffer_of_all_sites_it_is_the_synchronous_run(
    order: list[str],
) -> None:
    buffered = Federation(run=config(rounds=3, buffer=4), order=order).run()

    assert arrays_of(buffered) == arrays_of(Federation(run=config(rounds=3)).run())
    assert all(not r.ages for r in buffered.history)


# Examples


def test_a_slow_sites_delta_counts_by_its_age_instead_of_being_dropped() -> None:
    """Fixed work: sites a and b fill the buffer twice while c trains; then c's delta comes."""
    federation = Federation(
        [A, B, C],
        run=config(rounds=3, buffer=2, holdout=0.0),
        delays={"a": [0.0, 0.0, 20.0], "b": [0.0, 0.0, 30.0], "c": 10.0},
    )
    result = federation.run()

    first, second, third = result.history
    assert (sorted(first.trained), sorted(second.trained)) == (["a", "b"], ["a", "b"])
    assert sorted(third.trained) == ["a", "c"]  # c was asked in round 1, a in round 3
    assert (dict(first.ages), dict(second.ages), dict(third.ages)) == ({}, {}, {"c": 2})
    late, weight = 64.0, half_as_much(2)
    assert value(result) == pytest.approx(1.0 + 1.0 + (1.0 + weight * late) / 2, rel=1e-6)
    row = result.sites["c"]
    assert (row.rounds, row.stale, row.late, row.failures) == (1, 1, 0, 0)
    assert federation.events.of("round_aggregated")[2]["ages"] == {"c": 2}


def test_a_merge_does_not_wait_for_the_slowest() -> None:
    run = config(rounds=4, buffer=2, holdout=0.0)
    delays: dict[str, float | list[float]] = {"c": 50.0}
    federation = Federation([A, B, C], run=run, delays=delays)
    federation.run()

    assert federation.time.now <= 2 * POLL_S
    waiting = Federation([A, B, C], run=config(rounds=4, holdout=0.0), delays=delays)
    waiting.run()
    assert waiting.time.now >= 200.0


def test_a_site_is_asked_anew_as_soon_as_it_has_answered() -> None:
    federation = Federation(
        [A, B, C], run=config(rounds=3, buffer=1, holdout=0.0), delays={"b": 30.0, "c": 45.0}
    )
    result = federation.run()

    assert [r.asked for r in result.history] == [("a", "b", "c"), ("a",), ("a",)]
    assert [sorted(r.trained) for r in result.history] == [["a"], ["a"], ["a"]]


def test_a_second_delta_of_a_site_waits_for_the_next_merge() -> None:
    """b's delta of round 1 comes in round 2, where b is asked again and answers at once."""
    federation = Federation(
        [A, B], run=config(rounds=3, buffer=1, holdout=0.0), delays={"b": [1.0, 0.0], "a": [0, 9]}
    )
    result = federation.run()

    assert [sorted(r.trained) for r in result.history] == [["a"], ["b"], ["b"]]
    assert [dict(r.ages) for r in result.history] == [{}, {"b": 1}, {"b": 1}]


def test_a_round_ends_when_all_have_been_heard_though_the_buffer_is_larger() -> None:
    result = Federation([A, B], run=config(rounds=2, buffer=9, holdout=0.0)).run()

    assert [sorted(r.trained) for r in result.history] == [["a", "b"]] * 2
    assert value(result) == 2.0


def test_a_silent_site_fails_at_its_deadline_and_the_round_says_so() -> None:
    federation = Federation(
        [A, B, C], run=config(rounds=2, buffer=3, holdout=0.0), delays={"c": NEVER}
    )
    result = federation.run()

    first, second = result.history
    assert first.failed["c"].message == "no answer within 60 s"
    assert second.failed == {}
    assert federation.time.now == POLL_S + 60.0  # it is still to answer, and not asked again
    assert result.sites["c"].failures == 1


def test_an_answer_after_its_deadline_is_late_and_does_not_count() -> None:
    federation = Federation(
        [A, C],
        run=config(rounds=3, buffer=2, holdout=0.0),
        delays={"a": [0.0, 20.0, 0.0], "c": [70.0, 0.0]},
    )
    result = federation.run()

    assert [sorted(r.trained) for r in result.history][:2] == [["a"], ["a", "c"]]
    assert dict(result.history[1].ages) == {}
    assert federation.events.of("site_late") == [
        {"kind": "site_late", "site": "c", "round": 1, "asked": "train"}
    ]


def test_below_the_quorum_every_site_and_its_reason_are_listed() -> None:
    federation = Federation(
        [A, B, C], run=config(rounds=1, buffer=3, quorum=2), delays={"b": NEVER, "c": NEVER}
    )
    with pytest.raises(
        RunError,
        match=r"(?s)round 1: 1 of 3 sites sent a delta that counts \(a\), 2 are needed\n"
        r"  b: deadline: no answer within 60 s\n  c: deadline: no answer within 60 s",
    ):
        federation.run()


def test_no_more_than_the_cohort_train_at_a_time() -> None:
    federation = Federation(
        run=config(rounds=8, buffer=1, cohort=2, holdout=0.0), delays=dict.fromkeys(NAMES, 5.0)
    )
    under_way: list[int] = []
    send = federation.grid.push_messages

    def push(messages):  # type: ignore[no-untyped-def]
        ids = send(messages)
        under_way.append(len(federation.engine._exchange._mail._sent) + len(ids))
        return ids

    federation.grid.push_messages = push  # type: ignore[method-assign]
    result = federation.run()

    training = under_way[1:]  # the first letters ask who they are
    assert max(training) <= 2
    assert len({site for r in result.history for site in r.trained}) > 2


def test_bytes_of_every_answer_are_in_the_round_that_merged_or_saw_it() -> None:
    result = Federation([A, B, C], run=config(rounds=3, buffer=2, holdout=0.0)).run()

    assert sum(r.bytes_up for r in result.history) <= result.bytes_up
    assert all(r.bytes_up > 0 for r in result.history)
    assert np.isfinite(value(result))
