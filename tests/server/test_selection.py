"""Who is asked: over-selection and tiers, as draws and in rounds of toy sites."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.tables import Federation as TableOfRounds
from anabranch.server.selection import Latencies, asked_for, draw, draw_tier, tiers
from anabranch.server.series import aggregation_of
from tests.privacy_cases import client_config
from tests.simulations.federation import POLL_S, Federation, arrays_of, value
from tests.simulations.rig import NEVER, ToySite, config

NAMES = [f"site-{i}" for i in range(12)]
SITES = [ToySite(name, 10, step=float(i)) for i, name in enumerate("abcd")]
EVERYTHING: dict[str, Any] = {"rounds": 1, "cohort": 2, "over_selection": 1.0, "holdout": 0.0}


# Laws


@given(
    size=st.integers(1, 12), less=st.integers(0, 6), more=st.integers(0, 6), seed=st.integers(0, 99)
)
def test_who_is_drawn_stays_drawn_when_more_are(size: int, less: int, more: int, seed: int) -> None:
    few = draw(NAMES, size, less, np.random.default_rng(seed))
    many = draw(NAMES, size, less + more, np.random.default_rng(seed))

    assert set(few) <= set(many)
    assert len(many) == min(12, size + less + more)
    assert many == sorted(many, key=NAMES.index)


@given(
    seconds=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5).map(float)),
    count=st.integers(2, 5),
    least=st.integers(1, 13),
)
def test_tiers_are_sorted_equal_in_size_and_large_enough(
    seconds: dict[str, float], count: int, least: int
) -> None:
    found = tiers(seconds, count, least)

    assert sorted(name for tier in found for name in tier) == sorted(seconds)
    assert len(found) <= count
    assert max(map(len, found), default=0) - min(map(len, found), default=0) <= 1
    if len(found) > 1:
        assert min(map(len, found)) >= least
    for fast, slow in pairwise(found):
        assert max(seconds[n] for n in fast) <= min(seconds[n] for n in slow)


def test_every_site_has_the_same_chance_whatever_its_speed() -> None:
    groups = [NAMES[:5], NAMES[5:9], NAMES[9:]]  # the last is smaller than the cohort
    counts = dict.fromkeys(NAMES, 0)
    for seed in range(6000):
        for name in draw_tier(NAMES, groups, 3, np.random.default_rng(seed)):
            counts[name] += 1

    expected = 6000 * 3 / 12
    assert all(abs(count - expected) < 4.5 * np.sqrt(expected) for count in counts.values())


@settings(max_examples=15, deadline=None)
@given(delays=st.lists(st.integers(0, 50).map(float), min_size=4, max_size=4, unique=True))
def test_the_first_two_of_four_count_and_are_merged_in_the_order_of_names(
    delays: list[float],
) -> None:
    by_name: dict[str, Any] = dict(zip("abcd", delays, strict=True))
    result = Federation(SITES, run=config(**EVERYTHING), delays=by_name).run()
    first = sorted(sorted(by_name, key=lambda name: by_name[name])[:2])

    assert sorted(result.history[0].trained) == first
    alone = Federation(
        [site for site in SITES if site.name in first], run=config(rounds=1, holdout=0.0)
    )
    assert arrays_of(result) == arrays_of(alone.run())


# Examples


def test_as_many_are_asked_as_the_share_says() -> None:
    assert [asked_for(10, o) for o in (0.0, 0.1, 0.3, 0.31, 1.0)] == [10, 11, 13, 14, 20]


def test_who_comes_too_late_is_late_and_dropped_and_may_be_asked_again() -> None:
    run = config(rounds=2, cohort=2, over_selection=0.5, holdout=0.0)
    federation = Federation(SITES[:3], run=run, delays={"b": 1.5, "c": [2.5, 9.0]})
    result = federation.run()

    first = result.history[0]
    assert first.asked == ("a", "b", "c")
    assert (first.failed["c"].reason, first.failed["c"].message) == (
        "surplus",
        "2 deltas were there before its own",
    )
    row = result.sites["c"]
    assert (row.rounds, row.failures, row.late) == (0, 0, 1)
    assert [event["site"] for event in federation.events.of("site_surplus")] == ["c"]
    assert value(result) == 1.0  # twice the mean of 0 and 1


def test_answers_beyond_the_cohort_that_come_together_are_dropped_in_the_order_of_arrival() -> None:
    federation = Federation(SITES, run=config(**EVERYTHING))
    result = federation.run()

    assert sorted(result.history[0].trained) == ["a", "b"]
    assert {name: f.reason for name, f in result.history[0].failed.items()} == {
        "c": "surplus",
        "d": "surplus",
    }
    assert [result.sites[name].late for name in "abcd"] == [0, 0, 1, 1]


def test_a_failure_is_made_good_by_the_next_in_line() -> None:
    delays: dict[str, Any] = {"a": NEVER, "b": 1.0, "c": NEVER, "d": 5.0}
    federation = Federation(SITES, run=config(**EVERYTHING), delays=delays)
    result = federation.run()

    assert sorted(result.history[0].trained) == ["b", "d"]
    assert federation.time.now <= 5 + 2 * POLL_S


def test_with_too_few_answers_a_round_ends_at_its_deadline() -> None:
    delays: dict[str, Any] = dict.fromkeys("abc", NEVER) | {"d": 5.0}
    result = Federation(SITES, run=config(**EVERYTHING), delays=delays).run()
    assert {f.reason for f in result.history[0].failed.values()} == {"deadline"}

    with pytest.raises(RunError, match="1 of 4 sites sent a delta that counts"):
        Federation(SITES, run=config(quorum=2, **EVERYTHING), delays=delays).run()


def test_latencies_are_means_of_what_was_measured() -> None:
    latencies = Latencies()
    for site, seconds in (("a", 1.0), ("a", 4.0), ("b", 9.0)):
        latencies.take(site, seconds)

    assert latencies.means(["a", "b", "c"]) == {"a": 2.5, "b": 9.0}


def test_a_silent_site_is_in_the_slowest_tier() -> None:
    run = config(rounds=12, cohort=2, tiers=2, holdout=0.0, deadline_s=20.0)
    delays: dict[str, float | list[float]] = {"a": 1.0, "b": [21.0, 2.0], "c": 3.0, "d": 4.0}
    result = Federation(SITES, run=run, delays=delays).run()
    measured: set[str] = set()
    for report in result.history:
        if len(measured) == 4 and "b" in report.asked:
            assert "a" not in report.asked  # the fastest; b counts as 20 s or more at first
        measured |= set(report.asked)
    assert measured == set("abcd")


# Refusals


@pytest.mark.parametrize("field", [{"over_selection": 0.3}, {"tiers": 3}])
def test_speed_decides_only_where_it_may(field: dict[str, Any]) -> None:
    name = next(iter(field))
    with pytest.raises(ConfigError, match=f"federation.{name} needs federation.cohort"):
        config(**field)
    with pytest.raises(ConfigError, match=f"federation.{name} does not go with federation.buffer"):
        config(cohort=4, buffer=2, **field)


@pytest.mark.parametrize("field", [{"over_selection": 0.3}, {"tiers": 3}])
def test_a_private_cohort_stays_a_poisson_sample(field: dict[str, Any]) -> None:
    federation = TableOfRounds(rounds=100, cohort=100, weighting="uniform", **field)
    with pytest.raises(ConfigError, match=f"does not go with federation.{next(iter(field))}"):
        client_config(federation=federation)


def test_the_report_says_who_counts() -> None:
    def merged(**fields: Any) -> str:
        return aggregation_of(config(cohort=4, **fields))["merged"]

    assert merged() == "every round's cohort"
    assert merged(over_selection=0.3) == "the first 4 deltas, 30% more asked"
    assert merged(tiers=2) == "every round's cohort, drawn from 2 tiers of equal speed"
    assert merged(buffer=2) == "as soon as 2 deltas are there"
