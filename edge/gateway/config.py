"""A gateway's folder, and gateway.toml: what its owner decides.

    gateway.toml            this file
    authority/              ca.key ca.pem server.key server.pem; keys mode 0600 (authority.py)
    state.sqlite            tokens, devices, rounds, tasks, uploads, what was spent (store.py)
    spool/<upload>          bytes of uploads (spool.py)
    roster.json             who may be in a secure sum, if the publisher signed it (roster.py)
    files/<sha256>          adapters of open rounds
    results/<sha256>        deltas for the coordinator (results.py); no device can fetch them

name = "north"                      what the coordinator calls it
hosts = ["gateway.example.org"]     names and addresses in its certificate; devices call the first
port = 8443                         certificates required
enroll_port = 8444                  enrolment, and nothing else
bundles = ["bundles/codes"]         served to devices; relative to this folder
bundle_keys = ["<64 hex>"]          Ed25519 public keys that sign them
cohort = 50                         deltas that end a round early
min_cohort = 20                     with fewer at the deadline, nothing leaves

[client_privacy]                    client-level DP over devices, in the gateway's own budget
epsilon = 4.0
population = 1000
noise_multiplier = 2.0
clipping_norm = 1.0

[secure_aggregation]                deltas go up in a sum that hides each of them from this gateway
minimum = 20                        updates in a sum; at least min_cohort in any case
stage_s = 30.0                      deadline of each of the five stages after training

[record_privacy]                    needed for runs with [privacy]: one mechanism for all devices
records = 400                       a device samples each record with chance batch_size / records
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.secagg.fixed_point import Grid, ring_for
from anabranch.protocols.tables import Count, Fraction, Name, Positive

GATEWAY_FILE = "gateway.toml"
MESSAGE = 4096  # bytes of a message beside a chunk
KEYS = 512  # bytes of one device's keys in a message, at most
MAX_SECURE = 1000  # devices of a secure sum: all their keys travel in one message
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Host = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:-]{0,252}\Z")]
HexKey = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Delta = Annotated[float, msgspec.Meta(gt=0, lt=0.1)]
Seconds = Annotated[float, msgspec.Meta(ge=300, le=3600)]
StageSeconds = Annotated[float, msgspec.Meta(ge=5)]  # a device that waits calls every 1 to 2
Chunk = Annotated[int, msgspec.Meta(ge=1024, le=1 << 20)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[limits]: what one device, and all of them together, may use."""

    calls: Count = 64  # served at once; one more is RESOURCE_EXHAUSTED
    calls_a_minute: Count = 240  # of one device
    calls_at_once: Count = 4  # of one device
    enrolments_a_minute: Count = 120  # of all: guessing tokens is slow
    bytes_a_day: Count = 4 << 30  # of one device, both ways
    open_uploads: Count = 2  # of one device
    call_s: Seconds = 600.0  # longest deadline of a call; devices give a transfer 300
    chunk_bytes: Chunk = 65536
    message_bytes: Annotated[int, msgspec.Meta(ge=4096, le=16 << 20)] = 1 << 20
    max_examples: Count = 10_000  # records that one device may claim
    decoders: Count = 2  # deltas in memory at once
    lease_s: Positive = 900.0  # a task without a sign of life for so long frees its place


class ClientPrivacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[client_privacy]: (ε, δ) over devices, for all rounds that this gateway ever closes."""

    epsilon: Positive
    noise_multiplier: Positive  # σ: noise on the sum of clipped deltas, over S
    clipping_norm: Positive  # S, of a device's whole delta
    population: Count  # devices that may be drawn
    sample_rate: Fraction = 1.0  # q: chance that a device is in a round
    delta: Delta | None = None  # None: 1 / (10 population)

    @property
    def target_delta(self) -> float:
        """Return δ."""
        return 1 / (10 * self.population) if self.delta is None else self.delta

    @property
    def expected_cohort(self) -> float:
        """Return q N, the denominator of every mean."""
        return self.sample_rate * self.population


class RecordPrivacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[record_privacy]: what makes the mechanism of all devices one and the same."""

    records: Count  # q = batch_size / records; devices with fewer get no private task
    delta: Delta | None = None  # None: that of the run, else 1 / (10 max_examples)


