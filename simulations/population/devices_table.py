"""[devices] of an experiment file: how unequal the devices are.

One of three:

    preset = "phones"                     the synthetic generator (generator.py)

    [devices.classes.phone]               a mix of your own classes
    share = 0.8
    gflops = 10.0
    …
    [devices.classes.phone.regions]       of the class, by share; regions.py has the codes
    de = 0.7
    fr = 0.3

    trace = "devices.csv"                 one row per device (traces.py)

and, with any of them, `availability`, a file of intervals in which each device was seen online.
It takes the place of what the classes say of availability; in our own format, with classes or a
preset, its row `device` is the client of that number.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Count, Name, NotNegative, Positive, Share
from anabranch.simulations.population.regions import region_of

Hour = Annotated[float, msgspec.Meta(ge=0, le=24)]
Level = Annotated[float, msgspec.Meta(ge=0, le=1)]
Watching = Literal["always", "hours", "phone"]
Preset = Literal["phones", "hospitals"]


class DeviceClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[devices.classes.NAME]: one kind of device. Speeds and bandwidths are medians."""

    share: Positive  # of the population, relative to the other classes
    gflops: Positive  # sustained training speed, 10⁹ operations per second
    speed_spread: NotNegative = 0.0  # standard deviation of log speed
    memory_gb: Positive = 4.0  # 10⁹ bytes
    uplink_mbps: Positive = 10.0  # 10⁶ bits per second
    downlink_mbps: Positive = 50.0
    bandwidth_spread: NotNegative = 0.0  # standard deviation of log bandwidth, up and down alike
    compute_watts: NotNegative = 5.0
    network_watts: NotNegative = 1.0
    dropout: Share = 0.0  # chance that a round that was begun is abandoned
    clock_skew_s: NotNegative = 0.0  # standard deviation of the clock's error
    max_rank: Count | None = None  # highest LoRA rank it trains
    regions: dict[str, Positive] = {}  # region -> share; none: the world's mean, UTC
    availability: Watching = "always"
    opens: Hour = 8.0  # "hours": local time, weekdays
    closes: Hour = 18.0
    needs_charging: bool = True  # "phone": trains on the charger alone
    battery_threshold: Level = 0.3  # "phone" without needs_charging: least charge to train


class DevicesTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[devices]: where the devices are from, and when they are online."""

    preset: Preset | None = None
    classes: dict[Name, DeviceClass] = {}
    trace: str | None = None  # a file, relative to the experiment's
    trace_format: Literal["anabranch", "fedscale"] = "anabranch"
    gflop_per_sample: Positive | None = None  # fedscale: what its milliseconds were spent on
    availability: str | None = None  # a file
    availability_format: Literal["anabranch", "fedscale", "flash"] = "anabranch"
    period_s: Positive | None = None  # anabranch intervals repeat after this; None: they do not
    rows: Literal["draw", "in-order"] = "draw"  # which rows of a trace the clients are
    start_hour_utc: Hour = 0.0  # the run begins on a Monday at this hour


def require_consistent(table: DevicesTable) -> None:
    """Raise ConfigError for options that contradict each other, naming one and the fix."""
    given = [
        name
        for name, there in (
            ("preset", table.preset is not None),
            ("classes", bool(table.classes)),
            ("trace", table.trace is not None),
        )
        if there
    ]
    if len(given) != 1:
        raise ConfigError(
            "devices: expected exactly one of preset, classes and trace, got "
            f"{' and '.join(given) or 'none'}: remove all but one"
        )
    if table.trace is None and table.trace_format != "anabranch":
        raise ConfigError("devices.trace_format: there is no trace: add trace or remove it")
    if table.trace_format == "fedscale" and table.gflop_per_sample is None:
        raise ConfigError(
            "devices.gflop_per_sample: a FedScale trace gives milliseconds per sample of some "
            "model: say how many 10⁹ operations that was, for example 0.6 for MobileNetV2"
        )
    if table.trace_format != "fedscale" and table.gflop_per_sample is not None:
        raise ConfigError('devices.gflop_per_sample: only trace_format = "fedscale" has it')
    if table.availability is None and table.availability_format != "anabranch":
        raise ConfigError(
            "devices.availability_format: there is no file: add availability or remove it"
        )
    if table.period_s is not None and (
        table.availability is None or table.availability_format != "anabranch"
    ):
        raise ConfigError(
            "devices.period_s: only a file of intervals in the format anabranch needs one: remove "
            "it"
        )
    if table.availability is not None and table.start_hour_utc:
        raise ConfigError(
            "devices.start_hour_utc: the times of an availability file are virtual times, t = 0 is "
            "the beginning of the run: shift them in the file, and remove it"
        )
    if table.rows != "draw" and table.trace is None and table.availability is None:
        raise ConfigError("devices.rows: there is no trace: add one or remove rows")
    for name, one in table.classes.items():
        if one.availability == "hours" and one.opens >= one.closes:
            raise ConfigError(
                f"devices.classes.{name}: opens {one.opens:g}, expected less than closes "
                f"{one.closes:g}"
            )
        for code in one.regions:
            region_of(code)
