"""`anabranch edge ledger`: what the records of a device have spent, for whoever owns it.

Reads the device's folder; trains and sends nothing. Reading checks the chain and its witnesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from anabranch.edge.runtime.device_file import Budget, read_device
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.ledger import DeviceLedger
from anabranch.edge.runtime.ledger_chain import State
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.rdp import epsilon_of
from anabranch.storage.witness import state_folder

DELTA = 1e-5  # that ε is told at where device.toml has no budget


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One reservation."""

    entry: int
    run: str
    records: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    settled: bool
    epsilon: float  # of this one and all before it
    time: str


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """What a device's ledger adds up to."""

    path: str
    ledger: str  # its own name
    events: int
    head: str
    budget: Budget | None
    delta: float
    epsilon: float  # of all trainings composed: no record has spent more
    left: float | None  # of the budget; None: device.toml has none
    trainings: tuple[TrainingRow, ...]
    witnesses: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for --json; an ε beyond what is computed is null."""
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))  # infinity -> null
        return found


def ledger_of(home: Home) -> DeviceLedger:
    """Return the device's ledger, which is opened for each use."""
    return DeviceLedger(home.ledger, state_folder())


def report(home: Home, delta: float | None = None) -> DeviceReport:
    """Return what the device's ledger says, at `delta` or its budget's.

    Raises PrivacyError if it cannot be trusted, or nothing was ever reserved.
    """
    budget, ledger = read_device(home.folder).budget, ledger_of(home)
    state = ledger.state()
    if state is None:
        raise PrivacyError(f"{home.ledger}: no privacy ledger: nothing was ever trained privately")
    if delta is None:
        delta = DELTA if budget is None else budget.delta
    trainings = _rows(state, delta)
    epsilon = trainings[-1].epsilon if trainings else 0.0
    spent = epsilon if budget is None else epsilon_of(state.spends(), budget.delta)
    return DeviceReport(
        path=str(home.ledger),
        ledger=state.opened.ledger,
        events=len(state.heads),
        head=state.head,
        budget=budget,
        delta=delta,
        epsilon=epsilon,
        left=None if budget is None else max(0.0, budget.epsilon - spent),
        trainings=trainings,
        witnesses=tuple(map(str, ledger.witness_files(state))),
    )


def _rows(state: State, delta: float) -> tuple[TrainingRow, ...]:
    spends = state.spends()
    return tuple(
        TrainingRow(
            entry=entry,
            run=event.run,
            records=event.records,
            noise_multiplier=event.noise_multiplier,
            sample_rate=event.sample_rate,
            steps=event.steps,
            settled=entry in state.settled,
            epsilon=epsilon_of(spends[:number], delta),
            time=event.time,
        )
        for number, (entry, event) in enumerate(state.reserved.items(), 1)
    )
