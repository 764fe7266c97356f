from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.ledger import Ledger
from anabranch.client.privacy import Spend, epsilon_of
from anabranch.protocols.errors import PrivacyError

DATA, OTHER = "ab" * 32, "cd" * 32
SPEND = Spend(noise_multiplier=1.2, sample_rate=0.064, steps=10)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "site" / "ledger.sqlite")


# Laws


@settings(max_examples=20, deadline=None)
@given(
    script=st.lists(
        st.tuples(
            st.sampled_from([DATA, OTHER]),
            st.integers(1, 3),
            st.sampled_from(["reserve", "settle"]),
        ),
        max_size=8,
    )
)
def test_every_reservation_counts_settled_or_not(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[str, int, str]]
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("site") / "ledger.sqlite")
    for data, round_number, then in script:
        entry = ledger.reserve(data, "run", round_number, SPEND)
        if then == "settle":
            ledger.settle(entry, SPEND)

    assert ledger.history() == [SPEND] * len(script)


def test_a_spend_comes_back_bit_for_bit(ledger: Ledger) -> None:
    spend = Spend(noise_multiplier=1 / 3, sample_rate=64 / 999, steps=7)

    entry = ledger.reserve(DATA, "run", 1, spend)
    ledger.settle(entry, spend)

    assert ledger.history() == [spend]


# Examples


def test_a_new_ledger_has_spent_nothing(ledger: Ledger) -> None:
    assert ledger.epsilon(1e-4) == 0.0
    assert ledger.path.exists()


def test_rounds_and_runs_compose_over_reopened_ledgers(ledger: Ledger) -> None:
    for round_number in range(1, 21):
        again = Ledger(ledger.path)
        run = "first" if round_number <= 10 else "second"
        again.settle(again.reserve(DATA, run, round_number, SPEND), SPEND)

    assert ledger.epsilon(1e-4) == pytest.approx(3.75, abs=0.01)
    assert len(ledger.history("second")) == 10


def test_records_that_changed_do_not_start_again_at_zero(ledger: Ledger) -> None:
    ledger.reserve(DATA, "first", 1, SPEND)
    ledger.reserve(OTHER, "second", 1, SPEND)

    assert ledger.epsilon(1e-4) == epsilon_of([SPEND, SPEND], 1e-4)


def test_the_same_round_reserved_again_counts_again(ledger: Ledger) -> None:
    ledger.reserve(DATA, "run", 1, SPEND)
    ledger.settle(ledger.reserve(DATA, "run", 1, SPEND), SPEND)

    assert ledger.epsilon(1e-4) == epsilon_of([SPEND, SPEND], 1e-4)


def test_a_reservation_survives_a_killed_process(ledger: Ledger) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from anabranch.client.ledger import Ledger\n"
        "from anabranch.client.privacy import Spend\n"
        "spend = Spend(noise_multiplier=1.2, sample_rate=0.064, steps=10)\n"
        f"Ledger(Path(sys.argv[1])).reserve({DATA!r}, 'run', 1, spend)\n"
        "os._exit(9)  # between reserve and settle\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(ledger.path)], check=False)

    assert killed.returncode == 9
    assert ledger.history() == [SPEND]


def test_a_process_killed_inside_a_write_leaves_a_ledger_that_can_be_read(ledger: Ledger) -> None:
    ledger.reserve(DATA, "run", 1, SPEND)
    script = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('PRAGMA cache_size = 1')\n"
        "db.execute('BEGIN IMMEDIATE')\n"
        "for i in range(2000):\n"
        "    db.execute(\"INSERT INTO spends VALUES (NULL, 'x', 'y', 1, 1, 1, 1, 'settled')\")\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(ledger.path)], check=False)
    assert ledger.path.with_name("ledger.sqlite-journal").exists()

    assert ledger.history() == [SPEND]


def test_many_threads_may_reserve_at_once(ledger: Ledger) -> None:
    threads = [
        threading.Thread(target=lambda i=i: Ledger(ledger.path).reserve(DATA, "run", i, SPEND))
        for i in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ledger.history()) == 8


def test_only_the_owner_can_read_a_ledger(ledger: Ledger) -> None:
    ledger.reserve(DATA, "run", 1, SPEND)

    assert ledger.path.stat().st_mode & 0o077 == 0
    assert os.listdir(ledger.path.parent) == ["ledger.sqlite"]


# Refusals


def test_settling_something_else_is_refused_and_stays_reserved(ledger: Ledger) -> None:
    entry = ledger.reserve(DATA, "run", 1, SPEND)
    other = Spend(noise_multiplier=1.0, sample_rate=0.064, steps=10)

    with pytest.raises(PrivacyError, match=r"reserved .*1\.2.* training spent \(1\.0"):
        ledger.settle(entry, other)

    assert ledger.history() == [SPEND]


def test_an_entry_is_closed_once(ledger: Ledger) -> None:
    entry = ledger.reserve(DATA, "run", 1, SPEND)
    ledger.settle(entry, SPEND)

    with pytest.raises(PrivacyError, match=f"entry {entry} is not open"):
        ledger.settle(entry, SPEND)

    assert ledger.history() == [SPEND]


def test_an_unknown_entry_is_refused(ledger: Ledger) -> None:
    with pytest.raises(PrivacyError, match="entry 7 is not open"):
        ledger.settle(7, SPEND)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no privacy ledger"),
        (b"not a database, but long enough to be read as a header of one\n" * 40, "cannot be used"),
        (b"SQLite format 3\0" + bytes(4080), "cannot be used|no privacy ledger"),
    ],
)
def test_garbage_is_refused_and_left_alone(ledger: Ledger, content: bytes, message: str) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_bytes(content)

    with pytest.raises(PrivacyError, match=message):
        ledger.reserve(DATA, "run", 1, SPEND)
    with pytest.raises(PrivacyError, match=message):
        ledger.epsilon(1e-4)

    assert ledger.path.read_bytes() == content


def test_a_truncated_ledger_is_refused(ledger: Ledger) -> None:
    for round_number in range(1, 60):
        ledger.reserve(DATA, "run", round_number, SPEND)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(PrivacyError, match=r"ledger.*backup"):
        ledger.history()


def test_a_ledger_with_overwritten_pages_is_refused(ledger: Ledger) -> None:
    for round_number in range(1, 60):
        ledger.reserve(DATA, "run", round_number, SPEND)
    content = bytearray(ledger.path.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    ledger.path.write_bytes(content)

    with pytest.raises(PrivacyError, match=r"ledger.*backup"):
        ledger.reserve(DATA, "run", 60, SPEND)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA user_version = 2", "ledger version 2, expected 1"),
        ("PRAGMA application_id = 1", "no privacy ledger"),
        ("DROP TABLE spends", "cannot be used"),
        ("UPDATE spends SET noise_multiplier = 9e999", "not what a ledger holds"),
    ],
)
def test_a_file_that_was_changed_is_refused(ledger: Ledger, statement: str, message: str) -> None:
    ledger.reserve(DATA, "run", 1, SPEND)
    db = sqlite3.connect(ledger.path)
    db.execute(statement)
    db.commit()
    db.close()

    with pytest.raises(PrivacyError, match=message):
        ledger.history()


def test_a_folder_in_place_of_the_ledger_is_refused(ledger: Ledger) -> None:
    ledger.path.mkdir(parents=True)

    with pytest.raises(PrivacyError, match=r"cannot be used .* Do not delete it"):
        ledger.reserve(DATA, "run", 1, SPEND)
