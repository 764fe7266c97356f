"""Rounds in virtual time: laws of the clock, and small federations worked out by hand."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import RunError
from anabranch.simulations.clock.flops import Work
from anabranch.simulations.clock.outcome import outcome_of
from tests.simulations.clock.virtual import Virtual, Windows, devices_of, journeys_of, name, toys
from tests.simulations.federation import value
from tests.simulations.rig import config

SECONDS = st.lists(st.integers(1, 30), min_size=4, max_size=4)
MODES = st.sampled_from(
    [
        {"cohort": 2},
        {"cohort": 2, "over_selection": 0.5},
        {"cohort": 2, "tiers": 2},
        {"cohort": 2, "over_selection": 1.0, "tiers": 2},
        {"buffer": 2},
        {"buffer": 3, "cohort": 3},
    ]
)


def federation(mode: dict[str, Any], seconds: list[int], **more: Any) -> Virtual:
    """Return a federation of one client per number of seconds, over 5 rounds."""
    options = {"rounds": 5, "deadline_s": 20.0, "holdout": 0.0} | mode
    journeys = {key: more.pop(key) for key in ("availability", "devices", "seed") if key in more}
    run = config(**options)
    needed = run.federation.cohort if run.federation.over_selection else None
    return Virtual(
        run,
        journeys_of(run, seconds, **journeys),
        toys(*[1.0] * len(seconds)),
        ahead=run.federation.buffer or run.federation.cohort,
        needed=needed,
        **more,
    )


# Laws


@settings(max_examples=40, deadline=None)
@given(
    mode=MODES,
    seconds=SECONDS,
    dropout=st.sampled_from([0.0, 0.3]),
    begins=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_time_goes_forward_deadlines_are_kept_and_everything_adds_up(
    mode: dict[str, Any], seconds: list[int], dropout: float, begins: list[int], seed: int
) -> None:
    windows = Windows(*[[(begin, begin + 45.0), (begin + 60.0, 1e6)] for begin in begins])
    devices = devices_of(4, dropout=dropout, region=[0, 1, 0, 1], regions=("world", "at"))
    virtual = federation(mode, seconds, availability=windows, devices=devices, seed=seed)
    with suppress(RunError):  # nobody is left: what happened until then must be right, too
        virtual.run()
    log, journeys = virtual.journeys.log(), virtual.journeys
    merged, arrived, sent = log["merged_in"] > 0, log["arrived_at"], log["sent_at"]

    assert (sent[1:] >= sent[:-1]).all()  # nothing is sent before what was sent before it
    assert (arrived[merged] >= sent[merged]).all()
    assert (arrived[merged] <= sent[merged] + 20.0).all()  # the deadline, to the bit
    for one in journeys.rounds():
        assert one.started_at <= one.merged_at <= one.ended_at
        assert one.merged_at <= one.started_at + 20.0
        assert (arrived[log["merged_in"] == one.round] <= one.merged_at).all()
    times = [one.merged_at for one in journeys.rounds()]
    assert times == sorted(times)

    found = outcome_of(journeys)
    assert found.joules == pytest.approx(4.0 * log["compute_s"].sum())
    assert sum(found.grams.values()) == pytest.approx(log["grams"].sum())
    assert found.bytes_down == log["bytes_down"].sum()
    share = log.seconds[merged].sum() / max(found.device_seconds, 1e-9)
    assert found.wasted_share + share == pytest.approx(1.0)
    assert sum(found.answers.values()) == len(log)
    assert found.merged.sum() == merged.sum() == found.answers.get("merged", 0)
    assert found.trained == len(virtual.trained) == log["computed"].sum()
    assert log["computed"][merged].all()


@settings(max_examples=30, deadline=None)
@given(seconds=st.lists(st.integers(1, 20), min_size=8, max_size=8), seed=st.integers(0, 99))
def test_over_selection_never_ends_a_round_later_than_none(seconds: list[int], seed: int) -> None:
    def first_round(over: float) -> float:
        mode = {"cohort": 3, "over_selection": over, "rounds": 1, "seed": seed}
        virtual = federation(mode, seconds)
        virtual.run()
        return virtual.times()[0][1]

    times = [first_round(over) for over in (0.0, 0.3, 1.0)]
    assert times == sorted(times, reverse=True)


@settings(max_examples=20, deadline=None)
@given(
    seconds=st.lists(st.integers(1, 99), min_size=4, max_size=4, unique=True),
    seed=st.integers(0, 99),
)
def test_who_is_not_merged_is_not_trained_unless_answers_tie(seconds: list[int], seed: int) -> None:
    virtual = federation({"cohort": 2, "over_selection": 0.5, "seed": seed}, seconds)
    try:
        virtual.run()
    except RunError:
        return
    found = outcome_of(virtual.journeys)
    assert found.trained_in_vain == 0
    assert found.trained == found.answers["merged"] <= 10


# Examples: synchronous


def test_a_round_waits_for_its_slowest_or_for_the_deadline() -> None:
    """Clients of 2, 5 and 9 s; deadline 8 s. The third is late, busy in round 2, back in 3."""
    virtual = federation({"rounds": 3, "deadline_s": 8.0}, [2, 5, 9])
    result = virtual.run()

    assert virtual.times() == [(0.0, 8.0), (8.0, 13.0), (13.0, 21.0)]
    assert [len(r.asked) for r in result.history] == [3, 2, 3]
    assert [sorted(r.trained) for r in result.history] == [[name(0), name(1)]] * 3
    log = virtual.journeys.log()
    assert log.table()["outcome"].tolist().count("late") == 2
    assert log["arrived_at"].tolist() == [2.0, 5.0, 9.0, 10.0, 13.0, 15.0, 18.0, 22.0]
    assert virtual.trained == [(name(c), r) for r in (1, 2, 3) for c in (0, 1)]


def test_over_selection_takes_the_first_two_of_three_and_the_third_is_busy_until_it_is_done() -> (
    None
):
    virtual = federation({"cohort": 2, "over_selection": 0.5, "rounds": 2}, [3, 4, 10])
    result = virtual.run()

    # Round 2 begins at 4 s with the two that are free; the third answers at 10 s, and in vain.
    assert virtual.times() == [(0.0, 4.0), (4.0, 8.0)]
    assert [r.asked for r in result.history] == [(name(0), name(1), name(2)), (name(0), name(1))]
    assert result.history[0].failed[name(2)].reason == "surplus"
    assert result.sites[name(2)].failures == 0
    found = outcome_of(virtual.journeys)
    assert found.answers == {"merged": 4, "surplus": 1}
    assert found.wasted == {"surplus": 10 / 24}
    assert found.merged.tolist() == [2, 2, 0]


def test_a_client_that_gives_up_costs_the_round_its_deadline_and_may_be_asked_again() -> None:
    devices = devices_of(2, dropout=[0.0, 0.9])
    virtual = federation({"rounds": 4, "deadline_s": 20.0}, [3, 5], devices=devices, seed=3)
    result = virtual.run()
    log = virtual.journeys.log().table()

    assert [r.asked for r in result.history] == [(name(0), name(1))] * 4
    dropped = [o == "dropped" for o, c in zip(log["outcome"], log["client"], strict=True) if c == 1]
    assert dropped.count(True) >= 2
    spans = [merged - started for started, merged in virtual.times()]
    assert spans == [20.0 if gone else 5.0 for gone in dropped]
    spent = log["compute_s"][log["outcome"] == "dropped"]
    assert ((spent > 0) & (spent < 5)).all()


def test_a_client_that_goes_offline_is_not_waited_for_after_the_deadline_until_it_is_back() -> None:
    windows = Windows([(0, 1e6)], [(0, 4.0), (30.0, 1e6)])
    virtual = federation({"rounds": 4, "deadline_s": 10.0}, [3, 5], availability=windows)
    result = virtual.run()
    log = virtual.journeys.log()

    # Offline from 4 s: round 1 ends at 10 s; then one client alone, 3 s a round.
    assert virtual.times() == [(0.0, 10.0), (10.0, 13.0), (13.0, 16.0), (16.0, 19.0)]
    assert [len(r.asked) for r in result.history] == [2, 1, 1, 1]
    assert log.table()["outcome"].tolist()[1] == "offline"
    assert log["compute_s"][1] == 4.0


def test_the_first_round_waits_until_enough_clients_are_online() -> None:
    windows = Windows([(5.0, 1e6)], [(7.0, 1e6)], [(50.0, 1e6)])
    virtual = federation({"cohort": 2, "rounds": 1}, [3, 4, 5], availability=windows)
    virtual.run()

    assert virtual.times() == [(7.0, 11.0)]


def test_without_the_memory_a_device_says_so_at_once() -> None:
    run = config(rounds=1, holdout=0.0)
    devices = devices_of(2, memory_bytes=[1 << 40, 1000])
    work = Work(prefix=0.0, forward=1e9, backward=0.0, fixed_bytes=500, bytes_per_record=100.0)
    journeys = journeys_of(run, [3, 4], devices=devices, pace={"work": work})
    result = Virtual(run, journeys, toys(1.0, 1.0)).run()

    failure = result.history[0].failed[name(1)]
    assert (failure.reason, failure.message) == (
        "model", "training needs 0 MB of memory, the device has 0 MB"
    )  # fmt: skip
    assert outcome_of(journeys).answers == {"merged": 1, "memory": 1}
    assert journeys.rounds()[0].merged_at == 3.0


# Examples: tiers


def test_a_cohort_is_of_one_tier_once_everybody_was_measured() -> None:
    """1 and 2 s are one tier, 8 and 9 s the other: a round takes 2 or 9 s, never 8 for a mix."""
    virtual = federation({"cohort": 2, "tiers": 2, "rounds": 16}, [1, 8, 2, 9])
    result = virtual.run()
    measured: set[str] = set()
    kinds = set()
    for report, (started, merged) in zip(result.history, virtual.times(), strict=True):
        if len(measured) == 4:
            assert set(report.asked) in ({name(0), name(2)}, {name(1), name(3)})
            assert merged - started == (2.0 if name(0) in report.asked else 9.0)
            kinds.add(report.asked)
        measured |= set(report.asked)
    assert len(kinds) == 2


# Examples: buffered asynchronous


def test_fedbuff_by_hand() -> None:
    """Clients a, b, c, d take 2, 3, 7 and 10 s and send 1, 2, 4 and 8; K = 2.

    round  from  asked                there                            merged  adds
    1      0     a b c d              a 2, b 3                         3       (1 + 2) / 2
    2      3     a b                  a 5, b 6                         6       (1 + 2) / 2
    3      6     a b, c at 7          c 7 (of 1), a 8                  8       (4/√3 + 1) / 2
    4      8     a, b at 9, d at 10   b 9 (of 3), d 10 (of 1), a 10    10      (8/√4 + 2/√2) / 2
    5      10    a, b at 12           a is there (of 4), b 12 (of 4)   12      (1/√2 + 2/√2) / 2

    A client that has answered is asked anew at once, with the adapter that there is. At 10 s three
    are ready: those asked first come first, so a waits. In round 5 its second answer, at 12 s, does
    not count beside its first.
    """
    run = config(rounds=5, buffer=2, holdout=0.0)
    journeys = journeys_of(run, [2, 3, 7, 10])
    virtual = Virtual(run, journeys, toys(1.0, 2.0, 4.0, 8.0), ahead=2)
    result = virtual.run()

    assert virtual.times() == [(0.0, 3.0), (3.0, 6.0), (6.0, 8.0), (8.0, 10.0), (10.0, 12.0)]
    a, b, c, d = map(name, range(4))
    assert [sorted(r.trained) for r in result.history] == [[a, b], [a, b], [a, c], [b, d], [a, b]]
    assert [r.asked for r in result.history] == [(a, b, c, d), (a, b), (a, b, c), (a, b, d), (a, b)]
    assert [dict(r.ages) for r in result.history] == [{}, {}, {c: 2}, {d: 3, b: 1}, {a: 1, b: 1}]
    expected = [
        (1 + 2) / 2,
        (1 + 2) / 2,
        (4 / math.sqrt(3) + 1) / 2,
        (8 / math.sqrt(4) + 2 / math.sqrt(2)) / 2,
        (1 / math.sqrt(2) + 2 / math.sqrt(2)) / 2,
    ]
    assert value(result) == pytest.approx(sum(expected), rel=1e-6)
    rows = journeys.log()
    asked = zip(rows["client"], rows["sent_at"], rows["arrived_at"], rows["merged_in"], strict=True)
    assert [tuple(row) for row in asked] == [
        (0, 0, 2, 1), (1, 0, 3, 1), (2, 0, 7, 3), (3, 0, 10, 4),
        (0, 3, 5, 2), (1, 3, 6, 2),
        (0, 6, 8, 3), (1, 6, 9, 4), (2, 7, 14, 0),
        (0, 8, 10, 5), (1, 9, 12, 5), (3, 10, 20, 0),
        (0, 10, 12, 0), (1, 12, 15, 0),
    ]  # fmt: skip
