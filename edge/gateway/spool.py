"""Uploads on the disk: bytes are appended at their offset, and safe before anybody is told so.

    spool/<upload>      the first `committed` bytes are those of the device; what is behind them
                        was on its way when something broke, and is overwritten

`checkpoint` makes the bytes safe (fsync) and then says so in the database, every STEP bytes and
when a call ends; only that number is ever told to the device. When all bytes are there, the
SHA-256 is compared once. Of two calls that write one upload the later goes on; the earlier,
whose connection the device has given up, is refused.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import zlib
from pathlib import Path

from anabranch.edge.gateway.refusals import Damaged, Gap, Malformed, Superseded, Unknown
from anabranch.edge.gateway.store import Row, Store, count_traffic
from anabranch.storage.files import digest_of, sync_folder

STEP = 1 << 20  # bytes between checkpoints


class Spool:
    """The folder of all uploads."""

    def __init__(self, folder: Path, store: Store) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.store = folder, store
        self._lock = threading.Lock()
        self._writers: dict[str, int] = {}  # upload -> ticket of the call that writes it
        self._tickets = itertools.count(1)

    def path(self, upload: str) -> Path:
        """Return where an upload's bytes lie."""
        return self.folder / upload

    def open(self, upload: str, device: str) -> Writer:
        """Return a writer at the committed offset; any other writer of this upload ends."""
        row = self.store.row(
            "SELECT uploads.*, tasks.device FROM uploads JOIN tasks ON tasks.id = uploads.task "
            "WHERE uploads.id = ?",
            upload,
        )
        if row is None or row["device"] != device:
            raise Unknown("upload: none of this name; call BeginUpload first")
        with self._lock:
            ticket = self._writers[upload] = next(self._tickets)
            # Read again: an earlier writer may have gone on since, and can no more.
            row = self.store.row("SELECT * FROM uploads WHERE id = ?", upload) or row
            return Writer(self, upload, device, ticket, row)

    def holds(self, upload: str, ticket: int) -> bool:
        """Whether this call is still the one that writes."""
        return self._writers.get(upload) == ticket

    def release(self, upload: str, ticket: int) -> None:
        """End a call; a later one stays."""
        with self._lock:
            if self._writers.get(upload) == ticket:
                del self._writers[upload]

    def remove(self, upload: str) -> None:
        """Forget an upload's bytes; whoever writes it ends."""
        with self._lock:
            self._writers.pop(upload, None)
            self.path(upload).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Remove the bytes of uploads that no row knows; return how many there were."""
        known = {row["id"] for row in self.store.rows("SELECT id FROM uploads")}
        strange = [path for path in self.folder.iterdir() if path.name not in known]
        for path in strange:
            path.unlink(missing_ok=True)
        return len(strange)


class Writer:
    """One call that appends to one upload."""

    def __init__(self, spool: Spool, upload: str, device: str, ticket: int, row: Row) -> None:
        self._spool, self.upload, self._device, self._ticket = spool, upload, device, ticket
        self.size, self.committed = int(row["size"]), int(row["committed"])
        self.complete = bool(row["complete"])
        self._sha = bytes(row["sha"])
        self.end = self.committed
        self.counted = 0  # bytes of this call that are in the device's traffic
        self._file: int | None = None  # descriptor: nothing is buffered beyond a call's end

    def add(self, offset: int, data: bytes, crc: int) -> None:
        """Append what of this chunk is new.

        Raises Damaged (checksum), Gap (bytes before it are missing), Malformed (beyond the
        announced size), Superseded (a later call writes).
        """
        if zlib.crc32(data) != crc:
            raise Damaged(f"chunk at {offset}: CRC-32 differs; send it again")
        if offset > self.end:
            raise Gap(f"chunk at {offset}: bytes {self.end} to {offset} are missing")
        if offset + len(data) > self.size:
            raise Malformed(f"chunk at {offset}: ends beyond the {self.size} bytes announced")
        fresh = data[self.end - offset :]
        if not fresh:
            return
        with self._spool._lock:
            self._require_turn()
            _write(self._opened(), fresh, self.end)
        self.end += len(fresh)
        if self.end - self.committed >= STEP:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Make all bytes safe and say so; at the end, compare the digest.

        Raises Damaged if the bytes are not those announced: the upload begins again at 0.
        """
        if self._file is None or self.end == self.committed:
            return
        os.fsync(self._file)
        whole = self.end == self.size
        right = not whole or bytes.fromhex(digest_of(self._spool.path(self.upload))) == self._sha
        with self._spool._lock:
            self._require_turn()
            self._note(self.end if right else 0, complete=whole and right)
        if not right:
            raise Damaged("upload: the bytes do not have the announced SHA-256; begin again at 0")

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._spool.release(self.upload, self._ticket)

    def _note(self, committed: int, *, complete: bool) -> None:
        store = self._spool.store
        with store.writing() as db:
            db.execute(
                "UPDATE uploads SET committed = ?, complete = ? WHERE id = ?",
                (committed, complete, self.upload),
            )
            db.execute(
                "UPDATE tasks SET touched = ? WHERE id = (SELECT task FROM uploads WHERE id = ?)",
                (time.time(), self.upload),
            )
            moved = max(self.end - self.committed, 0)
            count_traffic(db, self._device, int(time.time()) // 86400, moved)
        self.counted += moved
        self.committed = self.end = committed
        self.complete = complete

    def _opened(self) -> int:
        if self._file is None:
            path = self._spool.path(self.upload)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            if self.end == 0:
                sync_folder(path.parent)
        return self._file

    def _require_turn(self) -> None:
        if not self._spool.holds(self.upload, self._ticket):
            raise Superseded("upload: a later call writes it, or it is not wanted any more")


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
