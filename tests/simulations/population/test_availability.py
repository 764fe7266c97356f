"""Availability: the same laws for what is drawn and for what a trace says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.population.availability import (
    DAY,
    HOUR,
    AlwaysOnline,
    Habit,
    Habits,
    PhoneLaw,
    Synthetic,
)
from anabranch.simulations.population.devices import Availability
from anabranch.simulations.population.intervals import Traced

TIMES = st.floats(0, 60 * DAY)
CLIENTS = 12


def habits(
    habit: Habit = Habit.PHONE,
    n: int = CLIENTS,
    *,
    offset: float = 0.0,
    needs_charging: bool = True,
    threshold: float = 0.3,
) -> Habits:
    return Habits(
        habit=np.full(n, habit, np.int8),
        utc_offset_h=np.full(n, offset),
        opens=np.full(n, 8.0),
        closes=np.full(n, 18.0),
        needs_charging=np.full(n, needs_charging),
        battery_threshold=np.full(n, threshold),
    )


def mixed(seed: int = 0) -> Synthetic:
    kinds = np.arange(CLIENTS) % 3
    offsets = np.linspace(-11, 13, CLIENTS)
    return Synthetic(
        Habits(
            habit=kinds.astype(np.int8),
            utc_offset_h=offsets,
            opens=np.full(CLIENTS, 8.0),
            closes=np.full(CLIENTS, 24.0),
            needs_charging=np.arange(CLIENTS) % 2 == 0,
            battery_threshold=np.full(CLIENTS, 0.4),
        ),
        seed=seed,
        start_hour_utc=5.5,
    )


def traced(spans: list[list[tuple[float, float]]], period: float = 0.0) -> Traced:
    start = np.concatenate([[0], np.cumsum([len(s) for s in spans])]).astype(np.int64)
    flat = np.array([span for s in spans for span in s], np.float64).reshape(-1, 2)
    return Traced(start, flat[:, 0], flat[:, 1], np.full(len(spans), period))


@st.composite
def traces(draw: st.DrawFn) -> Traced:
    """Return a trace whose intervals lie apart, repeating or not."""
    period = draw(st.sampled_from([0.0, 100.0, 1000.1, 86400.0]))
    spans: list[list[tuple[float, float]]] = []
    for _ in range(CLIENTS):
        places = draw(st.sets(st.integers(0, int(64 * (period or 5000.0))), max_size=8))
        edges = [place / 64 for place in sorted(places)]
        pairs = zip(edges[::2], edges[1::2], strict=False)
        spans.append([(a, b) for a, b in pairs if a < b <= (period or math.inf)])
    return traced(spans, period)


def obeys(availability: Availability, client: int, at: float) -> None:
    """Check the laws of the protocol for one client at one time."""
    everyone = np.arange(CLIENTS)
    online = bool(availability.online(np.array([client]), at)[0])
    until, coming = availability.online_until(client, at), availability.next_online(client, at)
    change = availability.next_change(at)

    assert online == bool(availability.online(everyone, at)[client])
    assert (until > at) == online
    assert (coming == at) == online
    assert coming >= at
    assert change > at
    if online:
        assert change <= until
        if math.isfinite(until):
            assert not availability.online(np.array([client]), until)[0]
            inside = at + 0.9 * (until - at)
            assert availability.online_until(client, inside) == until or inside == until
    else:
        assert until == at
        assert change <= coming
        if math.isfinite(coming):
            assert availability.online(np.array([client]), coming)[0]
            assert availability.next_online(client, at + 0.5 * (coming - at)) == coming
    if math.isfinite(change):
        before = at + 0.5 * (change - at)
        now = availability.online(everyone, at)
        if before < change:  # else no number lies between
            assert (availability.online(everyone, before) == now).all()
        assert (availability.online(everyone, change) != now).any()


@given(at=TIMES, client=st.integers(0, CLIENTS - 1), seed=st.integers(0, 100))
def test_drawn_availability_obeys_the_laws(at: float, client: int, seed: int) -> None:
    obeys(mixed(seed), client, at)


@given(trace=traces(), at=st.floats(0, 1e5), client=st.integers(0, CLIENTS - 1))
def test_traced_availability_obeys_the_laws(trace: Traced, at: float, client: int) -> None:
    obeys(trace, client, at)


@given(trace=traces(), client=st.integers(0, CLIENTS - 1))
def test_the_laws_hold_at_every_change_of_a_trace(trace: Traced, client: int) -> None:
    at = 0.0
    for _ in range(20):
        obeys(trace, client, at)
        at = trace.next_change(at)
        if math.isinf(at):
            break


@given(client=st.integers(0, CLIENTS - 1), cycle=st.integers(-2, 400), seed=st.integers(0, 50))
def test_the_windows_of_a_cycle_are_ascending_and_disjoint(
    client: int, cycle: int, seed: int
) -> None:
    begin, end = mixed(seed).windows(np.array([client]), np.array([cycle]))
    there = np.isfinite(begin[0])
    begins, ends = begin[0][there], end[0][there]

    assert (begins < ends).all()
    assert (ends[:-1] <= begins[1:]).all()
    assert (ends - begins[0] <= DAY).all() if len(begins) else True


@given(at=TIMES)
def test_what_is_asked_first_makes_no_difference(at: float) -> None:
    fresh, used = mixed(3), mixed(3)
    for client in range(CLIENTS):
        used.next_online(client, 1e6)
    everyone = np.arange(CLIENTS)

    assert (fresh.online(everyone, at) == used.online(everyone, at)).all()
    backwards = used.online(everyone[::-1].copy(), at)[::-1]
    assert (fresh.online(everyone, at) == backwards).all()


def test_other_seeds_and_other_days_are_drawn_anew() -> None:
    many = habits(n=500)
    everyone, noon = np.arange(500), 12 * HOUR
    one, other = Synthetic(many, seed=1), Synthetic(many, seed=2)

    assert (one.online(everyone, noon) != other.online(everyone, noon)).any()
    assert (one.online(everyone, noon) != one.online(everyone, noon + DAY)).any()


def test_four_times_as_many_phones_of_a_time_zone_are_online_at_night() -> None:
    """Bonawitz et al. 2019: "a 4x difference ... over a 24 hours period"."""
    phones = Synthetic(habits(n=4000), seed=0)
    everyone = np.arange(4000)
    hours = [(DAY * 2 + (h + 0.5) * HOUR) for h in range(24)]
    shares = np.array([phones.online(everyone, at).mean() for at in hours])

    assert 3.2 < shares.max() / shares.min() < 5.0
    assert shares.argmax() in (0, 1, 2, 3, 4)  # local time is UTC here
    assert shares.argmin() in range(9, 20)


def test_a_time_zone_shifts_the_day() -> None:
    here, there = Synthetic(habits(n=50), seed=4), Synthetic(habits(n=50, offset=5.5), seed=4)
    everyone = np.arange(50)
    for hour in range(0, 48, 3):
        at = DAY + hour * HOUR
        assert (here.online(everyone, at) == there.online(everyone, at - 5.5 * HOUR)).all()


def test_phones_that_need_no_charger_are_online_more_and_less_with_a_high_threshold() -> None:
    everyone, times = np.arange(800), [DAY + h * HOUR for h in range(24)]

    def share(**options: object) -> float:
        phones = Synthetic(habits(n=800, **options), seed=5)  # type: ignore[arg-type]
        return float(np.mean([phones.online(everyone, at).mean() for at in times]))

    charged = share(needs_charging=True)
    low, high = (share(needs_charging=False, threshold=t) for t in (0.2, 0.8))
    assert charged < high < low
    assert share(needs_charging=False, threshold=1.0) == pytest.approx(charged, abs=0.01)


def test_a_phone_on_battery_goes_when_the_threshold_is_reached() -> None:
    """Half full in the evening, 0.05 an hour: at a threshold of 0.5 none is online on battery."""
    law = PhoneLaw(night_chance=0.0, charged_chance=0.0, idle_chance=1.0)
    phones = Synthetic(habits(n=100, needs_charging=False, threshold=0.5), seed=6, law=law)
    everyone = np.arange(100)

    assert not any(phones.online(everyone, h * HOUR).any() for h in range(48))


def test_hours_are_weekdays_from_opening_to_closing_local_time() -> None:
    office = Synthetic(habits(Habit.HOURS, n=1, offset=1.0), seed=0)
    monday_open = 7 * HOUR  # 8:00 in UTC + 1

    assert office.next_online(0, 0.0) == monday_open
    assert office.online_until(0, monday_open) == monday_open + 10 * HOUR
    friday_close = 4 * DAY + 17 * HOUR
    assert office.next_online(0, friday_close) == 7 * DAY + 7 * HOUR
    assert office.next_change(monday_open) == monday_open + 10 * HOUR


def test_the_run_begins_at_its_start_hour() -> None:
    office = Synthetic(habits(Habit.HOURS, n=1), seed=0, start_hour_utc=6.0)

    assert office.next_online(0, 0.0) == 2 * HOUR


@given(at=TIMES)
def test_who_is_always_online_never_changes(at: float) -> None:
    for one in (AlwaysOnline(), Synthetic(habits(Habit.ALWAYS), seed=0)):
        assert one.online(np.arange(CLIENTS), at).all()
        assert one.online_until(3, at) == one.next_change(at) == math.inf
        assert one.next_online(3, at) == at


def test_a_trace_by_hand() -> None:
    trace = traced([[(10.0, 20.0), (30.0, 40.0)], [], [(0.0, 5.0)]])
    everyone = np.arange(3)

    assert trace.online(everyone, 0.0).tolist() == [False, False, True]
    assert trace.online(everyone, 10.0).tolist() == [True, False, False]
    assert trace.online(everyone, 20.0).tolist() == [False, False, False]
    assert trace.online_until(0, 12.0) == 20.0
    assert trace.next_online(0, 20.0) == 30.0
    assert trace.next_online(0, 40.0) == math.inf
    assert trace.next_online(1, 0.0) == math.inf
    assert [trace.next_change(t) for t in (0.0, 5.0, 30.0, 40.0)] == [5.0, 10.0, 40.0, math.inf]


def test_a_trace_that_repeats_joins_its_end_to_its_beginning() -> None:
    trace = traced([[(0.0, 10.0), (90.0, 100.0)], [(0.0, 100.0)]], period=100.0)

    assert trace.online_until(0, 95.0) == 110.0
    assert trace.online_until(0, 205.0) == 210.0
    assert trace.next_online(0, 215.0) == 290.0
    assert trace.online_until(1, 55.0) == math.inf
    assert trace.next_change(95.0) == 110.0


def test_traces_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected 0 <= begin < end <= period"):
        traced([[(5.0, 5.0)]])
    with pytest.raises(ConfigError, match="expected 0 <= begin < end <= period"):
        traced([[(5.0, 11.0)]], period=10.0)
    with pytest.raises(ConfigError, match="intervals of device 1 overlap or touch"):
        traced([[], [(0.0, 5.0), (5.0, 6.0)]])
    with pytest.raises(ConfigError, match="opening hours 8 to 7"):
        Habits(
            habit=np.array([Habit.HOURS], np.int8),
            utc_offset_h=np.zeros(1),
            opens=np.full(1, 8.0),
            closes=np.full(1, 7.0),
            needs_charging=np.ones(1, np.bool_),
            battery_threshold=np.zeros(1),
        )
