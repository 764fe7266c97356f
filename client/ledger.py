"""What private training has cost the records of a site, over all runs: one file per site.

A spend is written before training and stays, whatever happens then:

    reserve ──► train ──► settle ──► the update may leave

A crash between reserve and settle leaves a reserve without a settle, which counts: the update
may have left. The same round reserved again counts again. An event names the rows it was
trained on (membership.py), so neither a new run nor another coordinator, contract, split, order
or installation sets a row back to 0, and a new row begins at 0. Events are hash-chained
(chain.py) and witnessed outside the file (witness.py): a ledger that was edited, cut, rolled
back, deleted or exchanged stops all private training, and the error says what to do. Somebody
who rewrites file and witnesses together is found by comparing with the heads that the
coordinator was sent: `contains`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anabranch.client.chain import Adopted, BrokenChain, Event, Reserve, Settle, State
from anabranch.client.ledger_file import Book, locked, make, now, opened
from anabranch.client.membership import fingerprint_of, groups, largest, members_of
from anabranch.client.privacy import Spend, epsilon_of, require_budget
from anabranch.client.witness import Witnesses
from anabranch.protocols.errors import PrivacyError


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What may be spent: at most ε at δ by one run, by any one row, or by the site as a whole."""

    epsilon: float
    delta: float
    over: Literal["run", "row", "site"]
    name: str  # where it is set, for the message


