"""A ledger that was edited, cut, rolled back, deleted or exchanged stops private training."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from anabranch.client.chain import Event
from anabranch.client.ledger import Ledger
from anabranch.protocols.chain import Witness, link_hash
from anabranch.protocols.errors import PrivacyError
from anabranch.storage import book, witness
from anabranch.storage.chain import Adopted
from anabranch.storage.files import write_atomic
from tests.ledgers import SPEND, change, old_ledger, rows

ROWS = rows("a", "b")
ROUNDS = 3  # events: opened, data, and reserve and settle for each
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    train(Ledger(folder / "site" / "ledger.sqlite", folder / "state"), ROUNDS)
    return folder


@pytest.fixture
def ledger(template: Path, tmp_path: Path) -> Ledger:
    """Return a ledger of some rounds with both witnesses."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    ledger = Ledger(tmp_path / "site" / "ledger.sqlite", tmp_path / "state")
    ledger.history()  # the witness in the state folder learns of the move
    return ledger


def train(ledger: Ledger, rounds: int) -> None:
    for number in range(1, rounds + 1):
        ledger.settle(ledger.reserve(ROWS, "run", number, SPEND), SPEND)


def beside(ledger: Ledger) -> Path:
    return ledger.path.with_name("ledger.head")


def in_state(ledger: Ledger) -> Path:
    (file,) = (ledger.path.parent.parent / "state").glob("*.head")
    return file


def refused(ledger: Ledger, message: str) -> None:
    """Check that nothing works and nothing is changed."""
    before = ledger.path.read_bytes() if ledger.path.exists() else None
    for use in (
        lambda: ledger.reserve(ROWS, "run", 9, SPEND),
        lambda: ledger.settle(4, SPEND),
        lambda: ledger.spent(ROWS, 1e-4),
        lambda: ledger.history(),
        lambda: ledger.head,
    ):
        with pytest.raises(PrivacyError, match=message):
            use()
    assert (ledger.path.read_bytes() if ledger.path.exists() else None) == before


def rewrite(path: Path, edit: Callable[[list[Event]], list[Event]]) -> None:
    """Change events and make the chain whole again, as an attacker would."""
    with closing(sqlite3.connect(path)) as db:
        found = db.execute("SELECT id, kind, body, hash FROM events ORDER BY id").fetchall()
        events = edit([Event(*row) for row in found])
        db.execute("DELETE FROM events")
        previous = "0" * 64
        for number, event in enumerate(events, 1):
            previous = link_hash(previous, number, event.kind, event.text)
            db.execute(
                "INSERT INTO events VALUES (?, ?, ?, ?)",
                (number, event.kind, event.text, previous),
            )
        db.commit()


# The chain


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (
            ["UPDATE events SET body = replace(body, '\"steps\":10', '\"steps\":1') WHERE id = 3"],
            r"event 3 \(reserve\) is not what was written",
        ),
        (["UPDATE events SET kind = 'settle' WHERE id = 3"], r"event 3 .* is not what was written"),
        (["UPDATE events SET hash = '00' WHERE id = 5"], "event 5 .* is not what was written"),
        (["DELETE FROM events WHERE id = 4"], "event 4 is missing: after it comes event 5"),
        (["DELETE FROM events WHERE id = 1"], "event 1 is missing"),
        (["DELETE FROM events"], "the chain is empty"),
        (["UPDATE secret SET key = zeroblob(32)"], "the key of the rows is not the one"),
        (["DELETE FROM secret"], "the key of the rows is not the one"),
    ],
)
def test_what_was_edited_or_taken_out_is_noticed(
    ledger: Ledger, statements: list[str], message: str
) -> None:
    change(ledger.path, *statements)

    refused(ledger, f"was changed: .*{message}.*restore the ledger from a backup")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE members SET digests = zeroblob(32)", "the rows of data set .* are not what"),
        ("DELETE FROM members", "the rows of a data set are missing"),
        ("INSERT INTO members VALUES ('x', zeroblob(16))", "or of one that is not known"),
    ],
)
def test_rows_that_were_exchanged_are_noticed(ledger: Ledger, statement: str, message: str) -> None:
    change(ledger.path, statement)

    with pytest.raises(PrivacyError, match=message):
        ledger.spent(ROWS, 1e-4)
    with pytest.raises(PrivacyError, match=message):
        ledger.members()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda events: [*events[:2], *events[3:]], "event 3 .settle. cannot follow"),
        (lambda events: [events[0], *events[2:]], "event 2 .reserve. cannot follow"),
        (lambda events: [*events, events[3]], "event 9 .settle. cannot follow"),
        (lambda events: [*events, events[1]], "event 9 .data. cannot follow"),
        (lambda events: [*events, events[0]], "event 9 .opened. cannot follow"),
        (
            lambda events: [*events, Event(9, "refund", "{}", "")],
            r"event 9 \(refund\) cannot be read",
        ),
        (
            lambda events: [*events, Event(9, "settle", '{"reserve":3}', "")],
            r"event 9 \(settle\) cannot be read.*time",
        ),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused(
    ledger: Ledger, edit: Callable[[list[Event]], list[Event]], message: str
) -> None:
    rewrite(ledger.path, edit)

    refused(ledger, message)


