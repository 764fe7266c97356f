"""When a device may work for a gateway: what its sensors say against [conditions] of device.toml.

    condition            a sensor that is not there (None)
    charging             a device without a battery counts as charging; with one, as not charging
    unmetered            an unknown network counts as metered; unmetered = false allows it
    idle                 counts as in use; idle = false allows it
    min_battery          a device without a battery has enough
    max_temperature_c    counts as too hot; max_temperature_c = 150 allows it
    windows              there is always a clock

What is unknown is refused, but for the battery: a board that has none runs from the mains.
All of it is pure; `sensors.SystemSensors` reads a Linux device, another platform implements
`Sensors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, time
from enum import StrEnum
from typing import Literal, Protocol

from anabranch.edge.runtime.device_file import Conditions

NO_LIMIT_C = 150.0  # max_temperature_c from which no temperature is too high


class Network(StrEnum):
    """How a device is connected, by cost."""

    offline = "offline"
    metered = "metered"
    unmetered = "unmetered"


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What the sensors say at one moment; None: there is no such sensor."""

    battery: float | None  # share of full, 0 to 1
    charging: bool | None
    temperature_c: float | None  # of the hottest sensor
    network: Network | None
    idle: bool | None
    local: datetime  # the device's own time


class Sensors(Protocol):
    """Where readings come from."""

    def read(self) -> Readings:
        """Return the readings of this moment; what cannot be read is None, never an error."""


What = Literal["charging", "network", "idle", "battery", "temperature", "window", "data"]


@dataclass(frozen=True)
class Unmet:
    """One condition that does not hold, in words."""

    what: What
    text: str

    def __str__(self) -> str:
        return self.text


def unmet(conditions: Conditions, now: Readings) -> tuple[Unmet, ...]:
    """Return every condition that does not hold, in the order of the table above; () if all do.

    Being offline is reported whatever the conditions are.
    """
    found: list[Unmet | None] = [
        _charging(now) if conditions.charging else None,
        _network(now, conditions.unmetered),
        _idle(now) if conditions.idle else None,
        _battery(now, conditions.min_battery),
        _temperature(now, conditions.max_temperature_c),
        _window(now.local.time(), conditions.windows),
    ]
    return tuple(one for one in found if one is not None)


def without_network(reasons: Iterable[Unmet]) -> tuple[Unmet, ...]:
    """Return the reasons that matter for training, which needs no network."""
    return tuple(one for one in reasons if one.what != "network")


def only_network(reasons: Iterable[Unmet]) -> tuple[Unmet, ...]:
    """Return the reasons that matter for sending what is trained already."""
    return tuple(one for one in reasons if one.what == "network")


def in_window(now: time, window: str) -> bool:
    """Return whether a local time lies in "HH:MM-HH:MM"; the end is not in it.

    A window that ends before it begins passes midnight. "00:00-00:00" is the whole day.
    """
    begin, end = (time.fromisoformat(one) for one in window.split("-"))
    now = now.replace(tzinfo=None)
    return begin <= now < end if begin < end else now >= begin or now < end


def _charging(now: Readings) -> Unmet | None:
    if now.charging or (now.charging is None and now.battery is None):
        return None
    return Unmet("charging", "not charging")


def _network(now: Readings, unmetered: bool) -> Unmet | None:
    if now.network is Network.offline:
        return Unmet("network", "offline")
    if unmetered and now.network is not Network.unmetered:
        known = "unknown, which counts as metered" if now.network is None else "metered"
        return Unmet("network", f"the network is {known}")
    return None


def _idle(now: Readings) -> Unmet | None:
    if now.idle:
        return None
    return Unmet("idle", "in use" if now.idle is False else "not known to be idle")


def _battery(now: Readings, least: float) -> Unmet | None:
    if now.battery is None or now.battery >= least:
        return None
    return Unmet("battery", f"battery at {now.battery:.0%}, at least {least:.0%} needed")


def _temperature(now: Readings, most: float | None) -> Unmet | None:
    if most is None or most >= NO_LIMIT_C:
        return None
    if now.temperature_c is None:
        return Unmet("temperature", "temperature unknown, which counts as too hot")
    if now.temperature_c <= most:
        return None
    return Unmet("temperature", f"{now.temperature_c:.0f} °C, at most {most:.0f} °C allowed")


def _window(now: time, windows: tuple[str, ...]) -> Unmet | None:
    if not windows or any(in_window(now, one) for one in windows):
        return None
    return Unmet("window", f"{now:%H:%M} is outside {', '.join(windows)}")
