"""What a ledger counts: every reservation, on the rows it was made for."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.chain import Imported, Reserve
from anabranch.client.ledger import Ledger
from anabranch.client.privacy import Spend, epsilon_of
from anabranch.protocols.errors import PrivacyError
from tests.ledgers import SPEND, change, old_ledger, rows, spend

ROWS, OTHER = rows("a", "b"), rows("c")
SMALL = spend(2.0, 0.1, 3)
ROOT = Path(__file__).parents[2]
KILLED = """
import os, sys
from pathlib import Path
from anabranch.client.ledger import Ledger
from tests.ledgers import SPEND, rows
Ledger(Path(sys.argv[1])).reserve(rows("a", "b"), "run", 1, SPEND)
os._exit(9)  # between reserve and settle
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "site" / "ledger.sqlite")


def fresh(factory: pytest.TempPathFactory) -> Ledger:
    return Ledger(factory.mktemp("site") / "ledger.sqlite")


# Laws

data_sets = st.lists(
    st.tuples(st.sets(st.integers(0, 5), min_size=1), st.sampled_from([SPEND, SMALL])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=8, deadline=None)
@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]), st.integers(1, 3), st.sampled_from(["reserve", "settle"])
        ),
        max_size=6,
    )
)
def test_every_reservation_counts_settled_or_not(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[str, int, str]]
) -> None:
    ledger = fresh(tmp_path_factory)
    for name, round_number, then in script:
        entry = ledger.reserve(rows(name), "run", round_number, SPEND)
        if then == "settle":
            ledger.settle(entry, SPEND)

    assert ledger.history() == [SPEND] * len(script)


@settings(max_examples=8, deadline=None)
@given(script=data_sets, asked=st.sets(st.integers(0, 7), min_size=1))
def test_a_row_has_spent_the_composition_of_its_own_events(
    tmp_path_factory: pytest.TempPathFactory,
    script: list[tuple[set[int], Spend]],
    asked: set[int],
) -> None:
    ledger = fresh(tmp_path_factory)
    for number, (members, one) in enumerate(script, 1):
        ledger.reserve(rows(*members), f"run-{number}", 1, one)

    own = {
        row: epsilon_of([one for members, one in script if row in members], 1e-4) for row in asked
    }

    assert ledger.spent(rows(*asked), 1e-4) == max(own.values())
    for row, epsilon in own.items():
        assert ledger.spent(rows(row), 1e-4) == epsilon
    assert ledger.epsilon(1e-4) >= max(own.values())


@settings(max_examples=8, deadline=None)
@given(names=st.lists(st.integers(0, 9), min_size=1, max_size=8), data=st.data())
def test_the_order_of_rows_does_not_matter_and_their_number_does(
    tmp_path_factory: pytest.TempPathFactory, names: list[int], data: st.DataObject
) -> None:
    ledger = fresh(tmp_path_factory)
    ledger.reserve(rows(*names), "run", 1, SMALL)
    shuffled = data.draw(st.permutations(names))

    ledger.reserve(rows(*shuffled), "run", 2, SMALL)

    assert [event.kind for event in ledger.events()] == ["opened", "data", "reserve", "reserve"]
    assert ledger.fingerprint(rows(*names)) == ledger.fingerprint(rows(*shuffled))
    assert ledger.fingerprint(rows(*names)) != ledger.fingerprint(rows(*names, names[0]))


@settings(max_examples=10, deadline=None)
@given(old=st.sets(st.integers(0, 9), min_size=1), new=st.sets(st.integers(10, 19), min_size=1))
def test_new_rows_start_their_own_spend_and_old_rows_keep_theirs(
    tmp_path_factory: pytest.TempPathFactory, old: set[int], new: set[int]
) -> None:
    ledger = fresh(tmp_path_factory)
    ledger.reserve(rows(*old), "first", 1, SPEND)
    ledger.reserve(rows(*old, *new), "second", 1, SMALL)

    assert ledger.spent(rows(*new), 1e-4) == epsilon_of([SMALL], 1e-4)
    assert ledger.spent(rows(*old), 1e-4) == epsilon_of([SPEND, SMALL], 1e-4)
    assert ledger.spent(rows(*old, *new), 1e-4) == epsilon_of([SPEND, SMALL], 1e-4)


# Examples


def test_a_spend_comes_back_bit_for_bit(ledger: Ledger) -> None:
    odd = Spend(noise_multiplier=1 / 3, sample_rate=64 / 999, steps=7)

    ledger.settle(ledger.reserve(ROWS, "run", 1, odd), odd)

    assert ledger.history() == [odd]


