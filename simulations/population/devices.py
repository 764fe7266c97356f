"""The devices of a population: one number per client and property, and when each is online.

Notation: N clients; client i is row i of every array. Virtual time is seconds since the
beginning of the run; t = 0 is a Monday, 00:00 UTC plus the run's start hour.

    kind              index into `kinds`, the device classes
    gflops            sustained training speed, 10⁹ floating-point operations per second
    memory_bytes      memory of the device
    uplink_bps, downlink_bps        bits per second
    compute_watts, network_watts    power while it trains, and while it sends or receives
    region            index into `regions` (regions.py)
    utc_offset_h      local time = UTC + this
    dropout           chance that the client abandons a round it has begun
    clock_skew_s      what its clock is ahead of ours
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import ConfigError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Flags = NDArray[np.bool_]

_POSITIVE: Final = ("gflops", "memory_bytes", "uplink_bps", "downlink_bps")
_NOT_NEGATIVE: Final = ("compute_watts", "network_watts")


class Availability(Protocol):
    """When clients are online. Windows are half-open, [begin, end), and do not overlap.

    For every client and time: online_until(client, at) > at if and only if online; then
    next_online is `at`, else the begin of the first window after `at`, infinity if there is none.
    """

    def online(self, clients: Ints, at: float) -> Flags:
        """Return which of `clients` are online."""

    def online_until(self, client: int, at: float) -> float:
        """Return the end of the present window; `at` itself if the client is offline."""

    def next_online(self, client: int, at: float) -> float:
        """Return the first time >= `at` at which the client is online."""

    def next_change(self, at: float) -> float:
        """Return the first time > `at` at which any client comes or goes; infinity if never."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Devices:
    """N devices as arrays of length N. Raises ConfigError for lengths or values out of range."""

    kinds: tuple[str, ...]
    regions: tuple[str, ...]
    kind: NDArray[np.int16]
    gflops: Singles
    memory_bytes: Ints
    uplink_bps: Singles
    downlink_bps: Singles
    compute_watts: Singles
    network_watts: Singles
    region: NDArray[np.int16]
    utc_offset_h: Singles
    dropout: Singles
    clock_skew_s: Singles

    def __post_init__(self) -> None:
        for name, values in self._arrays().items():
            if values.shape != self.kind.shape or values.ndim != 1:
                raise ConfigError(
                    f"devices: {name} has shape {values.shape}, expected {self.kind.shape} as kind"
                )
            if not np.isfinite(values).all():
                raise ConfigError(f"devices: {name} holds a number that is not finite")
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            least = float(self._arrays()[name].min()) if len(self) else 1.0
            if least < 0 or (least == 0 and name in _POSITIVE):
                bound = "> 0" if name in _POSITIVE else ">= 0"
                raise ConfigError(f"devices: {name} is {least:g} for a device, expected {bound}")
        _require_indices("kind", self.kind, self.kinds)
        _require_indices("region", self.region, self.regions)
        if len(self) and not (self.dropout.min() >= 0 and self.dropout.max() < 1):
            raise ConfigError("devices: dropout is outside [0, 1) for a device")
        if len(self) and np.abs(self.utc_offset_h).max() > 14:
            raise ConfigError("devices: utc_offset_h is outside [-14, 14] for a device")

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, clients: Ints) -> Devices:
        """Return the devices of `clients`, in that order; a device may be taken twice."""
        arrays = {name: values[clients] for name, values in self._arrays().items()}
        return Devices(kinds=self.kinds, regions=self.regions, **arrays)

    def _arrays(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("kinds", "regions")}


def uniform_devices(num_clients: int, *, gflops: float = 10.0, bps: float = 1e7) -> Devices:
    """Return N equal devices that never drop out: a population without differences."""
    return Devices(
        kinds=("device",),
        regions=("world",),
        kind=np.zeros(num_clients, np.int16),
        gflops=np.full(num_clients, gflops, np.float32),
        memory_bytes=np.full(num_clients, 4 << 30, np.int64),
        uplink_bps=np.full(num_clients, bps, np.float32),
        downlink_bps=np.full(num_clients, bps, np.float32),
        compute_watts=np.full(num_clients, 5.0, np.float32),
        network_watts=np.full(num_clients, 1.0, np.float32),
        region=np.zeros(num_clients, np.int16),
        utc_offset_h=np.zeros(num_clients, np.float32),
        dropout=np.zeros(num_clients, np.float32),
        clock_skew_s=np.zeros(num_clients, np.float32),
    )


def _require_indices(name: str, values: NDArray[np.int16], names: tuple[str, ...]) -> None:
    if len(values) and not (values.min() >= 0 and values.max() < len(names)):
        raise ConfigError(
            f"devices: {name} holds {int(values.max())}, expected an index into {list(names)}"
        )
