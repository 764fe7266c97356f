"""[population] of an experiment file: many simulated clients out of one data file.

    [population]
    data = "train.csv"           relative to the experiment file
    clients = 1000
    partition = "dirichlet"      partitions.py says what each one does
    alpha = 0.5
    records_per_client = 50      on average; without it every record is dealt
    reuse = true                 a record may belong to many clients

Each client holds out training.holdout of its records. With reuse, a record that is held out by one
client is trained on by none. Copies of a record in the file are different records here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np

from anabranch.client.data.read import Table, read_table
from anabranch.client.data.records import Records, to_records
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, DataError
from anabranch.protocols.tables import Count, Positive
from anabranch.simulations.population import partitions, traces
from anabranch.simulations.population.availability import AlwaysOnline, Habit, Synthetic
from anabranch.simulations.population.clients import Partition
from anabranch.simulations.population.devices import Availability, Devices, Floats, Ints
from anabranch.simulations.population.devices_table import DevicesTable, require_consistent
from anabranch.simulations.population.generator import Generated, generate, preset
from anabranch.simulations.population.partitions import Sharing

Kind = Literal["iid", "quantity", "dirichlet", "shards", "feature", "natural"]
# option -> the partitions that have it
_OWN: Final = {
    "alpha": ("dirichlet", "feature"),
    "shards": ("shards",),
    "bins": ("feature",),
    "column": ("feature", "natural"),
    "small": ("natural",),
    "sizes": ("iid", "quantity", "dirichlet", "feature"),
    "spread": ("iid", "quantity", "dirichlet", "feature"),
}


class PopulationTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[population]: whose records are whose."""

    data: str
    clients: Count | None = None  # natural: None is one per value
    partition: Kind = "iid"
    alpha: Positive | None = None  # dirichlet, feature: concentration in all; default 1
    shards: Count | None = None  # shards: per client; default 2
    bins: Count | None = None  # feature: default 10
    column: str | None = None  # natural: required; feature: a column of numbers
    sizes: Literal["equal", "lognormal", "dirichlet"] | None = None  # quantity: lognormal
    spread: Positive | None = None  # σ of lognormal, β of dirichlet; default 1
    records_per_client: Count | None = None
    reuse: bool = False
    min_records: Annotated[int, msgspec.Meta(ge=1)] = 1  # a client has at least so many
    small: Literal["refuse", "drop"] | None = None  # natural: clients below min_records
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None  # None: the experiment's


@dataclass(frozen=True, eq=False, kw_only=True)
class Built:
    """A population as the engines and the clock take it; client i is entry i of everything."""

    records: Records
    partition: Partition
    devices: Devices | None = None
    availability: Availability | None = None
    max_ranks: Ints | None = None  # (clients,), 0: no limit; None: nobody has one
    values: tuple[str, ...] = ()  # natural: the column's value of each client


def build_population(
    table: PopulationTable,
    devices_table: DevicesTable | None,
    config: RunConfig,
    *,
    folder: Path,
    seed: int,
) -> Built:
    """Return the population of an experiment whose file lies in `folder`.

    The same for the same seed, tables and files. Raises ConfigError for options that contradict
    each other, DataError for files that cannot be read, break the contract, or are too small.
    """
    require_options(table)
    if devices_table is not None:
        require_consistent(devices_table)
    seed = seed if table.seed is None else table.seed
    file = read_table(folder / table.data)
    records = to_records(file, config)
    partition, values = divide(table, file, records, holdout=config.training.holdout, seed=seed)
    built = Built(records=records, partition=partition, values=values)
    if devices_table is None:
        return built
    devices, availability, ranks = equip(devices_table, len(partition), folder=folder, seed=seed)
    return Built(
        records=records,
        partition=partition,
        devices=devices,
        availability=availability,
        max_ranks=ranks if ranks is not None and ranks.any() else None,
        values=values,
    )


def require_options(table: PopulationTable) -> None:
    """Raise ConfigError for an option that the partition does not have or lacks."""
    for option, kinds in _OWN.items():
        if getattr(table, option) is not None and table.partition not in kinds:
            raise ConfigError(
                f"population.{option}: partition = {table.partition!r} does not have it, only "
                f"{' and '.join(kinds)}: remove it"
            )
    if table.partition == "natural" and table.column is None:
        raise ConfigError("population.column: a natural partition needs the name of a column")
    if table.partition != "natural" and table.clients is None:
        raise ConfigError(f"population.clients: partition = {table.partition!r} needs a number")
    if table.reuse and table.records_per_client is None:
        raise ConfigError("population.records_per_client: reuse = true needs it")
    if table.partition == "natural" and (table.reuse or table.records_per_client is not None):
        raise ConfigError(
            "population: a natural partition takes the records as they are: remove reuse and "
            "records_per_client"
        )
    if table.partition == "quantity" and table.sizes == "equal":
        raise ConfigError('population.sizes: "equal" is partition = "iid": take another')
    if table.spread is not None and (table.sizes or _default(table)) == "equal":
        raise ConfigError("population.spread: equal sizes have none: set sizes or remove it")
    least = table.records_per_client
    if least is not None and least < table.min_records:
        raise ConfigError(
            f"population.min_records: {table.min_records} is more than records_per_client = {least}"
        )


