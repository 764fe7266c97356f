"""`anabranch simulate`: one experiment, from its file to summary.json.

run folder   experiment.json   what it is a run of        (experiments/about.py)
             events.jsonl …    as every run folder        (server/store.py)
             rounds.csv        one line per round         (experiments/rounds.py)
             summary.json      the outcome; written last, so who has it is finished
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from anabranch.client.data.records import Records, fingerprint, load_records
from anabranch.protocols.tables import Device
from anabranch.server.client_privacy import plan_of
from anabranch.server.outcome import Finished, conclude
from anabranch.server.store import RunFolder
from anabranch.simulations import engines
from anabranch.simulations.engines import Engine
from anabranch.simulations.experiment import (
    Experiment,
    OnEvent,
    Watch,
    check_sites,
    federate,
    load,
    replaying,
)
from anabranch.simulations.experiments import rounds
from anabranch.simulations.experiments.about import About, digest, write_about
from anabranch.simulations.experiments.population_run import build_world, federate_population
from anabranch.simulations.experiments.virtual_page import device_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """What a run is called, and who is told of it."""

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of a sweep or a trial
    withheld: str | None = None  # why it makes no release
    on_event: OnEvent | None = None
    watch: Watch | None = None  # of every evaluation on the validation records


def simulate(
    path: Path,
    output: Path,
    *,
    engine: Engine | None = None,
    device: Device | None = None,
    workers: int | None = None,
    seed: int | None = None,
    faults: Path | None = None,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Run the experiment in `path`, write everything to `output`, and return summary.json.

    What is given comes before what the file says; `faults` is a plan to replay. Raises
    ConfigError, PrivacyError, DataError or RunError; what was done until then is in `output`.
    """
    experiment = override(load(path, seed=seed), engine=engine, device=device, workers=workers)
    if faults is not None:
        experiment = replaying(experiment, faults)
    return perform(experiment, output, Told(name=path.stem, on_event=on_event))


def override(experiment: Experiment, **given: Any) -> Experiment:
    """Return the experiment with those fields replaced that are not None.

    Raises ConfigError for an engine that cannot do what the experiment asks for.
    """
    overridden = dataclasses.replace(
        experiment, **{name: value for name, value in given.items() if value is not None}
    )
    engines.require_engine(
        overridden.engine, virtual=overridden.time == "virtual", base_dtype=overridden.base_dtype
    )
    return overridden


def perform(experiment: Experiment, output: Path, told: Told) -> dict[str, Any]:
    """Run an experiment into a new folder; return its summary. Raises as `simulate` does."""
    started = time.monotonic()
    plan_of(experiment.config)  # refuses before anything is written or anybody asked
    test = _records(experiment, experiment.test)
    validation = _records(experiment, experiment.validation)
    about = about_of(experiment, told, test=test, validation=validation)
    finished, virtual = _federate(experiment, output, told, about)
    finished = dataclasses.replace(finished, withheld=finished.withheld or told.withheld)
    return conclude(
        finished,
        test=test,
        validation=validation,
        seconds=time.monotonic() - started,
        facts=_tabulate(finished, about) | virtual,
        devices=() if experiment.config.client_privacy else device_parts(virtual),  # who took part
    )


def _federate(
    experiment: Experiment, output: Path, told: Told, about: About
) -> tuple[Finished, dict[str, Any]]:
    """Run the rounds over sites or a population, once all their records have been checked."""
    if experiment.population is None:
        records = check_sites(experiment)
        folder = _begin(experiment, output, about)
        return federate(experiment, records, folder, told.on_event, told.watch), {}
    world = build_world(experiment)
    folder = _begin(experiment, output, about)
    return federate_population(experiment, world, folder, told.on_event, told.watch)


def _begin(experiment: Experiment, output: Path, about: About) -> RunFolder:
    folder = RunFolder.create(output, experiment.run_toml)
    write_about(folder.path, about)
    return folder


def about_of(
    experiment: Experiment, told: Told, *, test: Records | None, validation: Records | None
) -> About:
    """Return what experiment.json says of a run; raises DataError for a file that is not there."""
    config = experiment.config
    whole, group = digests(experiment)
    return About(
        name=told.name,
        digest=whole,
        group=group,
        seed=config.seed,
        engine=experiment.engine,
        time=experiment.time,
        labels=config.task.labels,
        test=None if test is None else fingerprint(test),
        validation=None if validation is None else fingerprint(validation),
        changes=dict(told.changes),
        targets=experiment.targets,
    )


def digests(experiment: Experiment) -> tuple[str, str]:
    """Return the digest of all that decides the numbers, and the same without the seed."""
    alike = {
        "config": msgspec.to_builtins(msgspec.structs.replace(experiment.config, seed=0)),
        "experiment": experiment.facts(),
        "engine": experiment.engine,
        "device": experiment.device,
        "base_dtype": experiment.base_dtype,
    }
    files = experiment.files()
    return digest({**alike, "seed": experiment.config.seed}, files), digest(alike, files)


def _tabulate(finished: Finished, about: About) -> dict[str, Any]:
    """Write rounds.csv; return what the summary says of it."""
    hidden = finished.config.client_privacy is not None
    table = rounds.rounds_of(finished.result.history, hidden=hidden)
    rounds.write_rounds(finished.folder.path / rounds.NAME, table)
    return {
        "digest": about.digest,
        "time": about.time,
        "run_seconds": finished.result.seconds,  # virtual or real, as `time` says
        "time_to_accuracy": rounds.time_to_accuracy(table, about.targets),
    }


def _records(experiment: Experiment, path: Path | None) -> Records | None:
    return None if path is None else load_records(path, experiment.config)
