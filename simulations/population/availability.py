"""When devices are online: always, by opening hours, or as phones are (traces: intervals.py).

Virtual time is seconds since t = 0, a Monday at `start_hour_utc` UTC. Windows are half-open.

A phone, one cycle from 19:00 to 19:00 local time after the other; the whole rhythm of each
phone is shifted by up to 1.5 h:

    night       it is plugged in at s, unplugged at e, unless it is forgotten that night
    evening     [19:00, s) and
    day         [e, 19:00), cut into four slots: in each of them it may lie idle for a while, and
                may be charged while it does
    battery     half full in the evening; full when unplugged, half full after a night without a
                charger; falls by `drain` an hour, rises by `charge` an hour while charged
    online      idle, on Wi-Fi, and charged; with needs_charging = false a phone that is not
                charged is online, too, while its battery is above the threshold

The rule "idle, charging, on an unmetered network" is that of Bonawitz et al. 2019
(arXiv:1902.01046) and of Yang et al. 2021 (arXiv:2006.06983). The hours and chances are
assumptions, chosen so that about four times as many phones of one time zone are online at the
best hour as at the worst: "a 4x difference between low and high numbers of participating
devices over a 24 hours period" (Bonawitz et al.).

Every number is drawn from (seed, client, cycle, purpose) by a counter-based hash (SplitMix64's
finaliser): nothing is kept, any moment can be asked for in any order, and the memory does not
grow with time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.population.devices import Flags, Floats, Ints

HOUR: Final = 3600.0
DAY: Final = 24 * HOUR
PLUGGED_FROM: Final = 19.0  # local hour at which a phone's cycle begins
SLOTS: Final = 4  # of a phone's day
MOST_WINDOWS: Final = 2 + SLOTS  # in a cycle
MOST_CYCLES: Final = 366  # that next_online looks ahead


class Habit(IntEnum):
    """What decides when a device is online."""

    ALWAYS = 0
    HOURS = 1  # weekdays, from `opens` to `closes` local time
    PHONE = 2


@dataclass(frozen=True, kw_only=True)
class PhoneLaw:
    """Chances and hours of a phone's cycle; all are assumptions (see the module)."""

    rhythm: float = 1.5  # hours that a phone's cycle is shifted at most, uniform
    plugged_mean: float = 23.0  # local hour of plugging in, triangular ± 2 h
    plugged_width: float = 2.0
    night_mean: float = 7.5  # hours on the charger, triangular ± 2 h
    night_width: float = 2.0
    night_chance: float = 0.72  # plugged in at night, at home, on Wi-Fi
    idle_chance: float = 0.8  # per slot of day and evening: lies idle, on Wi-Fi
    charged_chance: float = 0.38  # of those: on a charger, too
    idle_least: float = 0.35  # share of the slot that it lies idle
    idle_most: float = 0.95
    jitter: float = 0.8  # of the cuts between the day's slots, as a share of a slot
    drain: float = 0.05  # share of the battery per hour
    charge: float = 0.5


@dataclass(frozen=True, eq=False, kw_only=True)
class Habits:
    """The habit of each of N devices, and what it depends on; raises ConfigError if not so.

    opens and closes are local hours in [0, 24], opens < closes; a battery_threshold is in [0, 1].
    """

    habit: NDArray[np.int8]
    utc_offset_h: Floats
    opens: Floats
    closes: Floats
    needs_charging: Flags
    battery_threshold: Floats

    def __post_init__(self) -> None:
        hours = self.habit == Habit.HOURS
        bad = hours & ~((self.opens >= 0) & (self.opens < self.closes) & (self.closes <= 24))
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise ConfigError(
                f"devices: opening hours {self.opens[at]:g} to {self.closes[at]:g}, expected "
                "0 <= opens < closes <= 24 (local time)"
            )

    def __len__(self) -> int:
        return len(self.habit)


class AlwaysOnline:
    """Every client is online at all times."""

    def online(self, clients: Ints, at: float) -> Flags:
        """Return True for all."""
        return np.ones(len(clients), np.bool_)

    def online_until(self, client: int, at: float) -> float:
        """Return infinity."""
        return math.inf

    def next_online(self, client: int, at: float) -> float:
        """Return `at`."""
        return at

    def next_change(self, at: float) -> float:
        """Return infinity."""
        return math.inf


