"""experiment.toml, read: the fields, and which of them go together (simulations/experiment.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Count, Device, Fraction, Name
from anabranch.simulations import engines
from anabranch.simulations.clock.table import ClockTable
from anabranch.simulations.cohort.precision import BaseDtype
from anabranch.simulations.faults.table import FaultsTable
from anabranch.simulations.population.devices_table import DevicesTable
from anabranch.simulations.population.table import PopulationTable


class ExperimentFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """experiment.toml."""

    run: str
    sites: dict[Name, str] = {}
    ranks: dict[Name, Count] = {}
    population: PopulationTable | None = None
    devices: DevicesTable | None = None
    clock: ClockTable | None = None
    faults: FaultsTable | None = None
    seeded_noise: bool = False  # of a private population: known noise, so nobody is protected
    engine: engines.Engine = "sequential"
    workers: Count = 1
    device: Device = "cpu"
    base_dtype: BaseDtype = "fp32"  # "bf16": of engines that train cohorts (cohort/precision.py)
    seed: int | None = None  # None: that of run.toml
    validation: str | None = None
    test: str | None = None
    targets: tuple[Fraction, ...] = ()
    sweep: dict[str, Any] | None = None  # experiments/sweep_plan.py
    tune: dict[str, Any] | None = None  # experiments/tuning.py


def decode_file(file: bytes, path: Path) -> ExperimentFile:
    """Return the file, or raise ConfigError naming `path` and the field."""
    try:
        decoded = msgspec.toml.decode(file, type=ExperimentFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    _require_finite(path, msgspec.toml.decode(file), "")
    _check(path, decoded)
    return decoded


def _require_finite(path: Path, value: object, where: str) -> None:
    """Refuse inf and nan, which TOML can write and no setting can be."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {where} = {value}: expected a finite number")
    inside: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for name, one in inside:
        _require_finite(path, one, f"{where}.{name}" if where else str(name))


def _check(path: Path, file: ExperimentFile) -> None:
    """Refuse what single fields cannot say."""
    virtual = any(one is not None for one in (file.devices, file.clock, file.faults))
    engines.require_engine(
        file.engine,
        virtual=virtual and file.population is not None,
        base_dtype=file.base_dtype,
        where=f"{path}: ",
    )
    if file.population is not None:
        if file.sites or file.ranks:
            raise ConfigError(
                f"{path}: there are [sites] and a [population]: leave one of them out"
            )
        return
    if not file.sites:
        raise ConfigError(
            f"{path}: [sites] is empty: name at least one site and its data file, or describe a "
            "[population]"
        )
    for name in ("devices", "clock", "faults"):
        if getattr(file, name) is not None:
            raise ConfigError(f"{path}: [{name}] goes with [population], not with [sites]")
    if file.seeded_noise:
        raise ConfigError(f"{path}: seeded_noise goes with [population], not with [sites]")
    strangers = sorted(file.ranks.keys() - file.sites.keys())
    if strangers:
        raise ConfigError(
            f"{path}: [ranks] names {strangers[0]!r}, which is not in [sites]: "
            f"expected one of {sorted(file.sites)}"
        )
