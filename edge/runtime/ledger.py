"""What private training has cost the records of a device, over all trainings: one file.

    reserve ──► train ──► settle ──► the adapter or delta may leave

The rules are those of a site's ledger (docs/ledger.md), with one that is simpler and stricter:
every training is charged to every record of the device, old and new, whatever bundle or gateway
asked for it. So ε of the device is the composition of all reservations; no record has spent more.

A reservation is on disk before it is returned and stays, whatever happens then: a training that
was cut off counts. Events are hash-chained (ledger_chain.py) and witnessed outside the file
(storage/): a ledger that was edited, cut, rolled back, deleted or exchanged stops all private
training, and the error says what to do. Somebody who rewrites file and witnesses together is
not noticed here. ε comes from the Rényi accountant (protocols/rdp.py), an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from anabranch.edge.runtime.ledger_chain import DEVICE, Reserve, State
from anabranch.protocols.chain import Link
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.rdp import epsilon_of, require_budget
from anabranch.protocols.spend import LARGEST_EPSILON, Spend
from anabranch.storage.book import now
from anabranch.storage.ledger import ChainedLedger


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What may be spent: at most ε at δ by one run, or by all of them (run None)."""

    epsilon: float
    delta: float
    name: str  # where it is set, for the message
    run: str | None = None


class DeviceLedger(ChainedLedger[State]):
    """The ledger at `path`; it is made when something is first reserved.

    `state` is the folder of a second witness (witness.state_folder()); None leaves the one
    beside the ledger. Every method raises PrivacyError if the ledger, or a witness of it, is not
    as it was left. Each call opens the file, so any thread or process may use its own
    DeviceLedger on one file.
    """

    def __init__(self, path: Path, state: Path | None) -> None:
        super().__init__(DEVICE, path, state)

    def reserve(self, spend: Spend, run: str, records: int, limits: Sequence[Limit] = ()) -> int:
        """Write down, durably, what training is about to spend; return the number of the event.

        Nothing is written, and PrivacyError raised, if a limit would be exceeded, or ε of the
        device above LARGEST_EPSILON at some limit's δ; check and writing are one transaction.
        If a witness cannot be written, the spend counts and PrivacyError is raised.
        """
        event = _reservation(spend, run, records)
        with self.writing() as book:
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
        with self.reading() as book:
            if book is None or entry not in book.state.open:
                raise PrivacyError(
                    f"{self.path}: entry {entry} is not open: it is settled, or of another "
                    "ledger. Begin the training anew; what was reserved counts"
                )
            return book.state.reserved[entry]

    def history(self, run: str | None = None) -> list[Spend]:
        """Return what was spent, oldest first; of one run, if `run` is given."""
        with self.reading() as book:
            return [] if book is None else book.state.spends(run)

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta` of all trainings composed: what any record has spent at most."""
        return epsilon_of(self.history(), delta)

    def events(self) -> list[Link]:
        """Return the chain, oldest event first; [] if nothing was ever reserved."""
        with self.reading() as book:
            return [] if book is None else book.events


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
