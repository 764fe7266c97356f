"""The synthetic generator: devices drawn from classes, and presets whose numbers say their source.

    gflops, bandwidths     median of the class · exp(σ z), z ~ N(0, 1): lognormal, as FedScale draws
                           device speeds; up- and downlink of one device share their z
    clock_skew_s           σ z
    class, region          by share, at random; local time is that of the region

Presets are in tables/devices.toml. Each number there names a source or is an assumption; for
a study, put what you measured in its place ([devices.classes.NAME], or a trace).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from anabranch.simulations.population.availability import Habit, Habits
from anabranch.simulations.population.devices import Devices, Floats, Ints
from anabranch.simulations.population.devices_table import DeviceClass, Preset
from anabranch.simulations.population.regions import region_of

TABLE: Final = Path(__file__).parent / "tables" / "devices.toml"
_HABITS: Final = {"always": Habit.ALWAYS, "hours": Habit.HOURS, "phone": Habit.PHONE}


class Number(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number with where it is from."""

    value: float
    source: str


class _PresetFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    says: str
    classes: dict[str, dict[str, Any]]
    regions: dict[str, Number]


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sources: dict[str, str]
    presets: dict[str, _PresetFile]


@dataclass(frozen=True)
class Generated:
    """N devices with their habits; max_rank is None if no class has one, 0 is no limit."""

    devices: Devices
    habits: Habits
    max_ranks: Ints | None


@cache
def preset(name: Preset) -> Mapping[str, DeviceClass]:
    """Return the classes of a preset."""
    found = _file().presets[name]
    regions = {code: number.value for code, number in found.regions.items()}
    return {
        kind: msgspec.convert(
            {key: v["value"] if isinstance(v, dict) else v for key, v in fields.items()}
            | {"regions": regions},
            DeviceClass,
        )
        for kind, fields in found.classes.items()
    }


def sources(name: Preset) -> Mapping[str, str]:
    """Return "class.field" (and "regions.code") -> where the number is from, in full."""
    file = _file()
    found = file.presets[name]
    numbers = {
        f"{kind}.{key}": msgspec.convert(value, Number)
        for kind, fields in found.classes.items()
        for key, value in fields.items()
        if isinstance(value, dict)
    }
    numbers |= {f"regions.{code}": number for code, number in found.regions.items()}
    return {key: _said(file.sources, number.source) for key, number in numbers.items()}


def generate(classes: Mapping[str, DeviceClass], num_clients: int, seed: int) -> Generated:
    """Return N devices drawn from the classes; the same for the same seed."""
    rng = np.random.default_rng([seed, 0xDE71])
    kinds = tuple(sorted(classes))
    kind = _by_share(rng.random(num_clients), [classes[name].share for name in kinds])
    codes = tuple(sorted({code for one in classes.values() for code in _regions(one)}))
    region = np.zeros(num_clients, np.int64)
    place = rng.random(num_clients)
    for index, name in enumerate(kinds):
        mine, shares = kind == index, _regions(classes[name])
        names = sorted(shares)
        at = np.array([codes.index(code) for code in names])
        region[mine] = at[_by_share(place[mine], [shares[code] for code in names])]
    speed, link, skew = rng.standard_normal((3, num_clients))

    def column(field: str) -> Floats:
        values = np.array([float(getattr(classes[name], field)) for name in kinds])
        return np.asarray(values[kind], np.float64)

    offsets = np.array([region_of(code).utc_offset_h for code in codes])[region]
    links = np.exp(column("bandwidth_spread") * link)
    devices = Devices(
        kinds=kinds,
        regions=codes,
        kind=kind.astype(np.int16),
        gflops=(column("gflops") * np.exp(column("speed_spread") * speed)).astype(np.float32),
        memory_bytes=(column("memory_gb") * 1e9).astype(np.int64),
        uplink_bps=(column("uplink_mbps") * 1e6 * links).astype(np.float32),
        downlink_bps=(column("downlink_mbps") * 1e6 * links).astype(np.float32),
        compute_watts=column("compute_watts").astype(np.float32),
        network_watts=column("network_watts").astype(np.float32),
        region=region.astype(np.int16),
        utc_offset_h=offsets.astype(np.float32),
        dropout=column("dropout").astype(np.float32),
        clock_skew_s=(column("clock_skew_s") * skew).astype(np.float32),
    )
    habits = Habits(
        habit=np.array([_HABITS[classes[name].availability] for name in kinds], np.int8)[kind],
        utc_offset_h=offsets,
        opens=column("opens"),
        closes=column("closes"),
        needs_charging=column("needs_charging") > 0,
        battery_threshold=column("battery_threshold"),
    )
    ranks = np.array([classes[name].max_rank or 0 for name in kinds], np.int64)
    return Generated(devices, habits, ranks[kind] if ranks.any() else None)


@cache
def _file() -> _File:
    return msgspec.toml.decode(TABLE.read_bytes(), type=_File)


def _said(known: Mapping[str, str], source: str) -> str:
    """Return a source in full: its key's text, and what is added after a colon."""
    key, _, added = source.partition(":")
    return known[key] + (f" ({added.strip()})" if added else "")


def _regions(one: DeviceClass) -> Mapping[str, float]:
    return one.regions or {"world": 1.0}


def _by_share(uniform: Floats, shares: Sequence[float]) -> Ints:
    """Return an index for each number in [0, 1): index k with probability shares[k] / Σ shares."""
    edges = np.cumsum(shares) / np.sum(shares)
    found: Ints = np.searchsorted(edges[:-1], uniform, side="right").astype(np.int64)
    return found
