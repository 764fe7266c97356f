"""A device's ledger: every reservation counts, and whatever happened to the file is noticed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.ledger import Ledger
from anabranch.edge.runtime import ledger as ledger_module
from anabranch.edge.runtime.device_file import DeviceFile, parse_device, read_device
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.ledger import DeviceLedger, Limit
from anabranch.edge.runtime.ledger_chain import KINDS
from anabranch.edge.runtime.ledger_report import report
from anabranch.protocols.chain import Link, Witness, link_hash
from anabranch.protocols.errors import ConfigError, PrivacyError
from anabranch.protocols.rdp import epsilon_of, require_budget
from anabranch.protocols.spend import Spend
from anabranch.storage import book, witness
from anabranch.storage.chain import Adopted
from anabranch.storage.files import write_atomic

ROOT = Path(__file__).parents[3]
DELTA = 1e-4
SPEND = Spend(noise_multiplier=1.2, sample_rate=0.064, steps=10)
SMALL = Spend(noise_multiplier=2.0, sample_rate=0.1, steps=3)
TRAININGS = 3  # events: opened, and reserve and settle for each


def train(ledger: DeviceLedger, times: int) -> None:
    for _ in range(times):
        ledger.settle(ledger.reserve(SPEND, "run", 50), SPEND)


@pytest.fixture
def empty(tmp_path: Path) -> DeviceLedger:
    return DeviceLedger(tmp_path / "device" / "ledger.sqlite", tmp_path / "state")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    train(DeviceLedger(folder / "device" / "ledger.sqlite", folder / "state"), TRAININGS)
    return folder


@pytest.fixture
def ledger(template: Path, tmp_path: Path) -> DeviceLedger:
    """Return a ledger of some trainings with both witnesses."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    ledger = DeviceLedger(tmp_path / "device" / "ledger.sqlite", tmp_path / "state")
    ledger.history()  # the witness in the state folder learns of the move
    return ledger


def limit(epsilon: float, run: str | None = None) -> Limit:
    return Limit(epsilon=epsilon, delta=DELTA, run=run, name="the budget of the test")


def beside(ledger: DeviceLedger) -> Path:
    return ledger.path.with_name("ledger.head")


def in_state(ledger: DeviceLedger) -> Path:
    (file,) = (ledger.path.parent.parent / "state").glob("*.head")
    return file


def change(path: Path, statement: str) -> None:
    """Change a ledger behind its back."""
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()


def refused(ledger: DeviceLedger, message: str) -> None:
    """Check that nothing works and nothing is changed."""
    before = ledger.path.read_bytes() if ledger.path.exists() else None
    for use in (
        lambda: ledger.reserve(SPEND, "run", 50),
        lambda: ledger.settle(2, SPEND),
        lambda: ledger.reservation(2),
        lambda: ledger.epsilon(DELTA),
        lambda: ledger.head,
    ):
        with pytest.raises(PrivacyError, match=message):
            use()
    assert (ledger.path.read_bytes() if ledger.path.exists() else None) == before


def rewrite(path: Path, edit: Callable[[list[Link]], list[Link]]) -> None:
    """Change events and make the chain whole again, as an attacker would."""
    with closing(sqlite3.connect(path)) as db:
        found = db.execute("SELECT id, kind, body, hash FROM events ORDER BY id").fetchall()
        events = edit([Link(*row) for row in found])
        db.execute("DELETE FROM events")
        previous = "0" * 64
        for number, event in enumerate(events, 1):
            previous = link_hash(previous, number, event.kind, event.text)
            row = (number, event.kind, event.text, previous)
            db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", row)
        db.commit()


# Laws


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([SPEND, SMALL]), st.sampled_from(["a", "b"]), st.booleans()),
        max_size=5,
    )
)
def test_every_reservation_counts_for_ever_settled_or_not_whoever_asked(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[Spend, str, bool]]
) -> None:
    ledger = DeviceLedger(tmp_path_factory.mktemp("device") / "ledger.sqlite", None)
    for spend, run, settle in script:
        entry = ledger.reserve(spend, run, 50)
        if settle:
            ledger.settle(entry, spend)

    spends = [spend for spend, _, _ in script]
    assert ledger.history() == spends
    assert ledger.history("a") == [spend for spend, run, _ in script if run == "a"]
    assert ledger.epsilon(DELTA) == epsilon_of(spends, DELTA)


