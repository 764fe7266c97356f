"""Devices and availability from files: our own format, FedScale's and FLASH's.

anabranch       devices: CSV with a header, or TOML with one [[devices]] per device. The columns
                are those of devices.py; kind and the speeds are required, the rest has a default:

                    kind,gflops,uplink_bps,downlink_bps,memory_bytes,region,utc_offset_h,…
                    phone,8.5,4e6,2e7,4e9,de,1,…

                utc_offset_h is by default that of the region; max_rank 0 is no limit.
                availability: CSV with the header device,begin_s,end_s: row `device` (from 0) of the
                devices is online in [begin_s, end_s) of virtual time. A device without a row
                is never online.
fedscale        devices: {id: {"computation": ms per sample, "communication": kbps}}
                availability: {id: {"active": [s, …], "inactive": [s, …], "finish_time": s}}:
                online from active[k] to inactive[k], repeating after finish_time. JSON, or the
                pickles FedScale ships (client_device_capacity, client_behave_trace). FedScale's
                benchmark/dataset/data/device_info/README.md describes both.
flash           availability: {id: {"messages": "2020-02-03 07:30:00\tbattery_charged_on\n…"}},
                the state traces of Yang et al. 2021 (arXiv:2006.06983): online while locked,
                charged and on Wi-Fi, as their models/timer.py has it. Times are taken as UTC and
                folded into one week, which repeats.

FedScale's speed becomes gflops = gflop_per_sample / seconds per sample, both its bandwidths are
equal, and everything else has the default.

Pickles are read as plain values only, and refused if they hold anything else (plain_pickle.py).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import numpy as np

from anabranch.protocols.errors import DataError
from anabranch.simulations.population.devices import Devices, Floats, Ints
from anabranch.simulations.population.intervals import Traced
from anabranch.simulations.population.plain_pickle import read_plain_pickle
from anabranch.simulations.population.regions import region_of

WEEK: Final = 7 * 86400.0
MOST_BYTES: Final = 1 << 28  # of a trace file
_MONDAY: Final = datetime(2020, 1, 6, tzinfo=UTC)
Spans = list[tuple[float, float]]


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device of a trace in the format anabranch; the fields are those of devices.py."""

    kind: str
    gflops: float
    uplink_bps: float
    downlink_bps: float
    memory_bytes: float = 4e9
    compute_watts: float = 5.0
    network_watts: float = 1.0
    region: str = "world"
    utc_offset_h: float | None = None  # None: that of the region
    dropout: float = 0.0
    clock_skew_s: float = 0.0
    max_rank: int = 0


@dataclass(frozen=True)
class TracedDevices:
    """The devices of a trace, in its order; max_ranks 0 is no limit."""

    devices: Devices
    max_ranks: Ints


@dataclass(frozen=True)
class Intervals:
    """When each device of a trace is online; `of` makes the availability of some of them."""

    spans: Sequence[Spans]
    periods: Sequence[float]  # 0: the trace does not repeat

    def __len__(self) -> int:
        return len(self.spans)

    def of(self, rows: Ints) -> Traced:
        """Return the availability of clients that are `rows` of the trace."""
        chosen = [self.spans[row] for row in rows]
        start = np.concatenate([[0], np.cumsum([len(spans) for spans in chosen])])
        flat = np.array([span for spans in chosen for span in spans], np.float64).reshape(-1, 2)
        periods = np.array([self.periods[row] for row in rows], np.float64)
        return Traced(start.astype(np.int64), flat[:, 0].copy(), flat[:, 1].copy(), periods)


def read_devices(path: Path) -> TracedDevices:
    """Read devices in the format anabranch; raise DataError naming file, row and field."""
    if path.suffix.lower() == ".toml":
        try:
            found = msgspec.toml.decode(_bytes(path)).get("devices")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            _refuse(path, str(error))
        if not isinstance(found, list):
            _refuse(path, "expected one [[devices]] per device")
        rows: Sequence[Any] = found
    else:
        rows = [{k: v for k, v in row.items() if v != ""} for row in _csv(path)]
    devices = []
    for index, row in enumerate(rows):
        try:
            devices.append(msgspec.convert(row, DeviceRow, strict=path.suffix.lower() == ".toml"))
        except msgspec.ValidationError as error:
            _refuse(path, f"row {index + 1}: {error}")
    if not devices:
        _refuse(path, "no device; expected one row per device")
    return _as_devices(devices)


