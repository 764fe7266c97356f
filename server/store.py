"""One run, one folder. Everything written here is whole or not there.

    run.toml                        the configuration, byte for byte
    events.jsonl                    what happened: {"at": UTC, "kind": …, …} per line
    checkpoints/round-0003.adapter  the global adapter after round 3 (docs/wire-format.md)
    summary.json                    the outcome; written last

A checkpoint is on disk before the event that announces it, so the events of a run that was
killed never speak of an adapter that is lost. A crash can leave a torn last line in
events.jsonl, nothing else; `RunFolder.open` cuts it off: that event had not been taken.
"""

from __future__ import annotations

import errno
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
from anabranch.storage.files import sweep, sync_folder, write_atomic


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

    @classmethod
    def open(cls, path: Path, run_toml: bytes, *, now: Callable[[], datetime] = _now) -> RunFolder:
        """Open the folder of a run of this configuration, or make what is missing of it.

        Nobody else may be writing in it. Raises ConfigError if it is of another configuration, or
        holds something and no run.toml.
        """
        file = path / "run.toml"
        if file.exists() and file.read_bytes() != run_toml:
            raise ConfigError(
                f"{file}: another configuration than the one of this run: a run is never changed; "
                "put the file back, or propose a new run"
            )
        if not file.exists():
            sweep(path)
            begun = [one.name for one in path.iterdir()] if path.is_dir() else []
            if begun == ["checkpoints"] and not any((path / "checkpoints").iterdir()):
                (path / "checkpoints").rmdir()  # of a `create` that was killed
            return cls.create(path, run_toml, now=now)
        for folder in (path, path / "checkpoints"):
            sweep(folder)
        (path / "checkpoints").mkdir(exist_ok=True)
        _mend(path / "events.jsonl")
        return cls(path, now=now)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event; it is on the disk when this returns. OSError if the disk is full."""
        line = msgspec.json.encode({"at": self._now(), "kind": kind, **fields}) + b"\n"
        file = self.path / "events.jsonl"
        new = not file.exists()
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(handle).st_size
        try:
            if os.write(handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)  # an event is taken as a whole, or not at all
            raise
        finally:
            os.close(handle)
        if new:
            sync_folder(self.path)

    def announced(self) -> int:
        """Return the last round whose adapter an event has announced; 0: none."""
        file = self.path / "events.jsonl"
        if not file.exists():
            return 0
        last = 0
        with file.open("rb") as lines:
            for line in lines:
                if b'"kind":"round_aggregated"' in line:
                    last = max(last, int(msgspec.json.decode(line)["round"]))
        return last

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


def _mend(events: Path) -> None:
    """Cut off what a crash left of an event at the end of the file: half a line, or no JSON."""
    if not events.exists():
        return
    with events.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        while end and not _is_event(data[data.rfind(b"\n", 0, end - 1) + 1 : end]):
            end = data.rfind(b"\n", 0, end - 1) + 1
        if end < len(data):
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())


def _is_event(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except msgspec.DecodeError:
        return False
