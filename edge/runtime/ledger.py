"""What private training has cost the records of a device, over all trainings: one file.

    reserve ──► train ──► settle ──► the adapter or delta may leave

The rules are those of a site's ledger (docs/ledger.md), with one that is simpler and stricter:
every training is charged to every record of the device, old and new, whatever bundle or gateway
asked for it. So ε of the device is the composition of all reservations; no record has spent more.

A reservation is on disk before it is returned and stays, whatever happens then: a training that
was cut off counts. Events are hash-chained (ledger_chain.py) and witnessed outside the file
(witness.py): a ledger that was edited, cut, rolled back, deleted or exchanged stops all private
training, and the error says what to do. Somebody who rewrites file and witnesses together is
not noticed here. ε comes from the Rényi accountant (protocols/rdp.py), an upper bound.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from anabranch.edge.runtime.ledger_chain import Adopted, Reserve, Settle, State
from anabranch.edge.runtime.ledger_file import Book, locked, make, now, opened
from anabranch.edge.runtime.witness import Witnesses
from anabranch.protocols.chain import BrokenChain, Link
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.rdp import epsilon_of, require_budget
from anabranch.protocols.spend import LARGEST_EPSILON, Spend


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What may be spent: at most ε at δ by one run, or by all of them (run None)."""

    epsilon: float
    delta: float
    name: str  # where it is set, for the message
    run: str | None = None


class DeviceLedger:
    """The ledger at `path`; it is made when something is first reserved.

    `state` is the folder of a second witness (witness.state_folder()); None leaves the one
    beside the ledger. Every method raises PrivacyError if the ledger, or a witness of it, is not
    as it was left. Each call opens the file, so any thread or process may use its own
    DeviceLedger on one file.
    """

    def __init__(self, path: Path, state: Path | None) -> None:
        self.path = path
        self._witnesses = Witnesses(path, state)

    def reserve(self, spend: Spend, run: str, records: int, limits: Sequence[Limit] = ()) -> int:
        """Write down, durably, what training is about to spend; return the number of the event.

        Nothing is written, and PrivacyError raised, if a limit would be exceeded, or ε of the
        device above LARGEST_EPSILON at some limit's δ; check and writing are one transaction.
        If a witness cannot be written, the spend counts and PrivacyError is raised.
        """
        event = _reservation(spend, run, records)
        with self._writing() as book:
            for limit in limits:
                require_budget(
                    book.state.spends(limit.run),
                    spend,
                    epsilon=min(limit.epsilon, LARGEST_EPSILON),
                    delta=limit.delta,
                    budget=limit.name,
                )
            return book.add(event).id

    def reservation(self, entry: int) -> Reserve:
        """Return an open reservation; raise PrivacyError if it is settled or there is none."""
        with self._reading() as book:
            if book is None or entry not in book.state.open:
                raise PrivacyError(
                    f"{self.path}: entry {entry} is not open: it is settled, or of another "
                    "ledger. Begin the training anew; what was reserved counts"
                )
            return book.state.reserved[entry]

    def settle(self, entry: int, spend: Spend) -> str:
        """Confirm that training spent what was reserved; return the head of the chain (hex).

        Only then may what was trained leave. Raises PrivacyError if `spend` differs or the entry
        is not open; it then counts as reserved.
        """
        with self._writing() as book:
            if entry not in book.state.open:
                raise PrivacyError(f"{self.path}: entry {entry} is not open, nothing may leave")
            reserved = book.state.reserved[entry].spend
            if reserved != spend:
                raise PrivacyError(
                    f"{self.path}: entry {entry} reserved (σ, q, steps) = {_values(reserved)}, "
                    f"training spent {_values(spend)}: nothing may leave"
                )
            return book.add(Settle(reserve=entry, time=now())).hash

    def history(self, run: str | None = None) -> list[Spend]:
        """Return what was spent, oldest first; of one run, if `run` is given."""
        with self._reading() as book:
            return [] if book is None else book.state.spends(run)

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta` of all trainings composed: what any record has spent at most."""
        return epsilon_of(self.history(), delta)

    def events(self) -> list[Link]:
        """Return the chain, oldest event first; [] if nothing was ever reserved."""
        with self._reading() as book:
            return [] if book is None else book.events

    def state(self) -> State | None:
        """Return what the events add up to; None if nothing was ever reserved."""
        with self._reading() as book:
            return None if book is None else book.state

    @property
    def head(self) -> str | None:
        """Return the hash of the last event; None if nothing was ever reserved."""
        state = self.state()
        return None if state is None else state.head

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
                    f"{self.path}: no ledger, and no witness of one: the first private training "
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

        A ledger has witnesses before the first reservation is in it, so one without any that has
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


def _reservation(spend: Spend, run: str, records: int) -> Reserve:
    """Return the event; raise PrivacyError for a run or records that no ledger can read again."""
    event = Reserve(
        run=run,
        records=records,
        noise_multiplier=spend.noise_multiplier,
        sample_rate=spend.sample_rate,
        steps=spend.steps,
        time=now(),
    )
    try:
        return msgspec.json.decode(msgspec.json.encode(event), type=Reserve)
    except msgspec.ValidationError as error:
        raise PrivacyError(f"this training cannot be reserved: {error}") from None


def _values(spend: Spend) -> tuple[float, float, int]:
    return spend.noise_multiplier, spend.sample_rate, spend.steps