def read_intervals(path: Path, num_devices: int, period_s: float | None) -> Intervals:
    """Read availability in the format anabranch; raise DataError naming file and row."""
    spans: list[Spans] = [[] for _ in range(num_devices)]
    for index, row in enumerate(_csv(path)):
        try:
            device = int(row["device"])
            begin, end = float(row["begin_s"]), float(row["end_s"])
        except (KeyError, TypeError, ValueError):
            _refuse(path, f"row {index + 1}: expected numbers in the columns device,begin_s,end_s")
        if not 0 <= device < num_devices:
            _refuse(path, f"row {index + 1}: device {device}, expected 0 to {num_devices - 1}")
        most = math.inf if period_s is None else period_s
        if not (0 <= begin < end <= most and math.isfinite(end)):
            _refuse(path, f"row {index + 1}: expected 0 <= begin_s < end_s <= {most:g}")
        spans[device].append((begin, end))
    return Intervals([merged(one) for one in spans], [period_s or 0.0] * num_devices)


def read_fedscale_devices(path: Path, gflop_per_sample: float) -> TracedDevices:
    """Read FedScale's client_device_capacity, pickle or JSON.

    Raises DataError naming the device.
    """
    rows = []
    for name, entry in _entries(path):
        speed, bandwidth = _number(entry, "computation"), _number(entry, "communication")
        if not (speed > 0 and bandwidth > 0):
            _refuse(path, f"device {name!r}: expected computation and communication, both > 0")
        bps = bandwidth * 1e3
        gflops = gflop_per_sample / (speed / 1e3)
        rows.append(DeviceRow(kind="fedscale", gflops=gflops, uplink_bps=bps, downlink_bps=bps))
    return _as_devices(rows)


def read_fedscale_intervals(path: Path) -> Intervals:
    """Read FedScale's client_behave_trace (pickle or JSON); raise DataError naming the device.

    Pairs that end before they begin are left out; those beyond finish_time are cut.
    """
    spans, periods = [], []
    for name, entry in _entries(path):
        finish = _number(entry, "finish_time")
        active, inactive = _numbers(entry.get("active")), _numbers(entry.get("inactive"))
        if finish <= 0 or active is None or inactive is None:
            _refuse(path, f"device {name!r}: expected active, inactive (numbers) and finish_time")
        pairs = zip(active, inactive, strict=False)
        spans.append(merged([(max(b, 0.0), min(e, finish)) for b, e in pairs]))
        periods.append(finish)
    return Intervals(spans, periods)


def read_flash_intervals(path: Path) -> Intervals:
    """Read FLASH's state traces (JSON); raise DataError naming the device and the message."""
    spans = []
    for name, entry in _entries(path):
        messages = entry.get("messages")
        if not isinstance(messages, str):
            _refuse(path, f"device {name!r}: expected messages, a text")
        try:
            spans.append(_folded(_ready(messages)))
        except ValueError as error:
            _refuse(path, f"device {name!r}: {error}")
    return Intervals(spans, [WEEK] * len(spans))


def merged(spans: Spans) -> Spans:
    """Return the union of [begin, end) as ascending intervals that do not touch."""
    union: Spans = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((begin, end))
    return union


