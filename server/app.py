"""The ServerApp of a deployed run: `serverapp = "anabranch.server.app:app"`.

Run configuration (`flwr run --run-config '…'`), paths as the ServerApp's machine sees them:

    run              run.toml
    output           the run folder, which must not exist yet or be empty
    connect-seconds  how long to wait for sites at the start of a round; default 600
    validation       the coordinator's own records: they choose the best round (optional)
    test             the coordinator's own records, touched once, at the end (optional)

With either of the two there is a release at the end, checked on them. Neither goes with a run
in which a part of the model stays at the sites (fedsa, a local head).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from anabranch.client.data.records import Records, load_records
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import AnabranchError, ConfigError
from anabranch.server.client_privacy import plan_of
from anabranch.server.evaluation import evaluator, initial_adapter, require_shared_model
from anabranch.server.outcome import Finished, conclude
from anabranch.server.result import Result
from anabranch.server.rounds import RoundEngine
from anabranch.server.store import RunFolder, new_run

CONNECT_S = 600.0
POLL_S = 0.5  # each look is a request to the SuperLink

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration names."""
    settings = context.run_config
    coordinate(
        grid,
        _path(settings, "run"),
        _path(settings, "output"),
        connect_s=float(settings.get("connect-seconds", CONNECT_S)),
        poll_s=POLL_S,
        validation=_optional_path(settings, "validation"),
        test=_optional_path(settings, "test"),
    )


def coordinate(
    grid: Grid,
    run_toml: Path,
    output: Path,
    *,
    first: Callable[[RunConfig], Adapter] | None = None,
    validation: Path | None = None,
    test: Path | None = None,
    **rounds: Any,
) -> Result:
    """Run all rounds of `run_toml` over `grid`, into the new run folder `output`.

    At the end there are summary.json and report.html, and a release if the coordinator has
    records to check it on. `first(config)` makes the adapter of round 0 (default: the base
    model's own); `rounds` is passed on to RoundEngine. Raises ConfigError for a wrong file or
    folder, DataError for the coordinator's records, and what the engine raises; that is written
    to the run's events, too.
    """
    text = _read(run_toml)
    config = parse(text, source=str(run_toml))
    require_shared_model(config, validation=validation, test=test)
    plan_of(config)  # refuses before anything is written or anybody asked
    own, held_back = (_records(path, config) for path in (validation, test))
    started = time.monotonic()
    folder = RunFolder.create(output, text)
    run = new_run(config.name)
    folder.event("run_started", run=run, config=config.digest())
    try:
        adapter = (first or initial_adapter)(config)
        engine = RoundEngine(
            grid,
            config,
            run=run,
            evaluate=None if own is None else evaluator(config, own),
            checkpoint=folder.checkpoint,
            event=folder.event,
            **rounds,
        )
        result = engine.run(adapter)
    except AnabranchError as error:
        folder.event("run_failed", error=type(error).__name__, message=str(error))
        raise
    finished = Finished(run=run, config=config, folder=folder, result=result)
    seconds = time.monotonic() - started
    conclude(finished, test=held_back, validation=own, seconds=seconds)
    return result


def _records(path: Path | None, config: RunConfig) -> Records | None:
    return None if path is None else load_records(path, config)


def _optional_path(settings: Mapping[str, Any], key: str) -> Path | None:
    return _path(settings, key) if settings.get(key) else None


def _path(settings: Mapping[str, Any], key: str) -> Path:
    value = settings.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"--run-config: {key!r} is missing; give it a path")
    return Path(value)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