class Ledger:
    """The ledger at `path`; it is made when something is first reserved.

    `state` is the folder of a second witness; None leaves the one beside the ledger. Every
    method raises PrivacyError if the ledger, or a witness of it, is not as it was left. Each
    call opens the file, so any thread or process may use its own Ledger on one file.
    """

    def __init__(self, path: Path, state: Path | None = None) -> None:
        self.path = path
        self._witnesses = Witnesses(path, state)

    def reserve(
        self,
        rows: Sequence[bytes],
        run: str,
        round_number: int,
        spend: Spend,
        limits: Sequence[Limit] = (),
    ) -> int:
        """Write down, durably, what training is about to spend; return the number of the event.

        `rows` are the hashes of the rows to train on. Nothing is written, and PrivacyError
        raised, if a limit would be exceeded; check and writing are one transaction. If a
        witness cannot be written, the spend counts and PrivacyError is raised.
        """
        if not rows:
            raise PrivacyError("0 records: nothing can be trained on privately")
        with self._writing() as book:
            members = members_of(rows, book.key)
            for limit in limits:
                _require(limit, book, members, run, spend)
            event = Reserve(
                data=book.add_set(members),
                run=run,
                round=round_number,
                noise_multiplier=spend.noise_multiplier,
                sample_rate=spend.sample_rate,
                steps=spend.steps,
                time=now(),
            )
            return book.add(event).id

    def settle(self, entry: int, spend: Spend) -> str:
        """Confirm that training spent what was reserved; return the head of the chain (hex).

        Only then may the update leave. Raises PrivacyError if `spend` differs or the entry is
        not open; it then counts as reserved.
        """
        with self._writing() as book:
            if entry not in book.state.open:
                raise PrivacyError(f"{self.path}: entry {entry} is not open, nothing may leave")
            reserved = book.state.reserved[entry]
            planned = (reserved.noise_multiplier, reserved.sample_rate, reserved.steps)
            ran = (spend.noise_multiplier, spend.sample_rate, spend.steps)
            if planned != ran:
                raise PrivacyError(
                    f"{self.path}: entry {entry} reserved (σ, q, steps) = {planned}, training "
                    f"spent {ran}: nothing may leave"
                )
            return book.add(Settle(reserve=entry, time=now())).hash

    def spent(self, rows: Sequence[bytes], delta: float) -> float:
        """Return the largest ε at `delta` that one of these rows has spent in all runs."""
        with self._reading() as book:
            if book is None:
                return 0.0
            found = _by_rows(book, members_of(rows, book.key))
            return max((epsilon_of(spends, delta) for spends in found), default=0.0)

    def history(self, run: str | None = None) -> list[Spend]:
        """Return what was spent on any row, oldest first; of one run, if `run` is given."""
        with self._reading() as book:
            return [] if book is None else book.state.spends(run=run)

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta` of all events composed, as if every row had been in each of them.

        No row has spent more.
        """
        return epsilon_of(self.history(), delta)

    def events(self) -> list[Event]:
        """Return the chain, oldest event first; [] if nothing was ever reserved."""
        with self._reading() as book:
            return [] if book is None else book.events

    def state(self) -> State | None:
        """Return what the events add up to; None if nothing was ever reserved."""
        with self._reading() as book:
            return None if book is None else book.state

    def members(self) -> dict[str, bytes]:
        """Return fingerprint -> keyed digests of the rows, oldest data set first."""
        with self._reading() as book:
            return {} if book is None else book.members()

    def members_of(self, rows: Sequence[bytes]) -> bytes:
        """Return the keyed digests of rows, sorted; b"" if nothing was ever reserved."""
        with self._reading() as book:
            return b"" if book is None else members_of(rows, book.key)

    def fingerprint(self, rows: Sequence[bytes]) -> str | None:
        """Return the fingerprint of rows as a data set; None if nothing was ever reserved."""
        with self._reading() as book:
            return None if book is None else fingerprint_of(members_of(rows, book.key))

    @property
    def head(self) -> str | None:
        """Return the hash of the last event; None if nothing was ever reserved."""
        state = self.state()
        return None if state is None else state.head

    def contains(self, head: str) -> bool:
        """Return whether the chain has, or once ended with, the event of this hash."""
        state = self.state()
        return state is not None and head in state.heads

    def witness_files(self, state: State) -> list[Path]:
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
                with opened(self.path) as db, locked(db):
                    book = Book(db)
                    if self._agrees(book.state):
                        raise PrivacyError(
                            f"{self.path}: the ledger agrees with its witnesses: there is nothing "
                            "to accept"
                        )
                    book.add(record)
            elif found:
                make(self.path, record)
            else:
                raise PrivacyError(
                    f"{self.path}: no ledger, and no witness of one: the first private round "
                    "makes it"
                )
            with opened(self.path) as db:
                state = self._witness(db)
            self._witnesses.forget(found, state)
            return state.head

    def _identity(self) -> str | None:
        """Return the ledger's own name; None if there is no file."""
        if not self.path.exists():
            return None
        with opened(self.path) as db, locked(db):
            return Book(db).state.opened.ledger

    def _agrees(self, state: State) -> bool:
        try:
            self._witnesses.require(state, self._witnesses.read(state.opened.ledger))
        except PrivacyError:
            return False
        return True

    @contextmanager
    def _reading(self) -> Iterator[Book | None]:
        """Yield the checked ledger, or None if there is none and never was."""
        with self._errors():
            if not self._exists():
                yield None
                return
            with self._checked() as book:
                yield book

    @contextmanager
    def _writing(self) -> Iterator[Book]:
        """Yield the checked ledger, made if absent; what is added is on disk, and witnessed,
        when the block ends.
        """
        with self._errors():
            if not self._exists():
                make(self.path)
            with self._checked() as book:
                yield book

    @contextmanager
    def _checked(self) -> Iterator[Book]:
        """Yield the ledger under the write lock; witness what was there, then what was added.

        A ledger has witnesses before the first data set is in it, so one without any that has
        one was tampered with.
        """
        with opened(self.path) as db:
            with locked(db):
                book = Book(db)
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

    def _witness(self, db: sqlite3.Connection) -> State:
        """Make the witnesses say how far the ledger is now.

        Under the write lock, so that of two writers none puts a witness back.
        """
        with locked(db):
            state = Book(db).state
            self._write_witnesses(state)
            return state

    def _write_witnesses(self, state: State) -> None:
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


def _by_rows(book: Book, members: bytes) -> list[list[Spend]]:
    """Return what the rows have spent: one list for each group that can have spent most."""
    found = groups(members, book.members())
    return [book.state.spends(data=group) for group in largest(found)]


def _require(limit: Limit, book: Book, members: bytes, run: str, planned: Spend) -> None:
    """Raise PrivacyError if `planned` on these rows would exceed the limit."""
    match limit.over:
        case "run":
            spent = [book.state.spends(run=run)]
        case "site":
            spent = [book.state.spends()]
        case "row":
            spent = _by_rows(book, members)
    for one in spent:
        require_budget(one, planned, epsilon=limit.epsilon, delta=limit.delta, budget=limit.name)
