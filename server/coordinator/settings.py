"""coordinator.toml: what the operator of a federation decides.

name = "heart"                          the federation; sites' certificates carry it
address = "fl.example.org:8443"         where sites reach the coordinator; invitations carry it
hosts = ["fl.example.org"]              in its certificate: names, addresses; those given to `init`
bind = "0.0.0.0:8443"                   the one public port: TLS, client certificates
page = "127.0.0.1:8444"                 the read-only page and the metrics
site_days = 90                          a site's certificate; renewed by itself in the last third
server_days = 30                        the coordinator's own; renewed by itself

[limits]
max_sites = 100                         active sites and open invitations together
max_message_mb = 256                    one message of a run, either way
requests_per_second = 50.0              of one site, on average
joins_per_minute = 10                   attempts to join from one address
connections = 512                       served at the public port at once
connections_per_address = 64            open from one address at once

[runs]
connect_s = 600.0                       how long a round waits for sites to connect
approve_s = 604800.0                    and for owners to approve the run, or their hours to begin
restarts = 5                            of a run's process without a round between, then it failed

[tracking]
tensorboard = false                     event files in runs/<run id>/tensorboard
mlflow = "http://127.0.0.1:5000"        a tracking server; without the key there is none
experiment = "anabranch"                of MLflow

Durations are seconds unless the name says otherwise. A change counts at the next `serve`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Count, Name, Positive

SETTINGS_FILE = "coordinator.toml"

_HOST = r"([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])"
_PORT = r"(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
Address = Annotated[str, msgspec.Meta(pattern=rf"^{_HOST}:{_PORT}\Z")]
Listen = Annotated[str, msgspec.Meta(pattern=rf"^{_HOST}:(0|{_PORT})\Z")]  # 0: any free port
Host = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9:]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9:])?\Z")]
Days = Annotated[float, msgspec.Meta(gt=0, le=825)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[limits]: what one site, and all of them together, may use."""

    max_sites: Count = 100
    max_message_mb: Annotated[int, msgspec.Meta(ge=1, le=2048)] = 256
    requests_per_second: Positive = 50.0
    joins_per_minute: Count = 10
    connections: Count = 512
    connections_per_address: Count = 64

    @property
    def max_message_bytes(self) -> int:
        """Return the largest message, in bytes."""
        return self.max_message_mb << 20


class Runs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[runs]: defaults of every run."""

    connect_s: Positive = 600.0
    approve_s: Positive = 604_800.0  # seven days
    restarts: Annotated[int, msgspec.Meta(ge=0)] = 5


class Tracking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[tracking]: who else is told a run's numbers (server/tracking.py); by default nobody."""

    tensorboard: bool = False  # event files in runs/<run id>/tensorboard
    mlflow: str | None = None  # address of a tracking server
    experiment: str = "anabranch"  # of MLflow


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """coordinator.toml."""

    name: Name
    address: Address
    hosts: Annotated[tuple[Host, ...], msgspec.Meta(min_length=1)]
    bind: Listen = "0.0.0.0:8443"
    page: Listen = "127.0.0.1:8444"
    site_days: Days = 90.0
    server_days: Days = 30.0
    limits: Limits = Limits()
    runs: Runs = Runs()
    tracking: Tracking = Tracking()

    def __post_init__(self) -> None:
        host = split_address(self.address)[0]
        if host not in self.hosts:
            raise ValueError(
                f"address: {host!r} is not one of hosts = {list(self.hosts)}, so no site would "
                "accept the coordinator's certificate"
            )


def split_address(address: str) -> tuple[str, int]:
    """Return (host without brackets, port) of "host:port" or "[v6]:port"."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """Return "host:port", an IPv6 address in brackets: what `split_address` reads back."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_settings(folder: Path) -> Settings:
    """Return the folder's coordinator.toml; raise ConfigError naming the field that is wrong."""
    file = folder / SETTINGS_FILE
    try:
        return parse_settings(file.read_bytes(), str(file))
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}. A federation's folder is made by `anabranch coordinator "
            "init`; name it with --folder"
        ) from None


def parse_settings(text: bytes | str, source: str) -> Settings:
    """Return the settings in TOML; raise ConfigError naming `source` and the field."""
    try:
        return msgspec.toml.decode(text, type=Settings)
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: text, or 5000 digits
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


def settings_text(name: str, hosts: list[str], port: int) -> str:
    """Return the coordinator.toml of a new federation. Raises ConfigError for a wrong value."""
    if not hosts:
        raise ConfigError("hosts: expected at least one, the one that sites call")
    quoted = [msgspec.json.encode(one).decode() for one in hosts]
    text = _TEMPLATE.format(
        name=msgspec.json.encode(name).decode(),
        address=msgspec.json.encode(join_address(hosts[0], port)).decode(),
        hosts=", ".join(quoted),
        port=port,
        page=port + 1 if port < 65535 else port - 1,
    )
    parse_settings(text, SETTINGS_FILE)
    return text


_TEMPLATE = """\
# A federation's coordinator. docs/coordinator.md says more; a change counts at the next `serve`.
name = {name}
address = {address}   # where sites reach it; in every invitation
hosts = [{hosts}]   # in its certificate; the authority signs for these alone
bind = "0.0.0.0:{port}"   # the one public port
page = "127.0.0.1:{page}"   # the read-only page and the metrics
site_days = 90   # a site's certificate; renewed by itself
server_days = 30   # the coordinator's own; renewed by itself

[limits]
max_sites = 100   # active sites and open invitations together
max_message_mb = 256   # one message of a run, either way
requests_per_second = 50.0   # of one site, on average
joins_per_minute = 10   # attempts to join from one address
connections = 512   # served at the public port at once
connections_per_address = 64   # open from one address at once

[runs]
connect_s = 600.0   # how long a round waits for sites to connect
approve_s = 604800.0   # and for owners to approve the run, or for their hours to begin: a week
restarts = 5   # of a run's process without a round between, then it failed

[tracking]
tensorboard = false   # event files in runs/<run id>/tensorboard
# mlflow = "http://127.0.0.1:5000"   # a tracking server that is told every run's numbers
experiment = "anabranch"   # of MLflow
"""
