"""The SQLite file under a device's ledger: made whole or not at all, one process at a time.

    events    id, kind, body, hash      the chain (ledger_chain.py); rows are only added

A transaction holds SQLite's write lock from its first read on, so that what was checked is what
is written to. The rules are those of the sites' ledger.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from anabranch.edge.runtime.files import sync_folder
from anabranch.edge.runtime.ledger_chain import Body, Opened, link, replay
from anabranch.protocols.chain import Link
from anabranch.protocols.errors import PrivacyError

APPLICATION_ID = 0x416E6544  # "AneD": not a site's ledger
VERSION = 1  # PRAGMA user_version
WAIT_S = 30.0  # for another process that is writing

_TABLES = (
    "CREATE TABLE events (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL, "
    "hash TEXT NOT NULL) STRICT",
    f"PRAGMA user_version = {VERSION}",
)


class Book:
    """A ledger inside a transaction. Raises BrokenChain if it is not what was written."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        rows = db.execute("SELECT id, kind, body, hash FROM events ORDER BY id")
        self.events = [Link(*row) for row in rows]
        self.state = replay(self.events)

    def add(self, body: Body) -> Link:
        """Append an event."""
        event = link(self.events[-1], body)
        _insert(self._db, event)
        self.events = [*self.events, event]
        return event


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the ledger at `path`; a commit is on disk when it returns.

    Raises sqlite3.Error, or PrivacyError for a file that is no device's ledger.
    """
    with closing(_connect(path)) as db:
        _require_ledger(path, db)
        yield db


@contextmanager
def locked(db: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock; commit at the end of the block, or roll back on an error."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    committed(db)


def committed(db: sqlite3.Connection) -> None:
    """Commit: what was written is on disk when this returns."""
    try:
        db.execute("COMMIT")
    except sqlite3.Error:
        db.execute("ROLLBACK")
        raise


def make(path: Path, *first: Body) -> None:
    """Create a ledger, whole or not at all, unless there is one; `first` follows `opened`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ledger.", dir=path.parent) as folder:
        new = Path(folder) / "new"
        with closing(_connect(new, mode="rwc")) as db:
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            with locked(db):
                _begin(db, *first)
        new.chmod(0o600)
        try:
            os.link(new, path)  # unlike a rename, never replaces another's ledger
        except FileExistsError:
            return  # another process was first
        sync_folder(path.parent)


def now() -> str:
    """Return the time as events have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _begin(db: sqlite3.Connection, *bodies: Body) -> None:
    """Make the table and the first events."""
    for statement in _TABLES:
        db.execute(statement)
    event = link(None, Opened(ledger=secrets.token_hex(16), time=now()))
    _insert(db, event)
    for body in bodies:
        event = link(event, body)
        _insert(db, event)


def _insert(db: sqlite3.Connection, event: Link) -> None:
    db.execute(
        "INSERT INTO events VALUES (?, ?, ?, ?)", (event.id, event.kind, event.text, event.hash)
    )


def _require_ledger(path: Path, db: sqlite3.Connection) -> None:
    """Raise PrivacyError unless the file is an undamaged ledger of a device."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        raise PrivacyError(
            f"{path}: this is no privacy ledger of a device (empty, or another SQLite file). "
            "Private training stops; restore the ledger from a backup"
        )
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise PrivacyError(
            f"{path}: the privacy ledger is damaged ({' '.join(found.split())}). Private "
            "training stops; restore it from a backup"
        )
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        raise PrivacyError(
            f"{path}: ledger version {version}, expected {VERSION}: it was written by "
            "another version of anabranch, use that one"
        )


def _connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """Open the file.

    synchronous = EXTRA is FULL plus a sync of the folder after the journal is removed: with
    FULL alone a power cut could bring the journal back and undo the last commit.
    """
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=WAIT_S, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA synchronous = EXTRA")
    except sqlite3.Error:
        db.close()
        raise
    return db
