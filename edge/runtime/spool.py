"""Deltas that wait to be sent: one file per task, there whole or not at all.

    spool/<SHA-256 of the task's id>.delta

    offset  size  field
    0       4     magic  b"ABS1"
    4       4     N: length of the header, u32 little-endian
    8       N     header, JSON: Entry
    8+N     size  the delta's frame (docs/wire-format.md)

A task has at most one delta: the first one that was put stays, so no two versions of the same
training, with other noise, ever leave. An entry is removed after the gateway's last word on it,
accepted or refused, or when the task's deadline has passed. A kill at any point leaves the entry
as it was; what a crash left half-written is swept when the spool is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from anabranch.edge.runtime.manifest import Digest
from anabranch.protocols.errors import DeviceError
from anabranch.protocols.wire import MAX_FRAME
from anabranch.storage.files import sweep, sync_folder, write_atomic

MAGIC = b"ABS1"
SUFFIX = ".delta"
MAX_HEADER = 4096  # bytes
MAX_SPOOL = 256 << 20  # bytes of all entries, unless the caller allows more
MAX_TASK = 256  # characters of a task's id

TaskId = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TASK)]
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_FRAME)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a delta without its bytes."""

    task: TaskId
    sha256: Digest
    size: Size
    examples: Number
    steps: Number
    deadline_unix: Number  # the gateway refuses later commits
    secure: bool = False  # it goes into a secure sum (summing.py) and is never sent itself

    def expired(self, now_unix: float) -> bool:
        """Return whether the gateway refuses it by now."""
        return now_unix > self.deadline_unix


@dataclass(frozen=True)
class Spool:
    """The folder of one device's deltas. One process at a time."""

    folder: Path
    limit: int = MAX_SPOOL  # bytes

    def put(
        self,
        task: str,
        frame: bytes,
        *,
        examples: int,
        steps: int,
        deadline_unix: int,
        secure: bool = False,
    ) -> Entry:
        """Store a delta durably and return its entry; the one that is there if there is one.

        Raises DeviceError, and stores nothing, if the spool would grow beyond its limit or the
        disk does not take it.
        """
        there = self.get(task)
        if there is not None:
            return there
        entry = Entry(
            task=task,
            sha256=hashlib.sha256(frame).hexdigest(),
            size=len(frame),
            examples=examples,
            steps=steps,
            deadline_unix=deadline_unix,
            secure=secure,
        )
        head = msgspec.json.encode(entry)
        data = MAGIC + len(head).to_bytes(4, "little") + head + frame
        used = self.used()
        if used + len(data) > self.limit:
            raise DeviceError(
                f"{self.folder}: {used} bytes wait to be sent, {len(data)} more are above the "
                f"limit of {self.limit}; connect the device so that they leave"
            )
        try:
            write_atomic(self._path(task), data, 0o600)
        except OSError as error:
            raise DeviceError(
                f"{self.folder}: cannot be written ({error.strerror or error}); free some space"
            ) from None
        return entry

    def get(self, task: str) -> Entry | None:
        """Return the entry of a task; None if there is none, or it is damaged."""
        entry = _read_entry(self._path(task))
        return entry if entry is not None and entry.task == task else None

    def entries(self) -> list[Entry]:
        """Return all whole entries, the earliest deadline first."""
        found = [_read_entry(path) for path in self._paths()]
        return sorted(
            (one for one in found if one is not None), key=lambda one: (one.deadline_unix, one.task)
        )

    def chunks(self, entry: Entry, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of a frame from `offset` on; one chunk is held at a time."""
        with self._path(entry.task).open("rb") as file:
            start = _frame_start(file.read(8))
            file.seek(start + offset)
            while offset < entry.size:
                data = file.read(min(size, entry.size - offset))
                if not data:
                    return
                yield offset, data
                offset += len(data)

    def is_whole(self, entry: Entry) -> bool:
        """Return whether the frame on the disk has the digest it had when it was put."""
        state = hashlib.sha256()
        try:
            for _, data in self.chunks(entry, 0, 1 << 20):
                state.update(data)
        except OSError:
            return False
        return state.hexdigest() == entry.sha256

    def remove(self, task: str) -> None:
        """Remove the entry of a task, if there is one."""
        self._path(task).unlink(missing_ok=True)
        if self.folder.is_dir():
            sync_folder(self.folder)

    def recover(self) -> list[str]:
        """Remove what a crash or a failing disk left; return the names of damaged entries."""
        sweep(self.folder)
        damaged = [path for path in self._paths() if _read_entry(path) is None]
        for path in damaged:
            path.unlink()
        return [path.name for path in damaged]

    def used(self) -> int:
        """Return the bytes of all entries."""
        return sum(path.stat().st_size for path in self._paths())

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*" + SUFFIX)) if self.folder.is_dir() else []

    def _path(self, task: str) -> Path:
        return self.folder / (hashlib.sha256(task.encode()).hexdigest() + SUFFIX)


def _frame_start(head: bytes) -> int:
    return 8 + int.from_bytes(head[4:8], "little")


def _read_entry(path: Path) -> Entry | None:
    """Return the header of an entry's file; None unless the file is as long as it says."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = _frame_start(head) - 8
            if head[:4] != MAGIC or length > MAX_HEADER:
                return None
            entry = msgspec.json.decode(file.read(length), type=Entry)
            whole = path.stat().st_size == 8 + length + entry.size
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return entry if whole else None
