"""What private rounds have cost the clients of a simulated population: ledgers in memory.

What a site's ledger does (client/ledger.py), for thousands of clients that exist for one run:
the same sums over the same rows, the same limits, the same refusals, but no file, no chain and no
witness. The head that a settled round reports names the client and the entry; it is no hash, and
says that it is simulated.

NOTHING HERE PROTECTS REAL RECORDS. A spent budget lives as long as the object: the next run begins
at 0, and so does every process that has books of its own. Whoever simulates with several
processes must train a client in the same process in all rounds, or its ε is too small.

Clients of one size share their plan and spend, and ε is cached by what was spent
(client/privacy.py), so only the first of them costs a call of the accountant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anabranch.client.ledger import Limit
from anabranch.client.membership import fingerprint_of, groups, largest, members_of
from anabranch.client.privacy import Spend, epsilon_of, require_budget
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spend import Unit

KEY = bytes(32)  # digests of rows are compared here, and never leave: any key will do


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One reserved round."""

    data: str  # fingerprint of its rows
    run: str
    round: int
    spend: Spend


class ClientBooks:
    """One client's ledger; implements private_round.Books. Not for several threads."""

    def __init__(self, client: str) -> None:
        self.client = client
        self._sets: dict[str, bytes] = {}  # fingerprint -> members (membership.py)
        self._known: dict[bytes, str] = {}  # SHA-256 of rows in order -> fingerprint
        self._entries: list[Entry] = []
        self._settled: set[int] = set()

    def reserve(
        self,
        rows: Sequence[bytes],
        run: str,
        round_number: int,
        spend: Spend,
        limits: Sequence[Limit] = (),
    ) -> int:
        """Note what training is about to spend; return the number of the entry, from 1.

        `rows` are the hashes of the rows to train on. Nothing is noted, and PrivacyError raised,
        if a limit would be exceeded.
        """
        if not rows:
            raise PrivacyError("0 records: nothing can be trained on privately")
        for limit in limits:
            for spent in self._spent(limit, rows, run, spend.unit):
                require_budget(
                    spent, spend, epsilon=limit.epsilon, delta=limit.delta, budget=limit.name
                )
        data = self._add(rows)
        self._entries.append(Entry(data=data, run=run, round=round_number, spend=spend))
        return len(self._entries)

    def settle(self, entry: int, spend: Spend) -> str:
        """Confirm that training spent what was reserved; return what stands for a head.

        Raises PrivacyError if `spend` differs or the entry is not open; it then counts as reserved.
        """
        if not 1 <= entry <= len(self._entries) or entry in self._settled:
            raise PrivacyError(f"{self.client}: entry {entry} is not open, nothing may leave")
        reserved = self._entries[entry - 1].spend
        if reserved != spend:
            raise PrivacyError(
                f"{self.client}: entry {entry} reserved {reserved}, training spent {spend}: "
                "nothing may leave"
            )
        self._settled.add(entry)
        return f"simulated:{self.client}:{entry}"

    def spent(self, rows: Sequence[bytes], delta: float, unit: Unit = "record") -> float:
        """Return the largest ε at `delta` that one of these rows has spent."""
        return max((epsilon_of(spends, delta) for spends in self._by_rows(rows, unit)), default=0.0)

    def history(self, run: str | None = None, unit: Unit = "record") -> list[Spend]:
        """Return what was spent on any row, oldest first; of one run, if `run` is given."""
        return [
            one.spend
            for one in self._entries
            if one.spend.unit == unit and (run is None or one.run == run)
        ]

    def _spent(
        self, limit: Limit, rows: Sequence[bytes], run: str, unit: Unit
    ) -> list[list[Spend]]:
        match limit.over:
            case "run":
                return [self.history(run, unit)]
            case "site":
                return [self.history(unit=unit)]
            case "row":
                return list(self._by_rows(rows, unit))

    def _by_rows(self, rows: Sequence[bytes], unit: Unit) -> Iterator[list[Spend]]:
        """Yield what the rows have spent: one list for each group that can have spent most."""
        alone = len(self._sets) == 1 and _digest(rows) in self._known  # as always in one run
        if alone or unit == "client":
            yield self.history(unit=unit)
            return
        for group in largest(groups(members_of(rows, KEY), self._sets)):
            spends = (one.spend for one in self._entries if one.data in group)
            yield [spend for spend in spends if spend.unit == unit]

    def _add(self, rows: Sequence[bytes]) -> str:
        """Keep a data set; return its fingerprint."""
        digest = _digest(rows)
        known = self._known.get(digest)
        if known is None:
            members = members_of(rows, KEY)
            known = self._known[digest] = fingerprint_of(members)
            self._sets[known] = members
        return known


class SimulatedBooks:
    """The ledgers of a population, by name of client; made when first asked for."""

    def __init__(self) -> None:
        self._clients: dict[str, ClientBooks] = {}

    def of(self, client: str) -> ClientBooks:
        """Return the books of a client."""
        found = self._clients.get(client)
        if found is None:
            found = self._clients[client] = ClientBooks(client)
        return found


def _digest(rows: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(rows)).digest()
