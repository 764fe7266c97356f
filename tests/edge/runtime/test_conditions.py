from __future__ import annotations

from datetime import datetime, time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.edge.runtime.conditions import (
    Network,
    Readings,
    in_window,
    only_network,
    unmet,
    without_network,
)
from anabranch.edge.runtime.device_file import Conditions

GOOD: dict[str, Any] = {
    "battery": 0.9,
    "charging": True,
    "temperature_c": 30.0,
    "network": Network.unmetered,
    "idle": True,
    "local": datetime(2026, 1, 1, 23, 0),
}


def reasons(conditions: Conditions | None = None, **changes: Any) -> list[str]:
    return [str(one) for one in unmet(conditions or Conditions(), Readings(**(GOOD | changes)))]


minutes = st.integers(0, 24 * 60 - 1).map(lambda m: time(m // 60, m % 60))
windows = st.tuples(minutes, minutes).map(lambda w: f"{w[0]:%H:%M}-{w[1]:%H:%M}")


@given(minutes, minutes, minutes)
def test_a_window_and_its_complement_split_the_day(now: time, a: time, b: time) -> None:
    if a == b:
        assert in_window(now, f"{a:%H:%M}-{b:%H:%M}")
    else:
        there = in_window(now, f"{a:%H:%M}-{b:%H:%M}")
        assert there != in_window(now, f"{b:%H:%M}-{a:%H:%M}")


@given(minutes, st.lists(windows, min_size=1, max_size=4))
def test_windows_are_a_union(now: time, several: list[str]) -> None:
    conditions = Conditions(windows=tuple(several))
    local = datetime.combine(datetime(2026, 1, 1), now)
    held = reasons(conditions, local=local) == []
    assert held == any(in_window(now, one) for one in several)


@pytest.mark.parametrize(
    ("now", "inside"),
    [("21:59", False), ("22:00", True), ("23:59", True), ("00:00", True), ("05:59", True),
     ("06:00", False), ("12:00", False)],
)  # fmt: skip
def test_a_window_passes_midnight(now: str, inside: bool) -> None:
    assert in_window(time.fromisoformat(now), "22:00-06:00") == inside


def test_all_conditions_hold() -> None:
    assert reasons() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"charging": False}, "not charging"),
        ({"charging": None}, "not charging"),
        ({"network": Network.metered}, "the network is metered"),
        ({"network": None}, "the network is unknown, which counts as metered"),
        ({"network": Network.offline}, "offline"),
        ({"idle": False}, "in use"),
        ({"idle": None}, "not known to be idle"),
        ({"battery": 0.29}, "battery at 29%, at least 30% needed"),
        ({"temperature_c": 42.6}, "43 °C, at most 42 °C allowed"),
        ({"temperature_c": None}, "temperature unknown, which counts as too hot"),
    ],
)
def test_each_condition_that_does_not_hold_is_named(change: dict[str, Any], reason: str) -> None:
    assert reasons(**change) == [reason]


def test_a_window_that_is_not_now_is_named() -> None:
    found = reasons(Conditions(windows=("01:00-05:00", "12:00-13:00")))
    assert found == ["23:00 is outside 01:00-05:00, 12:00-13:00"]


def test_a_board_without_a_battery_counts_as_charging() -> None:
    assert reasons(charging=None, battery=None) == []
    assert reasons(charging=False, battery=None) == ["not charging"]


def test_what_is_not_asked_for_is_not_looked_at() -> None:
    lax = Conditions(
        charging=False, unmetered=False, idle=False, min_battery=0, max_temperature_c=150.0
    )
    nothing = {"charging": None, "temperature_c": None, "network": None, "idle": None}
    assert reasons(lax, battery=0.01, **nothing) == []
    assert reasons(msgspec.structs.replace(lax, max_temperature_c=None), **nothing) == []


def test_offline_is_unmet_whatever_is_asked() -> None:
    assert reasons(Conditions(unmetered=False), network=Network.offline) == ["offline"]


def test_training_needs_no_network_and_sending_nothing_else() -> None:
    found = unmet(Conditions(), Readings(**(GOOD | {"charging": False, "network": None})))
    assert [one.what for one in without_network(found)] == ["charging"]
    assert [one.what for one in only_network(found)] == ["network"]