@settings(max_examples=8, deadline=None)
@given(st.floats(0.5, 3), st.integers(1, 6))
def test_a_budget_is_never_exceeded(
    tmp_path_factory: pytest.TempPathFactory, budget: float, times: int
) -> None:
    ledger = DeviceLedger(tmp_path_factory.mktemp("device") / "ledger.sqlite", None)
    for _ in range(times):
        before = ledger.history()
        try:
            ledger.reserve(SPEND, "run", 50, [limit(budget)])
        except PrivacyError:
            assert epsilon_of([*before, SPEND], DELTA) > budget
            assert ledger.history() == before
        assert ledger.epsilon(DELTA) <= budget


# Examples


def test_nothing_reserved_is_nothing_spent_and_makes_no_file(empty: DeviceLedger) -> None:
    assert empty.epsilon(DELTA) == 0.0
    assert empty.head is None
    assert empty.events() == []
    assert not empty.path.parent.exists()


def test_the_file_is_its_owners_alone(ledger: DeviceLedger) -> None:
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def test_a_budget_over_a_run_and_over_the_device(empty: DeviceLedger) -> None:
    two = epsilon_of([SPEND, SPEND], DELTA)
    for run in ("a", "b"):
        empty.reserve(SPEND, run, 50, [limit(two, run), limit(2 * two)])
        empty.reserve(SPEND, run, 50, [limit(two, run), limit(2 * two)])
        with pytest.raises(PrivacyError, match="above the budget of the test"):
            empty.reserve(SPEND, run, 50, [limit(two, run)])

    with pytest.raises(PrivacyError, match=r"above the budget .* 40 steps are spent"):
        empty.reserve(SPEND, "c", 50, [limit(two)])


def test_no_budget_is_above_the_largest_epsilon(empty: DeviceLedger) -> None:
    weak = Spend(noise_multiplier=0.1, sample_rate=1.0, steps=1000)

    with pytest.raises(PrivacyError, match=r"would bring epsilon from 0\.000 to inf"):
        empty.reserve(weak, "run", 50, [limit(float("inf"))])


def test_the_report_says_what_every_training_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    home = Home(tmp_path / "device")
    with pytest.raises(PrivacyError, match="nothing was ever trained privately"):
        report(home)
    ledger = DeviceLedger(home.ledger, witness.state_folder())
    ledger.settle(ledger.reserve(SPEND, "a", 50), SPEND)
    ledger.reserve(SMALL, "b", 60)
    (home.folder / "device.toml").write_text("[budget]\nepsilon = 4\ndelta = 1e-4\n")

    found = report(home)

    assert [(row.run, row.records, row.settled) for row in found.trainings] == [
        ("a", 50, True),
        ("b", 60, False),
    ]
    assert found.trainings[0].epsilon == epsilon_of([SPEND], DELTA)
    assert found.epsilon == epsilon_of([SPEND, SMALL], DELTA)
    assert found.left == pytest.approx(4 - found.epsilon)
    assert found.head == ledger.head
    assert msgspec.json.encode(found.as_dict())


def test_device_toml_is_read_strictly(tmp_path: Path) -> None:
    assert read_device(tmp_path) == DeviceFile()
    (tmp_path / "device.toml").write_text(
        '[budget]\nepsilon = 2\ndelta = 1e-5\n[conditions]\nidle = false\nwindows = ["22:00-06:00"]'
    )
    found = read_device(tmp_path)
    assert found.budget is not None
    assert found.budget.epsilon == 2.0
    assert found.conditions.windows == ("22:00-06:00",)
    assert found.conditions.charging


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[budget]\nepsilon = 2", "missing required field `delta`"),
        ("[budget]\nepsilon = nan\ndelta = 1e-5", r"at `\$\.budget\.epsilon`"),
        ("[budget]\nepsilon = inf\ndelta = 1e-5", r"at `\$\.budget\.epsilon`"),
        ("[budget]\nepsilon = 2\ndelta = 0", r"at `\$\.budget\.delta`"),
        ("[budgets]", "unknown field `budgets`"),
        ('[conditions]\nwindows = ["24:00-06:00"]', r"at `\$\.conditions\.windows\[0\]`"),
        ("[conditions]\nmin_battery = 30", r"at `\$\.conditions\.min_battery`"),
        ("\x00", "here: "),
    ],
)
def test_a_wrong_device_toml_is_refused_naming_the_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_device(text, source="here")


