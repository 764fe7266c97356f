"""The SQLite file under a coordinator's state: its tables, its connections, its copies.

    invitations  single-use invitations, as SHA-256 of their secret
    sites        the roster: one row per name, the last site that had it
    keys         every site key that was ever in the roster; none comes in twice
    reports      what each site said last
    runs         one row per run: what was proposed, what is wanted, what it does
    rosters      among whom a run sums updates, if it does so securely
    waits        what a run waits for now
    asked        what a run asked of which site, and what became of it

Journal in WAL mode, synchronous = FULL: what a transaction said is on the disk. Every change is one
BEGIN IMMEDIATE transaction, so any number of processes may share the file. The file has mode 0600;
SQLite gives its -wal and -shm files the same. A file of an earlier VERSION is brought to this one
when it is opened, in one transaction; one of a later version is refused.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from anabranch.protocols.errors import ConfigError, ProtocolError, RunError
from anabranch.storage.files import write_atomic

APPLICATION = 0x616E6231  # "anb1", PRAGMA application_id
VERSION = 2  # PRAGMA user_version
BUSY_S = 10.0  # for another process that is writing

S = TypeVar("S", bound=msgspec.Struct)

SCHEMA = f"""
CREATE TABLE invitations (
  secret_hash TEXT PRIMARY KEY, site TEXT NOT NULL, created REAL NOT NULL, expires REAL NOT NULL,
  used REAL, key TEXT NOT NULL DEFAULT ''
) STRICT, WITHOUT ROWID;
CREATE TABLE sites (
  name TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, public_key TEXT NOT NULL, node TEXT UNIQUE,
  status TEXT NOT NULL CHECK (status IN ('active', 'revoked', 'left')), joined REAL NOT NULL,
  expires REAL NOT NULL, serial TEXT NOT NULL, version TEXT NOT NULL, reason TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE keys (key TEXT PRIMARY KEY, site TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE reports (
  site TEXT PRIMARY KEY, report TEXT NOT NULL, at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE runs (
  run TEXT PRIMARY KEY, name TEXT NOT NULL, toml TEXT NOT NULL, signed TEXT NOT NULL,
  created REAL NOT NULL, desired TEXT NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL,
  flower_run TEXT, restarts INTEGER NOT NULL, continues TEXT, validation TEXT, test TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE waits (run TEXT PRIMARY KEY, wait TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE asked (
  run TEXT NOT NULL, site TEXT NOT NULL, asked TEXT NOT NULL, PRIMARY KEY (run, site)
) STRICT, WITHOUT ROWID;
PRAGMA application_id = {APPLICATION};
"""

# version -> what brings a file to it; a new file goes the same way
STEPS = {
    1: SCHEMA,
    2: """
ALTER TABLE sites ADD COLUMN peer_key TEXT;
CREATE UNIQUE INDEX sites_peer_key ON sites (peer_key);
CREATE TABLE rosters (run TEXT PRIMARY KEY, roster TEXT NOT NULL) STRICT, WITHOUT ROWID;
""",
}


class StateFile:
    """The open file: one connection that reads and one that writes, each behind a lock.

    Threads may share it; a process that was forked must open its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explained(path):
            self._reader = _connect(path)
        try:
            _require_ours(path, self._reader)
            _update(path, self._reader)
            with _explained(path):
                self._writer = _connect(path)
        except BaseException:
            self._reader.close()
            raise
        self._reading, self._writing = threading.Lock(), threading.Lock()

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Yield the writer inside one transaction; rolled back if the block raises.

        Raises RunError if the disk is full or another process writes for more than BUSY_S, and
        ConfigError if the file is damaged.
        """
        with _explained(self.path), self._writing:
            db = self._writer
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite ends it itself if the disk is full
                    db.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Return all rows of one query; raises as `writing` does."""
        with _explained(self.path), self._reading:
            return [dict(row) for row in self._reader.execute(query, values)]

    def check(self) -> None:
        """Read the whole file; raise ConfigError saying what to do if any of it is damaged."""
        found = [row["quick_check"] for row in self.rows("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise damaged(self.path, str(found[0]).splitlines()[-1] if found else "unreadable")

    def backup(self, target: Path) -> None:
        """Write a copy of one moment to `target`, whole or not at all, mode 0600.

        Others may read and write meanwhile.
        """
        with _explained(self.path), self._reading:
            data = self._reader.serialize()
        write_atomic(target, data, 0o600)


def make(path: Path) -> None:
    """Make the file of a new federation; ConfigError if there is one. Whole or not at all."""
    if path.exists():
        raise ConfigError(f"{path}: exists; choose another folder")
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.executescript(f"BEGIN; {_steps_after(0)} COMMIT;")
        data = db.serialize()
    write_atomic(path, data, 0o600)
    StateFile(path).close()  # turns the journal to WAL


def damaged(path: Path, why: object) -> ConfigError:
    """Return the error for a file that cannot be used, with what to do."""
    return ConfigError(
        f"{path}: not a coordinator's state, or damaged ({why}). Stop the coordinator and run "
        "`anabranch coordinator restore-state`, which puts the last copy in its place; "
        "docs/coordinator.md says what a copy may lack"
    )


def _connect(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise ConfigError(
            f"{path}: missing. Without it nobody knows which sites are in: run `anabranch "
            "coordinator restore-state`, or make a new federation with `anabranch coordinator init`"
        )
    os.chmod(path, 0o600)
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            db.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        db.close()
        raise
    return db


def _require_ours(path: Path, db: sqlite3.Connection) -> None:
    with _explained(path):
        (application,), (version,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
    if application != APPLICATION:
        raise damaged(path, f"application id {application:#x}, expected {APPLICATION:#x}")
    if not 1 <= version <= VERSION:
        raise ConfigError(
            f"{path}: state of version {version}, this software knows {VERSION}. Install the "
            "version of anabranch that wrote it, or a newer one"
        )


def _update(path: Path, db: sqlite3.Connection) -> None:
    """Bring the file to this version, whole or not at all; one process does it, others wait."""
    with _explained(path):
        if _version(db) == VERSION:
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in _steps_after(_version(db)).split(";"):
                db.execute(statement)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _steps_after(version: int) -> str:
    """Return the statements that bring a file of `version` (0: an empty one) to VERSION."""
    steps = [text for number, text in STEPS.items() if number > version]
    return "".join([*steps, f"PRAGMA user_version = {VERSION};"])


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says into an error that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise damaged(path, error) from None
        raise RunError(
            f"{path}: cannot be used now ({error}). Make room on the disk, or wait until the "
            "other process that is writing has ended; what was there before is unchanged"
        ) from None
    except sqlite3.ProgrammingError:
        raise  # of this software
    except sqlite3.DatabaseError as error:
        raise damaged(path, error) from None


# -- structs and rows: a field is a column ---------------------------------------------------------

_UNSIGNED = ("node", "flower_run")  # 64 bits without a sign, which SQLite's integers do not hold


def text_of(value: msgspec.Struct) -> str:
    """Return a struct as JSON, for a column."""
    return msgspec.json.encode(value).decode()


def struct_of(row: Mapping[str, Any], kind: type[S]) -> S:
    """Return a row as a struct; msgspec.ValidationError if it is none."""
    values = {
        name: int(value) if name in _UNSIGNED and value is not None else value
        for name, value in row.items()
    }
    return msgspec.convert(values, kind)


def one(db: sqlite3.Connection, query: str, *values: Any) -> dict[str, Any] | None:
    """Return the first row, inside a transaction."""
    found = db.execute(query, values).fetchone()
    return None if found is None else dict(found)


def put(db: sqlite3.Connection, table: str, entry: msgspec.Struct) -> None:
    """Write a struct as a row, inside a transaction. Its first field is the row's key.

    Raises ConfigError, and changes nothing, if another row has what only one may have.
    """
    names = entry.__struct_fields__
    values = [getattr(entry, name) for name in names]
    columns = [
        str(value) if name in _UNSIGNED and value is not None else value
        for name, value in zip(names, values, strict=True)
    ]
    marks, sets = ", ".join("?" * len(names)), ", ".join(f"{n} = excluded.{n}" for n in names[1:])
    query = (
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks}) "
        f"ON CONFLICT ({names[0]}) DO UPDATE SET {sets}"
    )
    try:
        db.execute(query, columns)
    except sqlite3.IntegrityError as error:
        raise ConfigError(f"{table[:-1]} {values[0]}: another has the same ({error})") from None


def require_own_peer(db: sqlite3.Connection, site: str, key: str | None) -> None:
    """Raise ProtocolError, inside a transaction, if another site has this peer key."""
    other = one(db, "SELECT name FROM sites WHERE peer_key = ? AND name <> ?", key, site)
    if other is not None:
        raise ProtocolError(f"site {site}: its peer key is that of site {other['name']}")


def change(
    db: sqlite3.Connection, table: str, name: str, kind: type[S], changes: Mapping[str, Any]
) -> S:
    """Change fields of one row, inside a transaction; return the whole.

    Raises ConfigError if there is no such row, TypeError for a field that does not exist or is
    the row's key, and msgspec.ValidationError for a value of another type.
    """
    key, *fields = kind.__struct_fields__
    unknown = sorted(set(changes) - set(fields))
    if unknown:
        raise TypeError(f"{kind.__name__}: {unknown} cannot be changed")
    row = one(db, f"SELECT * FROM {table} WHERE {key} = ?", name)
    if row is None:
        raise ConfigError(
            f"{table[:-1]} {name}: there is none of this name; `anabranch coordinator {table}` "
            "lists them"
        )
    changed = msgspec.structs.replace(struct_of(row, kind), **changes)
    checked = msgspec.convert(msgspec.to_builtins(changed), kind)  # types; replace looks at none
    put(db, table, checked)
    return checked
