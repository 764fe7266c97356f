"""Regions: carbon intensity of electricity and local time, from tables/regions.csv.

    CO₂ [g] = energy [J] / 3.6·10⁶ · intensity [g/kWh]

Intensities are life-cycle means of one year; every row of the table names its year and source.
They say what a kilowatt-hour costs on average, not what one more would cost.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.population.devices import Floats

TABLE: Final = Path(__file__).parent / "tables" / "regions.csv"
JOULES_PER_KWH: Final = 3.6e6


@dataclass(frozen=True)
class Region:
    """One row of the table; g_per_kwh is gCO₂-equivalents per kilowatt-hour."""

    region: str
    name: str
    g_per_kwh: float
    year: int
    utc_offset_h: float
    source: str


@cache
def regions() -> Mapping[str, Region]:
    """Return all regions by their code, in the order of the table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    found = [
        Region(
            region=row["region"],
            name=row["name"],
            g_per_kwh=float(row["g_per_kwh"]),
            year=int(row["year"]),
            utc_offset_h=float(row["utc_offset_h"]),
            source=row["source"],
        )
        for row in rows
    ]
    return MappingProxyType({region.region: region for region in found})


def region_of(code: str) -> Region:
    """Return a region; raise ConfigError naming those that there are."""
    known = regions()
    if code not in known:
        raise ConfigError(
            f"region {code!r} is not in the table of carbon intensities: "
            f"expected one of {', '.join(known)}"
        )
    return known[code]


def co2_grams(energy_joules: ArrayLike, region: str) -> Floats:
    """Return the grams of CO₂-equivalents that the energy costs in `region`, elementwise.

    Raises ConfigError for a region that is not in the table.
    """
    intensity = region_of(region).g_per_kwh
    return np.asarray(energy_joules, np.float64) / JOULES_PER_KWH * intensity