class SecureSums(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[secure_aggregation]: the gateway learns the sum of its devices' deltas, and no delta."""

    minimum: Annotated[int, msgspec.Meta(ge=2)] = 3  # updates in a sum; min_cohort if that is more
    threshold: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 2 / 3  # share that must stay
    colluding: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.1  # share that may help the gateway
    range: Positive = 4.0  # every value of a delta lies in [-range, range]
    value_bits: Annotated[int, msgspec.Meta(ge=8, le=32)] = 20  # per value, at least
    ring: Literal[16, 24, 32, 64] | None = None  # bits; None: the narrowest that holds the sum
    keystream: Literal["fastest", "aes-256-ctr", "chacha20"] = "chacha20"
    stage_s: StageSeconds = 30.0  # deadline of each of the five stages


class GatewayFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """gateway.toml."""

    name: Name
    hosts: Annotated[tuple[Host, ...], msgspec.Meta(min_length=1)]
    address: Host = "0.0.0.0"  # listened on
    port: Port = 8443
    enroll_port: Port = 8444
    bundles: tuple[str, ...] = ()
    bundle_keys: tuple[HexKey, ...] = ()
    cohort: Count = 50
    min_cohort: Count = 20
    over_selection: Annotated[float, msgspec.Meta(ge=1, le=10)] = 1.3
    clipping_norm: Positive | None = None  # of a device's delta; None: not clipped
    certificate_days: Annotated[int, msgspec.Meta(ge=1, le=825)] = 90  # of devices
    retry_s: Annotated[int, msgspec.Meta(ge=1, le=86400)] = 60  # devices come back in 1 to 3 times
    reflection: bool = False  # gRPC server reflection, for debugging
    limits: Limits = Limits()
    client_privacy: ClientPrivacy | None = None
    record_privacy: RecordPrivacy | None = None
    secure_aggregation: SecureSums | None = None

    def __post_init__(self) -> None:
        _check(self)


def _check(file: GatewayFile) -> None:
    if file.min_cohort > file.cohort:
        raise ValueError(
            f"min_cohort = {file.min_cohort} is above cohort = {file.cohort}: a round would end "
            "before it may be sent"
        )
    limits = file.limits
    if limits.message_bytes < limits.chunk_bytes + MESSAGE:
        raise ValueError(
            f"limits.message_bytes = {limits.message_bytes}: expected at least {MESSAGE} more than "
            f"chunk_bytes = {limits.chunk_bytes}, as a chunk travels in one message"
        )
    if file.secure_aggregation is not None:
        _check_secure(file, file.secure_aggregation)
    private = file.client_privacy
    if private is None:
        return
    if file.clipping_norm is not None:
        raise ValueError("clipping_norm: with [client_privacy] the norm stands there; leave it out")
    if private.expected_cohort < file.min_cohort:
        raise ValueError(
            f"client_privacy: an expected cohort of {private.expected_cohort:g} is below "
            f"min_cohort = {file.min_cohort}; raise sample_rate or population"
        )
    if private.target_delta >= 1 / private.population:
        raise ValueError(
            f"client_privacy.delta = {private.target_delta:g} is not below 1/population = "
            f"{1 / private.population:g}: it would allow releasing whole devices"
        )


def _check_secure(file: GatewayFile, secure: SecureSums) -> None:
    if file.client_privacy is not None:
        raise ValueError(
            "[secure_aggregation] does not go with [client_privacy]: this gateway would clip and "
            "noise deltas that it does not see; leave one of the two out"
        )
    if file.clipping_norm is not None:
        raise ValueError(
            "[secure_aggregation] does not go with clipping_norm: nobody clips what nobody sees; "
            "secure_aggregation.range bounds every value"
        )
    if secure.threshold < (1 + secure.colluding) / 2:
        raise ValueError(
            f"secure_aggregation.threshold = {secure.threshold:g}: expected at least (1 + "
            f"colluding) / 2 = {(1 + secure.colluding) / 2:g}, or both secrets of a device could "
            "be collected"
        )
    if secure.minimum > file.cohort:
        raise ValueError(
            f"secure_aggregation.minimum = {secure.minimum} is above cohort = {file.cohort}: no "
            "sum would be opened before the deadline"
        )
    if file.cohort * file.over_selection > MAX_SECURE:
        raise ValueError(
            f"[secure_aggregation]: cohort * over_selection = "
            f"{file.cohort * file.over_selection:g} devices, at most {MAX_SECURE} fit the messages "
            "of one sum"
        )
    needed = KEYS * file.cohort * file.over_selection + MESSAGE
    if file.limits.message_bytes < needed:
        raise ValueError(
            f"[secure_aggregation]: limits.message_bytes = {file.limits.message_bytes}: the keys "
            f"of all devices of a sum travel in one message, of up to {needed:.0f} bytes"
        )
    most = math.ceil(file.cohort * file.over_selection)
    try:
        Grid(ring_for(most, secure.value_bits, secure.ring), most, secure.range)
    except ConfigError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class GatewayFolder:
    """Paths below a gateway's folder."""

    folder: Path

    @property
    def authority(self) -> Path:
        """Keys and certificates."""
        return self.folder / "authority"

    @property
    def state(self) -> Path:
        """The database."""
        return self.folder / "state.sqlite"

    @property
    def roster(self) -> Path:
        """The devices of secure sums, signed by the bundles' publisher (roster.py); optional."""
        return self.folder / "roster.json"

    @property
    def spool(self) -> Path:
        """Bytes of uploads."""
        return self.folder / "spool"

    @property
    def files(self) -> Path:
        """Adapters of open rounds by SHA-256; devices fetch them."""
        return self.folder / "files"

    @property
    def results(self) -> Path:
        """Deltas for the coordinator by SHA-256."""
        return self.folder / "results"

    def read(self) -> GatewayFile:
        """Return gateway.toml; raise ConfigError naming the field that is wrong."""
        return read_gateway(self.folder)

    def bundles(self, file: GatewayFile) -> list[Path]:
        """Return the folders of the bundles that are served."""
        return [(self.folder / one).resolve() for one in file.bundles]


def read_gateway(folder: Path) -> GatewayFile:
    """Return the folder's gateway.toml; raise ConfigError naming the field that is wrong."""
    file = folder / GATEWAY_FILE
    try:
        return msgspec.toml.decode(file.read_bytes(), type=GatewayFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: {error}. A gateway's folder is made by `anabranch edge gateway init`"
        ) from None


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may read."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chmod(folder, 0o700)
