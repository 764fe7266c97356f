"""The SQLite file under a ledger: made whole or not at all, opened by one process at a time.

    events    id, kind, body, hash      the chain (protocols/chain.py); rows are only added

What else a kind of ledger keeps is in its Format. A transaction holds SQLite's write lock from
its first read on, so that what was checked is what is written to. A file of an older version is
converted in one transaction.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from anabranch.protocols.chain import Link
from anabranch.protocols.errors import PrivacyError
from anabranch.storage.chain import Beginning, Kinds, Spending, State, link
from anabranch.storage.files import sync_folder

WAIT_S = 30.0  # for another process that is writing

_EVENTS = (
    "CREATE TABLE events (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL, "
    "hash TEXT NOT NULL) STRICT"
)

S = TypeVar("S", bound=State[Beginning, Spending])


def _unchecked(db: sqlite3.Connection, state: object) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Format(Generic[S]):
    """What one kind of ledger has of its own."""

    name: str  # "privacy ledger", for messages
    training: str  # what makes the file, for messages
    adopt: str  # the command that accepts a loss, for messages
    application_id: int  # PRAGMA application_id
    version: int  # PRAGMA user_version
    kinds: Kinds
    begin: Callable[[sqlite3.Connection, str, str], msgspec.Struct]
    """(file, the ledger's name, time) -> the first event; makes the tables beside `events`."""
    replay: Callable[[Sequence[Link]], S]
    """Return what the events add up to; raise BrokenChain if they are no chain of this kind."""
    check: Callable[[sqlite3.Connection, S], None] = _unchecked
    """Raise BrokenChain if what the file holds beside the events does not agree with them."""
    older: Mapping[int, Callable[[sqlite3.Connection], None]] = field(default_factory=dict)
    """What turns a file of an older version into one of this version, by that version."""


class Book(Generic[S]):
    """A ledger inside a transaction. Raises BrokenChain if it is not what was written."""

    def __init__(self, form: Format[S], db: sqlite3.Connection) -> None:
        self.db = db
        self._kinds = form.kinds
        rows = db.execute("SELECT id, kind, body, hash FROM events ORDER BY id")
        self.events = [Link(*row) for row in rows]
        self.state = form.replay(self.events)
        form.check(db, self.state)

    def add(self, body: msgspec.Struct) -> Link:
        """Append an event."""
        event = link(self.events[-1], self._kinds, body)
        _insert(self.db, event)
        self.events = [*self.events, event]
        return event


@contextmanager
def opened(form: Format[S], path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the ledger at `path`, converted to this version if it was older.

    A commit is on disk when it returns. Raises sqlite3.Error, or PrivacyError for a file that is
    no ledger of this kind.
    """
    with closing(_connect(path)) as db:
        _require_ledger(form, path, db)
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


def make(form: Format[S], path: Path, *first: msgspec.Struct) -> None:
    """Create a ledger, whole or not at all, unless there is one; `first` follows `opened`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ledger.", dir=path.parent) as folder:
        new = Path(folder) / "new"
        with closing(_connect(new, mode="rwc")) as db:
            db.execute(f"PRAGMA application_id = {form.application_id}")
            with locked(db):
                begin(form, db, *first)
        new.chmod(0o600)
        try:
            os.link(new, path)  # unlike a rename, never replaces another's ledger
        except FileExistsError:
            return  # another process was first
        sync_folder(path.parent)


def begin(form: Format[S], db: sqlite3.Connection, *bodies: msgspec.Struct) -> None:
    """Make the tables and the first events, inside a transaction."""
    db.execute(_EVENTS)
    db.execute(f"PRAGMA user_version = {form.version}")
    event = link(None, form.kinds, form.begin(db, secrets.token_hex(16), now()))
    _insert(db, event)
    for body in bodies:
        event = link(event, form.kinds, body)
        _insert(db, event)


def now() -> str:
    """Return the time as events have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _insert(db: sqlite3.Connection, event: Link) -> None:
    db.execute(
        "INSERT INTO events VALUES (?, ?, ?, ?)", (event.id, event.kind, event.text, event.hash)
    )


def _require_ledger(form: Format[S], path: Path, db: sqlite3.Connection) -> None:
    """Raise PrivacyError unless the file is an undamaged ledger; convert an older one."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != form.application_id:
        raise PrivacyError(
            f"{path}: this is no {form.name} (empty, or another SQLite file). "
            "Private training stops; restore the ledger from a backup"
        )
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise PrivacyError(
            f"{path}: the privacy ledger is damaged ({' '.join(found.split())}). Private "
            "training stops; restore it from a backup"
        )
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version in form.older:
        form.older[version](db)
        (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != form.version:
        raise PrivacyError(
            f"{path}: ledger version {version}, expected {form.version}: it was written by "
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
