"""What a gateway knows, in one SQLite file: a restart loses nothing and counts nothing twice.

    tokens      one-time enrolment tokens, as SHA-256
    devices     who may call
    rounds      one per (run, number): what was asked, when it ends, how it ended
    tasks       one per (round, device): handed → (trained →) counted | refused | aborted
    uploads     announced bytes of a task, and how many of them are safe
    counted     the deltas that go into a round: one row per task, ever
    traffic     bytes per device and day
    spends      client- and record-level privacy: one row per (run, number, unit)
    peers       the key that a device signs with in secure sums; the first one stays
    sums        secure rounds: collecting → running → masked → done

Journal in WAL mode, synchronous = FULL: what a transaction said is on the disk. Every change is
one BEGIN IMMEDIATE transaction, behind one lock within the process and SQLite's between processes
(the gRPC server and the Flower client share the file).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.edge.gateway.refusals import Denied
from anabranch.protocols.errors import ConfigError

FORMAT = 1
BUSY_S = 30.0

SCHEMA = """
CREATE TABLE about (format INTEGER NOT NULL);
CREATE TABLE tokens (
  hash BLOB PRIMARY KEY, label TEXT NOT NULL, expires REAL NOT NULL, device TEXT
) WITHOUT ROWID;
CREATE TABLE devices (
  id TEXT PRIMARY KEY, key BLOB NOT NULL, label TEXT NOT NULL, platform TEXT NOT NULL,
  enrolled REAL NOT NULL, revoked REAL, seen REAL, runtime TEXT NOT NULL DEFAULT '',
  examples INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE rounds (
  id INTEGER PRIMARY KEY, run TEXT NOT NULL, number INTEGER NOT NULL, digest BLOB NOT NULL,
  assignment BLOB NOT NULL, spec BLOB NOT NULL, adapter TEXT NOT NULL,
  adapter_bytes INTEGER NOT NULL, bundle TEXT NOT NULL, mechanism BLOB,
  described INTEGER NOT NULL, opened REAL NOT NULL, deadline REAL NOT NULL,
  state TEXT NOT NULL DEFAULT 'open', reason TEXT NOT NULL DEFAULT '', result TEXT,
  examples INTEGER, steps INTEGER, clients INTEGER, closed REAL, UNIQUE (run, number)
);
CREATE TABLE tasks (
  id TEXT PRIMARY KEY, round INTEGER NOT NULL REFERENCES rounds, device TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'handed', reason TEXT NOT NULL DEFAULT '', declared INTEGER NOT NULL,
  touched REAL NOT NULL, UNIQUE (round, device)
) WITHOUT ROWID;
CREATE TABLE draws (
  round INTEGER NOT NULL REFERENCES rounds, device TEXT NOT NULL, drawn INTEGER NOT NULL,
  PRIMARY KEY (round, device)
) WITHOUT ROWID;
CREATE TABLE uploads (
  id TEXT PRIMARY KEY, task TEXT NOT NULL UNIQUE REFERENCES tasks, sha BLOB NOT NULL,
  size INTEGER NOT NULL, committed INTEGER NOT NULL DEFAULT 0, complete INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE counted (
  task TEXT PRIMARY KEY REFERENCES tasks, round INTEGER NOT NULL REFERENCES rounds,
  upload TEXT NOT NULL, sha BLOB NOT NULL, examples INTEGER NOT NULL, steps INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE traffic (
  device TEXT NOT NULL, day INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY (device, day)
) WITHOUT ROWID;
CREATE TABLE spends (
  run TEXT NOT NULL, number INTEGER NOT NULL, unit TEXT NOT NULL, noise REAL NOT NULL,
  rate REAL NOT NULL, steps INTEGER NOT NULL, PRIMARY KEY (run, number, unit)
) WITHOUT ROWID;
"""

# Of secure sums; added to the databases of older gateways when they are opened.
SUMS = """
CREATE TABLE IF NOT EXISTS peers (
  device TEXT PRIMARY KEY REFERENCES devices, key BLOB NOT NULL UNIQUE
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sums (
  round INTEGER PRIMARY KEY REFERENCES rounds, plan BLOB NOT NULL,
  state TEXT NOT NULL DEFAULT 'collecting', attempts INTEGER NOT NULL DEFAULT 0,
  masked_bytes INTEGER NOT NULL DEFAULT 0
);
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Enrolment:
    """What a token is exchanged for."""

    device: str
    key: bytes  # SHA-256 of its public key
    platform: str


class Store:
    """The open database. Threads may share it."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            raise ConfigError(
                f"{file}: missing. Without it nobody knows who is enrolled and what privacy was "
                "spent: restore it, or make a new gateway with `anabranch edge gateway init`"
            )
        self._lock = threading.RLock()
        try:
            self._db = _connect(file)
            found = self._db.execute("SELECT format FROM about").fetchone()
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{file}: not a gateway's state ({error}); restore it") from None
        if found is None or found["format"] != FORMAT:
            self._db.close()
            raise ConfigError(f"{file}: expected format {FORMAT}, got {found}")
        self._db.executescript(SUMS)

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        with self._lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection inside one transaction; rolled back if the block raises."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite ends it itself if the disk is full
                    self._db.execute("ROLLBACK")
                raise

    def row(self, query: str, *values: Any) -> Row | None:
        """Return the first row, or None."""
        with self._lock:
            found = self._db.execute(query, values).fetchone()
        return None if found is None else dict(found)

    def rows(self, query: str, *values: Any) -> list[Row]:
        """Return all rows."""
        with self._lock:
            return [dict(row) for row in self._db.execute(query, values)]

    # -- enrolment -------------------------------------------------------------------------------

    def add_token(self, hashed: bytes, expires: float, label: str) -> None:
        """Remember a token until it is used or `expires`."""
        with self.writing() as db:
            db.execute("INSERT INTO tokens VALUES (?, ?, ?, NULL)", (hashed, label, expires))

    def enrol(self, hashed: bytes, new: Enrolment, now: float) -> str:
        """Exchange a token for the new device; return the device's name.

        Of many that come with one token, one gets a device. The same key may come again, as its
        answer may have been lost: it gets the same device. Raises Denied.
        """
        with self.writing() as db:
            token = db.execute("SELECT * FROM tokens WHERE hash = ?", (hashed,)).fetchone()
            if token is None or token["expires"] <= now:
                raise Denied("token: unknown or expired; ask the gateway's operator for a new one")
            if token["device"] is not None:
                found = db.execute(
                    "SELECT * FROM devices WHERE id = ? AND key = ? AND revoked IS NULL",
                    (token["device"], new.key),
                ).fetchone()
                if found is None:
                    raise Denied("token: used already; ask the gateway's operator for a new one")
                return str(found["id"])
            db.execute("UPDATE tokens SET device = ? WHERE hash = ?", (new.device, hashed))
            db.execute(
                "INSERT INTO devices (id, key, label, platform, enrolled) VALUES (?, ?, ?, ?, ?)",
                (new.device, new.key, token["label"], new.platform, now),
            )
        return new.device

    def renew(self, device: str, key: bytes) -> None:
        """Note the device's new key; its old certificate runs out by itself."""
        with self.writing() as db:
            db.execute("UPDATE devices SET key = ? WHERE id = ?", (key, device))

    def pin_peer(self, device: str, key: bytes) -> None:
        """Keep the key that a device signs with in secure sums; Denied for any later one."""
        with self.writing() as db:
            db.execute("INSERT INTO peers VALUES (?, ?) ON CONFLICT DO NOTHING", (device, key))
        if self.peer(device) != key:
            raise Denied(
                "peer_key: this device has another one here, or another device has this one; enrol "
                "again with a new token"
            )

    def peer(self, device: str) -> bytes | None:
        """Return the pinned key of a device."""
        found = self.row("SELECT key FROM peers WHERE device = ?", device)
        return None if found is None else bytes(found["key"])

    def peers(self) -> dict[str, bytes]:
        """Return the pinned keys of all devices that are not revoked."""
        query = (
            "SELECT device, peers.key AS key FROM peers JOIN devices ON devices.id = device "
            "WHERE revoked IS NULL ORDER BY device"
        )
        return {row["device"]: bytes(row["key"]) for row in self.rows(query)}

    def require_device(self, device: str) -> Row:
        """Return the device's row; Denied if it is unknown or revoked."""
        found = self.row("SELECT * FROM devices WHERE id = ?", device)
        if found is None:
            raise Denied("certificate: this gateway does not know the device; enrol again")
        if found["revoked"] is not None:
            raise Denied("certificate: the device was revoked; talk to the gateway's operator")
        return found

    def revoke(self, device: str, now: float) -> bool:
        """Refuse a device from now on, and what it has sent to open rounds; False if unknown."""
        with self.writing() as db:
            changed = db.execute(
                "UPDATE devices SET revoked = coalesce(revoked, ?) WHERE id = ?", (now, device)
            )
            if not changed.rowcount:
                return False
            open_tasks = (
                "SELECT tasks.id FROM tasks JOIN rounds ON rounds.id = tasks.round "
                "WHERE device = ? AND rounds.state = 'open'"
            )
            db.execute(f"DELETE FROM counted WHERE task IN ({open_tasks})", (device,))
            db.execute(
                "UPDATE tasks SET state = 'refused', reason = 'revoked' "
                f"WHERE id IN ({open_tasks})",
                (device,),
            )
        return True

    def devices(self) -> list[Row]:
        """Return all devices, the oldest first."""
        return self.rows("SELECT * FROM devices ORDER BY enrolled, id")

    # -- traffic ---------------------------------------------------------------------------------

    def traffic(self, device: str, day: int) -> int:
        """Return the bytes that a device has sent and fetched on a day."""
        found = self.row("SELECT bytes FROM traffic WHERE device = ? AND day = ?", device, day)
        return 0 if found is None else int(found["bytes"])

    def add_traffic(self, device: str, day: int, count: int) -> None:
        """Add to it."""
        with self.writing() as db:
            count_traffic(db, device, day, count)


def count_traffic(db: sqlite3.Connection, device: str, day: int, count: int) -> None:
    """Add bytes of a device and day, inside a transaction; older days are forgotten."""
    db.execute(
        "INSERT INTO traffic VALUES (?, ?, ?) "
        "ON CONFLICT (device, day) DO UPDATE SET bytes = bytes + excluded.bytes",
        (device, day, count),
    )
    db.execute("DELETE FROM traffic WHERE device = ? AND day < ?", (device, day - 1))


def make_store(file: Path) -> None:
    """Make the empty database of a new gateway; ConfigError if there is one."""
    if file.exists():
        raise ConfigError(f"{file}: exists; choose another folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    db = _connect(file)
    try:
        db.executescript(f"BEGIN; {SCHEMA} INSERT INTO about VALUES ({FORMAT}); COMMIT;")
        file.chmod(0o600)
    finally:
        db.close()


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            db.execute(f"PRAGMA {pragma}")
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db