def test_what_was_never_used_has_spent_nothing_and_leaves_no_file(ledger: Ledger) -> None:
    assert ledger.epsilon(1e-4) == ledger.spent(ROWS, 1e-4) == 0.0
    assert ledger.events() == []
    assert ledger.head is None
    assert not ledger.contains("0" * 64)
    assert not ledger.path.exists()


def test_rounds_and_runs_compose_over_reopened_ledgers(ledger: Ledger) -> None:
    for round_number in range(1, 21):
        again = Ledger(ledger.path)
        run = "first" if round_number <= 10 else "second"
        again.settle(again.reserve(ROWS, run, round_number, SPEND), SPEND)

    assert ledger.spent(ROWS, 1e-4) == pytest.approx(3.75, abs=0.01)
    assert len(ledger.history("second")) == 10


def test_the_same_round_reserved_again_counts_again(ledger: Ledger) -> None:
    ledger.reserve(ROWS, "run", 1, SPEND)
    ledger.settle(ledger.reserve(ROWS, "run", 1, SPEND), SPEND)

    assert ledger.spent(ROWS, 1e-4) == epsilon_of([SPEND, SPEND], 1e-4)


def test_an_event_says_everything_that_epsilon_is_computed_from(ledger: Ledger) -> None:
    entry = ledger.reserve(ROWS, "run", 3, SPEND)
    head = ledger.settle(entry, SPEND)

    opened, data, reserve, settle = (json.loads(event.text) for event in ledger.events())
    times = [event.pop("time") for event in (opened, data, reserve, settle)]
    assert all(time.endswith("+00:00") for time in times)
    assert reserve == {
        "data": ledger.fingerprint(ROWS),
        "run": "run",
        "round": 3,
        "noise_multiplier": 1.2,
        "sample_rate": 0.064,
        "steps": 10,
        "mechanism": "poisson-subsampled-gaussian",
        "neighbouring": "add-or-remove-one-record",
    }
    assert (data["data"], data["rows"]) == (reserve["data"], 2)
    assert settle == {"reserve": entry}
    assert head == ledger.head == ledger.events()[-1].hash


def test_a_row_cannot_be_recognised_without_the_key_of_the_ledger(
    tmp_path: Path, ledger: Ledger
) -> None:
    other = Ledger(tmp_path / "other" / "ledger.sqlite")
    for one in (ledger, other):
        one.reserve(ROWS, "run", 1, SPEND)

    assert ledger.fingerprint(ROWS) != other.fingerprint(ROWS)
    assert not any(row[:16] in ledger.path.read_bytes() for row in ROWS)


def test_every_head_there_ever_was_is_in_the_chain(ledger: Ledger) -> None:
    heads = []
    for number in (1, 2):
        heads.append(ledger.settle(ledger.reserve(ROWS, "run", number, SPEND), SPEND))

    assert all(ledger.contains(head) for head in heads)
    assert not ledger.contains("ab" * 32)


def test_a_reservation_survives_a_killed_process(ledger: Ledger) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(ledger.path)], check=False, cwd=ROOT)

    assert done.returncode == 9
    assert ledger.history() == [SPEND]
    state = ledger.state()
    assert state is not None
    assert state.open == set(state.reserved)


def test_a_process_killed_inside_a_write_leaves_a_ledger_that_can_be_read(ledger: Ledger) -> None:
    ledger.reserve(ROWS, "run", 1, SPEND)
    script = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('PRAGMA cache_size = 1')\n"
        "db.execute('BEGIN IMMEDIATE')\n"
        "for i in range(100, 2100):\n"
        "    db.execute(\"INSERT INTO events VALUES (?, 'x', 'y', 'z')\", (i,))\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(ledger.path)], check=False)
    assert ledger.path.with_name("ledger.sqlite-journal").exists()

    assert ledger.history() == [SPEND]


def test_many_threads_may_reserve_at_once(ledger: Ledger) -> None:
    threads = [
        threading.Thread(target=lambda i=i: Ledger(ledger.path).reserve(ROWS, "run", i, SPEND))
        for i in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ledger.history()) == 8


def test_only_the_owner_can_read_a_ledger(ledger: Ledger) -> None:
    ledger.reserve(ROWS, "run", 1, SPEND)

    assert ledger.path.stat().st_mode & 0o077 == 0
    assert sorted(os.listdir(ledger.path.parent)) == ["ledger.head", "ledger.sqlite"]


# A ledger of format 1


