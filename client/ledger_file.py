"""The SQLite file under a ledger: made whole or not at all, opened by one process at a time.

    events    id, kind, body, hash      the chain (chain.py); rows are only added
    members   data, digests             the rows of a data set (membership.py), fixed by its
                                        fingerprint, which is in the chain
    secret    key                       of the digests, fixed by its SHA-256 in the first event

A transaction holds SQLite's write lock from its first read on, so that what was checked is what
is written to. A file of format 1 (spends, without rows or chain) is converted in one transaction.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from anabranch.client.chain import (
    Body,
    BrokenChain,
    DataSet,
    Event,
    Imported,
    Opened,
    link,
    replay,
)
from anabranch.client.files import sync_folder
from anabranch.client.membership import WIDTH, fingerprint_of
from anabranch.protocols.errors import PrivacyError

APPLICATION_ID = 0x416E6162  # "Anab"
VERSION = 2  # PRAGMA user_version
WAIT_S = 30.0  # for another process that is writing

_TABLES = (
    "CREATE TABLE events (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL, "
    "hash TEXT NOT NULL) STRICT",
    "CREATE TABLE members (data TEXT PRIMARY KEY, digests BLOB NOT NULL) STRICT",
    "CREATE TABLE secret (key BLOB NOT NULL) STRICT",
    f"PRAGMA user_version = {VERSION}",
)


class Book:
    """A ledger inside a transaction. Raises BrokenChain if it is not what was written."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.events = _events(db)
        self.state = replay(self.events)
        keys = db.execute("SELECT key FROM secret").fetchall()
        if len(keys) != 1 or hashlib.sha256(keys[0][0]).hexdigest() != self.state.opened.key:
            raise BrokenChain("the key of the rows is not the one of the first event")
        self.key: bytes = keys[0][0]

    def add(self, body: Body) -> Event:
        """Append an event."""
        event = link(self.events[-1], body)
        _insert(self._db, event)
        self.events = [*self.events, event]
        return event

    def add_set(self, members: bytes) -> str:
        """Append the data set with these members, unless it is there; return its fingerprint."""
        data = fingerprint_of(members)
        if data not in self.state.sets:
            self._db.execute("INSERT INTO members VALUES (?, ?)", (data, members))
            self.add(DataSet(data=data, rows=len(members) // WIDTH, time=now()))
        return data

    def members(self) -> dict[str, bytes]:
        """Return the members of every data set, oldest first. Raises BrokenChain."""
        found: dict[str, bytes] = dict(self._db.execute("SELECT data, digests FROM members"))
        if found.keys() != self.state.sets.keys():
            raise BrokenChain("the rows of a data set are missing, or of one that is not known")
        for data, event in self.state.sets.items():
            if fingerprint_of(found[data]) != data or len(found[data]) != WIDTH * event.rows:
                raise BrokenChain(f"the rows of data set {data[:12]}… are not what was written")
        return {data: found[data] for data in self.state.sets}


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the ledger at `path`, converted to this format if it was older.

    A commit is on disk when it returns. Raises sqlite3.Error, or PrivacyError for a file that is
    no ledger.
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
    """Make the tables and the first events."""
    for statement in _TABLES:
        db.execute(statement)
    key = secrets.token_bytes(32)
    db.execute("INSERT INTO secret VALUES (?)", (key,))
    identity, digest = secrets.token_hex(16), hashlib.sha256(key).hexdigest()
    event = link(None, Opened(format=2, ledger=identity, key=digest, time=now()))
    _insert(db, event)
    for body in bodies:
        event = link(event, body)
        _insert(db, event)


def _events(db: sqlite3.Connection) -> list[Event]:
    rows = db.execute("SELECT id, kind, body, hash FROM events ORDER BY id")
    return [Event(*row) for row in rows]


def _insert(db: sqlite3.Connection, event: Event) -> None:
    db.execute(
        "INSERT INTO events VALUES (?, ?, ?, ?)", (event.id, event.kind, event.text, event.hash)
    )


def _convert(db: sqlite3.Connection) -> None:
    """Turn a ledger of format 1 into one of this format; all its spends are imported."""
    with locked(db):
        if db.execute("PRAGMA user_version").fetchone() != (1,):
            return  # another process was first
        spends = db.execute(
            "SELECT fingerprint, run, round, state, noise_multiplier, sample_rate, steps "
            "FROM spends ORDER BY id"
        ).fetchall()
        fields = ("data", "run", "round", "state", "noise_multiplier", "sample_rate", "steps")
        _begin(db, *(Imported(**dict(zip(fields, spend, strict=True))) for spend in spends))
        db.execute("DROP TABLE spends")
        Book(db)  # reads back what was written, or undoes all of it


def _require_ledger(path: Path, db: sqlite3.Connection) -> None:
    """Raise PrivacyError unless the file is an undamaged ledger; convert one of format 1."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        raise PrivacyError(
            f"{path}: this is no privacy ledger (empty, or another SQLite file). "
            "Private training stops; restore the ledger from a backup"
        )
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise PrivacyError(
            f"{path}: the privacy ledger is damaged ({' '.join(found.split())}). Private "
            "training stops; restore it from a backup"
        )
    if db.execute("PRAGMA user_version").fetchone() == (1,):
        _convert(db)
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
