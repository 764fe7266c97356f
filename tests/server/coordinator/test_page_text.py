from __future__ import annotations

import io
import unicodedata
from datetime import UTC
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from anabranch.server.coordinator.folder import Federation
from anabranch.server.coordinator.page.shown import Alert, SiteView, View
from anabranch.server.coordinator.page.status_text import Clock, length, render, text, watch
from anabranch.server.coordinator.page.view import view
from tests.page_cases import DAY, NOW, add_site, example, make, report

EMPTY = View(at=NOW, federation="heart", address="127.0.0.1:8443", version="0.1.0")


@given(said=st.text(), name=st.text())
def test_nothing_that_a_site_says_controls_the_terminal(said: str, name: str) -> None:
    site = SiteView(
        name=name, status="active", state="waiting", doing=said, reason=said, certificate_ends=NOW
    )
    alert = Alert(kind="x", level="notice", about=name, text=said)
    shown = replace(EMPTY, sites=(site,), alerts=(alert,))

    for written in (text(shown, UTC), rendered(shown)):
        control = {c for c in written if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
        assert control <= {"\n"}
        assert not any(
            unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE") for c in written
        )


def test_a_reason_of_many_lines_is_said_on_one() -> None:
    said = "0 of 2 sites sent a delta\n  north: too few records\r\n  south: \x1b[31mno"
    alert = Alert(kind="x", level="problem", about="r1", text=said)

    written = text(replace(EMPTY, alerts=(alert,)), UTC)

    assert "sent a delta; north: too few records; south: \ufffd[31mno" in written


def rendered(shown: View, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(shown, UTC))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (7199.0, "2 h"),
        (7500.0, "2 h 5 min"),
        (48 * 3600.0, "2 d"),
        (3 * DAY + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations_are_said_in_two_units_at_most(seconds: float, said: str) -> None:
    assert length(seconds) == said


def test_times_of_another_day_have_their_date_and_what_is_past_is_overdue() -> None:
    clock = Clock(NOW, UTC)  # 2026-09-21 14:13:20

    assert clock.at(NOW - 60) == "14:12:20"
    assert clock.at(NOW - DAY) == "2026-09-20 14:13:20"
    assert clock.at(None) == "\u2013"
    assert clock.since(NOW - 120) == "since 14:11:20 (2 min)"
    assert clock.until(NOW + 90) == "14:14:50 (in 90 s)"
    assert clock.until(NOW - 1) == "14:13:19 (overdue)"


def test_a_status_says_every_wait_every_alert_and_every_site(tmp_path: Path) -> None:
    shown = view(example(tmp_path / "heart", NOW), NOW)
    plain, rich = text(shown, UTC), rendered(shown, 200)

    for line in (
        "waits for bergen, delft: their deltas of round 13; 3 are needed",
        "since 14:11:10 (2 min), until 14:41:10 (in 28 min); then: the round goes on with the "
        "deltas that are there, if there are 3",
        "round 13 of 20: training, 2 of 4 sites have answered",
        "PROBLEM: delft: no report from it (since 14:11:45 (95 s))",
        "training, step 40 of 200, round 13",
        "ε 5.85 of 8.00 planned",
        "invited: esbjerg; the invitation ends 15:03:20 (in 50 min)",
    ):
        assert line in plain
        assert line in rich
    assert plain.endswith("\n")
    assert not any(row != row.rstrip() for row in plain.splitlines())


def test_an_empty_federation_says_what_to_do(tmp_path: Path) -> None:
    said = text(view(make(tmp_path / "heart"), NOW), UTC)

    assert "no run yet; `anabranch coordinator run RUN.toml` starts one" in said
    assert "sites: 0" in said


class Pipe(io.StringIO):
    """Not a terminal."""


class Terminal(io.StringIO):
    """A terminal that is interrupted."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return make(tmp_path / "heart")


def test_in_a_pipe_a_text_is_written_when_something_has_changed(federation: Federation) -> None:
    out, slept = Pipe(), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            add_site(federation, "aarhus")

    watch(federation, 3.0, out=out, now=lambda: NOW + len(slept), sleep=sleep, times=4)

    assert slept == [3.0, 3.0, 3.0]
    assert out.getvalue().count("heart at 127.0.0.1:8443") == 2
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_it_goes_on_until_it_is_interrupted(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "50")
    add_site(federation, "aarhus")
    report(federation, "aarhus", activity="training", step=1, steps=2)
    out = Terminal()

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    watch(federation, out=out, now=lambda: NOW, sleep=interrupt)

    assert "training, step 1 of 2" in out.getvalue()
    assert out.getvalue().endswith("\x1b[?25h\x1b[?1049l")  # cursor and screen are given back
