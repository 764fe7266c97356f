"""A federation on one machine, from its files to its result: `anabranch simulate`.

    experiment.toml     run = "run.toml"             the run all parties agree on
                        engine = "sequential"        or "cohort", "ray", "flower" (engines.py)
                        workers = 1                  clients, or shards of a cohort, at a time
                        base_dtype = "fp32"          or "bf16": frozen weights (cohort/precision.py)
                        seed = 0                     instead of the seed in run.toml
                        validation = "dev.csv"       the coordinator's: chooses the best round
                        test = "test.csv"            the coordinator's: touched once, at the end
                        targets = [0.8, 0.9]         accuracies: when was each reached?

                        [sites]                      either: sites with a file each
                        north = "north.csv"          name = data file, relative to this file
                        [ranks]
                        north = 4                    highest LoRA rank it trains; others: no limit

                        [population]                 or: many clients over one data set
                        [devices] [clock] [faults]   how unequal they are, what a round costs, and
                                                     what goes wrong (population_run.py)

                        [sweep], [tune]              experiments/sweep_plan.py, tune_plan.py

Sites get folders of their own inside the run folder, with a fresh privacy ledger each: what
is spent here is not charged to the ledger of a real site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from anabranch.client.data.records import Records, load_records
from anabranch.client.models import require_device
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError, DataError
from anabranch.protocols.tables import Device
from anabranch.server.evaluation import evaluator, initial_adapter, require_shared_model
from anabranch.server.outcome import Finished
from anabranch.server.store import RunFolder, new_run
from anabranch.simulations import engines
from anabranch.simulations.clock.table import ClockTable
from anabranch.simulations.cohort.precision import BaseDtype
from anabranch.simulations.experiments.file import decode_file
from anabranch.simulations.experiments.settings import Tree, changed, decode, encode, file_of
from anabranch.simulations.faults.plan import FaultPlan, read_plan
from anabranch.simulations.faults.table import FaultsTable
from anabranch.simulations.population.devices_table import DevicesTable
from anabranch.simulations.population.table import PopulationTable
from anabranch.storage.files import write_atomic

OnEvent = Callable[..., None]
Evaluate = Callable[[Adapter], dict[str, float]]
Watch = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment with its files found and its run configuration read."""

    config: RunConfig
    run_toml: bytes
    sites: Mapping[str, Path] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)  # site -> highest LoRA rank
    engine: engines.Engine = "sequential"
    workers: int = 1
    device: Device = "cpu"
    base_dtype: BaseDtype = "fp32"  # of the frozen weights, where a cohort multiplies them
    validation: Path | None = None
    test: Path | None = None
    targets: tuple[float, ...] = ()
    folder: Path = Path()  # that the files of the tables below are relative to
    population: PopulationTable | None = None
    devices: DevicesTable | None = None
    clock: ClockTable | None = None
    faults: FaultsTable | FaultPlan | None = None  # a plan: to be replayed
    seeded_noise: bool = False

    @property
    def time(self) -> Literal["real", "virtual"]:
        """Return what a second of this run is."""
        simulated = any(one is not None for one in (self.devices, self.clock, self.faults))
        return "virtual" if simulated else "real"

    def files(self) -> list[Path]:
        """Return every file that decides the numbers, beside the configuration."""
        own = [path for path in (self.validation, self.test) if path is not None]
        tables = [
            None if self.population is None else self.population.data,
            None if self.devices is None else self.devices.trace,
            None if self.devices is None else self.devices.availability,
            self.faults.plan if isinstance(self.faults, FaultsTable) else None,
        ]
        return [*self.sites.values(), *own, *(self.folder / one for one in tables if one)]

    def facts(self) -> dict[str, Any]:
        """Return what decides the numbers, beside the configuration and the files."""
        tables = (self.population, self.devices, self.clock, self.faults)
        return {
            "sites": list(self.sites),
            "ranks": dict(self.ranks),
            "tables": [msgspec.to_builtins(one) for one in tables],
            "seeded_noise": self.seeded_noise,
        }


@dataclass(frozen=True, kw_only=True)
class Source:
    """experiment.toml and run.toml as trees: what a sweep changes before they are read."""

    path: Path
    file: bytes
    run: Path
    run_toml: bytes

    def trees(self) -> tuple[Tree, Tree]:
        """Return (experiment.toml, run.toml)."""
        return decode(self.file, str(self.path)), decode(self.run_toml, str(self.run))


def read_source(path: Path) -> Source:
    """Read the two files; raise ConfigError naming the one that cannot be read."""
    file = _read(path, "an experiment.toml")
    run = path.parent / decode_file(file, path).run
    return Source(path=path, file=file, run=run, run_toml=_read(run, "a run.toml"))


def load(
    path: Path, changes: Mapping[str, Any] | None = None, seed: int | None = None
) -> Experiment:
    """Read experiment.toml and its run.toml; raise ConfigError naming file and field.

    `changes` are settings by dotted path (experiments/settings.py), put into the files before
    they are read; `seed` comes before the experiment's own, and that before run.toml's.
    """
    return experiment_of(read_source(path), changes or {}, seed)


