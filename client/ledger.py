"""What private training has cost the records of a site, over all runs: one file per site.

A spend is written before training and stays, whatever happens then:

    reserve ──► train ──► settle ──► the update may leave

A crash between reserve and settle leaves a reserve without a settle, which counts. The same round
reserved again counts again, unless it is the same question asked again (answers.py) and nothing
was settled: the reserve is then used again. An event names the rows it was
trained on (membership.py), so neither a new run nor another coordinator, contract, split, order
or installation sets a row back to 0, and a new row begins at 0. Events are hash-chained
(chain.py) and witnessed outside the file (storage/): a ledger that was edited, cut, rolled
back, deleted or exchanged stops all private training, and the error says what to do. Somebody
who rewrites file and witnesses together is found by comparing with the heads that the
coordinator was sent: `contains`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from anabranch.client.chain import KINDS, Event, Reserve, State
from anabranch.client.ledger_file import SITE, add_set, key_of, members_in
from anabranch.client.membership import fingerprint_of, groups, largest, members_of
from anabranch.client.privacy import Spend, epsilon_of, require_budget
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spend import Unit
from anabranch.storage.book import Book, now
from anabranch.storage.chain import Settle, spend_of
from anabranch.storage.ledger import ChainedLedger


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What may be spent: at most ε at δ by one run, by any one row, or by the site as a whole."""

    epsilon: float
    delta: float
    over: Literal["run", "row", "site"]
    name: str  # where it is set, for the message


class Ledger(ChainedLedger[State]):
    """The ledger at `path`; it is made when something is first reserved.

    `state` is the folder of a second witness; None leaves the one beside the ledger. Every
    method raises PrivacyError if the ledger, or a witness of it, is not as it was left. Each
    call opens the file, so any thread or process may use its own Ledger on one file.
    """

    def __init__(self, path: Path, state: Path | None = None) -> None:
        super().__init__(SITE, path, state)

    def reserve(
        self,
        rows: Sequence[bytes],
        run: str,
        round_number: int,
        spend: Spend,
        limits: Sequence[Limit] = (),
        again: int | None = None,
    ) -> int:
        """Write down, durably, what training is about to spend; return the number of the event.

        `rows` are the hashes of the rows to train on. Nothing is written, and PrivacyError
        raised, if a limit would be exceeded; check and writing are one transaction. If a
        witness cannot be written, the spend counts and PrivacyError is raised.

        With `again`, the first open reserve after event `again` is used again, and nothing is
        written, if it is of the same rows, run, round and spend, and keeps the limits as they
        are now. An event is settled once, before its update leaves, so no update of it has left.
        """
        if not rows:
            raise PrivacyError("0 records: nothing can be trained on privately")
        with self.writing() as book:
            members = members_of(rows, key_of(book))
            event = Reserve.of(
                spend, data=fingerprint_of(members), run=run, round=round_number, time=now()
            )
            held = None if again is None else _held(book.state, event, again)
            before = book.state if held is None else _without(book.state, held)
            for limit in limits:
                _require(limit, book, before, members, spend, run)
            if held is not None:
                return held
            add_set(book, members)
            return book.add(event).id

    def confirm(
        self, entry: int, run: str, round_number: int, spend: Spend, delta: float
    ) -> tuple[str, float] | None:
        """Settle an entry, unless that was done; return the hash of its settle, and ε at `delta`.

        ε is the largest that a row of the entry's data set has spent in all runs; of a client's
        round, what the site as a client has. For whoever
        alone holds the entry's one update, and may have been cut off before: nobody else may ask.
        None, with nothing written, if the ledger has no such entry of this run, round and spend.
        """
        with self.writing() as book:
            body = book.state.reserved.get(entry)
            if body is None or (body.run, body.round, spend_of(body)) != (run, round_number, spend):
                return None
            if entry in book.state.open:
                head = book.add(Settle(reserve=entry, time=now())).hash
            else:
                head = _settled_by(book, entry)
            found = _by_rows(book, book.state, members_in(book)[body.data], spend.unit)
            return head, max((epsilon_of(spends, delta) for spends in found), default=0.0)

    def spent(self, rows: Sequence[bytes], delta: float, unit: Unit = "record") -> float:
        """Return the largest ε at `delta` that one of these rows has spent in all runs.

        Of the unit "client": that the site has spent as a client, whatever its rows.
        """
        with self.reading() as book:
            if book is None:
                return 0.0
            found = _by_rows(book, book.state, members_of(rows, key_of(book)), unit)
            return max((epsilon_of(spends, delta) for spends in found), default=0.0)

    def history(self, run: str | None = None, unit: Unit = "record") -> list[Spend]:
        """Return what was spent on any row, oldest first; of one run, if `run` is given."""
        with self.reading() as book:
            return [] if book is None else book.state.spends(run=run, unit=unit)

    def epsilon(self, delta: float, unit: Unit = "record") -> float:
        """Return ε at `delta` of all events composed, as if every row had been in each of them.

        No row has spent more.
        """
        return epsilon_of(self.history(unit=unit), delta)

    def events(self) -> list[Event]:
        """Return the chain, oldest event first; [] if nothing was ever reserved."""
        with self.reading() as book:
            return (
                [] if book is None else [Event(e.id, e.kind, e.text, e.hash) for e in book.events]
            )

    def members(self) -> dict[str, bytes]:
        """Return fingerprint -> keyed digests of the rows, oldest data set first."""
        with self.reading() as book:
            return {} if book is None else members_in(book)

    def members_of(self, rows: Sequence[bytes]) -> bytes:
        """Return the keyed digests of rows, sorted; b"" if nothing was ever reserved."""
        with self.reading() as book:
            return b"" if book is None else members_of(rows, key_of(book))

    def fingerprint(self, rows: Sequence[bytes]) -> str | None:
        """Return the fingerprint of rows as a data set; None if nothing was ever reserved."""
        with self.reading() as book:
            return None if book is None else fingerprint_of(members_of(rows, key_of(book)))

    def contains(self, head: str) -> bool:
        """Return whether the chain has, or once ended with, the event of this hash."""
        state = self.state()
        return state is not None and head in state.heads


