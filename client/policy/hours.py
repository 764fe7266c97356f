"""When a site takes part: "Mon-Fri 20:00-06:00", by the clock on its wall.

    window   DAYS HH:MM-HH:MM
    DAYS     "daily", or days and ranges with commas: "Mon-Fri", "Sat,Sun", "Fri-Mon"
    HH:MM    00:00 to 23:59; the end may be 24:00

A window whose end is not after its begin goes over midnight and belongs to the day on which it
begins. Wall clock times mean what people mean: on the night that clocks are put back, the hour
that comes twice is inside twice; when they are put forward, an hour inside never comes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from anabranch.protocols.errors import ConfigError

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY_MINUTES = 24 * 60
_WINDOW = re.compile(r"(\S+) (\d\d):(\d\d)-(\d\d):(\d\d)")


@dataclass(frozen=True)
class Window:
    """Days (Monday is 0) on which it begins; minutes since midnight, `end` above a day: next."""

    days: frozenset[int]
    begin: int
    end: int

    def holds(self, day: int, minute: int) -> bool:
        """Whether a minute of a weekday is inside."""
        today = day in self.days and self.begin <= minute < self.end
        return today or ((day - 1) % 7 in self.days and minute + DAY_MINUTES < self.end)


@dataclass(frozen=True)
class Hours:
    """Windows in one time zone; without any window it is always open."""

    windows: tuple[Window, ...]
    zone: ZoneInfo

    def open_at(self, now: float) -> bool:
        """Whether `now`, in seconds since 1970 UTC, is inside."""
        local = datetime.fromtimestamp(now, UTC).astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        return not self.windows or any(w.holds(local.weekday(), minute) for w in self.windows)

    def opens(self, now: float) -> datetime:
        """Return the next time at which a window begins, in the zone of the windows."""
        local = datetime.fromtimestamp(now, UTC).astimezone(self.zone)
        coming = (
            datetime.combine(
                local.date() + timedelta(days=ahead),
                time(window.begin // 60, window.begin % 60),
                self.zone,
            )
            for ahead in range(8)
            for window in self.windows
            if (local.weekday() + ahead) % 7 in window.days
        )
        return min(one for one in coming if one.timestamp() > now)


def parse_hours(windows: Sequence[str], zone: str) -> Hours:
    """Return the hours in words. Raises ConfigError naming the window or zone that is wrong."""
    try:
        where = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(
            f"hours.zone: no time zone {zone[:60]!r} here; expected a name such as "
            '"Europe/Copenhagen" or "UTC"'
        ) from None
    return Hours(tuple(_window(text) for text in windows), where)


def _window(text: str) -> Window:
    match = _WINDOW.fullmatch(text)
    if match is None:
        raise _wrong(text)
    days = frozenset(day for part in match[1].split(",") for day in _days(part, text))
    hours, minutes = (int(match[2]), int(match[4])), (int(match[3]), int(match[5]))
    begin, end = (hour * 60 + minute for hour, minute in zip(hours, minutes, strict=True))
    if max(minutes) > 59 or begin >= DAY_MINUTES or end > DAY_MINUTES:
        raise _wrong(text)
    return Window(days, begin, end if end > begin else end + DAY_MINUTES)


def _days(part: str, text: str) -> list[int]:
    if part == "daily":
        return list(range(7))
    first, dash, last = part.partition("-")
    last = last if dash else first
    if first not in DAYS or last not in DAYS:
        raise _wrong(text)
    begin, end = DAYS.index(first), DAYS.index(last)
    return [(begin + step) % 7 for step in range((end - begin) % 7 + 1)]


def _wrong(text: str) -> ConfigError:
    return ConfigError(
        f'hours.open: expected a window such as "Mon-Fri 20:00-06:00", got {text[:60]!r}'
    )