# Refusals of reserve and settle


def test_what_was_not_reserved_cannot_be_settled(ledger: DeviceLedger) -> None:
    entry = ledger.reserve(SPEND, "run", 50)
    before = ledger.events()

    for ran in (
        replace(SPEND, steps=11),
        replace(SPEND, noise_multiplier=1.1),
        replace(SPEND, sample_rate=0.065),
    ):
        with pytest.raises(PrivacyError, match=r"reserved \(σ, q, steps\) = \(1\.2, 0\.064, 10\)"):
            ledger.settle(entry, ran)
    for other in (1, entry - 1, entry + 1):  # opened, a settle, nothing
        with pytest.raises(PrivacyError, match=f"entry {other} is not open, nothing may leave"):
            ledger.settle(other, SPEND)
    assert ledger.events() == before

    ledger.settle(entry, SPEND)
    with pytest.raises(PrivacyError, match="is not open, nothing may leave"):
        ledger.settle(entry, SPEND)
    with pytest.raises(PrivacyError, match="is not open"):
        ledger.reservation(entry)


@pytest.mark.parametrize(("run", "records"), [("", 5), ("x" * 257, 5), ("run", 0)])
def test_what_the_ledger_could_not_read_again_is_not_written(
    empty: DeviceLedger, run: str, records: int
) -> None:
    with pytest.raises(PrivacyError, match="this training cannot be reserved"):
        empty.reserve(SPEND, run, records)
    assert not empty.path.exists()