def _held(state: State, event: Reserve, after: int) -> int | None:
    """Return the first open reserve behind `after` that is `event` but for its time."""
    same = (e for e, body in state.reserved.items() if replace(body, time=event.time) == event)
    return min((e for e in same if e > after and e in state.open), default=None)


def _without(state: State, entry: int) -> State:
    """Return what the events would add up to without this reserve."""
    rest = {e: body for e, body in state.reserved.items() if e != entry}
    return dataclasses.replace(state, reserved=rest)


def _settled_by(book: Book[State], entry: int) -> str:
    """Return the hash of the event that settled an entry."""
    bodies = ((link.hash, link.read(KINDS)) for link in book.events if link.kind == "settle")
    return next(h for h, body in bodies if isinstance(body, Settle) and body.reserve == entry)


def _by_rows(
    book: Book[State], state: State, members: bytes, unit: Unit = "record"
) -> list[list[Spend]]:
    """Return what the rows have spent: one list for each group that can have spent most."""
    if unit == "client":
        return [state.spends(unit=unit)]
    found = groups(members, members_in(book))
    return [state.spends(data=group) for group in largest(found)]


def _require(
    limit: Limit, book: Book[State], state: State, members: bytes, planned: Spend, run: str
) -> None:
    """Raise PrivacyError if `planned` on these rows would exceed the limit."""
    match limit.over:
        case "run":
            spent = [state.spends(run=run, unit=planned.unit)]
        case "site":
            spent = [state.spends(unit=planned.unit)]
        case "row":
            spent = _by_rows(book, state, members, planned.unit)
    for one in spent:
        require_budget(one, planned, epsilon=limit.epsilon, delta=limit.delta, budget=limit.name)
