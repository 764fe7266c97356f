"""One run, one folder. Everything written here is whole or not there.

    run.toml                        the configuration, byte for byte
    events.jsonl                    what happened: {"at": UTC, "kind": …, …} per line
    checkpoints/round-0003.adapter  the global adapter after round 3 (docs/wire-format.md)
    summary.json                    the outcome; written last

A checkpoint is on disk before the event that announces it, so the events of a run that was
killed never speak of an adapter that is lost. A crash can leave a torn last line in
events.jsonl, nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ConfigError
from anabranch.storage.files import sync_folder, write_atomic


def new_run(name: str) -> str:
    """Return the identity of a new run: never one that was used, whatever the folder's name.

    Sites keep books on privacy by run, and names of folders come back.
    """
    return f"{name}-{uuid4().hex[:12]}"


def _now() -> datetime:
    return datetime.now(UTC)


class RunFolder:
    """An existing run folder."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = _now) -> None:
        self.path = path
        self._now = now

    @classmethod
    def create(
        cls, path: Path, run_toml: bytes, *, now: Callable[[], datetime] = _now
    ) -> RunFolder:
        """Make the folder of a new run.

        Raises ConfigError if something is there already: results are never mixed or replaced.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{path}: a run needs a folder of its own and this one is not empty; name "
                "another, or move this one away"
            )
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoints").mkdir()
        write_atomic(path / "run.toml", run_toml)
        return cls(path, now=now)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event; it is on the disk when this returns."""
        line = msgspec.json.encode({"at": self._now(), "kind": kind, **fields}) + b"\n"
        file = self.path / "events.jsonl"
        new = not file.exists()
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
        if new:
            sync_folder(self.path)

    def checkpoint(self, round_number: int, adapter: Adapter) -> None:
        """Keep the global adapter after a round."""
        write_atomic(self.checkpoint_path(round_number), wire.encode(adapter))

    def checkpoint_path(self, round_number: int) -> Path:
        """Return where the adapter after a round is; the names sort by round."""
        return self.path / "checkpoints" / f"round-{round_number:04d}.adapter"

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, for machines and for people with an editor."""
        text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
        write_atomic(self.path / "summary.json", text + b"\n")
