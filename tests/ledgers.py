"""Rows, spends and damage that the tests of the ledger share."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from anabranch.client.privacy import Spend

SPEND = Spend(noise_multiplier=1.2, sample_rate=0.064, steps=10)

FORMAT_1 = """
PRAGMA application_id = 1097752930;
PRAGMA user_version = 1;
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


def rows(*names: object) -> list[bytes]:
    """Return one row hash per name."""
    return [hashlib.sha256(str(name).encode()).digest() for name in names]


def spend(sigma: float = 1.2, rate: float = 0.064, steps: int = 10) -> Spend:
    return Spend(noise_multiplier=sigma, sample_rate=rate, steps=steps)


def change(path: Path, *statements: str) -> None:
    """Change a ledger behind its back."""
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def old_ledger(path: Path, entries: Iterable[tuple[str, str, int, Spend, str]]) -> Path:
    """Write a ledger of format 1 with (fingerprint, run, round, spend, state)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(FORMAT_1)
        for data, run, number, one, state in entries:
            db.execute(
                "INSERT INTO spends VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)",
                (data, run, number, one.noise_multiplier, one.sample_rate, one.steps, state),
            )
        db.commit()
    return path
