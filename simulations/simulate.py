"""`anabranch simulate`: one experiment, from its file to summary.json."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from anabranch.client.data.records import Records, load_records
from anabranch.protocols.config import Device
from anabranch.protocols.errors import ReleaseError
from anabranch.server.release import Release
from anabranch.server.store import RunFolder
from anabranch.simulations import outcome
from anabranch.simulations.engines import Engine
from anabranch.simulations.experiment import (
    Experiment,
    Federated,
    OnEvent,
    check_sites,
    federate,
    load,
)


def simulate(
    path: Path,
    output: Path,
    *,
    engine: Engine | None = None,
    device: Device | None = None,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Run the experiment in `path`, write everything to `output`, and return summary.json.

    Raises ConfigError, DataError, RunError or ReleaseError; what was done until then is in
    `output`.
    """
    started = time.monotonic()
    experiment = load(path)
    experiment = dataclasses.replace(
        experiment, engine=engine or experiment.engine, device=device or experiment.device
    )
    test = _records(experiment, experiment.test)
    validation = _records(experiment, experiment.validation)
    records = check_sites(experiment)
    folder = RunFolder.create(output, experiment.run_toml)
    federated = federate(experiment, records, folder, on_event)
    name = "federated" if experiment.config.privacy is None else "federated_dp"
    accuracy: dict[str, float] = {}
    macro_f1: dict[str, float] = {}
    matrix: list[list[int]] = []
    if test is not None:
        metrics, matrix = outcome.measure(federated, test)
        accuracy, macro_f1 = {name: metrics["accuracy"]}, {name: metrics["macro_f1"]}
    made, refused = _release(federated, test, validation)
    summary = outcome.summary_of(federated, seconds=time.monotonic() - started) | {
        "engine": experiment.engine,
        "accuracy": accuracy,
        "macro_f1": macro_f1,
        "release": None if made is None else outcome.release_summary(made),
        "release_refused": refused,
    }
    outcome.report(federated, summary=summary, made=made, matrix=matrix)
    federated.folder.summarise(summary)
    return summary


def _records(experiment: Experiment, path: Path | None) -> Records | None:
    return None if path is None else load_records(path, experiment.config)


def _release(
    federated: Federated, test: Records | None, validation: Records | None
) -> tuple[Release | None, str | None]:
    """Return the release, or None and why there is none."""
    records = test if test is not None else validation
    if records is None:
        return None, (
            "a release is checked on records of the coordinator, and there are none: give the "
            "experiment `test` or `validation`"
        )
    try:
        return outcome.release(federated, records), None
    except ReleaseError as error:
        federated.folder.event("release_refused", message=str(error))
        return None, str(error)
