"""Secure sums as events.jsonl tells them: every attempt, whatever else is in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from anabranch.server.report import ReportData, render
from anabranch.server.store import RunFolder
from anabranch.server.sums.log import SumEvent, lost_words, sums_of

ATTEMPT: dict[str, Any] = {
    "round": 1,
    "attempt": 1,
    "opened": False,
    "reason": "1 of 3 members are left",
    "members": ["aachen", "bonn", "essen"],
    "survivors": [],
    "groups": [],
    "dropped": {"mask": ["bonn", "essen"]},
    "bytes_up": 1200,
    "bytes_down": 900,
    "seconds": 2.25,
    "stage_seconds": {"mask": 2.0},
}
OPENED = ATTEMPT | {
    "attempt": 2, "opened": True, "reason": "", "survivors": ["aachen", "bonn", "essen"],
    "dropped": {},
}  # fmt: skip


@given(st.dictionaries(st.sampled_from(["share", "mask", "reveal"]), st.integers(1, 99)))
def test_every_stage_and_count_is_in_the_words(found: dict[str, int]) -> None:
    parts = [part.split(" at ") for part in lost_words(found).split(", ") if part]
    assert {stage: int(count) for count, stage in parts} == found


def test_every_attempt_is_read_in_order_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", b"")
    events = folder.path / "events.jsonl"
    assert sums_of(events) == ()
    folder.event("secure_sum_started", round=1, sites=["aachen"])
    folder.event("secure_sum", **ATTEMPT)
    with events.open("ab") as file:
        file.write(b'{"kind":"secure_sum","round":1,\n')
    folder.event("secure_sum", **OPENED)

    first, second = sums_of(events)

    assert (first.opened, first.lost, first.reason) == (False, {"mask": 2}, ATTEMPT["reason"])
    assert (second.attempt, second.opened, second.lost) == (2, True, {})
    assert second.survivors == ("aachen", "bonn", "essen")


def test_the_report_has_members_survivors_and_where_the_others_were_lost(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", b"")
    folder.event("secure_sum", **ATTEMPT)
    folder.event("secure_sum", **OPENED)
    page = render(ReportData(name="run", sums=sums_of(folder.path / "events.jsonl")))

    assert "<h3>Secure sums</h3>" in page
    assert "not opened" in page
    assert "2 at mask" in page
    assert "norms and record counts of single sites are seen by nobody" in page
    assert "Secure sums" not in render(ReportData(name="run"))


def test_an_event_of_an_older_run_has_one_attempt() -> None:
    assert SumEvent(round=1, opened=True, members=("a", "b")).attempt == 1
