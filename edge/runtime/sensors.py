"""What a Linux device knows of itself, without privileges or extra dependencies.

    battery, charging    /sys/class/power_supply/*: type, scope, present, capacity, status, online
    temperature          /sys/class/thermal/*/temp, the hottest
    network              the interface of the default route (/proc/net/route, ipv6_route); whether
                         it is metered, from NetworkManager's `nmcli` where that is installed,
                         else mobile interfaces are metered and all others unknown
    idle                 CPU time of other processes since the last reading (psutil)

Files are read below a `root`, which tests replace. What cannot be read is None, never an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from anabranch.edge.runtime.conditions import Network, Readings

BUSY_SHARE = 0.25  # of all CPU time, used by other processes: above it a device is not idle
MIN_SAMPLE_S = 0.2  # CPU seconds of all cores between two looks at the load
_MAINS = ("Mains", "USB", "USB_C", "USB_PD", "Wireless")
_PLAUSIBLE_C = (-50.0, 150.0)  # sensors that are not connected report others
_MOBILE = ("wwan", "wwp", "ppp", "rmnet")


@dataclass
class SystemSensors:
    """The sensors of a Linux device, read from files below `root`.

    `run` returns the output of a command, or None if it fails. What the own process uses does
    not count as load, so training does not stop itself.
    """

    root: Path = Path("/")
    run: Callable[[list[str]], str | None] | None = None
    busy_share: float = BUSY_SHARE

    def __post_init__(self) -> None:
        self._sample = _cpu_seconds()
        self._idle: bool | None = None

    def read(self) -> Readings:
        """Return the readings of this moment."""
        supplies = [_supply(folder) for folder in _folders(self.root / "sys/class/power_supply")]
        return Readings(
            battery=_battery_level(supplies),
            charging=_is_charging(supplies),
            temperature_c=_hottest(_folders(self.root / "sys/class/thermal")),
            network=self._network(),
            idle=self._idle_now(),
            local=datetime.now().astimezone(),
        )

    def _idle_now(self) -> bool | None:
        now = _cpu_seconds()
        share = others_share(self._sample, now)
        if share is None and self._idle is None:
            share = _load_share()
        elif share is not None:
            self._sample = now
        if share is not None:
            self._idle = share <= self.busy_share
        return self._idle

    def _network(self) -> Network | None:
        interface = default_interface(self.root / "proc/net")
        if interface is None:
            return Network.offline
        if interface == "":
            return None
        fields = "--get-values=GENERAL.METERED"
        answer = (self.run or _run)(["nmcli", "--terse", fields, "device", "show", interface])
        word = (answer or "").strip().split(" ")[0]
        if word in ("yes", "no"):
            return Network.metered if word == "yes" else Network.unmetered
        return Network.metered if interface.startswith(_MOBILE) else None


@dataclass(frozen=True)
class CpuSeconds:
    """CPU time since the machine started: of all cores, spent working, by this process."""

    total: float
    busy: float
    own: float


def others_share(before: CpuSeconds, now: CpuSeconds) -> float | None:
    """Return the share of CPU time that other processes used in between; None if too short."""
    total = now.total - before.total
    if total < MIN_SAMPLE_S:
        return None
    others = (now.busy - before.busy) - (now.own - before.own)
    return min(max(others / total, 0.0), 1.0)


def default_interface(folder: Path) -> str | None:
    """Return the interface of the default route, None if there is none, "" if unknown.

    `folder` is /proc/net: `route` for IPv4, `ipv6_route` for IPv6.
    """
    four, six = _text(folder / "route"), _text(folder / "ipv6_route")
    for line in (four or "").splitlines()[1:]:
        cells = line.split()
        if len(cells) > 7 and cells[1] == "00000000" and cells[7] == "00000000":
            return cells[0]
    for line in (six or "").splitlines():
        cells = line.split()
        if len(cells) > 9 and cells[0] == "0" * 32 and cells[1] == "00" and cells[9] != "lo":
            return cells[9]
    return "" if four is None and six is None else None


def _supply(folder: Path) -> dict[str, str]:
    names = ("type", "scope", "capacity", "status", "online", "present")
    return {name: text for name in names if (text := _text(folder / name)) is not None}


def _batteries(supplies: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the device's own batteries: not those of mice and pens, nor empty bays."""
    return [
        one
        for one in supplies
        if one.get("type") == "Battery"
        and one.get("scope", "System") == "System"
        and one.get("present", "1") == "1"
    ]


def _battery_level(supplies: list[dict[str, str]]) -> float | None:
    """Return the lowest level; a battery that says nothing of its level counts as empty."""
    levels = []
    for one in _batteries(supplies):
        capacity = one.get("capacity", "")
        levels.append(min(int(capacity), 100) / 100 if capacity.isdigit() else 0.0)
    return min(levels) if levels else None


def _is_charging(supplies: list[dict[str, str]]) -> bool | None:
    online = [
        one["online"] != "0" for one in supplies if one.get("type") in _MAINS and "online" in one
    ]
    if any(online):
        return True
    states = {one.get("status") for one in _batteries(supplies)} - {None, "Unknown"}
    if states:
        return "Discharging" not in states
    return False if online else None


def _hottest(folders: list[Path]) -> float | None:
    found = []
    for folder in folders:
        text = _text(folder / "temp")
        if text is not None and text.lstrip("-").isdigit():
            found.append(int(text) / 1000)
    low, high = _PLAUSIBLE_C
    return max((one for one in found if low < one < high), default=None)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _cpu_seconds() -> CpuSeconds:
    import psutil

    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user already
    total = sum(times) - guests
    own = psutil.Process().cpu_times()
    return CpuSeconds(total, total - idle, own.user + own.system)


def _load_share() -> float | None:
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def _run(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
