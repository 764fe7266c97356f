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

[secure_aggregation]        what the device asks of a gateway before its deltas are added to others
required = true             no delta for the gateway's eyes; only sums of a signed roster
minimum = 20                updates in a sum, at least
threshold = 0.5             share of the members that must stay until a sum is opened
colluding = 0.1             share of the members that may help the gateway, and learn nothing

The file lies in the device's folder (home.py). Without it the conditions stand as above, there is
no budget, and nothing is required.
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


class SecureFloors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[secure_aggregation]: the owner's floors; without `required` for secure tasks alone."""

    required: bool = False
    minimum: Annotated[int, msgspec.Meta(ge=2)] = 2
    threshold: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.5
    colluding: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.0


class DeviceFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """device.toml."""

    budget: Budget | None = None  # None: no limit over all trainings
    conditions: Conditions = Conditions()
    secure_aggregation: SecureFloors = SecureFloors()


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