# The witnesses


@pytest.mark.parametrize("lost", ["beside", "state", "none"])
@pytest.mark.parametrize("cut", [1, 2, 6])
def test_a_tail_that_was_cut_is_noticed_by_any_one_witness(
    ledger: Ledger, cut: int, lost: str
) -> None:
    change(ledger.path, f"DELETE FROM events WHERE id > {8 - cut}")
    if lost != "none":
        (beside(ledger) if lost == "beside" else in_state(ledger)).unlink()

    refused(ledger, rf"rolled back or cut: it has {8 - cut} events, .* saw 8")


@pytest.mark.parametrize("lost", ["beside", "state", "none"])
def test_an_older_copy_is_noticed(ledger: Ledger, tmp_path: Path, lost: str) -> None:
    shutil.copy(ledger.path, tmp_path / "copy")
    train(ledger, 1)
    shutil.copy(tmp_path / "copy", ledger.path)
    if lost != "none":
        (beside(ledger) if lost == "beside" else in_state(ledger)).unlink()

    refused(ledger, "rolled back or cut: it has 8 events, .* saw 10")


def test_an_older_copy_of_ledger_and_witness_is_noticed_by_the_other_witness(
    ledger: Ledger, tmp_path: Path
) -> None:
    shutil.copytree(ledger.path.parent, tmp_path / "backup")
    train(ledger, 1)
    shutil.rmtree(ledger.path.parent)
    shutil.copytree(tmp_path / "backup", ledger.path.parent)

    refused(ledger, r"it has 8 events, .*state/[0-9a-f]{32}\.head saw 10")


def test_a_chain_that_was_made_anew_is_noticed(ledger: Ledger) -> None:
    cheaper = ('"steps":10', '"steps":1')
    rewrite(
        ledger.path,
        lambda events: [replace(event, text=event.text.replace(*cheaper)) for event in events],
    )

    refused(ledger, "was rewritten: its event 8 is not the one that .* saw")


def test_a_deleted_ledger_is_noticed(ledger: Ledger) -> None:
    ledger.path.unlink()

    refused(ledger, "ledger is missing, but .* says that it had 8 events.*--adopt")


def test_a_deleted_folder_is_noticed_by_the_witness_in_the_state_folder(ledger: Ledger) -> None:
    shutil.rmtree(ledger.path.parent)

    refused(ledger, r"ledger is missing, but .*state/.* says that it had 8 events")
    assert not ledger.path.exists()


@pytest.mark.parametrize("with_witness", [False, True])
def test_the_ledger_of_another_site_is_noticed(
    ledger: Ledger, tmp_path: Path, with_witness: bool
) -> None:
    other = Ledger(tmp_path / "other" / "ledger.sqlite")
    train(other, 1)
    shutil.copy(other.path, ledger.path)
    if with_witness:
        shutil.copy(beside(other), beside(ledger))

    refused(ledger, "another privacy ledger was here: .* speaks of ledger")


def test_a_ledger_without_any_witness_is_refused(ledger: Ledger) -> None:
    in_state(ledger).unlink()
    beside(ledger).unlink()

    refused(ledger, r"witnesses of this privacy ledger are gone.*Expected .*ledger\.head.*--adopt")


def test_one_lost_witness_is_written_again(ledger: Ledger) -> None:
    for lost in (beside(ledger), in_state(ledger)):
        before = lost.read_bytes()
        lost.unlink()
        ledger.history()
        assert lost.read_bytes() == before


def test_a_witness_that_is_none_is_refused(ledger: Ledger) -> None:
    beside(ledger).write_text("{}")

    refused(ledger, "this witness of a privacy ledger cannot be read .*missing required field")


def test_a_ledger_may_move_with_its_folder(ledger: Ledger, tmp_path: Path) -> None:
    ledger.path.parent.rename(tmp_path / "elsewhere")
    moved = Ledger(tmp_path / "elsewhere" / "ledger.sqlite", tmp_path / "state")

    train(moved, 1)

    found = msgspec.json.decode(in_state(moved).read_bytes(), type=Witness)
    assert found.path == str(moved.path)
    assert found.count == 10


def test_a_copy_of_a_site_cannot_spend_beside_the_site(ledger: Ledger, tmp_path: Path) -> None:
    shutil.copytree(ledger.path.parent, tmp_path / "copy")
    copy = Ledger(tmp_path / "copy" / "ledger.sqlite", tmp_path / "state")

    train(copy, 1)

    refused(ledger, "rolled back or cut: it has 8 events, .* saw 10")


