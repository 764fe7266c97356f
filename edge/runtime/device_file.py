"""device.toml: what the owner of a device decides, and no gateway can.

[budget]                    what the device's records may spend, over all trainings
epsilon = 8.0
delta = 1e-5

[conditions]                when work for a gateway may run; what is left out stands as here
charging = true
unmetered = true            network
idle = true
min_battery = 0.3           share of a full battery
max_temperature_c = 42.0    150 is as good as no limit
windows = ["22:00-06:00"]   local time; []: at any time

The file lies in the device's folder (home.py). Without it the conditions stand as above and
there is no budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from anabranch.protocols.errors import ConfigError

DEVICE_FILE = "device.toml"

Window = Annotated[
    str, msgspec.Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]\Z")
]
Celsius = Annotated[float, msgspec.Meta(ge=-50, le=150)]
Epsilon = Annotated[float, msgspec.Meta(gt=0, le=100)]  # beyond 100 an ε says nothing


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[budget]: (ε, δ) for all trainings on the device together, whoever asked for them."""

    epsilon: Epsilon
    delta: Annotated[float, msgspec.Meta(gt=0, lt=0.1)]


class Conditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[conditions]: all of them must hold. Times of `windows` are local; one may pass midnight."""

    charging: bool = True
    unmetered: bool = True
    idle: bool = True
    min_battery: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.3
    max_temperature_c: Celsius | None = 42.0  # None: no limit; TOML has no word for it
    windows: tuple[Window, ...] = ()  # (): at any time


class DeviceFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """device.toml."""

    budget: Budget | None = None  # None: no limit over all trainings
    conditions: Conditions = Conditions()


def read_device(folder: Path) -> DeviceFile:
    """Return the folder's device.toml, or the defaults if there is none.

    Raises ConfigError naming the field that is wrong.
    """
    file = folder / DEVICE_FILE
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return DeviceFile()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    return parse_device(data, source=str(file))


def parse_device(text: bytes | str, *, source: str) -> DeviceFile:
    """Return the content of a device.toml; raise ConfigError naming `source` and field."""
    try:
        return msgspec.toml.decode(text, type=DeviceFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: {error}") from None
