"""A ledger of what private training costs: a book, its witnesses, and what stops training.

A spend is written before training and stays, whatever happens then:

    reserve ──► train ──► settle ──► what was trained may leave

Events are hash-chained (protocols/chain.py) and witnessed outside the file (witness.py): a ledger
that was edited, cut, rolled back, deleted or exchanged stops all private training, and the error
says what to do. What is reserved, and against which limits, is for each kind of ledger to say.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic

from anabranch.protocols.chain import BrokenChain
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spend import Spend
from anabranch.storage.book import Book, Format, S, locked, make, now, opened
from anabranch.storage.chain import Adopted, Settle, spend_of
from anabranch.storage.witness import Witnesses


class ChainedLedger(Generic[S]):
    """The ledger of this format at `path`; it is made when something is first written.

    `state` is the folder of a second witness; None leaves the one beside the ledger. Every
    method raises PrivacyError if the ledger, or a witness of it, is not as it was left. Each
    call opens the file, so any thread or process may use its own object on one file.
    """

    def __init__(self, form: Format[S], path: Path, state: Path | None) -> None:
        self.path = path
        self._form = form
        self._witnesses = Witnesses(path, state, form.adopt)

    def settle(self, entry: int, spend: Spend) -> str:
        """Confirm that training spent what was reserved; return the head of the chain (hex).

        Only then may what was trained leave. Raises PrivacyError if `spend` differs or the entry
        is not open; it then counts as reserved.
        """
        with self.writing() as book:
            if entry not in book.state.open:
                raise PrivacyError(f"{self.path}: entry {entry} is not open, nothing may leave")
            reserved = spend_of(book.state.reserved[entry])
            if reserved != spend:
                raise PrivacyError(
                    f"{self.path}: entry {entry} reserved (σ, q, steps) = {_values(reserved)}, "
                    f"training spent {_values(spend)}: nothing may leave"
                )
            return book.add(Settle(reserve=entry, time=now())).hash

    def state(self) -> S | None:
        """Return what the events add up to; None if nothing was ever reserved."""
        with self.reading() as book:
            return None if book is None else book.state

    @property
    def head(self) -> str | None:
        """Return the hash of the last event; None if nothing was ever reserved."""
        state = self.state()
        return None if state is None else state.head

    def witness_files(self, state: S) -> list[Path]:
        """Return where the witnesses of a ledger in this state lie."""
        return self._witnesses.files(state)

    def adopt(self) -> str:
        """Accept the ledger as it is against its witnesses, and record it; return the new head.

        A ledger that is missing is begun anew. Events that were lost stay lost: the `adopted`
        event names what the witnesses had seen. Raises PrivacyError if the chain itself is
        broken, or if there is nothing to accept.
        """
        with self._errors():
            found = self._witnesses.read(self._identity())
            record = Adopted(witnesses=tuple(found.values()), time=now())
            if self.path.exists():
                with opened(self._form, self.path) as db, locked(db):
                    book = Book(self._form, db)
                    if self._agrees(book.state):
                        raise PrivacyError(
                            f"{self.path}: the ledger agrees with its witnesses: there is nothing "
                            "to accept"
                        )
                    book.add(record)
            elif found:
                make(self._form, self.path, record)
            else:
                raise PrivacyError(
                    f"{self.path}: no ledger, and no witness of one: the first private "
                    f"{self._form.training} makes it"
                )
            with opened(self._form, self.path) as db:
                state = self._witness(db)
            self._witnesses.forget(found, state)
            return state.head

    def _identity(self) -> str | None:
        """Return the ledger's own name; None if there is no file."""
        if not self.path.exists():
            return None
        with opened(self._form, self.path) as db, locked(db):
            return Book(self._form, db).state.opened.ledger

    def _agrees(self, state: S) -> bool:
        try:
            self._witnesses.require(state, self._witnesses.read(state.opened.ledger))
        except PrivacyError:
            return False
        return True

    @contextmanager
    def reading(self) -> Iterator[Book[S] | None]:
        """Yield the checked ledger, or None if there is none and never was."""
        with self._errors():
            if not self._exists():
                yield None
                return
            with self._checked() as book:
                yield book

    @contextmanager
    def writing(self) -> Iterator[Book[S]]:
        """Yield the checked ledger, made if absent; what is added is on disk, and witnessed,
        when the block ends.
        """
        with self._errors():
            if not self._exists():
                make(self._form, self.path)
            with self._checked() as book:
                yield book

    @contextmanager
    def _checked(self) -> Iterator[Book[S]]:
        """Yield the ledger under the write lock; witness what was there, then what was added.

        A ledger has witnesses before the first reservation is in it: one that has a reservation
        and no witness was tampered with.
        """
        with opened(self._form, self.path) as db:
            with locked(db):
                book = Book(self._form, db)
                found = self._witnesses.read(book.state.opened.ledger)
                if not self._witnesses.require(book.state, found):
                    self._write_witnesses(book.state)
                before = book.events[-1]
                yield book
            if book.events[-1] != before:
                self._witness(db)

    def _exists(self) -> bool:
        """Return whether there is a ledger. Raises PrivacyError if there was one."""
        if self.path.exists():
            return True
        found = self._witnesses.read(None)
        if self.path.exists():
            return True  # another process was first
        self._witnesses.require_none(found)
        return False

    def _witness(self, db: sqlite3.Connection) -> S:
        """Make the witnesses say how far the ledger is now.

        Under the write lock, so that of two writers none puts a witness back.
        """
        with locked(db):
            state = Book(self._form, db).state
            self._write_witnesses(state)
            return state

    def _write_witnesses(self, state: S) -> None:
        try:
            self._witnesses.write(state)
        except OSError as error:
            raise PrivacyError(
                f"{self.path}: the witness of the privacy ledger cannot be written ({error}). "
                "What was reserved counts as spent, and nothing may leave. Make room, or the "
                f"folder writable: {', '.join(map(str, self._witnesses.files(state)))}"
            ) from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn whatever makes the file unusable into a PrivacyError that says what to do."""
        try:
            yield
        except BrokenChain as error:
            raise PrivacyError(
                f"{self.path}: the privacy ledger was changed: {error}. Private training stops; "
                "restore the ledger from a backup"
            ) from None
        except (sqlite3.Error, OSError) as error:
            raise PrivacyError(
                f"{self.path}: the privacy ledger cannot be used ({error}). Private training "
                "stops until the file is readable again; restore it from a backup. Do not "
                "delete it: what was spent would be forgotten"
            ) from error


def _values(spend: Spend) -> tuple[object, ...]:
    plain = (spend.noise_multiplier, spend.sample_rate, spend.steps)
    return plain if spend.skellam is None else (*plain, spend.skellam, spend.unit)
