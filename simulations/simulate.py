"""`anabranch simulate`: one experiment, from its file to summary.json."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from anabranch.client.data.records import Records, load_records
from anabranch.protocols.tables import Device
from anabranch.server.client_privacy import plan_of
from anabranch.server.outcome import conclude
from anabranch.server.store import RunFolder
from anabranch.simulations.engines import Engine
from anabranch.simulations.experiment import Experiment, OnEvent, check_sites, federate, load


def simulate(
    path: Path,
    output: Path,
    *,
    engine: Engine | None = None,
    device: Device | None = None,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Run the experiment in `path`, write everything to `output`, and return summary.json.

    Raises ConfigError, PrivacyError, DataError or RunError; what was done until then is in
    `output`.
    """
    started = time.monotonic()
    experiment = load(path)
    plan_of(experiment.config)  # refuses before anything is written or anybody asked
    experiment = dataclasses.replace(
        experiment, engine=engine or experiment.engine, device=device or experiment.device
    )
    test = _records(experiment, experiment.test)
    validation = _records(experiment, experiment.validation)
    records = check_sites(experiment)
    folder = RunFolder.create(output, experiment.run_toml)
    finished = federate(experiment, records, folder, on_event)
    seconds = time.monotonic() - started
    return conclude(finished, test=test, validation=validation, seconds=seconds)


def _records(experiment: Experiment, path: Path | None) -> Records | None:
    return None if path is None else load_records(path, experiment.config)
