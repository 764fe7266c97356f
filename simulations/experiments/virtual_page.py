"""What a run's report says of its devices: virtual time, wasted work, energy, fairness, faults.

The tables are those of summary.json under "virtual" and "faults" (clock/outcome.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from anabranch.server.page import ABSENT, paragraph, table
from anabranch.server.svg import Markup, percent, size

SAYS: Final = (
    "Seconds, energy and CO2 are those that the devices would have needed, in virtual time; nobody "
    "waited for them. Energy is that of all devices together."
)


def device_parts(said: Mapping[str, Any]) -> list[Markup]:
    """Return the parts of the section; none for a run without a clock and without faults.

    `said` is what the summary says of virtual time and faults.
    """
    parts = [] if said.get("virtual") is None else _virtual(said["virtual"])
    faults = said.get("faults")
    if faults is not None:
        rows = [[kind, f"{count:,}"] for kind, count in faults["counts"].items()]
        caption = f"Planned with seed {faults['seed']}; the plan is in faults.toml"
        parts.append(
            table(["fault", "times"], rows or [["none", "0"]], kinds="tn", caption=caption)
        )
    return parts


def _virtual(virtual: Mapping[str, Any]) -> list[Markup]:
    answers, wasted = virtual["answers"], virtual["wasted"]
    part = virtual["participation"]
    totals = [
        ["virtual time", _seconds(virtual["virtual_seconds"])],
        ["device time", _seconds(virtual["device_seconds"])],
        ["of it wasted", percent(virtual["wasted_share"])],
        ["bytes, up and down", size(virtual["bytes_up"] + virtual["bytes_down"])],
        ["of them wasted", size(virtual["bytes_wasted"])],
        ["energy", f"{virtual['joules']:,.4g} J"],
        ["of it wasted", f"{virtual['joules_wasted']:,.4g} J"],
        ["CO2 equivalents", f"{virtual['co2_grams']:,.4g} g"],
    ]
    outcomes = [
        [name, f"{count:,}", percent(wasted[name]) if name in wasted else ABSENT]
        for name, count in answers.items()
    ]
    regions = virtual["co2_grams_by_region"]
    return [
        paragraph(SAYS),
        table(["of the run", "value"], totals, kinds="tn"),
        *_optional([virtual["metric"], "reached after"], _targets(virtual)),
        *_optional(["answers", "messages", "device time wasted"], outcomes),
        *_optional(["region", "g CO2"], [[k, f"{v:,.4g}"] for k, v in regions.items()]),
        table(
            ["participation", "value"],
            [
                ["Gini (0: all alike)", f"{part['gini']:.3f}"],
                ["Jain (1: all alike)", f"{part['jain']:.3f}"],
                ["never merged", percent(part["never"])],
            ],
            kinds="tn",
        ),
        *_optional(
            ["class", "clients", "share of merged", "never merged"],
            [
                [name, f"{of['clients']:,}", percent(of["share_of_merged"]), percent(of["never"])]
                for name, of in part["by_class"].items()
            ],
        ),
    ]


def _targets(virtual: Mapping[str, Any]) -> list[list[str]]:
    return [
        [target, "never" if at is None else _seconds(at)]
        for target, at in virtual["time_to"].items()
    ]


def _optional(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Markup]:
    return [table(head, rows, kinds="t" + "n" * (len(head) - 1))] if rows else []


def _seconds(value: float) -> str:
    return f"{value:,.1f} s"
