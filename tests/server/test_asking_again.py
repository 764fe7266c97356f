"""A letter that was lost is sent again, and its answer counts once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import RunError
from anabranch.server.mailbox import AGAIN_S, ANSWER_LOST_S, LOST_S, ttl_of
from tests.server.stations import REPORT_S, Fate, Watched
from tests.simulations.rig import config

DEADLINE = 60.0
CONNECT = 30.0

fates = st.one_of(
    st.tuples(st.just("answer"), st.sampled_from([0.0, 2.0, 30.0, 59.0, 61.0, 200.0])),
    st.tuples(st.sampled_from(["lost", "lost answer", "dead"]), st.just(0.0)),
    st.tuples(st.sampled_from(["restart", "away"]), st.sampled_from([2.0, 20.0, 100.0])),
    st.tuples(st.just("error"), st.sampled_from([0.0, 2.0, 3.0, 4.0, 5.0, 8.0])),
)
scripts = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.lists(fates, max_size=6), min_size=1, max_size=3
)


def run_of(**federation: object):  # type: ignore[no-untyped-def]
    settings = {"rounds": 1, "weighting": "uniform", "client_evaluation": False, **federation}
    return config(deadline_s=DEADLINE, **settings)  # type: ignore[arg-type]


# Laws


@settings(max_examples=150)
@given(
    scripts=scripts,
    rounds=st.integers(1, 3),
    quorum=st.integers(1, 3),
    buffer=st.sampled_from([None, None, 1, 2]),
    evaluated=st.booleans(),
    reports=st.booleans(),
    names=st.booleans(),
)
def test_whatever_sites_do_the_run_ends_and_every_wait_is_shown(
    scripts: dict[str, list[Fate]],
    rounds: int,
    quorum: int,
    buffer: int | None,
    evaluated: bool,
    reports: bool,
    names: bool,
) -> None:
    quorum = min(quorum, buffer or quorum)
    run = run_of(rounds=rounds, quorum=quorum, buffer=buffer, client_evaluation=evaluated)
    watched = Watched(scripts, run=run, connect_s=CONNECT, reports=reports, names=names)

    try:
        result = watched.run()
    except RunError:
        result = None

    assert watched.time.now <= rounds * (CONNECT + 2 * DEADLINE)
    assert watched.unsaid == []
    assert watched.waits[-1:] in ([], [None])
    if result is not None:
        assert len(result.history) == rounds
        for report in result.history:
            assert len(report.trained) >= quorum
    counts = {site.name: site for site in (s.site for s in watched.stations.values())}
    told = [(e["site"], e["round"]) for e in watched.events.of("site_trained")]
    assert len(told) == len(set(told))  # a delta is counted once
    assert {site for site, _ in told} <= set(counts)


@settings(max_examples=80)
@given(
    scripts=st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.lists(
            st.one_of(
                st.tuples(st.sampled_from(["lost", "lost answer"]), st.just(0.0)),
                st.tuples(st.sampled_from(["restart", "away"]), st.sampled_from([2.0, 20.0])),
                st.tuples(st.just("error"), st.sampled_from([3.0, 4.0, 5.0, 8.0])),
                st.tuples(st.just("answer"), st.sampled_from([0.0, 5.0])),
            ),
            max_size=3,
        ),
        min_size=1,
    ),
    rounds=st.integers(1, 3),
)
def test_what_was_lost_is_asked_again_until_it_is_there_and_changes_nothing(
    scripts: dict[str, list[Fate]], rounds: int
) -> None:
    run = config(rounds=rounds, deadline_s=1000.0, client_evaluation=False, quorum=len(scripts))
    plain = Watched(dict.fromkeys(scripts, ()), run=run).run()
    watched = Watched(scripts, run=run)

    result = watched.run()

    assert watched.value(result) == watched.value(plain)
    assert [r.trained for r in result.history] == [r.trained for r in plain.history]
    assert all(not report.failed for report in result.history)
    assert all(station.computed == rounds for station in watched.stations.values())


# Examples


def times(watched: Watched, site: str, kind: str = "train") -> list[float]:
    """Return when a site was sent messages of a kind."""
    return [at for at, name, what in watched.grid.sent if (name, what) == (site, kind)]


def test_a_lost_message_is_sent_again_once_the_site_says_that_it_is_idle() -> None:
    watched = Watched({"a": [], "b": [("lost", 0.0)]}, run=run_of())
    result = watched.run()

    assert watched.value(result) == 1.5
    first, again = times(watched, "b")
    assert LOST_S < again - first <= LOST_S + 2 * REPORT_S
    assert watched.events.of("site_asked_again") == [
        {
            "kind": "site_asked_again",
            "site": "b",
            "round": 1,
            "asked": "train",
            "reason": "the site says it has nothing to do",
        }
    ]
    assert result.sites["b"].bytes_down == 2 * result.sites["a"].bytes_down
    assert len(times(watched, "a")) == 1


def test_a_lost_answer_is_asked_for_again_and_was_trained_once() -> None:
    watched = Watched({"a": [("lost answer", 0.0)]}, run=run_of())
    result = watched.run()

    assert watched.value(result) == 1.0
    first, again = times(watched, "a")
    assert ANSWER_LOST_S < again - first <= ANSWER_LOST_S + 2 * REPORT_S
    assert watched.stations["a"].computed == 1


def test_a_site_that_was_started_anew_in_a_round_is_asked_again_at_once() -> None:
    watched = Watched({"a": [], "b": [("restart", 8.0)]}, run=run_of())
    result = watched.run()

    assert watched.value(result) == 1.5
    first, again = times(watched, "b")
    assert again - first <= 8.0 + 2 * REPORT_S
    assert watched.events.of("site_asked_again")[0]["reason"] == "the site was started anew"


def test_a_node_that_was_unavailable_is_asked_again_when_it_is_back() -> None:
    watched = Watched({"a": [], "b": [("away", 25.0)]}, run=run_of())
    result = watched.run()

    assert watched.value(result) == 1.5
    assert [at > 25.0 for at in times(watched, "b")] == [False, True]
    assert result.history[0].failed == {}


def test_a_node_that_is_not_back_by_the_deadline_has_missed_it() -> None:
    watched = Watched({"a": [], "b": [("away", 500.0)]}, run=run_of())
    result = watched.run()

    assert watched.value(result) == 1.0
    assert result.history[0].failed["b"].message == "no answer within 60 s"
    assert watched.time.now <= 2.0 + DEADLINE


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_what_flower_lost_is_asked_again_and_no_more_often_than_it_may(code: int) -> None:
    watched = Watched({"a": [("error", float(code))] * 4}, run=run_of())
    result = watched.run()

    assert watched.value(result) == 1.0
    sent = times(watched, "a")
    assert len(sent) == 5
    assert all(later - earlier >= AGAIN_S for earlier, later in pairwise(sent))


@pytest.mark.parametrize("code", [0, 1, 2, 6, 7])
def test_what_flower_says_of_the_app_is_the_answer(code: int) -> None:
    watched = Watched({"a": [("error", float(code))], "b": []}, run=run_of())
    result = watched.run()

    assert result.history[0].failed["a"].reason == "flower"
    assert len(times(watched, "a")) == 1


def test_without_reports_nothing_is_asked_twice() -> None:
    watched = Watched({"a": [("error", 5.0)], "b": []}, run=run_of(), reports=False)
    result = watched.run()

    assert result.history[0].failed["a"].message == "Flower error 5: the node is unavailable"
    assert len(times(watched, "a")) == 1


def test_a_late_answer_to_the_first_copy_is_taken_and_the_second_is_dropped() -> None:
    watched = Watched({"a": [("answer", 20.0)], "b": [("answer", 25.0)]}, run=run_of(rounds=2))
    watched.stations["a"].report = lambda now: idle(now)  # type: ignore[method-assign]
    result = watched.run()

    assert len(times(watched, "a")) >= 3  # it says that it is idle while it trains
    assert [sorted(r.trained) for r in result.history] == [["a", "b"], ["a", "b"]]
    assert watched.value(result) == 3.0
    assert result.sites["a"].late == 0


def idle(now: float):  # type: ignore[no-untyped-def]
    from anabranch.protocols.identity.join import Report

    return Report(boot="0" * 64, activity="idle", since=0.0)


def test_a_lost_letter_that_nobody_waits_for_leaves_its_site_free() -> None:
    watched = Watched({"a": [], "b": [("restart", 70.0)]}, run=run_of(rounds=3))
    result = watched.run()

    assert [sorted(r.trained) for r in result.history[:1]] == [["a"]]
    slow = Watched(
        {"a": [("answer", 0.0), ("answer", 30.0)], "b": [("restart", 65.0)]}, run=run_of(rounds=3)
    )
    assert "b" in slow.run().history[2].trained  # long before its message expires


def test_a_message_lives_twice_as_long_as_it_is_waited_for() -> None:
    assert ttl_of(3600.0) == 7200.0
    assert ttl_of(1.0) == 60.0
    lived: list[float] = []
    watched = Watched({"a": []}, run=run_of(), connect_s=100.0)
    push = watched.grid.push_messages

    def noted(messages):  # type: ignore[no-untyped-def]
        messages = list(messages)
        lived.extend(message.metadata.ttl for message in messages)
        return push(messages)

    watched.grid.push_messages = noted  # type: ignore[method-assign]
    watched.run()

    assert lived == [200.0, 120.0]


def test_a_message_that_flower_does_not_take_is_sent_until_it_does() -> None:
    watched = Watched({"a": [], "b": []}, run=run_of())
    push, refused = watched.grid.push_messages, [0]

    def full(messages):  # type: ignore[no-untyped-def]
        messages = list(messages)
        if messages[0].metadata.message_type == "train" and refused[0] < 2:
            refused[0] += 1
            return ["" for _ in messages]
        return push(messages)

    watched.grid.push_messages = full  # type: ignore[method-assign]
    result = watched.run()

    assert refused == [2]
    assert watched.value(result) == 1.5
