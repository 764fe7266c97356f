"""Whatever is done to an audit log is found out, and the report says what was proved."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.identity import audit
from anabranch.storage.audit_check import read_log_key
from anabranch.storage.audit_log import log_report, verify
from tests.storage.audit_rig import second_witness, without_witnesses, written


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    """Give a log of seven lines, to be written over, and its bytes."""
    log = written(tmp_path_factory.mktemp("kept"), 6)
    data = log.path.read_bytes()
    yield log.path, data
    log.path.write_bytes(data)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_found(kept: tuple[Path, bytes], data: st.DataObject) -> None:
    path, original = kept
    changed = bytearray(original)
    changed[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)

    with pytest.raises(ProtocolError):
        verify(path)


@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from(["remove", "swap", "double", "blank"]))
def test_lines_removed_moved_or_added_are_found(
    kept: tuple[Path, bytes], one: int, other: int, how: str
) -> None:
    path, original = kept
    lines = original.splitlines(keepends=True)
    if how == "remove":
        del lines[one]
    elif how == "double":
        lines.insert(other, lines[one])
    elif how == "blank":
        lines.insert(one, b"\n")
    elif one != other:
        lines[one], lines[other] = lines[other], lines[one]
    path.write_bytes(b"".join(lines))

    if how == "swap" and one == other:
        assert verify(path).entries == 7
    else:
        with pytest.raises(ProtocolError):
            verify(path)


@given(st.data())
def test_any_cut_end_is_found_by_a_witness(kept: tuple[Path, bytes], data: st.DataObject) -> None:
    path, original = kept
    path.write_bytes(original[: data.draw(st.integers(0, len(original) - 1))])

    with pytest.raises(ProtocolError):
        verify(path)


def test_the_first_bad_line_is_named(tmp_path: Path) -> None:
    log = written(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*lines[:3], lines[3].replace(b"r2", b"r9"), *lines[4:]]))

    with pytest.raises(ProtocolError, match=r"line 4: not what was written: its hash is another"):
        verify(log.path)
    with pytest.raises(ProtocolError, match="there is no audit log"):
        verify(tmp_path / "none.jsonl")


def test_a_line_of_another_key_is_found(tmp_path: Path) -> None:
    """Its hash and its place are right: only the signature is another's."""
    mine, theirs = written(tmp_path / "a", 1), written(tmp_path / "b", 1)
    last = audit.read_line(mine.path.read_bytes().splitlines()[-1])
    key = read_log_key(theirs.key_path)
    line = audit.write_line(last, "approved", last.time, {}, key)
    with mine.path.open("ab") as file:
        file.write(line + b"\n")

    with pytest.raises(ProtocolError, match="line 3: it is not signed with this log's key"):
        verify(mine.path)
    with pytest.raises(ProtocolError, match="the last line: it is not signed"):
        mine.append("x")


def test_a_log_of_another_key_is_not_the_one_expected(tmp_path: Path) -> None:
    log = written(tmp_path, 1)
    assert verify(log.path, log.public_key).key == log.public_key

    with pytest.raises(ProtocolError, match="line 1 names the public key"):
        verify(log.path, "00" * 32)


def test_a_head_that_another_keeps_shows_a_cut_end(tmp_path: Path) -> None:
    log = written(tmp_path, 3)
    heads = {log.head, log.append("left")}
    assert verify(log.path, contains=heads).entries == 5

    without_witnesses(log)
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[:-1]))
    found = verify(log.path)
    assert (found.entries, found.witnesses) == (4, 0)  # nothing here shows it
    with pytest.raises(ProtocolError, match="no line has the hash"):
        verify(log.path, contains=heads)


@pytest.mark.parametrize("which", ["beside", "state"])
def test_one_witness_is_enough(tmp_path: Path, which: str) -> None:
    log = written(tmp_path)
    (log.path.with_suffix(".head") if which == "state" else second_witness(log)).unlink()
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[:-2]))

    with pytest.raises(ProtocolError, match=r"the end was cut after line 4: .* saw 6 lines"):
        verify(log.path)


def test_verifying_holds_a_line_at_a_time(tmp_path: Path) -> None:
    log = written(tmp_path, 1)
    key = read_log_key(log.key_path)
    last = audit.read_line(log.path.read_bytes().splitlines()[-1])
    with log.path.open("ab") as file:
        for _ in range(400):
            line = audit.write_line(last, "big", last.time, {"text": "x" * 20_000}, key)
            last = audit.read_line(line)
            file.write(line + b"\n")

    tracemalloc.start()
    try:
        assert verify(log.path).entries == 402
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 < log.path.stat().st_size // 8
    finally:
        tracemalloc.stop()


def test_a_report_says_what_was_and_what_was_not_proved(tmp_path: Path) -> None:
    log = written(tmp_path, 2)
    values, text, ok = log_report(log.path)
    assert ok
    assert (values["entries"], values["head"], values["key_given"]) == (3, log.head, True)
    assert text.startswith("whole: ")
    assert "note" not in text

    without_witnesses(log)
    log.key_path.unlink()
    _, text, ok = log_report(log.path)
    assert ok
    assert "no key was given" in text
    assert "no witness here" in text

    _, text, ok = log_report(log.path, contains=["00" * 32])
    assert not ok
    assert text.startswith("not whole: ")