def experiment_of(source: Source, changes: Mapping[str, Any], seed: int | None) -> Experiment:
    """Return the experiment of two files with some settings changed."""
    file_toml, run_toml = _changed(source, changes, seed)
    file = decode_file(file_toml, source.path)
    config = parse(run_toml, source=str(source.run))
    if file.seeded_noise and config.privacy is None:
        raise ConfigError(f"{source.path}: seeded_noise is for runs with [privacy]: leave it out")
    if config.privacy is not None and file.clock is not None and file.clock.partial_work:
        raise ConfigError(
            f"{source.path}: clock.partial_work = true does not go with [privacy]: the number of "
            "noisy steps is fixed in advance, and fewer would tell how fast a client is. Leave "
            "partial_work out"
        )
    require_shared_model(config, validation=file.validation, test=file.test)
    folder = source.path.parent
    return Experiment(
        config=config,
        run_toml=run_toml,
        sites={name: folder / data for name, data in sorted(file.sites.items())},
        ranks=file.ranks,
        engine=file.engine,
        workers=file.workers,
        device=file.device,
        base_dtype=file.base_dtype,
        validation=None if file.validation is None else folder / file.validation,
        test=None if file.test is None else folder / file.test,
        targets=file.targets,
        folder=folder,
        population=file.population,
        devices=file.devices,
        clock=file.clock,
        faults=file.faults,
        seeded_noise=file.seeded_noise,
    )


def replaying(experiment: Experiment, plan: Path) -> Experiment:
    """Return the experiment with the faults of a plan instead of its own; ConfigError for [sites].

    Raises ConfigError for a plan that cannot be read.
    """
    if experiment.population is None:
        raise ConfigError(f"{plan}: faults strike a [population]; this experiment has [sites]")
    if experiment.engine not in engines.VIRTUAL:
        raise ConfigError(f'{plan}: faults need virtual time, not engine = "{experiment.engine}"')
    return dataclasses.replace(experiment, faults=read_plan(plan))


def has_sweep(path: Path) -> bool:
    """Whether an experiment has a [sweep]; ConfigError if it cannot be read."""
    source = read_source(path)
    return source.trees()[0].get("sweep") is not None


def _changed(source: Source, changes: Mapping[str, Any], seed: int | None) -> tuple[bytes, bytes]:
    """Return both files with changes and seed in them; unchanged files stay byte for byte."""
    of_file = {path: value for path, value in changes.items() if file_of(path) == "experiment"}
    of_run = {path: value for path, value in changes.items() if file_of(path) == "run"}
    file_tree, run_tree = source.trees()
    seed = file_tree.get("seed") if seed is None else seed
    if seed is not None and seed != run_tree.get("seed", 0):
        of_run["seed"] = seed
    return (
        encode(changed(file_tree, of_file)) if of_file else source.file,
        encode(changed(run_tree, of_run)) if of_run else source.run_toml,
    )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give the path of {what}") from None


def federate(
    experiment: Experiment,
    records: Mapping[str, Records],
    folder: RunFolder,
    on_event: OnEvent | None = None,
    watch: Watch | None = None,
) -> Finished:
    """Run all rounds and return the result; everything is written to `folder` as it happens.

    `records` are those of check_sites. `watch` is told the metrics of every evaluation on the
    validation records, and may raise to end the run. Raises what engines.run raises.
    """
    config = experiment.config
    run = new_run(config.name)
    sites = {
        name: _site(folder.path, name, data, experiment) for name, data in experiment.sites.items()
    }

    def event(kind: str, **fields: Any) -> None:
        folder.event(kind, **fields)
        if on_event is not None:
            on_event(kind, **fields)

    event(
        "run_started",
        run=run,
        config=config.digest(),
        sites=list(sites),
        rounds=config.federation.rounds,
        engine=experiment.engine,
    )
    result = engines.run(
        experiment.engine,
        config,
        sites,
        initial_adapter(config),
        run_name=run,
        workers=experiment.workers,
        base_dtype=experiment.base_dtype,
        evaluate=watched(experiment, watch),
        checkpoint=folder.checkpoint,
        event=event,
    )
    counts = {
        name: one.label_counts(len(config.task.labels)).tolist() for name, one in records.items()
    }
    return Finished(run=run, config=config, folder=folder, result=result, label_counts=counts)


def watched(experiment: Experiment, watch: Watch | None) -> Evaluate | None:
    """Return what measures an adapter on the validation records; None without them."""
    if experiment.validation is None:
        return None
    records = load_records(experiment.validation, experiment.config)
    measure = evaluator(experiment.config, records, device=experiment.device)
    if watch is None:
        return measure

    def told(adapter: Adapter) -> dict[str, float]:
        metrics = measure(adapter)
        watch(metrics)
        return metrics

    return told


def check_sites(experiment: Experiment) -> dict[str, Records]:
    """Return every site's records, or raise one DataError with what all of them break.

    Raises ConfigError if the device is not there. Nothing has been written or trained then.
    """
    require_device(experiment.device)
    records: dict[str, Records] = {}
    problems: list[str] = []
    for name, data in experiment.sites.items():
        try:
            records[name] = load_records(data, experiment.config)
        except DataError as error:
            problems.append(f"site {name}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return records


def _site(run: Path, name: str, data: Path, experiment: Experiment) -> Path:
    """Write the site's folder inside the run folder and return it."""
    folder = run / "sites" / name
    lines = [
        f"name = {msgspec.json.encode(name).decode()}",
        f"data = {msgspec.json.encode(str(data.resolve())).decode()}",
        f'device = "{experiment.device}"',
        'ledger_witness = "folder"',  # nothing of a simulation outlives its run folder
    ]
    if name in experiment.ranks:
        lines.append(f"max_rank = {experiment.ranks[name]}")
    write_atomic(folder / "site.toml", "\n".join([*lines, ""]).encode())
    return folder
