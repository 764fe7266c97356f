"""A run over a population: records loaded once, clients made when they are asked for.

    [population]   records, and which of them each client has       population/table.py
    [devices]      how unequal they are, and when they are online   population/devices_table.py
    [clock]        what a round costs in virtual time               clock/table.py
    [faults]       what goes wrong                                  faults/table.py

With any of the last three a run is in virtual time, its seconds are those of the devices, and
nobody waits for them. [clock] alone has equal devices that are always online; [devices] alone has
the clock's defaults.

Beside what every run folder holds:

    clients/            what single clients did        (experiments/recorder.py)
    messages.parquet    every message: times, bytes, energy, outcome (clock/log.py), with a clock
    faults.toml         the plan of the run's faults, to be replayed: --faults

With [privacy] every client has books of its own, in memory. `seeded_noise = true` draws their noise
from the seed, so that a run can be repeated exactly. Noise that can be drawn again protects
nobody: such a run makes no release.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from anabranch.client.models import MODELS, require_device
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.server.evaluation import initial_adapter
from anabranch.server.outcome import Finished
from anabranch.server.statement.guarantees import LISTED
from anabranch.server.store import RunFolder, new_run
from anabranch.simulations import engines
from anabranch.simulations.clock.flops import Work, work_of
from anabranch.simulations.clock.journeys import DeviceJourneys
from anabranch.simulations.clock.outcome import outcome_of
from anabranch.simulations.clock.table import ClockTable, build_journeys
from anabranch.simulations.experiment import Experiment, OnEvent, Watch, load, watched
from anabranch.simulations.experiments.recorder import Recorder
from anabranch.simulations.faults.replay import replayable
from anabranch.simulations.faults.table import Faults
from anabranch.simulations.faults.table import build as build_faults
from anabranch.simulations.population.availability import AlwaysOnline
from anabranch.simulations.population.books import SimulatedBooks
from anabranch.simulations.population.client import Conduct
from anabranch.simulations.population.clients import PopulationClients, client_name
from anabranch.simulations.population.devices import uniform_devices
from anabranch.simulations.population.show import describe, write_page
from anabranch.simulations.population.table import Built, build_population
from anabranch.storage.files import write_atomic

KNOWN_NOISE = (
    "seeded_noise = true: whoever knows the seed knows the noise, so nobody is protected, and the "
    "epsilon of this run is only what fresh noise would have cost"
)
TOO_MANY = (
    f"more than {LISTED} clients trained with [privacy], and a release lists the guarantee of each"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class World:
    """A population with all that surrounds it, and the adapter that its run starts from."""

    built: Built
    adapter: Adapter
    journeys: DeviceJourneys | None  # None: no clock
    faults: Faults | None


def build_world(experiment: Experiment) -> World:
    """Build what an experiment's tables describe; nothing is written.

    The same for the same seed, tables and files. Raises ConfigError and DataError, naming table
    and field.
    """
    require_device(experiment.device)
    built, adapter = built_of(experiment), initial_adapter(experiment.config)
    clock = experiment.clock
    if clock is None and experiment.devices is not None:
        clock = ClockTable()
    return World(
        built=built,
        adapter=adapter,
        journeys=None if clock is None else _journeys(experiment, clock, built, adapter),
        faults=_faults(experiment, built),
    )


def built_of(experiment: Experiment) -> Built:
    """Return the population of an experiment and its devices; raises as build_world does."""
    if experiment.population is None:
        raise ConfigError("the experiment has [sites], and no [population]")
    devices, clock = experiment.devices, experiment.clock
    if clock is not None and devices is not None and clock.start_hour:
        if devices.start_hour_utc not in (0.0, clock.start_hour):
            raise ConfigError(
                f"clock.start_hour = {clock.start_hour:g} and devices.start_hour_utc = "
                f"{devices.start_hour_utc:g}: leave one of them out"
            )
        devices = msgspec.structs.replace(devices, start_hour_utc=clock.start_hour)
    config = experiment.config
    return build_population(
        experiment.population, devices, config, folder=experiment.folder, seed=config.seed
    )


def show(path: Path, *, seed: int | None = None, page: Path | None = None) -> dict[str, Any]:
    """Describe the population of an experiment, and draw it into the file `page`; run nothing.

    Raises ConfigError and DataError as build_world does.
    """
    experiment = load(path, seed=seed)
    built, labels = built_of(experiment), experiment.config.task.labels
    if page is not None:
        says = f"{path.name}, seed {experiment.config.seed}."
        write_page(page, built, labels, title="Population", says=says)
    return {
        "clients": len(built.partition),
        "records": len(built.records),
        "seed": experiment.config.seed,
        "page": None if page is None else str(page),
        "text": describe(built, labels),
    }


def federate_population(
    experiment: Experiment,
    world: World,
    folder: RunFolder,
    on_event: OnEvent | None = None,
    watch: Watch | None = None,
) -> tuple[Finished, dict[str, Any]]:
    """Run all rounds; return the result, and what the summary says of its virtual time.

    Everything is written to `folder` as it happens. Raises what engines.run raises.
    """
    config, built, run = experiment.config, world.built, new_run(experiment.config.name)
    recorder = Recorder(folder, on_event)
    recorder(
        "run_started",
        run=run,
        config=config.digest(),
        sites=len(built.partition),
        rounds=config.federation.rounds,
        engine=experiment.engine,
    )
    faults = world.faults
    with _replayable(faults, config.seed, folder.path):
        try:
            result = engines.run(
                experiment.engine,
                config,
                _clients(experiment, world, folder.path / "sites"),
                world.adapter,
                run_name=run,
                workers=experiment.workers,
                base_dtype=experiment.base_dtype,
                device=experiment.device,
                journeys=world.journeys if faults is None else faults.journeys(world.journeys),
                tampering=None if faults is None else faults.tampering,
                restarts=() if faults is None else faults.restarts,
                evaluate=watched(experiment, watch),
                checkpoint=folder.checkpoint,
                event=recorder,
            )
        finally:
            recorder.flush()
    listed = len(result.sites) <= LISTED
    finished = Finished(
        run=run,
        config=config,
        folder=folder,
        result=result,
        label_counts=_label_counts(experiment, built, listed),
        listed=listed,
        withheld=_withheld(experiment, listed),
    )
    said = _virtual(experiment, world, folder.path)
    if faults is not None:
        said["faults"] = {"seed": faults.plan.seed, "counts": faults.plan.counts()}
    return finished, said


def _clients(experiment: Experiment, world: World, folder: Path) -> PopulationClients:
    config, pace = experiment.config, None if world.journeys is None else world.journeys.pace
    partial = experiment.clock is not None and experiment.clock.partial_work
    conduct = Conduct(
        step_limit=pace if partial else None,
        noise_seed=config.seed if experiment.seeded_noise else None,
    )
    return PopulationClients(
        records=world.built.records,
        partition=world.built.partition,
        folder=folder,
        device=experiment.device,
        max_ranks=world.built.max_ranks,
        books=SimulatedBooks() if _charged(config) else None,
        conduct=conduct if world.faults is None else world.faults.conduct(conduct),
    )


def _faults(experiment: Experiment, built: Built) -> Faults | None:
    if experiment.faults is None:
        return None
    config = experiment.config
    return build_faults(
        experiment.faults,
        [client_name(i) for i in range(len(built.partition))],
        rounds=config.federation.rounds,
        num_labels=len(config.task.labels),
        folder=experiment.folder,
        seed=config.seed,
    )


def _replayable(faults: Faults | None, seed: int, folder: Path) -> AbstractContextManager[object]:
    """Return what writes faults.toml, and says in an error how to replay it."""
    return nullcontext() if faults is None else replayable(faults.plan, seed, folder)


def _journeys(
    experiment: Experiment, clock: ClockTable, built: Built, adapter: Adapter
) -> DeviceJourneys:
    config, partition = experiment.config, built.partition
    devices, availability = built.devices, built.availability
    return build_journeys(
        clock,
        uniform_devices(len(partition)) if devices is None else devices,
        AlwaysOnline() if availability is None else availability,
        config,
        _work(experiment, built) if clock.flops_per_record is None else None,
        config.seed,
        sizes=partition.sizes,
        held=partition.held,
        spec=adapter.spec,
    )


def _work(experiment: Experiment, built: Built) -> Work:
    """Return what a record costs, counted on the model with a few of the records."""
    config, records = experiment.config, built.records
    classifier = MODELS.classifier(config, "cpu")
    few = records.take(np.linspace(0, len(records) - 1, min(8, len(records))).astype(np.int64))
    return work_of(classifier, classifier.encode(few.inputs), config.training.optimizer)


def _virtual(experiment: Experiment, world: World, folder: Path) -> dict[str, Any]:
    """Write messages.parquet; return the summary's part about virtual time."""
    if world.journeys is None:
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    clock = experiment.clock or ClockTable()
    accuracies = experiment.targets if clock.metric == "accuracy" else ()
    targets = sorted({*accuracies, *clock.targets})
    outcome = outcome_of(world.journeys, targets, clock.metric)
    file = io.BytesIO()
    pq.write_table(pa.table(dict(outcome.message_table())), file, compression="zstd")
    write_atomic(folder / "messages.parquet", file.getvalue())
    return {"virtual": outcome.summary()}


def _label_counts(experiment: Experiment, built: Built, listed: bool) -> Mapping[str, list[int]]:
    """Return label counts by client, or of all records where there are too many clients."""
    num_labels = len(experiment.config.task.labels)
    if not listed:
        return {"population": built.records.label_counts(num_labels).tolist()}
    partition, labels = built.partition, built.records.labels
    return {
        client_name(i): np.bincount(labels[_rows(built, i)], minlength=num_labels).tolist()
        for i in range(min(len(partition), LISTED))
    }


def _rows(built: Built, client: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    start = built.partition.start
    return built.partition.rows[start[client] : start[client + 1]]


def _withheld(experiment: Experiment, listed: bool) -> str | None:
    config = experiment.config
    if experiment.seeded_noise:
        return KNOWN_NOISE
    many = config.privacy is not None and config.client_privacy is None and not listed
    return TOO_MANY if many else None


def _charged(config: RunConfig) -> bool:
    """Return whether clients spend privacy themselves: on records, or in noised secure sums."""
    sums = config.client_privacy is not None and config.secure_aggregation is not None
    return config.privacy is not None or sums
