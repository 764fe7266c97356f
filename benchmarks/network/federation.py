"""A running federation for a measurement, as its users run it (tests/faults/rig.py)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.faults.rig import Rig


@contextmanager
def federation(folder: Path, records: Mapping[str, Path]) -> Iterator[Rig]:
    """Yield a federation over loopback whose sites have joined and serve."""
    rig = Rig(folder, sorted(records))
    try:
        rig.gather(lambda name: records[name])
        yield rig
    finally:
        rig.close()


def carried_out(rig: Rig, toml: str, seconds: float) -> str:
    """Propose a run, have it approved, wait for its end; return its id. SystemExit if it fails."""
    run = rig.begin(toml)
    require_finished(rig, run, seconds)
    return run


def require_finished(rig: Rig, run: str, seconds: float) -> None:
    """Wait for the end of a run; SystemExit, with the ends of all logs, if it is no good one."""
    entry = rig.over(run, seconds)
    if entry.state != "finished":
        raise SystemExit(f"run {run} {entry.state}: {entry.detail}\n{rig.tails()}")


def at(event: Mapping[str, Any]) -> float:
    """Return when an event was written, in seconds since 1970."""
    return datetime.fromisoformat(event["at"]).timestamp()


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="anabranch-network-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
