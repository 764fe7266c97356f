"""`anabranch site ledger`: what the records of a site have spent, for whoever signs for it.

Reads the site's folder; trains and sends nothing. No report and no export holds a row, a row's
hash, or the key of the hashes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from anabranch.client.chain import Event, Reserve, State
from anabranch.client.data.read import Never, read_table
from anabranch.client.data.rows import row_hashes
from anabranch.client.ledger import Ledger
from anabranch.client.membership import WIDTH, groups, known, largest
from anabranch.client.pld import Compared, compare
from anabranch.client.policy.policy_file import columns_never
from anabranch.client.privacy import Spend, epsilon_of, repeats_within
from anabranch.client.site_file import Budget, ledger_of, read_site
from anabranch.protocols.errors import ConfigError, DataError, PrivacyError
from anabranch.storage.chain import spend_of
from anabranch.storage.files import write_atomic

CLIENT_DELTA = 1e-5  # that ε of the site as a client is told at


@dataclass(frozen=True, kw_only=True)
class SetReport:
    """One data set: ε is the largest of its rows', over all events of all data sets."""

    data: str  # fingerprint
    rows: int
    runs: tuple[str, ...]
    rounds: int  # reserved, settled or not; those that protected the client are not among them
    open: int  # reserved and not settled: cut off, or in training now
    first: str  # time of the first round; "" without any
    last: str
    delta: float
    epsilon: float
    left: float | None  # of the budget; None: site.toml has none
    rounds_left: int | None  # such as the last one, within the budget


@dataclass(frozen=True, kw_only=True)
class ClientReport:
    """What the site has spent as one client with all its records: a row per round it took part."""

    runs: tuple[str, ...]
    rounds: int
    open: int
    first: str
    last: str
    delta: float
    epsilon: float  # of all those rounds; says nothing about single records


@dataclass(frozen=True, kw_only=True)
class LedgerReport:
    """What a ledger adds up to."""

    site: str
    path: str
    ledger: str  # its own name
    events: int
    head: str
    imported: int  # spends of a ledger of format 1, charged to every row
    budget: Budget | None
    sets: tuple[SetReport, ...]
    delta: float  # of `everything`
    everything: float  # ε of all events composed: no row has spent more
    records: tuple[int, int] | None  # rows of the present file: (known, new); None: not readable
    client: ClientReport | None = None  # None: it never protected a whole client

    def as_dict(self) -> dict[str, Any]:
        """Return the report for --json; an ε beyond what is computed is null."""
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))  # infinity -> null
        present = self.records
        return found | {
            "records": None if present is None else {"known": present[0], "new": present[1]}
        }


def report(folder: Path) -> LedgerReport:
    """Return what the site's ledger says. Raises PrivacyError if it cannot be trusted."""
    file = read_site(folder)
    ledger = ledger_of(folder, file)
    state = _state(ledger)
    members = ledger.members()
    delta = _delta(file.budget, max((event.rows for event in state.sets.values()), default=1))
    return LedgerReport(
        site=file.name,
        path=str(ledger.path),
        ledger=state.opened.ledger,
        events=state.count,
        head=state.head,
        imported=len(state.imported),
        budget=file.budget,
        sets=tuple(_set(data, state, members, file.budget) for data in state.sets),
        delta=delta,
        everything=epsilon_of(state.spends(), delta),
        records=_present(folder / file.data, ledger, members, columns_never(folder)),
        client=_client(state),
    )


def _client(state: State) -> ClientReport | None:
    rounds = {i: event for i, event in state.reserved.items() if event.unit == "client"}
    if not rounds:
        return None
    events = list(rounds.values())
    return ClientReport(
        runs=tuple(dict.fromkeys(event.run for event in events)),
        rounds=len(rounds),
        open=len(state.open & rounds.keys()),
        first=events[0].time,
        last=events[-1].time,
        delta=CLIENT_DELTA,
        epsilon=epsilon_of(state.spends(unit="client"), CLIENT_DELTA),
    )


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was checked: the chain and the rows by their hashes, the witnesses, and ε twice.

    Skellam noise is composed by its Rényi divergences alone: where it is among the events of a
    data set, the two accountants compare the others, and `renyi` has the bound of all.
    """

    events: int
    head: str
    witnesses: tuple[str, ...]  # files that agree
    epsilons: dict[str, Compared]  # by fingerprint
    renyi: dict[str, tuple[float, float]] = field(default_factory=dict)  # -> (ε, δ); or "client"

    @property
    def ok(self) -> bool:
        """Return whether both accountants agree on every ε. All else was refused before."""
        return all(compared.agree for compared in self.epsilons.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for --json."""
        return {
            "ok": self.ok,
            "events": self.events,
            "head": self.head,
            "witnesses": list(self.witnesses),
            "epsilons": {
                data: {"delta": c.delta, "prv": c.prv, "pld": c.pld, "agree": c.agree}
                for data, c in self.epsilons.items()
            },
            "renyi": {
                data: {"epsilon": epsilon if math.isfinite(epsilon) else None, "delta": delta}
                for data, (epsilon, delta) in self.renyi.items()
            },
        }