def _as_devices(rows: Sequence[DeviceRow]) -> TracedDevices:
    kinds, codes = sorted({row.kind for row in rows}), sorted({row.region for row in rows})
    offsets = {code: region_of(code).utc_offset_h for code in codes}

    def column(read: Callable[[DeviceRow], float]) -> Floats:
        return np.array([read(row) for row in rows], np.float64)

    def offset(row: DeviceRow) -> float:
        return offsets[row.region] if row.utc_offset_h is None else row.utc_offset_h

    devices = Devices(
        kinds=tuple(kinds),
        regions=tuple(codes),
        kind=column(lambda r: kinds.index(r.kind)).astype(np.int16),
        gflops=column(lambda r: r.gflops).astype(np.float32),
        memory_bytes=column(lambda r: r.memory_bytes).astype(np.int64),
        uplink_bps=column(lambda r: r.uplink_bps).astype(np.float32),
        downlink_bps=column(lambda r: r.downlink_bps).astype(np.float32),
        compute_watts=column(lambda r: r.compute_watts).astype(np.float32),
        network_watts=column(lambda r: r.network_watts).astype(np.float32),
        region=column(lambda r: codes.index(r.region)).astype(np.int16),
        utc_offset_h=column(offset).astype(np.float32),
        dropout=column(lambda r: r.dropout).astype(np.float32),
        clock_skew_s=column(lambda r: r.clock_skew_s).astype(np.float32),
    )
    return TracedDevices(devices, column(lambda r: r.max_rank).astype(np.int64))


def _ready(messages: str) -> Spans:
    """Return when a phone was locked, charged and on Wi-Fi, in seconds since a Monday."""
    locked = charged = wifi = False
    since: float | None = None
    spans: Spans = []
    for line in messages.splitlines():
        if not line.strip():
            continue
        stamp, tab, state = line.strip().partition("\t")
        if not tab:
            raise ValueError(f"the message {line[:60]!r} has no tab between time and state")
        moment = datetime.strptime(stamp.strip(), "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        at, state = (moment - _MONDAY).total_seconds(), state.strip().lower()
        if state in ("battery_charged_on", "battery_charged_off"):
            charged = state.endswith("_on")
        elif state in ("wifi", "unknown", "2g", "3g", "4g", "5g"):
            wifi = state == "wifi"
        elif state in ("screen_lock", "screen_unlock"):
            locked = state == "screen_lock"
        ready = locked and charged and wifi
        if ready and since is None:
            since = at
        elif not ready and since is not None:
            spans.append((since, at))
            since = None
    return spans


def _folded(spans: Spans) -> Spans:
    """Return intervals folded into one week [0, WEEK)."""
    parts: Spans = []
    for begin, end in spans:
        low = begin % WEEK
        high = low + min(end - begin, WEEK)
        parts += [(low, min(high, WEEK)), (0.0, high - WEEK)]
    return merged(parts)


def _entries(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the entries of a JSON or pickle dictionary of dictionaries, in its order."""
    data = _bytes(path)
    try:
        plain = json.loads(data) if data[:1] in b"{ \n\t\r" else read_plain_pickle(data)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"{error}; expected JSON, or a pickle of plain values: nothing was run")
    if not isinstance(plain, dict) or not plain:
        _refuse(path, "expected a dictionary with one entry per device")
    for name, entry in plain.items():
        if not isinstance(entry, dict):
            _refuse(path, f"device {name!r}: expected a dictionary, got {type(entry).__name__}")
    return [(str(name), entry) for name, entry in plain.items()]


def _number(entry: Mapping[str, Any], key: str) -> float:
    """Return a finite number, or -1 if there is none."""
    found = _numbers([entry.get(key)])
    return -1.0 if found is None else found[0]


def _numbers(values: Any) -> list[float] | None:
    """Return a list of finite numbers, or None if it is anything else."""
    if not isinstance(values, list | tuple):
        return None
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if not math.isfinite(value):
            return None
    return [float(value) for value in values]


def _csv(path: Path) -> list[dict[str, str]]:
    try:
        text = _bytes(path).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        _refuse(path, str(error))
    for index, row in enumerate(rows):
        if None in row or None in row.values():
            _refuse(path, f"row {index + 1}: expected as many cells as the header has")
    return rows


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MOST_BYTES:
            _refuse(path, f"larger than {MOST_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror or error}")


def _refuse(path: Path, problem: str) -> NoReturn:
    raise DataError(f"{path}: {problem}") from None
