"""[clock] of an experiment: what rounds cost in virtual time.

The deadline, over-selection, tiers and the buffer are the run's own (run.toml, [federation]): a
real coordinator keeps them, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Fraction, NotNegative, Positive, Uplink
from anabranch.simulations.clock.flops import Work
from anabranch.simulations.clock.journeys import DeviceJourneys
from anabranch.simulations.clock.pace import Ints, Pace, Prefix
from anabranch.simulations.clock.payload import REPORT_BYTES, frame_bytes
from anabranch.simulations.population.devices import Availability, Devices

REQUEST_BYTES = 4096  # of the JSON beside an adapter; for partial work alone

Metric = Literal["accuracy", "auroc", "macro_f1"]


class ClockTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[clock]."""

    start_hour: Annotated[float, msgspec.Meta(ge=0, lt=168)] = 0.0  # UTC, from Monday 00:00
    flops_per_record: Positive | None = None  # forward and backward; None: counted on the model
    prefix: Prefix = "round"  # frozen layers: once a round, once a run, or with every use
    partial_work: bool = False  # who is slow does the steps that fit before the deadline
    overhead_s: NotNegative = 0.0  # of every message, in each direction
    heartbeat_s: NotNegative = 30.0  # how often the coordinator learns who is connected
    memory_factor: NotNegative = 1.0  # of what training needs as counted; 0: memory for all
    speed_sigma: NotNegative = 0.0  # of the logarithm of the speed, from round to round
    network_sigma: NotNegative = 0.0
    metric: Metric = "accuracy"  # that the targets are of; more is better
    targets: tuple[Fraction, ...] = ()  # time to accuracy is told for these


def build_journeys(
    table: ClockTable,
    devices: Devices,
    availability: Availability,
    config: RunConfig,
    work: Work | None,
    seed: int,
    *,
    sizes: Ints,
    held: Ints | None = None,
    spec: AdapterSpec | None = None,
    index: Mapping[str, int] | None = None,
) -> DeviceJourneys:
    """Return the journeys of a population, whose `pace` is the StepLimit of partial work.

    `work` is that of flops.work_of; None needs table.flops_per_record. `sizes` and `held` are
    the clients' training and held-out records. `spec` is the adapter's, needed for partial work.
    `index` says which client has which name; None: client-000000 and so on. `availability` counts
    from the table's start hour.

    Raises ConfigError for clients without devices, or for what is missing.
    """
    if len(sizes) != len(devices):
        raise ConfigError(f"[clock]: {len(sizes)} clients and {len(devices)} devices")
    pace = Pace(
        gflops=devices.gflops,
        uplink_bps=devices.uplink_bps,
        downlink_bps=devices.downlink_bps,
        sizes=sizes,
        work=_work(table, work),
        batch_size=config.training.batch_size,
        deadline_s=config.federation.deadline_s,
        seed=seed,
        private=config.privacy is not None,
        prefix=table.prefix,
        overhead_s=table.overhead_s,
        speed_sigma=table.speed_sigma,
        network_sigma=table.network_sigma,
        partial_work=table.partial_work,
        index=index,
    )
    if table.partial_work:
        if spec is None:
            raise ConfigError("clock.partial_work needs the adapter's spec: its bytes take time")
        if config.privacy is not None:
            raise ConfigError(
                "clock.partial_work does not go with [privacy]: the number of noisy steps is fixed "
                "in advance, and fewer would tell how fast a client is. Leave partial_work out"
            )
        down = frame_bytes(spec, WHOLE, Uplink()) + _header(spec)
        pace = pace.with_bytes(down, REPORT_BYTES + frame_bytes(spec, WHOLE, config.uplink))
    return DeviceJourneys(
        devices,
        availability,
        config,
        pace,
        held=held,
        seed=seed,
        memory_factor=table.memory_factor,
        heartbeat_s=table.heartbeat_s,
    )


def _work(table: ClockTable, work: Work | None) -> Work:
    """Return the work as counted, or as the table says it."""
    flops = table.flops_per_record
    if flops is None:
        if work is None:
            raise ConfigError("clock.flops_per_record: expected a number: no model was counted")
        return work
    fixed, record = (0, 0.0) if work is None else (work.fixed_bytes, work.bytes_per_record)
    return Work(
        prefix=0.0,
        forward=flops / 3,  # the backward pass is twice the forward pass
        backward=2 * flops / 3,
        fixed_bytes=fixed,
        bytes_per_record=record,
    )


def _header(spec: AdapterSpec) -> int:
    """Return the bytes that a request has beyond the values: the spec, and the configuration."""
    return len(msgspec.json.encode(spec)) + REQUEST_BYTES
