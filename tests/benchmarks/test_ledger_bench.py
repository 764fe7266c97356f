"""The kill benchmark sees what it is for: it can find an update without a row, and a low ε."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from anabranch.client.privacy import Spend
from anabranch.client.site import Site
from benchmarks.harness import ROOT
from benchmarks.ledger.run import CONFIG, POINTS, Found, check, make_site
from benchmarks.ledger.worker import released, started

SPEND = Spend(noise_multiplier=2.0, sample_rate=0.1, steps=2)
ROWS = [b"a" * 32, b"b" * 32]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


def test_every_step_of_a_round_is_a_point_to_die_at() -> None:
    steps = ["reserve", "witness", "train", "commit", "settle", "release"]

    assert [stage for stage, when in POINTS if when == "before"] == steps
    assert [stage for stage, when in POINTS if when == "after"] == steps


def test_an_update_without_a_settled_row_is_found(site: Path) -> None:
    ledger = Site(site).ledger
    entry = ledger.reserve(ROWS, "r", 1, SPEND)
    (site / "outbox" / "r-1.frame").write_bytes(b"")
    found = Found()

    check(site, found)
    before = found.updates_without_row
    ledger.settle(entry, SPEND)
    check(site, found)

    assert released(site) == [("r", 1)]
    assert (before, found.updates_without_row) == (1, 0)


def test_a_training_that_the_ledger_does_not_know_is_found(site: Path) -> None:
    Site(site).ledger.reserve(ROWS, "r", 1, SPEND)
    (site / "started").write_text("r 1 2.0 0.1 2\nr 2 2.0 0.1 2\n")
    found = Found()

    check(site, found)

    assert [number for _, number, _ in started(site)] == [1, 2]
    assert (found.epsilon_undercounted, found.unusable) == (1, 0)
    assert found.epsilon < found.exact


def test_a_ledger_that_was_cut_is_found(site: Path) -> None:
    ledger = Site(site).ledger
    ledger.reserve(ROWS, "r", 1, SPEND)
    ledger.path.unlink()
    found = Found()

    check(site, found)

    assert found.unusable == 1


def test_the_runs_that_are_killed_are_private() -> None:
    assert CONFIG.privacy is not None


@pytest.mark.slow
def test_no_kill_loses_anything(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    script = ROOT / "benchmarks" / "ledger" / "run.py"

    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reached") == 4, done.stdout
    assert "MISSED" not in done.stdout
