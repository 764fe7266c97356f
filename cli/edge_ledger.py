"""anabranch edge ledger: what private training has cost the records of this device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.edge_trust import Home_
from anabranch.cli.output import Json, emit, table

if TYPE_CHECKING:
    from anabranch.edge.runtime.ledger_report import DeviceReport


def ledger(
    home: Home_ = None,
    delta: Annotated[
        float | None, typer.Option("--delta", help="Tell epsilon at this delta.")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Accept a restored or lost ledger, and record it.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Show what the device's records have spent, over all trainings. Nothing is sent."""
    from anabranch.edge.runtime.home import Home
    from anabranch.edge.runtime.ledger_report import ledger_of, report

    place = Home.default() if home is None else Home(home)
    if adopt:
        head = ledger_of(place).adopt()
        emit({"head": head}, f"accepted and recorded; the head is {head}", as_json=as_json)
        return 0
    found = report(place, delta)
    emit(found.as_dict(), _text(found), as_json=as_json)
    return 0


def _text(found: DeviceReport) -> str:
    header = ("training", "run", "records", "noise", "rate", "steps", "settled", "epsilon", "time")
    rows = [
        (
            one.entry,
            one.run,
            one.records,
            f"{one.noise_multiplier:.3f}",
            f"{one.sample_rate:.4f}",
            one.steps,
            "yes" if one.settled else "no",
            f"{one.epsilon:.3f}",
            one.time,
        )
        for one in found.trainings
    ]
    lines = [f"{found.path}: {found.events} events", "", table(header, rows), ""]
    if found.budget is None:
        lines.append("budget: none in device.toml; only each run has one")
    else:
        lines.append(
            f"budget: epsilon {found.budget.epsilon:g} at delta {found.budget.delta:.1e} over all "
            f"trainings, {found.left:.3f} left"
        )
    lines.append(f"spent by any record, at most: epsilon {found.epsilon:.3f} at {found.delta:.1e}")
    lines.append(f"head: {found.head}")
    return "\n".join(lines)