class Synthetic:
    """Availability by habit, drawn when asked for; see the module for the law."""

    def __init__(
        self, habits: Habits, *, seed: int, start_hour_utc: float = 0.0, law: PhoneLaw | None = None
    ) -> None:
        self._habits, self._seed, self._law = habits, seed, law or PhoneLaw()
        # Local seconds since the Monday midnight before t = 0, at t = 0.
        self._zero = (start_hour_utc + habits.utc_offset_h) * HOUR
        clients = np.arange(len(habits))
        shift = _Draws(seed, clients, np.full_like(clients, -1)).between(-1.0, 1.0)
        begins = (PLUGGED_FROM + self._law.rhythm * shift) * HOUR
        self._anchor = np.where(habits.habit == Habit.PHONE, begins, 0.0)

    def online(self, clients: Ints, at: float) -> Flags:
        """Return which of `clients` are online."""
        begin, end = self.windows(clients, self._cycle(clients, at))
        inside: Flags = (begin <= at) & (at < end)
        now: Flags = np.logical_or(inside.any(axis=1), self._habits.habit[clients] == Habit.ALWAYS)
        return now

    def online_until(self, client: int, at: float) -> float:
        """Return the end of the present window; `at` itself if the client is offline."""
        if self._habits.habit[client] == Habit.ALWAYS:
            return math.inf
        one = np.array([client])
        begin, end = self.windows(one, self._cycle(one, at))
        now = (begin <= at) & (at < end)
        return float(end[now][0]) if now.any() else at

    def next_online(self, client: int, at: float) -> float:
        """Return the first time >= `at` at which the client is online.

        Infinity if there is none within a year of cycles.
        """
        if self._habits.habit[client] == Habit.ALWAYS:
            return at
        one = np.array([client])
        first = self._cycle(one, at)
        for ahead in range(MOST_CYCLES):
            begin, end = self.windows(one, first + ahead)
            coming = np.maximum(begin[end > at], at)
            if len(coming):
                return float(coming.min())
        return math.inf

    def next_change(self, at: float) -> float:
        """Return the first time > `at` at which any client comes or goes; infinity if never."""
        clients = np.flatnonzero(self._habits.habit != Habit.ALWAYS)
        if not len(clients):
            return math.inf
        # Cycles begin at another time for each client: whose next one begins before the first
        # change that was found may have an earlier one in it.
        cycle, found = self._cycle(clients, at), math.inf
        for _ in range(MOST_CYCLES):
            edges = np.concatenate(self.windows(clients, cycle))
            found = min(
                found, float(edges[(edges > at) & np.isfinite(edges)].min(initial=math.inf))
            )
            cycle = cycle + 1
            early = cycle * DAY + self._anchor[clients] - self._zero[clients] < found
            clients, cycle = clients[early], cycle[early]
            if not len(clients):
                break
        return found

    def windows(self, clients: Ints, cycle: Ints) -> tuple[Floats, Floats]:
        """Return begin and end of each client's windows in its `cycle`, (n, MOST_WINDOWS) each.

        In seconds of virtual time, ascending and disjoint in a row; a window that is not
        there is [inf, -inf). Clients that are always online have none.
        """
        habit = self._habits.habit[clients]
        begin = np.full((len(clients), MOST_WINDOWS), math.inf)
        end = np.full((len(clients), MOST_WINDOWS), -math.inf)
        base = cycle * DAY + self._anchor[clients] - self._zero[clients]
        hours = (habit == Habit.HOURS) & (cycle % 7 < 5)
        begin[hours, 0] = base[hours] + self._habits.opens[clients][hours] * HOUR
        end[hours, 0] = base[hours] + self._habits.closes[clients][hours] * HOUR
        phone = habit == Habit.PHONE
        if phone.any():
            begins, ends = self._phone(clients[phone], cycle[phone])
            begin[phone] = base[phone, None] + begins * HOUR
            end[phone] = base[phone, None] + ends * HOUR
        return begin, end

    def _cycle(self, clients: Ints, at: float) -> Ints:
        """Return the cycle that each client is in; exact at its edges."""
        cycle = np.floor((at + self._zero[clients] - self._anchor[clients]) / DAY).astype(np.int64)
        base = cycle * DAY + self._anchor[clients] - self._zero[clients]
        return cycle - (base > at) + (base + DAY <= at)

    def _phone(self, clients: Ints, cycle: Ints) -> tuple[Floats, Floats]:
        """Return begin and end in hours since 19:00 local time, (n, MOST_WINDOWS)."""
        law, n = self._law, len(clients)
        draw = _Draws(self._seed, clients, cycle)
        begin = np.full((n, MOST_WINDOWS), math.inf)
        end = np.full((n, MOST_WINDOWS), -math.inf)
        plugged = law.plugged_mean - PLUGGED_FROM + law.plugged_width * draw.triangular()
        unplugged = plugged + law.night_mean + law.night_width * draw.triangular()
        night = draw.chance(law.night_chance)
        begin[night, 1], end[night, 1] = plugged[night], unplugged[night]
        low = np.where(night, plugged, 4.0)  # a phone without a night is put away at 23:00
        up = np.where(night, unplugged, 12.0)  # and taken at 7:00
        self._slot(draw, clients, (np.zeros(n), low), np.full(n, 0.5), (begin[:, 0], end[:, 0]))
        level, slot, from_ = np.where(night, 1.0, 0.5), (24.0 - up) / SLOTS, up
        for j in range(SLOTS):
            cut = up + slot * (j + 1 + law.jitter * draw.between(-0.5, 0.5))
            to = cut if j < SLOTS - 1 else np.full(n, 24.0)
            edges = (begin[:, 2 + j], end[:, 2 + j])
            level, from_ = self._slot(draw, clients, (from_, to), level, edges), to
        return begin, end

    def _slot(
        self,
        draw: _Draws,
        clients: Ints,
        span: tuple[Floats, Floats],
        level: Floats,
        window: tuple[Floats, Floats],
    ) -> Floats:
        """Write the window of one slot, `span` in hours; return the battery at its end.

        Out of the idle time the battery falls; while the phone lies idle and is charged it rises.
        """
        law, lasting = self._law, span[1] - span[0]
        length = lasting * draw.between(law.idle_least, law.idle_most)
        start = span[0] + draw.between(0.0, 1.0) * (lasting - length)
        idle, charged = draw.chance(law.idle_chance), draw.chance(law.charged_chance)
        level = np.maximum(level - law.drain * (start - span[0]), 0.0)
        spare = (level - self._habits.battery_threshold[clients]) / law.drain
        lasts = np.where(charged, length, np.minimum(length, spare))
        there = idle & (charged | ~self._habits.needs_charging[clients]) & (lasts > 0)
        window[0][there], window[1][there] = start[there], (start + lasts)[there]
        change = np.where(charged & idle, law.charge, -law.drain) * length
        level = np.clip(level + change, 0.0, 1.0)
        left: Floats = np.maximum(level - law.drain * (span[1] - start - length), 0.0)
        return left


class _Draws:
    """A stream of numbers for each (seed, client, cycle); every call is the next purpose."""

    def __init__(self, seed: int, clients: Ints, cycle: Ints) -> None:
        with np.errstate(over="ignore"):
            mixed = _mix(np.uint64(seed % 2**64) + _GOLDEN * clients.astype(np.uint64))
            self._state = _mix(mixed ^ (_GOLDEN * cycle.astype(np.uint64)))
        self._purpose = 0

    def _uniform(self) -> Floats:
        """Return numbers in [0, 1), (n,)."""
        self._purpose += 1
        with np.errstate(over="ignore"):
            bits = _mix(self._state + np.uint64(self._purpose) * _GOLDEN)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def between(self, low: float, high: float) -> Floats:
        """Return numbers in [low, high)."""
        return low + (high - low) * self._uniform()

    def triangular(self) -> Floats:
        """Return numbers in (-1, 1), most likely near 0."""
        return self._uniform() - self._uniform()

    def chance(self, probability: float) -> Flags:
        """Return True with the probability."""
        return self._uniform() < probability


_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's finaliser of each value (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
