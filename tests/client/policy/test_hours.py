"""Hours by the clock on the wall, over midnight, weeks and changes of the clock."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.policy.hours import DAYS, parse_hours
from anabranch.protocols.errors import ConfigError

COPENHAGEN = ZoneInfo("Europe/Copenhagen")
times = st.integers(0, 24 * 60 - 1)
moments = st.integers(1_600_000_000, 2_000_000_000)


def clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


@given(day=st.sampled_from(DAYS), begin=times, end=times, now=moments)
def test_a_window_holds_the_minutes_from_its_begin_for_its_length(
    day: str, begin: int, end: int, now: int
) -> None:
    hours = parse_hours([f"{day} {clock(begin)}-{clock(end)}"], "UTC")
    length = (end - begin) % (24 * 60) or 24 * 60
    monday = 4 * 24 * 60  # 1970-01-05
    since = (now // 60 - monday - DAYS.index(day) * 24 * 60 - begin) % (7 * 24 * 60)

    assert hours.open_at(now) == (since < length)


@given(days=st.lists(st.sampled_from(DAYS), min_size=1), begin=times, end=times, now=moments)
def test_the_next_opening_is_ahead_and_open_and_named_in_the_zone(
    days: list[str], begin: int, end: int, now: int
) -> None:
    hours = parse_hours([f"{','.join(days)} {clock(begin)}-{clock(end)}"], "Asia/Kolkata")
    opens = hours.opens(now)  # no change of the clock there

    assert now < opens.timestamp() <= now + 7 * 86_400
    assert hours.open_at(opens.timestamp())
    assert (opens.hour, opens.minute) == (begin // 60, begin % 60)


@given(now=moments)
def test_no_window_means_always(now: int) -> None:
    assert parse_hours([], "UTC").open_at(now)


@pytest.mark.parametrize(
    ("local", "is_open"),
    [
        ("2026-11-20 19:59", False),  # Friday
        ("2026-11-20 20:00", True),
        ("2026-11-21 05:59", True),  # Saturday morning belongs to Friday
        ("2026-11-21 06:00", False),
        ("2026-11-21 20:00", False),
        ("2026-11-23 05:59", False),  # Monday morning belongs to Sunday
        ("2026-11-23 20:00", True),
    ],
)
def test_working_days_over_midnight(local: str, is_open: bool) -> None:
    hours = parse_hours(["Mon-Fri 20:00-06:00"], "Europe/Copenhagen")
    when = datetime.fromisoformat(local).replace(tzinfo=COPENHAGEN)

    assert hours.open_at(when.timestamp()) is is_open


def test_the_hour_that_comes_twice_is_inside_twice() -> None:
    hours = parse_hours(["Sun 02:00-03:00"], "Europe/Copenhagen")
    first = datetime(2026, 10, 25, 2, 0, tzinfo=COPENHAGEN).timestamp()  # 3:00 becomes 2:00

    inside = [hours.open_at(first + minutes * 60) for minutes in range(-30, 180, 30)]

    assert inside == [False, True, True, True, True, False, False]


def test_the_hour_that_does_not_come_is_never_inside() -> None:
    hours = parse_hours(["Sun 02:00-03:00"], "Europe/Copenhagen")
    before = datetime(2026, 3, 29, 1, 0, tzinfo=COPENHAGEN).timestamp()  # 2:00 becomes 3:00

    assert not any(hours.open_at(before + minutes * 60) for minutes in range(180))


def test_a_night_is_an_hour_shorter_or_longer_when_clocks_change() -> None:
    hours = parse_hours(["Sat 20:00-06:00"], "Europe/Copenhagen")
    for day, length in ((datetime(2026, 3, 28), 9), (datetime(2026, 10, 24), 11)):
        begin = day.replace(hour=20, tzinfo=COPENHAGEN).timestamp()

        assert hours.open_at(begin + timedelta(hours=length).total_seconds() - 1)
        assert not hours.open_at(begin + timedelta(hours=length).total_seconds())


def test_ranges_of_days_may_go_over_the_end_of_the_week() -> None:
    (window,) = parse_hours(["Fri-Mon,Wed 08:00-24:00"], "UTC").windows

    assert window.days == {4, 5, 6, 0, 2}
    assert (window.begin, window.end) == (480, 1440)
    assert parse_hours(["daily 00:00-24:00"], "UTC").windows[0].days == set(range(7))


@pytest.mark.parametrize(
    "text",
    ["Mon 20:00", "Mon 25:00-26:00", "Mon 08:00-24:30", "Mon 08:60-09:00", "Mon 24:00-01:00",
     "monday 08:00-09:00", "Mon- 08:00-09:00", "Mon,, 08:00-09:00", "08:00-09:00", ""],
)  # fmt: skip
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r'hours.open: expected a window such as "Mon-Fri 20'):
        parse_hours([text], "UTC")


@pytest.mark.parametrize("zone", ["Europe/Kobenhavn", "", "../../etc/passwd", "Europe", "\0"])
def test_a_zone_that_is_none_is_refused(zone: str) -> None:
    with pytest.raises(ConfigError, match=r"hours.zone: no time zone"):
        parse_hours([], zone)
