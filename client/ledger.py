"""What private training has cost the records of a site, over all runs: one SQLite file.

A spend is written before training and stays, whatever happens then:

    reserve ──► reserved ──► settle ──► settled

A crash between reserve and settle leaves `reserved`, which counts: the update may have left.
The same round reserved again counts again. Each spend names the data set (its fingerprint)
and the run, but `epsilon` composes all of a site's spends: neither a new run nor records that
were added, reordered or read with another configuration start again at 0. A file that cannot
be read, or is no ledger, stops all private training; a file that was deleted cannot be told
from a new one, so it belongs in the site's backup.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from anabranch.client.files import sync_folder
from anabranch.client.privacy import Spend, epsilon_of
from anabranch.protocols.errors import PrivacyError

APPLICATION_ID = 0x416E6162  # "Anab"
VERSION = 1  # PRAGMA user_version
WAIT_S = 30.0  # for another process that is writing

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
CREATE TABLE spends (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    fingerprint TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL CHECK (round >= 1),
    noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
    sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
    steps INTEGER NOT NULL CHECK (steps >= 1),
    state TEXT NOT NULL CHECK (state IN ('reserved', 'settled'))
) STRICT;
"""


class Ledger:
    """The ledger at `path`, made if absent. Every method raises PrivacyError if it is unusable.

    Each call opens the file, so any thread or process may use its own Ledger on one file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def reserve(self, fingerprint: str, run: str, round_number: int, spend: Spend) -> int:
        """Write down, durably, what training is about to spend; return the entry's number."""
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT INTO spends (fingerprint, run, round, noise_multiplier, sample_rate, "
                "steps, state) VALUES (?, ?, ?, ?, ?, ?, 'reserved')",
                (
                    fingerprint,
                    run,
                    round_number,
                    spend.noise_multiplier,
                    spend.sample_rate,
                    spend.steps,
                ),
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

    def settle(self, entry: int, spend: Spend) -> None:
        """Confirm that training spent what was reserved. Only then may its update leave.

        Raises PrivacyError if `spend` differs or the entry is not open; it then counts as
        reserved.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT noise_multiplier, sample_rate, steps FROM spends "
                "WHERE id = ? AND state = 'reserved'",
                (entry,),
            ).fetchone()
            if row is None:
                raise PrivacyError(f"{self.path}: entry {entry} is not open, nothing may leave")
            ran = (spend.noise_multiplier, spend.sample_rate, spend.steps)
            if row != ran:
                raise PrivacyError(
                    f"{self.path}: entry {entry} reserved (σ, q, steps) = {row}, training spent "
                    f"{ran}: nothing may leave"
                )
            db.execute("UPDATE spends SET state = 'settled' WHERE id = ?", (entry,))

    def history(self, run: str | None = None) -> list[Spend]:
        """Return what the records have spent, oldest first; of one run, if `run` is given."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT noise_multiplier, sample_rate, steps FROM spends "
                "WHERE run = ? OR ? IS NULL ORDER BY id",
                (run, run),
            ).fetchall()
        try:
            return [Spend(noise_multiplier=s, sample_rate=q, steps=t) for s, q, t in rows]
        except ValueError as error:
            raise PrivacyError(
                f"{self.path}: not what a ledger holds ({error}). Private training stops; restore "
                "the ledger from a backup"
            ) from None

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta` of everything the site's records have spent, all runs composed."""
        return epsilon_of(self.history(), delta)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection inside a transaction that is on disk when the block ends."""
        try:
            self._make()
            with closing(_connect(self.path)) as db:
                self._require_ledger(db)
                db.execute("BEGIN IMMEDIATE")
                with db:  # commit, or roll back on an error
                    yield db
        except (sqlite3.Error, OSError) as error:
            raise PrivacyError(
                f"{self.path}: the privacy ledger cannot be used ({error}). Private training "
                "stops until the file is readable again; restore it from a backup. Do not "
                "delete it: what was spent would be forgotten"
            ) from error

    def _make(self) -> None:
        """Create the file, whole or not at all, unless there is one."""
        if self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ledger.", dir=self.path.parent) as folder:
            new = Path(folder) / "new"
            with closing(_connect(new, mode="rwc")) as db:
                db.executescript(_SCHEMA)
            new.chmod(0o600)
            try:
                os.link(new, self.path)  # unlike a rename, never replaces another's ledger
            except FileExistsError:
                return  # another process was first
            sync_folder(self.path.parent)

    def _require_ledger(self, db: sqlite3.Connection) -> None:
        """Raise PrivacyError unless the file is an undamaged ledger of this version."""
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise PrivacyError(
                f"{self.path}: this is no privacy ledger (empty, or another SQLite file). "
                "Private training stops; restore the ledger from a backup"
            )
        if version != VERSION:
            raise PrivacyError(
                f"{self.path}: ledger version {version}, expected {VERSION}: it was written by "
                "another version of anabranch, use that one"
            )
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise PrivacyError(
                f"{self.path}: the privacy ledger is damaged ({' '.join(found.split())}). Private "
                "training stops; restore it from a backup"
            )


def _connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """Open the file; a commit is on disk when it returns.

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