def verify(folder: Path) -> Verified:
    """Check everything that can be checked here.

    Raises PrivacyError if chain, rows or a witness are not what was written. Whether both
    accountants agree is in the result: PRV (Opacus) and PLD (dp-accounting) compose the same
    events, and their intervals must overlap. An ε beyond what is computed is not compared.
    """
    file = read_site(folder)
    ledger = ledger_of(folder, file)
    state, members = _state(ledger), ledger.members()
    found: dict[str, Compared] = {}
    renyi: dict[str, tuple[float, float]] = {}
    for data, event in state.sets.items():
        delta = _delta(file.budget, event.rows)
        spends = _dearest(data, state, members, delta)
        epsilon = epsilon_of(spends, delta)
        gaussian = [spend for spend in spends if spend.skellam is None]
        if len(gaussian) < len(spends):
            renyi[data] = epsilon, delta
        if math.isfinite(epsilon_of(gaussian, delta)):
            found[data] = compare(gaussian, delta)
    if (client := _client(state)) is not None:
        renyi["client"] = client.epsilon, client.delta
    return Verified(
        events=state.count,
        head=state.head,
        witnesses=tuple(str(path) for path in ledger.witness_files(state)),
        epsilons=found,
        renyi=renyi,
    )


def export(folder: Path, target: Path) -> int:
    """Write every event to `target`, one JSON object per line; return how many.

    The keys are id, kind, body and hash; `body` is the text that was hashed (chain.py).
    """
    ledger = ledger_of(folder, read_site(folder))
    _state(ledger)
    events = ledger.events()
    write_atomic(target, b"".join(line(event) for event in events))
    return len(events)


def line(event: Event) -> bytes:
    """Return an event as one line of an export."""
    fields = {"id": event.id, "kind": event.kind, "body": event.text, "hash": event.hash}
    return msgspec.json.encode(fields) + b"\n"


def contains(folder: Path, head: str) -> bool:
    """Return whether the site's chain holds an event of this hash (64 hex digits)."""
    if len(head) != 64 or set(head) - set("0123456789abcdef"):
        raise ConfigError(
            f"{head!r} is no head of a ledger: expected the 64 hex digits of `ledger` in "
            "events.jsonl"
        )
    return ledger_of(folder, read_site(folder)).contains(head)


def adopt(folder: Path) -> str:
    """Accept the site's ledger against its witnesses (Ledger.adopt); return the new head."""
    return ledger_of(folder, read_site(folder)).adopt()


def _state(ledger: Ledger) -> State:
    state = ledger.state()
    if state is None:
        raise PrivacyError(
            f"{ledger.path}: there is no privacy ledger: this site has not trained privately yet"
        )
    return state


def _set(data: str, state: State, members: dict[str, bytes], budget: Budget | None) -> SetReport:
    rounds = {
        i: event
        for i, event in state.reserved.items()
        if event.data == data and event.unit == "record"
    }
    delta = _delta(budget, state.sets[data].rows)
    spends = _dearest(data, state, members, delta)
    epsilon = epsilon_of(spends, delta)
    events = list(rounds.values())
    return SetReport(
        data=data,
        rows=state.sets[data].rows,
        runs=tuple(dict.fromkeys(event.run for event in events)),
        rounds=len(rounds),
        open=len(state.open & rounds.keys()),
        first=events[0].time if events else "",
        last=events[-1].time if events else "",
        delta=delta,
        epsilon=epsilon,
        left=None if budget is None else max(budget.epsilon - epsilon, 0.0),
        rounds_left=_rounds_left(spends, events, budget),
    )


def _rounds_left(spends: list[Spend], events: list[Reserve], budget: Budget | None) -> int | None:
    if budget is None or not events:
        return None
    unit = spend_of(events[-1])
    return repeats_within(spends, unit, epsilon=budget.epsilon, delta=budget.delta)


def _dearest(data: str, state: State, members: dict[str, bytes], delta: float) -> list[Spend]:
    """Return what those rows of a data set have spent that have spent most."""
    found = largest(groups(members[data], members))
    every = [state.spends(data=group) for group in found]
    return max(every, key=lambda spends: epsilon_of(spends, delta))


def _delta(budget: Budget | None, rows: int) -> float:
    """Return the δ of a report: the budget's, else 1 / (10 rows) as runs have it."""
    return 1 / (10 * rows) if budget is None else budget.delta


def _present(
    data: Path, ledger: Ledger, members: dict[str, bytes], never: Never
) -> tuple[int, int] | None:
    """Return how many rows of the site's file have been in a data set, and how many not."""
    try:
        own = ledger.members_of(row_hashes(read_table(data, never)))
    except DataError:
        return None
    count = known(own, list(members.values()))
    return count, len(own) // WIDTH - count