def test_spends_of_format_1_are_charged_to_every_row(tmp_path: Path) -> None:
    path = old_ledger(
        tmp_path / "ledger.sqlite",
        [("ab" * 32, "r1", 1, SPEND, "settled"), ("cd" * 32, "r2", 1, SMALL, "reserved")],
    )
    ledger = Ledger(path)

    assert ledger.history() == [SPEND, SMALL]
    assert ledger.history("r2") == [SMALL]
    ledger.reserve(ROWS, "r3", 1, SMALL)
    assert ledger.spent(ROWS, 1e-4) == epsilon_of([SPEND, SMALL, SMALL], 1e-4)
    assert ledger.spent(OTHER, 1e-4) == epsilon_of([SPEND, SMALL], 1e-4)
    kinds = [event.kind for event in ledger.events()]
    assert kinds == ["opened", "imported", "imported", "data", "reserve"]
    body = ledger.events()[2].body
    assert isinstance(body, Imported)
    assert (body.data, body.state) == ("cd" * 32, "reserved")


def test_a_ledger_of_format_1_that_cannot_be_converted_is_left_as_it_was(tmp_path: Path) -> None:
    path = old_ledger(tmp_path / "ledger.sqlite", [("ab" * 32, "r1", 1, SPEND, "settled")])
    change(path, "UPDATE spends SET noise_multiplier = 9e999")

    with pytest.raises(PrivacyError, match="privacy ledger"):
        Ledger(path).history()

    change(path, "UPDATE spends SET noise_multiplier = 1.2")
    assert Ledger(path).history() == [SPEND]


def test_an_empty_ledger_of_format_1_is_converted_too(tmp_path: Path) -> None:
    path = old_ledger(tmp_path / "ledger.sqlite", [])

    assert Ledger(path).history() == []
    assert [event.kind for event in Ledger(path).events()] == ["opened"]


# Refusals


def test_settling_something_else_is_refused_and_stays_reserved(ledger: Ledger) -> None:
    entry = ledger.reserve(ROWS, "run", 1, SPEND)

    with pytest.raises(PrivacyError, match=r"reserved .*1\.2.* training spent \(1\.0"):
        ledger.settle(entry, spend(1.0))

    assert ledger.history() == [SPEND]


def test_an_entry_is_closed_once(ledger: Ledger) -> None:
    entry = ledger.reserve(ROWS, "run", 1, SPEND)
    head = ledger.settle(entry, SPEND)

    with pytest.raises(PrivacyError, match=f"entry {entry} is not open"):
        ledger.settle(entry, SPEND)

    assert ledger.head == head


def test_an_unknown_entry_is_refused(ledger: Ledger) -> None:
    with pytest.raises(PrivacyError, match="entry 7 is not open"):
        ledger.settle(7, SPEND)


def test_no_rows_are_no_data_set(ledger: Ledger) -> None:
    with pytest.raises(PrivacyError, match="0 records"):
        ledger.reserve([], "run", 1, SPEND)

    assert not ledger.path.exists()


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
        ledger.reserve(ROWS, "run", 1, SPEND)
    with pytest.raises(PrivacyError, match=message):
        ledger.epsilon(1e-4)

    assert ledger.path.read_bytes() == content


def test_a_truncated_ledger_is_refused(ledger: Ledger) -> None:
    for round_number in range(1, 30):
        ledger.reserve(ROWS, "run", round_number, SPEND)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(PrivacyError, match=r"ledger.*backup"):
        ledger.history()


def test_a_ledger_with_overwritten_pages_is_refused(ledger: Ledger) -> None:
    for round_number in range(1, 30):
        ledger.reserve(ROWS, "run", round_number, SPEND)
    content = bytearray(ledger.path.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    ledger.path.write_bytes(content)

    with pytest.raises(PrivacyError, match=r"ledger.*backup"):
        ledger.reserve(ROWS, "run", 60, SPEND)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA user_version = 3", "ledger version 3, expected 2"),
        ("PRAGMA application_id = 1", "no privacy ledger"),
        ("DROP TABLE events", "cannot be used"),
    ],
)
def test_another_file_is_refused(ledger: Ledger, statement: str, message: str) -> None:
    ledger.reserve(ROWS, "run", 1, SPEND)
    change(ledger.path, statement)

    with pytest.raises(PrivacyError, match=message):
        ledger.history()


def test_a_folder_in_place_of_the_ledger_is_refused(ledger: Ledger) -> None:
    ledger.path.mkdir(parents=True)

    with pytest.raises(PrivacyError, match=r"cannot be used .* Do not delete it"):
        ledger.reserve(ROWS, "run", 1, SPEND)


def test_every_pair_of_events_has_another_hash(ledger: Ledger) -> None:
    for number in (1, 1, 2):
        ledger.reserve(ROWS, "run", number, SPEND)

    events = [event for event in ledger.events() if isinstance(event.body, Reserve)]
    assert all(a.hash != b.hash for a, b in itertools.combinations(events, 2))
    assert math.isfinite(ledger.epsilon(1e-4))
