"""The ServerApp of a deployed run: `serverapp = "anabranch.server.app:app"`.

Run configuration (`flwr run --run-config '…'`), paths as the ServerApp's machine sees them:

    run              run.toml
    output           the run folder, which must not exist yet or be empty
    connect-seconds  how long to wait for sites at the start of a round; default 600
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import AnabranchError, ConfigError
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
    )


def coordinate(
    grid: Grid,
    run_toml: Path,
    output: Path,
    *,
    first: Callable[[RunConfig], Adapter] | None = None,
    **rounds: Any,
) -> Result:
    """Run all rounds of `run_toml` over `grid`, into the new run folder `output`.

    `first(config)` makes the adapter of round 0 (default: the base model's own); `rounds` is
    passed on to RoundEngine. Raises ConfigError for a wrong file or folder, and what the
    engine raises; that is written to the run's events, too.
    """
    text = _read(run_toml)
    config = parse(text, source=str(run_toml))
    folder = RunFolder.create(output, text)
    run = new_run(config.name)
    folder.event("run_started", run=run, config=config.digest())
    try:
        adapter = (first or first_adapter)(config)
        engine = RoundEngine(
            grid, config, run=run, checkpoint=folder.checkpoint, event=folder.event, **rounds
        )
        result = engine.run(adapter)
    except AnabranchError as error:
        folder.event("run_failed", error=type(error).__name__, message=str(error))
        raise
    folder.summarise(summary(result, config, run))
    return result


def first_adapter(config: RunConfig) -> Adapter:
    """Return the adapter of the freshly made model; torch is imported here."""
    from anabranch.server.evaluation import initial_adapter

    return initial_adapter(config)


def summary(result: Result, config: RunConfig, run: str) -> dict[str, Any]:
    """Return what summary.json says about a run."""
    best = result.history[result.best_round - 1]
    return {
        "run": run,
        "seed": config.seed,
        "rounds": len(result.history),
        "best_round": result.best_round,
        "client": dict(best.client),
        "coordinator": dict(best.coordinator),
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "seconds": result.seconds,
        "sites": {name: dataclasses.asdict(row) for name, row in result.sites.items()},
    }


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