def test_a_ledger_of_format_1_that_is_put_back_is_noticed(ledger: Ledger) -> None:
    ledger.path.unlink()
    old_ledger(ledger.path, [("ab" * 32, "r0", 1, SPEND, "settled")])

    with pytest.raises(PrivacyError, match="another privacy ledger was here"):
        ledger.history()


# Crashes and full disks


def test_a_crash_between_commit_and_witness_is_accepted_and_repaired(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [beside(ledger).read_bytes(), in_state(ledger).read_bytes()]
    train(ledger, 1)
    for file, content in zip((beside(ledger), in_state(ledger)), old, strict=True):
        file.write_bytes(content)

    assert len(ledger.history()) == ROUNDS + 1

    for file in (beside(ledger), in_state(ledger)):
        assert msgspec.json.decode(file.read_bytes(), type=Witness).count == 10


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
@pytest.mark.parametrize("step", range(9))
def test_a_crash_at_any_write_loses_no_spend_and_blocks_nothing(
    tmp_path: Path, step: int, after: bool
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", tmp_path / "state")
    did: list[str] = []

    def rounds() -> None:
        for number in range(1, 4):
            did.append("start")
            entry = ledger.reserve(ROWS, "run", number, SPEND)
            did.append("train")
            ledger.settle(entry, SPEND)
            did.append("release")

    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, step, after=after)
        with pytest.raises(Crash):
            rounds()

    state = ledger.state()

    assert did.count("release") <= (0 if state is None else len(state.settled))
    assert did.count("train") <= len(ledger.history()) <= did.count("start")
    train(ledger, 1)
    assert len(ledger.history()) > did.count("train")


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_witness_that_cannot_be_written_stops_the_round_and_what_was_reserved_counts(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(witness, "write_atomic", full)
        with pytest.raises(PrivacyError, match=r"witness .* cannot be written .*No space left"):
            ledger.reserve(ROWS, "run", 4, SPEND)
        with pytest.raises(PrivacyError, match=r"witness .* cannot be written"):
            ledger.history()

    assert len(ledger.history()) == ROUNDS + 1


def test_an_update_whose_settling_was_not_witnessed_does_not_leave(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ledger.reserve(ROWS, "run", 4, SPEND)
    with monkeypatch.context() as patch:
        patch.setattr(witness, "write_atomic", full)
        with pytest.raises(PrivacyError, match="nothing may leave"):
            ledger.settle(entry, SPEND)

    assert len(ledger.history()) == ROUNDS + 1


# Accepting a loss


def test_a_restored_ledger_is_accepted_and_the_chain_says_so(
    ledger: Ledger, tmp_path: Path
) -> None:
    shutil.copy(ledger.path, tmp_path / "copy")
    train(ledger, 1)
    lost = ledger.head
    shutil.copy(tmp_path / "copy", ledger.path)

    head = ledger.adopt()

    assert ledger.head == head
    event = ledger.events()[-1].body
    assert isinstance(event, Adopted)
    assert {(w.count, w.head) for w in event.witnesses} == {(10, lost)}
    train(ledger, 1)
    assert len(ledger.history()) == ROUNDS + 1


def test_a_lost_ledger_begins_anew_and_the_chain_says_so(ledger: Ledger) -> None:
    lost = ledger.head
    ledger.path.unlink()

    ledger.adopt()

    assert [event.kind for event in ledger.events()] == ["opened", "adopted"]
    event = ledger.events()[-1].body
    assert isinstance(event, Adopted)
    assert {w.head for w in event.witnesses} == {lost}
    assert not ledger.contains(str(lost))
    train(ledger, 1)
    assert in_state(ledger).exists()  # one, for the old one's is gone


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: None, "agrees with its witnesses: there is nothing to accept"),
        (
            lambda path: change(path, "DELETE FROM events WHERE id = 4"),
            "was changed: event 4 is missing",
        ),
        (lambda path: path.write_bytes(b""), "no privacy ledger"),
    ],
)
def test_what_cannot_be_accepted_is_refused(ledger: Ledger, damage: Damage, message: str) -> None:
    damage(ledger.path)

    with pytest.raises(PrivacyError, match=message):
        ledger.adopt()


def test_what_never_was_cannot_be_accepted(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="no ledger, and no witness of one"):
        Ledger(tmp_path / "ledger.sqlite", tmp_path / "state").adopt()


# The state folder


def test_a_state_folder_that_cannot_be_made_stops_private_training(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    ledger = Ledger(tmp_path / "site" / "ledger.sqlite", tmp_path / "state")

    with pytest.raises(PrivacyError, match="witness of the privacy ledger cannot be written"):
        ledger.reserve(ROWS, "run", 1, SPEND)
