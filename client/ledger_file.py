"""The SQLite file under a site's ledger: what it holds beside the chain of events.

    members   data, digests             the rows of a data set (membership.py), fixed by its
                                        fingerprint, which is in the chain
    secret    key                       of the digests, fixed by its SHA-256 in the first event

A file of format 1 (spends, without rows or chain) is converted in one transaction.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3

from anabranch.client.chain import KINDS, DataSet, Imported, Opened, State, replay
from anabranch.client.membership import WIDTH, fingerprint_of
from anabranch.protocols.chain import BrokenChain
from anabranch.storage.book import Book, Format, begin, locked, now


def key_of(book: Book[State]) -> bytes:
    """Return the key of the digests."""
    key: bytes = book.db.execute("SELECT key FROM secret").fetchone()[0]
    return key


def add_set(book: Book[State], members: bytes) -> str:
    """Append the data set with these members, unless it is there; return its fingerprint."""
    data = fingerprint_of(members)
    if data not in book.state.sets:
        book.db.execute("INSERT INTO members VALUES (?, ?)", (data, members))
        book.add(DataSet(data=data, rows=len(members) // WIDTH, time=now()))
    return data


def members_in(book: Book[State]) -> dict[str, bytes]:
    """Return the members of every data set, oldest first. Raises BrokenChain."""
    found: dict[str, bytes] = dict(book.db.execute("SELECT data, digests FROM members"))
    if found.keys() != book.state.sets.keys():
        raise BrokenChain("the rows of a data set are missing, or of one that is not known")
    for data, event in book.state.sets.items():
        if fingerprint_of(found[data]) != data or len(found[data]) != WIDTH * event.rows:
            raise BrokenChain(f"the rows of data set {data[:12]}… are not what was written")
    return {data: found[data] for data in book.state.sets}


def _begin(db: sqlite3.Connection, ledger: str, time: str) -> Opened:
    """Make the tables and the key; return the first event."""
    db.execute("CREATE TABLE members (data TEXT PRIMARY KEY, digests BLOB NOT NULL) STRICT")
    db.execute("CREATE TABLE secret (key BLOB NOT NULL) STRICT")
    key = secrets.token_bytes(32)
    db.execute("INSERT INTO secret VALUES (?)", (key,))
    return Opened(format=2, ledger=ledger, key=hashlib.sha256(key).hexdigest(), time=time)


def _check(db: sqlite3.Connection, state: State) -> None:
    keys = db.execute("SELECT key FROM secret").fetchall()
    if len(keys) != 1 or hashlib.sha256(keys[0][0]).hexdigest() != state.opened.key:
        raise BrokenChain("the key of the rows is not the one of the first event")


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
        begin(SITE, db, *(Imported(**dict(zip(fields, spend, strict=True))) for spend in spends))
        db.execute("DROP TABLE spends")
        Book(SITE, db)  # reads back what was written, or undoes all of it


SITE = Format(
    name="privacy ledger",
    training="round",
    adopt="anabranch site ledger --adopt",
    application_id=0x416E6162,  # "Anab"
    version=2,
    kinds=KINDS,
    begin=_begin,
    replay=replay,
    check=_check,
    older={1: _convert},
)
