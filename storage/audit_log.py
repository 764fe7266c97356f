"""The audit log of a coordinator or a site: signed lines in a file that is only ever added to.

    audit.jsonl          the log; what a line holds and proves: protocols/identity/audit.py
    audit.key            its Ed25519 key: 32 bytes in hex, mode 0600
    audit.head           witness beside the log: how many lines it has, and the last one's hash
    $XDG_STATE_HOME/anabranch/logs/<log id>.head   second witness, outside the folder (witness.py)
    audit.torn-<sha256>  what a crash left of a line that was never finished

An append holds a lock, reads the first and the last line and the witnesses, writes one line and
returns when it is on the disk: its cost does not grow with the log. Any number of processes and
threads may append. The log writes by itself, before what was to be added,

    torn  when a crash had ended an append half-way: what stands after the last end of a line was
          moved to the side file that this line names with its digest. That append had not returned.
          (A crash in the middle of that leaves the side file, and no line.)
    gap   when a witness saw more lines than there are: the end was cut, or an old copy was put
          back. The log goes on, and says for ever what is missing.

and in its first line, as `lost`, which logs were here before and were taken away. A log whose
last line, key or witnessed part is another than was written takes no line any more. How a log is
verified: audit_check.py.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.protocols.chain import GENESIS, Witness
from anabranch.protocols.errors import MalformedMessage, ProtocolError, RunError
from anabranch.protocols.identity.audit import (
    FORMAT,
    MAX_LINE,
    OPENED,
    Entry,
    Lost,
    Opening,
    public_key,
    read_line,
    require_signed,
    write_line,
)
from anabranch.storage.audit_check import (
    GAP,
    TORN,
    Verified,
    log_report,
    logs_folder,
    lost_at,
    opening_at,
    public_hex,
    read_log_key,
    read_witnesses,
    verify,
    witness_files,
)
from anabranch.storage.files import locked, write_atomic

__all__ = ["AuditLog", "Verified", "log_report", "verify"]

RESERVED = frozenset({OPENED, GAP, TORN})
Note = tuple[str, dict[str, object]]  # kind, fields


def utc_now() -> datetime:
    """Return the time, UTC."""
    return datetime.now(UTC)


class AuditLog:
    """The log at `path`, signed with the key in `key_path`; both are made by the first append.

    `who` is written into its first line: "coordinator heart", "site st-anna of heart".
    """

    def __init__(
        self, path: Path, key_path: Path, who: str, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self.path = path
        self.key_path = key_path
        self.who = who
        self._clock = clock

    def append(self, kind: str, **fields: object) -> str:
        """Add a line; return its hash, the new head, when it is on the disk.

        Fields never hold the contents of a record, a secret, or what was computed from single
        records. Raises ValueError for a kind or a field that cannot be written; ConfigError for a
        key that others may read; ProtocolError for a log that is not as it was left; PrivacyError
        if there is no place for the second witness; RunError if the disk does not take it. After
        an error the line may be there, whole, or not at all.
        """
        if kind in RESERVED:
            raise ValueError(f"audit log: lines of kind {kind} are written by the log itself")
        with self._held():
            logs_folder()  # there must be one, before anything is written
            return self._append(kind, fields)

    @property
    def head(self) -> str:
        """Return the hash of the last line; 64 zeros before the first.

        Raises ProtocolError if that line is not what was written.
        """
        with self._held():
            if not self.path.exists():
                return GENESIS
            with self.path.open("rb") as file:
                last, _, _ = self._last(file)
            self._require_last(last, opening_at(self.path))
        return last.hash

    @property
    def public_key(self) -> str:
        """Return the public key that verifies the log, hex; makes the key if there is none."""
        with self._held():
            return public_hex(self._key())

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the log's lock. Whatever the system refuses is a RunError."""
        try:
            with locked(self.path):
                yield
        except OSError as error:
            raise RunError(
                f"{self.path}: the audit log cannot be read or written "
                f"({error.strerror or error}), and nothing is done that it does not say; make "
                "room, or check the folder's owner"
            ) from error

    def _append(self, kind: str, fields: Mapping[str, object]) -> str:
        key = self._key()
        if not self.path.exists():
            self._create(key)
        opening = opening_at(self.path)
        if public_hex(key) != opening.key:
            raise ProtocolError(
                f"{self.key_path}: this is not the key of {self.path}; restore the one with the "
                f"public key {opening.key[:16]}…"
            )
        with self.path.open("r+b", buffering=0) as file:
            last, torn, end = self._last(file)
            self._require_last(last, opening)
            notes = self._gaps(opening, last)
            notes += [_torn_note(self.path, torn)] if torn else []
            text, last = self._lines(last, [*notes, (kind, dict(fields))], key)
            if torn:
                _set_aside(self.path, torn)
                file.truncate(end)
            _add(file, end, text)
        self._witness(opening, last)
        return last.hash

    def _lines(self, last: Entry, notes: list[Note], key: Ed25519PrivateKey) -> tuple[bytes, Entry]:
        """Return the lines that follow `last`, and the last of them."""
        text = b""
        for kind, fields in notes:
            line = write_line(last, kind, self._time(), fields, key)
            text, last = text + line + b"\n", read_line(line)
        return text, last

    def _create(self, key: Ed25519PrivateKey) -> None:
        """Write the first line; it names the logs that witnesses know to have been here."""
        opening = Opening(
            format=FORMAT,
            log=secrets.token_hex(16),
            who=self.who,
            key=public_hex(key),
            lost=tuple(
                Lost(log=seen.ledger, lines=seen.count, head=seen.head)
                for seen in lost_at(self.path)
            ),
        )
        line = write_line(None, OPENED, self._time(), opening.fields(), key)
        write_atomic(self.path, line + b"\n", mode=0o600)
        self._witness(opening, read_line(line))

    def _last(self, file: BinaryIO) -> tuple[Entry, bytes, int]:
        """Return the last whole line, what stands after it, and where that begins."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2 * (MAX_LINE + 1)))
        whole, end, torn = file.read().rpartition(b"\n")
        if not end or len(torn) > MAX_LINE:
            raise ProtocolError(
                f"{self.path}: this does not end as an audit log; restore it from a backup"
            )
        try:
            return read_line(whole.rpartition(b"\n")[2]), torn, size - len(torn)
        except MalformedMessage as error:
            raise ProtocolError(
                f"{self.path}: the last line: {error}. Nothing can be added to this log; restore "
                "it from a backup, or move it away and keep it: a new one begins"
            ) from None

    def _require_last(self, last: Entry, opening: Opening) -> None:
        try:
            require_signed(last, public_key(opening.key))
        except ProtocolError as error:
            raise ProtocolError(
                f"{self.path}: the last line: {error}; restore the log from a backup"
            ) from None

    def _gaps(self, opening: Opening, last: Entry) -> list[Note]:
        """Return the lines to add because a witness saw lines that are not there.

        Raises ProtocolError if a witness saw another line than the one that is there.
        """
        gaps: dict[str, Note] = {}
        for file, seen in read_witnesses(self.path, opening):
            if seen.count > last.n:
                reason = f"a witness saw {seen.count} lines, and {last.n} were left"
                gaps[seen.head] = (GAP, {"seen": seen.count, "head": seen.head, "reason": reason})
            elif not self._has(seen, last):
                raise ProtocolError(
                    f"{self.path}: line {seen.count} is not the one that {file} saw: the log was "
                    "rewritten, or is in use in two places; restore it from a backup"
                )
        return list(gaps.values())

    def _has(self, seen: Witness, last: Entry) -> bool:
        """Whether line `seen.count` ≤ n is the one that the witness saw."""
        if seen.count == last.n:
            return seen.head == last.hash
        if seen.count == last.n - 1:
            return seen.head == last.previous
        with self.path.open("rb") as file:  # only after witnesses could not be written
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if number == seen.count:
                    return read_line(line.removesuffix(b"\n")).hash == seen.head
        return False

    def _witness(self, opening: Opening, last: Entry) -> None:
        """Make both witnesses say how far the log is. A witness may lag, never run ahead."""
        where = str(self.path.resolve())
        seen = Witness(ledger=opening.log, path=where, count=last.n, head=last.hash)
        for file in witness_files(self.path, opening.log):
            write_atomic(file, msgspec.json.encode(seen) + b"\n", mode=0o600)

    def _key(self) -> Ed25519PrivateKey:
        if not self.key_path.exists():
            if self.path.exists():
                raise ProtocolError(
                    f"{self.key_path}: the key of {self.path} is gone; restore it from a backup, "
                    "or move the log away and keep it: a new one begins"
                )
            seed = Ed25519PrivateKey.generate().private_bytes_raw().hex()
            write_atomic(self.key_path, seed.encode() + b"\n", mode=0o600)
        return read_log_key(self.key_path)

    def _time(self) -> str:
        return self._clock().astimezone(UTC).isoformat(timespec="milliseconds")


def _side_file(log: Path, torn: bytes) -> Path:
    return log.with_suffix(f".torn-{hashlib.sha256(torn).hexdigest()[:16]}")


def _torn_note(log: Path, torn: bytes) -> Note:
    digest = hashlib.sha256(torn).hexdigest()
    return TORN, {"bytes": len(torn), "sha256": digest, "file": _side_file(log, torn).name}


def _set_aside(log: Path, torn: bytes) -> None:
    """Write a torn part to its side file: the same one if this is done again."""
    write_atomic(_side_file(log, torn), torn, mode=0o600)


def _add(file: BinaryIO, end: int, text: bytes) -> None:
    """Write at the end, and return when it is on the disk; what could not be written is undone."""
    file.seek(end)
    try:
        written = file.write(text)
        while written < len(text):
            written += file.write(text[written:])
    except OSError:
        file.truncate(end)
        raise
    os.fsync(file.fileno())