# The chain


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "UPDATE events SET body = replace(body, '\"steps\":10', '\"steps\":1') WHERE id = 2",
            r"event 2 \(reserve\) is not what was written",
        ),
        ("UPDATE events SET kind = 'settle' WHERE id = 2", "event 2 .* is not what was written"),
        ("UPDATE events SET hash = '00' WHERE id = 5", "event 5 .* is not what was written"),
        ("DELETE FROM events WHERE id = 4", "event 4 is missing: after it comes event 5"),
        ("DELETE FROM events WHERE id = 1", "event 1 is missing"),
        ("DELETE FROM events", "the chain is empty"),
    ],
)
def test_what_was_edited_or_taken_out_is_noticed(
    ledger: DeviceLedger, statement: str, message: str
) -> None:
    change(ledger.path, statement)

    refused(ledger, f"was changed: .*{message}.*restore the ledger from a backup")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda events: [events[0], *events[2:]], "event 2 .settle. cannot follow"),
        (lambda events: [*events, events[2]], "event 8 .settle. cannot follow"),
        (lambda events: [*events, events[0]], "event 8 .opened. cannot follow"),
        (lambda events: events[1:], "event 1 .reserve. cannot follow"),
        (lambda events: [*events, Link(8, "refund", "{}", "")], "refund. cannot be read"),
        (lambda events: [*events, Link(8, "settle", '{"reserve":2}', "")], "cannot be read.*time"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused(
    ledger: DeviceLedger, edit: Callable[[list[Link]], list[Link]], message: str
) -> None:
    rewrite(ledger.path, edit)

    refused(ledger, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no privacy ledger of a device"), (b"x" * 4096, "cannot be used .*not a database")],
)
def test_a_file_that_is_no_ledger_is_refused(
    ledger: DeviceLedger, content: bytes, message: str
) -> None:
    ledger.path.write_bytes(content)

    refused(ledger, message)


@pytest.mark.parametrize("keep", [1000, 4096, 6000])
def test_a_truncated_file_is_refused(ledger: DeviceLedger, keep: int) -> None:
    os.truncate(ledger.path, keep)

    refused(ledger, "privacy ledger")


def test_the_ledger_of_a_site_is_none_of_a_device(ledger: DeviceLedger, tmp_path: Path) -> None:
    site = Ledger(tmp_path / "site" / "ledger.sqlite")
    site.reserve([b"x" * 32], "run", 1, SPEND)
    shutil.copy(site.path, ledger.path)

    refused(ledger, "this is no privacy ledger of a device")


# The witnesses


@pytest.mark.parametrize("lost", ["beside", "state", "none"])
@pytest.mark.parametrize("cut", [1, 2, 6])
def test_a_tail_that_was_cut_is_noticed_by_any_one_witness(
    ledger: DeviceLedger, cut: int, lost: str
) -> None:
    change(ledger.path, f"DELETE FROM events WHERE id > {7 - cut}")
    if lost != "none":
        (beside(ledger) if lost == "beside" else in_state(ledger)).unlink()

    refused(ledger, rf"rolled back or cut: it has {7 - cut} events, .* saw 7")


def test_an_older_copy_of_the_folder_is_noticed_by_the_other_witness(
    ledger: DeviceLedger, tmp_path: Path
) -> None:
    shutil.copytree(ledger.path.parent, tmp_path / "backup")
    train(ledger, 1)
    shutil.rmtree(ledger.path.parent)
    shutil.copytree(tmp_path / "backup", ledger.path.parent)

    refused(ledger, r"it has 7 events, .*state/[0-9a-f]{32}\.head saw 9")


def test_a_chain_that_was_made_anew_is_noticed(ledger: DeviceLedger) -> None:
    cheaper = ('"steps":10', '"steps":1')
    rewrite(ledger.path, lambda events: [replace(e, text=e.text.replace(*cheaper)) for e in events])

    refused(ledger, "was rewritten: its event 7 is not the one that .* saw")


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_deleted_ledger_is_noticed(ledger: DeviceLedger, whole_folder: bool) -> None:
    shutil.rmtree(ledger.path.parent) if whole_folder else ledger.path.unlink()

    refused(ledger, "ledger is missing, but .* says that it had 7 events.*edge ledger --adopt")
    assert not ledger.path.exists()


def test_the_ledger_of_another_device_is_noticed(ledger: DeviceLedger, tmp_path: Path) -> None:
    other = DeviceLedger(tmp_path / "other" / "ledger.sqlite", None)
    train(other, 1)
    shutil.copy(other.path, ledger.path)

    refused(ledger, "another privacy ledger was here: .* speaks of ledger")


def test_a_ledger_without_any_witness_is_refused(ledger: DeviceLedger) -> None:
    in_state(ledger).unlink()
    beside(ledger).unlink()

    refused(ledger, r"witnesses of this privacy ledger are gone.*--adopt")


def test_one_lost_witness_is_written_again(ledger: DeviceLedger) -> None:
    for lost in (beside(ledger), in_state(ledger)):
        before = lost.read_bytes()
        lost.unlink()
        ledger.history()
        assert lost.read_bytes() == before


def test_a_witness_that_is_none_is_refused(ledger: DeviceLedger) -> None:
    beside(ledger).write_text("{}")

    refused(ledger, "this witness of a privacy ledger cannot be read .*missing required field")


def test_a_copy_of_a_device_cannot_spend_beside_it(ledger: DeviceLedger, tmp_path: Path) -> None:
    shutil.copytree(ledger.path.parent, tmp_path / "copy")
    copy = DeviceLedger(tmp_path / "copy" / "ledger.sqlite", tmp_path / "state")

    train(copy, 1)

    refused(ledger, "rolled back or cut: it has 7 events, .* saw 9")


# Crashes, full disks, two at once


class Crash(BaseException):
    """The process ends here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int, *, after: bool) -> None:
    """End the process at the given durable write, counted from 0: before or after it is done."""
    writes = 0

    def ending(write: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal writes
            writes += 1
            if writes == step + 1 and not after:
                raise Crash
            result = write(*args, **kwargs)
            if writes == step + 1:
                raise Crash
            return result

        return wrapped

    monkeypatch.setattr(witness, "write_atomic", ending(write_atomic))
    monkeypatch.setattr(os, "link", ending(os.link))
    monkeypatch.setattr(book, "committed", ending(book.committed))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(12))
def test_a_crash_at_any_write_loses_no_spend_and_blocks_nothing(
    empty: DeviceLedger, step: int, after: bool
) -> None:
    did: list[str] = []

    def trainings() -> None:
        for _ in range(3):
            did.append("start")
            entry = empty.reserve(SPEND, "run", 50)
            did.append("train")
            empty.settle(entry, SPEND)
            did.append("release")

    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, step, after=after)
        with pytest.raises(Crash):
            trainings()

    state = empty.state()

    assert did.count("release") <= (0 if state is None else len(state.settled))
    assert did.count("train") <= len(empty.history()) <= did.count("start")
    train(empty, 1)
    assert len(empty.history()) > did.count("train")


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_witness_that_cannot_be_written_stops_and_what_was_reserved_counts(
    ledger: DeviceLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ledger.reserve(SPEND, "run", 50)
    with monkeypatch.context() as patch:
        patch.setattr(witness, "write_atomic", full)
        with pytest.raises(PrivacyError, match=r"cannot be written .*nothing may leave"):
            ledger.settle(entry, SPEND)

    assert len(ledger.history()) == TRAININGS + 1


RACE = """
import sys
from pathlib import Path
from anabranch.edge.runtime.ledger import DeviceLedger, Limit
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.rdp import epsilon_of, require_budget
from anabranch.protocols.spend import Spend
spend = Spend(noise_multiplier=1.2, sample_rate=0.064, steps=10)
budget = Limit(epsilon=epsilon_of([spend] * 2, 1e-4), delta=1e-4, name="b")
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
try:
    DeviceLedger(Path(sys.argv[1]), None).reserve(spend, "run", 50, [budget])
except PrivacyError as error:
    sys.exit(0 if "above b of" in str(error) else 1)
sys.exit(7)
"""


def test_of_two_processes_that_want_the_last_of_a_budget_one_is_refused(tmp_path: Path) -> None:
    ledger = DeviceLedger(tmp_path / "ledger.sqlite", None)
    ledger.reserve(SPEND, "run", 50)
    command = [sys.executable, "-c", RACE, str(ledger.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
    with (
        subprocess.Popen(command, **pipes) as first,  # type: ignore[call-overload]
        subprocess.Popen(command, **pipes) as second,  # type: ignore[call-overload]
    ):
        for one in (first, second):
            assert one.stdout.readline() == "ready\n"
        for one in (first, second):
            one.stdin.write("go\n")
            one.stdin.flush()
    codes = sorted((first.returncode, second.returncode))

    assert codes == [0, 7]
    assert len(ledger.history()) == 2


def test_nobody_reads_the_ledger_between_anothers_check_and_reservation(
    ledger: DeviceLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_inside, order = threading.Event(), []

    def check(*args: Any, **kwargs: Any) -> None:
        order.append("check")
        if len(order) > 1:
            second_inside.set()
        else:
            second.start()
            assert not second_inside.wait(0.3)  # it would have read what the first one read
        require_budget(*args, **kwargs)

    def reserve() -> None:
        DeviceLedger(ledger.path, None).reserve(SPEND, "run", 50, [limit(50)])

    second = threading.Thread(target=reserve)
    monkeypatch.setattr(ledger_module, "require_budget", check)

    ledger.reserve(SPEND, "run", 50, [limit(50)])
    second.join()

    assert second_inside.is_set()
    assert len(ledger.history()) == TRAININGS + 2


# Accepting a loss


def test_a_restored_ledger_is_accepted_and_the_chain_says_so(
    ledger: DeviceLedger, tmp_path: Path
) -> None:
    shutil.copy(ledger.path, tmp_path / "copy")
    train(ledger, 1)
    lost = ledger.head
    shutil.copy(tmp_path / "copy", ledger.path)

    assert ledger.adopt() == ledger.head

    event = ledger.events()[-1].read(KINDS)
    assert isinstance(event, Adopted)
    assert {(w.count, w.head) for w in event.witnesses} == {(9, lost)}
    train(ledger, 1)
    assert len(ledger.history()) == TRAININGS + 1


def test_a_lost_ledger_begins_anew_and_the_chain_says_so(ledger: DeviceLedger) -> None:
    ledger.path.unlink()

    ledger.adopt()

    assert [event.kind for event in ledger.events()] == ["opened", "adopted"]
    train(ledger, 1)
    found = msgspec.json.decode(in_state(ledger).read_bytes(), type=Witness)  # one: the old is gone
    assert found.head == ledger.head


def test_there_may_be_nothing_to_accept(ledger: DeviceLedger, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="there is nothing to accept"):
        ledger.adopt()
    with pytest.raises(PrivacyError, match="no ledger, and no witness of one"):
        DeviceLedger(tmp_path / "new" / "ledger.sqlite", None).adopt()
    change(ledger.path, "DELETE FROM events WHERE id = 4")
    with pytest.raises(PrivacyError, match="event 4 is missing"):
        ledger.adopt()