def divide(
    table: PopulationTable, file: Table, records: Records, *, holdout: float, seed: int
) -> tuple[Partition, tuple[str, ...]]:
    """Return the partition, and the value of each client if it is a natural one."""
    sharing = Sharing(
        clients=table.clients or 0,
        seed=seed,
        records_per_client=table.records_per_client,
        reuse=table.reuse,
        min_records=table.min_records,
        holdout=holdout,
        sizes=table.sizes or _default(table),
        spread=table.spread or 1.0,
    )
    match table.partition:
        case "iid" | "quantity":
            return partitions.iid(len(records), sharing), ()
        case "dirichlet":
            return partitions.by_label(records.labels, table.alpha or 1.0, sharing), ()
        case "shards":
            return partitions.by_shards(records.labels, table.shards or 2, sharing), ()
        case "feature":
            values = _feature(table, file, records)
            return partitions.by_feature(values, table.bins or 10, table.alpha or 1.0, sharing), ()
        case "natural":
            cells = _column(table.column or "", file)
            return partitions.by_value(cells, sharing, small=table.small or "refuse")


def equip(
    table: DevicesTable, num_clients: int, *, folder: Path, seed: int
) -> tuple[Devices, Availability, Ints | None]:
    """Return the devices of N clients, when they are online, and their highest ranks.

    Raises ConfigError and DataError as build_population does.
    """
    if table.trace is None:
        classes = preset(table.preset) if table.preset is not None else table.classes
        made = generate(classes, num_clients, seed)
        if table.availability is None:
            return made.devices, _synthetic(made, table, seed), made.max_ranks
        intervals = _intervals(table, folder, num_clients)
        if table.availability_format == "anabranch":  # row i is client i
            return made.devices, intervals.of(np.arange(num_clients)), made.max_ranks
        rows = _rows(table.availability, len(intervals), num_clients, table, seed)
        return made.devices, intervals.of(rows), made.max_ranks
    path = folder / table.trace
    traced = (
        traces.read_fedscale_devices(path, table.gflop_per_sample or 1.0)
        if table.trace_format == "fedscale"
        else traces.read_devices(path)
    )
    chosen = _rows(table.trace, len(traced.devices), num_clients, table, seed)
    devices, ranks = traced.devices.take(chosen), traced.max_ranks[chosen]
    if table.availability is None:
        return devices, AlwaysOnline(), ranks
    if table.availability_format == "anabranch":  # row by row the same devices
        return devices, _intervals(table, folder, len(traced.devices)).of(chosen), ranks
    intervals = _intervals(table, folder, num_clients)
    rows = _rows(table.availability, len(intervals), num_clients, table, seed + 1)
    return devices, intervals.of(rows), ranks


def _synthetic(made: Generated, table: DevicesTable, seed: int) -> Availability:
    if (made.habits.habit == Habit.ALWAYS).all():
        return AlwaysOnline()
    return Synthetic(made.habits, seed=seed, start_hour_utc=table.start_hour_utc)


def _intervals(table: DevicesTable, folder: Path, num_devices: int) -> traces.Intervals:
    path = folder / (table.availability or "")
    match table.availability_format:
        case "anabranch":
            return traces.read_intervals(path, num_devices, table.period_s)
        case "fedscale":
            return traces.read_fedscale_intervals(path)
        case "flash":
            return traces.read_flash_intervals(path)


def _rows(name: str, there: int, wanted: int, table: DevicesTable, seed: int) -> Ints:
    """Return which rows of a trace the clients are: in order, or drawn, each once if possible."""
    if table.rows == "in-order":
        if there < wanted:
            raise DataError(
                f"{name}: {there} devices for {wanted} clients: take fewer clients, or set "
                'devices.rows = "draw" to use devices more than once'
            )
        return np.arange(wanted)
    rng = np.random.default_rng([seed, 0x7ACE])
    rows: Ints = (
        rng.permutation(there)[:wanted] if there >= wanted else rng.integers(0, there, wanted)
    )
    return rows


def _feature(table: PopulationTable, file: Table, records: Records) -> Floats:
    """Return what orders the records: a column of numbers, or what partitions.py says."""
    if table.column is not None:
        cells = _column(table.column, file)
        try:
            return np.array([float(cell) for cell in cells], np.float64)
        except (TypeError, ValueError):
            raise DataError(
                f"{file.source}: population.column {table.column!r} is not a column of numbers"
            ) from None
    if isinstance(records.inputs, list):
        return np.array([len(text) for text in records.inputs], np.float64)
    return partitions.principal_scores(records.inputs)


def _column(name: str, file: Table) -> Sequence[Any]:
    if name not in file.columns:
        raise ConfigError(
            f"population.column: {file.source} has no column {name!r}, only {list(file.columns)}"
        )
    return file.columns[name]


def _default(table: PopulationTable) -> Literal["equal", "lognormal"]:
    return "lognormal" if table.partition == "quantity" else "equal"
