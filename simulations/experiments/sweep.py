"""A sweep, run: one folder per run, and at any point it can be killed and started again.

    sweep.json                     which runs there are, with the digest of each; before the first
    learning_rate-0.1/seed-0/      a run folder (simulate.py)

A run is finished when its summary.json is there, which is written last, with the digest of what is
to be run. Finished runs are skipped, so what is started again completes those that are missing.
A folder without summary.json is the half of a run: it is removed, and the run begins anew; nothing
is ever continued or mixed. A finished run of another configuration is never touched: the sweep is
refused. A run that fails is written down with its reason, and the others go on.

Two processes on one output take turns (an advisory lock).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from anabranch.protocols.errors import AnabranchError, ConfigError
from anabranch.simulations.experiment import OnEvent
from anabranch.simulations.experiments.sweep_plan import Planned, plan
from anabranch.simulations.simulate import Told, perform
from anabranch.storage.files import PARTIAL, locked, sweep, write_atomic

MANIFEST = "sweep.json"
NO_RELEASE = "a run of a sweep is measured, not released; run the chosen setting by itself"

State = Literal["unfinished", "finished", "failed"]


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One run in sweep.json."""

    folder: str
    name: str
    seed: int
    changes: dict[str, Any]
    digest: str
    state: State = "unfinished"
    error: str | None = None


class Manifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """sweep.json."""

    experiment: str
    runs: list[Entry]


OnRun = Callable[[Entry, int, int], None]  # (a run that ended, its place, of how many)


def run_sweep(
    path: Path,
    output: Path,
    *,
    on_event: OnEvent | None = None,
    on_run: OnRun = lambda entry, place, total: None,
    **given: Any,
) -> dict[str, Any]:
    """Complete the sweep of an experiment in `output`; return what sweep.json says, and counts.

    Raises ConfigError before anything is run: for an experiment that cannot be, for an `output`
    that holds something else, or finished runs of another configuration.
    """
    planned = plan(path, **given)
    with locked(output / MANIFEST):
        manifest = _begin(path, output, planned)
        skipped = sum(entry.state == "finished" for entry in manifest.runs)
        for place, (entry, one) in enumerate(zip(manifest.runs, planned, strict=True), 1):
            if entry.state != "finished":
                _run(output, entry, one, on_event)
                _write(output, manifest)
            on_run(entry, place, len(planned))
    return {
        "folder": str(output),
        "runs": [msgspec.structs.asdict(entry) for entry in manifest.runs],
        "finished": sum(entry.state == "finished" for entry in manifest.runs),
        "failed": sum(entry.state == "failed" for entry in manifest.runs),
        "skipped": skipped,
    }


def read_manifest(output: Path) -> Manifest:
    """Return sweep.json of a folder; raise ConfigError if it cannot be read."""
    path = output / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; expected the output folder of a sweep") from None


def _begin(path: Path, output: Path, planned: Sequence[Planned]) -> Manifest:
    """Write sweep.json, with what is finished already, once nothing of it can be lost."""
    known: set[str] = set()
    if (output / MANIFEST).exists():
        known = {entry.folder for entry in read_manifest(output).runs}
    elif any(not one.name.startswith(".") for one in output.iterdir()):
        raise ConfigError(
            f"{output}: a sweep needs a folder of its own, and this one is not empty; name "
            "another, or move this one away"
        )
    manifest = Manifest(experiment=path.name, runs=[_entry(output, one) for one in planned])
    for one, entry in zip(planned, manifest.runs, strict=True):
        folder = output / one.folder
        if folder.exists() and one.folder not in known and entry.state != "finished":
            raise ConfigError(f"{folder}: is no run of this sweep; move it away")
        sweep(folder.parent)
    _write(output, manifest)
    return manifest


def _entry(output: Path, one: Planned) -> Entry:
    """Return a run as it is found; raise ConfigError for a finished one that is another."""
    entry = Entry(
        folder=one.folder,
        name=one.name,
        seed=one.experiment.config.seed,
        changes=one.changes,
        digest=one.digest,
    )
    summary = output / one.folder / "summary.json"
    if not summary.exists():
        return entry
    try:
        found = msgspec.json.decode(summary.read_bytes(), type=dict[str, Any]).get("digest")
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{summary}: {error}; move the run's folder away") from None
    if found != one.digest:
        raise ConfigError(
            f"{summary.parent}: is a finished run of another configuration, or of other data "
            f"({str(found)[:12]}, expected {one.digest[:12]}); name another output, or move it away"
        )
    entry.state = "finished"
    return entry


def _run(output: Path, entry: Entry, one: Planned, on_event: OnEvent | None) -> None:
    """Run one, from the beginning; a mistake in it becomes its entry's error."""
    folder = output / entry.folder
    discard(folder)
    told = Told(name=one.name, changes=one.changes, withheld=NO_RELEASE, on_event=on_event)
    try:
        perform(one.experiment, folder, told)
    except AnabranchError as error:
        entry.state, entry.error = "failed", str(error)
    else:
        entry.state, entry.error = "finished", None


def discard(folder: Path) -> None:
    """Remove the half of a run; a crash on the way leaves a hidden folder that is swept later."""
    if folder.exists():
        hidden = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PARTIAL, dir=folder.parent)
        folder.rename(Path(hidden) / "half")
        shutil.rmtree(hidden)


def _write(output: Path, manifest: Manifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    write_atomic(output / MANIFEST, text + b"\n")
