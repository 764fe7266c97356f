"""A federation on one machine, from its files to its run folder: `anabranch simulate`.

    experiment.toml     run = "run.toml"             the run all parties agree on
                        engine = "sequential"        or "flower" (Ray)
                        validation = "dev.csv"       the coordinator's: chooses the best round
                        test = "test.csv"            the coordinator's: touched once, at the end
                        [sites]
                        north = "north.csv"          name = data file, relative to this file
                        [ranks]
                        north = 4                    highest LoRA rank it trains; others: no limit

Sites get folders of their own inside the run folder, with a fresh privacy ledger each: what
is spent here is not charged to the ledger of a real site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from anabranch.client.data.records import Records, load_records
from anabranch.client.files import read_run
from anabranch.client.site import require_device
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, DataError
from anabranch.protocols.tables import Count, Device, Name
from anabranch.server.evaluation import evaluator, initial_adapter, require_shared_model
from anabranch.server.outcome import Finished
from anabranch.server.store import RunFolder, new_run
from anabranch.simulations import engines
from anabranch.storage.files import write_atomic

OnEvent = Callable[..., None]


class ExperimentFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """experiment.toml."""

    run: str
    sites: dict[Name, str]
    ranks: dict[Name, Count] = {}
    engine: engines.Engine = "sequential"
    workers: Count = 1  # clients that train at a time
    device: Device = "cpu"
    validation: str | None = None
    test: str | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment with its files found and its run configuration read."""

    config: RunConfig
    run_toml: bytes
    sites: Mapping[str, Path]
    ranks: Mapping[str, int] = field(default_factory=dict)  # site -> highest LoRA rank
    engine: engines.Engine = "sequential"
    workers: int = 1
    device: Device = "cpu"
    validation: Path | None = None
    test: Path | None = None


def load(path: Path) -> Experiment:
    """Read experiment.toml and its run.toml; raise ConfigError naming file and field."""
    try:
        file = msgspec.toml.decode(path.read_bytes(), type=ExperimentFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not file.sites:
        raise ConfigError(f"{path}: [sites] is empty: name at least one site and its data file")
    strangers = sorted(file.ranks.keys() - file.sites.keys())
    if strangers:
        raise ConfigError(
            f"{path}: [ranks] names {strangers[0]!r}, which is not in [sites]: "
            f"expected one of {sorted(file.sites)}"
        )
    folder = path.parent
    run = folder / file.run
    config = read_run(run)
    require_shared_model(config, validation=file.validation, test=file.test)
    return Experiment(
        config=config,
        run_toml=run.read_bytes(),
        sites={name: folder / data for name, data in sorted(file.sites.items())},
        ranks=file.ranks,
        engine=file.engine,
        workers=file.workers,
        device=file.device,
        validation=None if file.validation is None else folder / file.validation,
        test=None if file.test is None else folder / file.test,
    )


def federate(
    experiment: Experiment,
    records: Mapping[str, Records],
    folder: RunFolder,
    on_event: OnEvent | None = None,
) -> Finished:
    """Run all rounds and return the result; everything is written to `folder` as it happens.

    `records` are those of check_sites. Raises what engines.run raises.
    """
    config = experiment.config
    validation = None
    if experiment.validation is not None:
        validation = load_records(experiment.validation, config)
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
        evaluate=None
        if validation is None
        else evaluator(config, validation, device=experiment.device),
        checkpoint=folder.checkpoint,
        event=event,
    )
    counts = {
        name: one.label_counts(len(config.task.labels)).tolist() for name, one in records.items()
    }
    return Finished(run=run, config=config, folder=folder, result=result, label_counts=counts)


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
