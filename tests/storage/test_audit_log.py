"""An audit log as it is written: by many, through crashes, and after somebody cut it."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.chain import GENESIS
from anabranch.protocols.errors import ConfigError, PrivacyError, ProtocolError, RunError
from anabranch.protocols.identity import audit
from anabranch.storage import audit_log
from anabranch.storage.audit_check import opening_at, read_log_key
from anabranch.storage.audit_log import AuditLog, log_report, verify
from tests.storage.audit_rig import log_in, second_witness, without_witnesses, written

FORKED = "import sys; from pathlib import Path; from anabranch.storage.audit_log import AuditLog\n"


# What the log does about it ------------------------------------------------------------------


def test_a_cut_end_stays_in_the_log(tmp_path: Path) -> None:
    log = written(tmp_path)
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[:-2]))
    log.append("resumed")
    log.append("again")

    found = verify(log.path)
    assert found.entries == 7  # four, the gap, and two
    assert found.gaps == ("line 5: a witness saw 6 lines, and 4 were left",)
    values, text, ok = log_report(log.path)
    assert not ok
    assert values["ok"] is False
    assert "missing   line 5" in text


def test_a_log_that_was_taken_away_stays_in_the_next(tmp_path: Path) -> None:
    log = written(tmp_path)
    head = log.head
    log.path.unlink()
    assert log.head == GENESIS
    log.append("begun")

    assert opening_at(log.path).lost[0].head == head
    assert verify(log.path).gaps == ("line 1: a log of 6 lines was here before this one",)
    log.path.unlink()
    log.append("begun")
    assert {lost.lines for lost in opening_at(log.path).lost} == {6, 2}


def test_a_log_that_was_exchanged_takes_no_line(tmp_path: Path) -> None:
    log, other = written(tmp_path / "a"), written(tmp_path / "b")
    shutil.copy(other.path, log.path)
    shutil.copy(other.key_path, log.key_path)

    for attempt in (lambda: log.append("x"), lambda: verify(log.path)):
        with pytest.raises(ProtocolError, match="another log was here"):
            attempt()


@pytest.mark.parametrize("since", [1, 2, 4])
def test_a_log_that_was_rewritten_takes_no_line(tmp_path: Path, since: int) -> None:
    """An old copy goes on by itself, with its key, and its witness is hidden from it."""
    log = written(tmp_path / "a", 3)
    old = log.path.read_bytes()
    log.append("real")
    witness = second_witness(log).read_bytes()
    without_witnesses(log)
    log.path.write_bytes(old)
    for number in range(since):
        log.append("forged", number=number)
    second_witness(log).write_bytes(witness)

    with pytest.raises(ProtocolError, match=r"line 5 is not the one that .* saw"):
        log.append("x")
    with pytest.raises(ProtocolError, match=r"line 5 is not the one that .* saw"):
        verify(log.path)


def test_a_witness_that_lags_is_brought_up(tmp_path: Path) -> None:
    log = written(tmp_path)
    early = second_witness(log).read_bytes()
    log.append("a")
    log.append("b")
    log.append("c")
    second_witness(log).write_bytes(early)
    log.append("d")

    assert second_witness(log).read_bytes() == log.path.with_suffix(".head").read_bytes()
    assert verify(log.path).gaps == ()


def test_a_witness_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    log = written(tmp_path)
    log.path.with_suffix(".head").write_bytes(b"{")

    for attempt in (lambda: log.append("x"), lambda: verify(log.path)):
        with pytest.raises(ProtocolError, match=r"audit\.head: this witness .* cannot be read"):
            attempt()


@given(st.integers(1, 400), st.booleans())
@settings(max_examples=30)
def test_a_line_that_a_crash_tore_is_set_aside(
    tmp_path_factory: pytest.TempPathFactory, cut: int, both: bool
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    log = written(folder, 2)
    key, last = read_log_key(log.key_path), log.path.read_bytes().splitlines()[-1]
    whole = audit.write_line(audit.read_line(last), "approved", "now", {"run": "x" * 300}, key)
    torn = whole[:cut]
    with log.path.open("ab") as file:
        file.write(torn)
    if not both:
        second_witness(log).unlink()

    assert verify(log.path).torn == len(torn)
    assert log.head == audit.read_line(last).hash
    log.append("resumed")
    found = verify(log.path)
    assert (found.entries, found.torn, found.repaired, found.gaps) == (5, 0, 1, ())
    entry = audit.read_line(log.path.read_bytes().splitlines()[3])
    assert entry.fields["sha256"] == hashlib.sha256(torn).hexdigest()
    assert (folder / str(entry.fields["file"])).read_bytes() == torn


def test_an_acknowledged_line_that_lost_its_end_is_a_gap_too(tmp_path: Path) -> None:
    log = written(tmp_path, 3)
    log.path.write_bytes(log.path.read_bytes()[:-1])

    with pytest.raises(ProtocolError, match="the end was cut after line 3"):
        verify(log.path)
    log.append("resumed")
    found = verify(log.path)
    assert found.repaired == 1
    assert found.gaps == ("line 4: a witness saw 4 lines, and 3 were left",)


@pytest.mark.parametrize("content", [b"", b"\n", b"no log\n", b"x" * 200_000, b"{}\n" * 70_000])
def test_a_file_that_is_no_log_takes_no_line(tmp_path: Path, content: bytes) -> None:
    log = written(tmp_path, 1)
    log.path.write_bytes(content)

    for attempt in (lambda: log.append("x"), lambda: log.head, lambda: verify(log.path)):
        with pytest.raises(ProtocolError, match=r"audit\.jsonl: "):
            attempt()
    assert log.path.read_bytes() == content


# Many writers, and no room -------------------------------------------------------------------


def test_two_processes_and_two_threads_keep_one_chain(tmp_path: Path) -> None:
    code = FORKED + (
        "folder, who = Path(sys.argv[1]), sys.argv[2]\n"
        "log = AuditLog(folder / 'audit.jsonl', folder / 'audit.key', 'site a of b')\n"
        "for number in range(20): log.append('from', who=who, number=number)"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), who]) for who in ("p", "q")
    ]

    def work(who: str) -> None:
        log = log_in(tmp_path)
        for number in range(20):
            log.append("from", who=who, number=number)

    threads = [threading.Thread(target=work, args=(who,)) for who in ("s", "t")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait(60) for other in others] == [0, 0]

    assert verify(tmp_path / "audit.jsonl").entries == 81
    entries = map(audit.read_line, (tmp_path / "audit.jsonl").read_bytes().splitlines()[1:])
    seen: dict[object, list[object]] = {}
    for entry in entries:
        seen.setdefault(entry.fields["who"], []).append(entry.fields["number"])
    assert seen == {who: list(range(20)) for who in "pqst"}


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    code = FORKED + (
        "folder = Path(sys.argv[1])\n"
        "log = AuditLog(folder / 'audit.jsonl', folder / 'audit.key', 'site a of b')\n"
        "while True: print(log.append('step', text='x' * 5000), flush=True)"
    )
    heads: set[str] = set()
    for lines in (1, 7, 20):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(lines):
                heads.add(process.stdout.readline().strip())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().splitlines(keepends=True)
            heads |= {line.strip() for line in rest if line.endswith("\n")}

    assert len(heads) >= 28
    found = verify(tmp_path / "audit.jsonl", contains=heads)
    assert (found.gaps, found.witnesses) == ((), 2)


def test_a_line_is_on_the_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = written(tmp_path, 1)
    synced: dict[int, int] = {}
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        found = os.fstat(handle)
        synced[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", fsync)
    log.append("a")
    for file in (log.path, log.path.with_suffix(".head"), second_witness(log)):
        assert synced[file.stat().st_ino] == file.stat().st_size


def test_a_full_disk_leaves_the_log_whole(tmp_path: Path) -> None:
    log = written(tmp_path)
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))  # room for a part of a line
    try:
        with pytest.raises(RunError, match=r"audit log cannot be read or written \(File too large"):
            log.append("x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert log.path.read_bytes() == before
    log.append("room-again")
    assert verify(log.path).entries == 7


def test_the_cost_of_an_append_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the first and the last line is read, however long the log is."""
    read: list[bytes] = []

    def counted(line: bytes) -> audit.Entry:
        read.append(line)
        return audit.read_line(line)

    monkeypatch.setattr(audit_log, "read_line", counted)
    log = written(tmp_path, 3)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([lines[0], b"\n" * 1000, *lines[1:]]))  # seen by verify alone
    read.clear()
    log.append("a")

    assert len(read) == 2  # the last line, and the new one
    with pytest.raises(ProtocolError, match="line 2: no line of an audit log"):
        verify(log.path)


# Keys, times and reports ---------------------------------------------------------------------


def test_key_log_and_witnesses_are_the_owners_alone(tmp_path: Path) -> None:
    log = written(tmp_path, 1)
    for file in (log.path, log.key_path, log.path.with_suffix(".head"), second_witness(log)):
        assert file.stat().st_mode & 0o777 == 0o600
    assert log.public_key == verify(log.path).key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    log = written(tmp_path, 1)
    log.key_path.chmod(mode)

    with pytest.raises(ConfigError, match=rf"mode {mode:04o}, .* chmod 600"):
        log.append("x")
    assert verify(log.path).entries == 2


def test_a_key_that_is_gone_or_another_is_refused(tmp_path: Path) -> None:
    log, other = written(tmp_path / "a", 1), written(tmp_path / "b", 1)
    seed = log.key_path.read_text()

    log.key_path.write_bytes(other.key_path.read_bytes())
    with pytest.raises(ProtocolError, match="this is not the key of"):
        log.append("x")
    log.key_path.write_text(seed[:-5])
    with pytest.raises(ConfigError, match="expected an Ed25519 key") as caught:
        log.append("x")
    assert seed[:20] not in str(caught.value)
    log.key_path.unlink()
    with pytest.raises(ProtocolError, match=r"the key of .* is gone"):
        log.append("x")


@pytest.mark.parametrize("kind", ["opened", "gap", "torn"])
def test_the_logs_own_kinds_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match="written by the log itself"):
        log_in(tmp_path).append(kind)
    assert not list(tmp_path.iterdir())


def test_a_line_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    log = written(tmp_path, 1)
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match="cannot have a field"):
        log.append("x", hash="y")
    assert log.path.read_bytes() == before


def test_a_user_without_a_home_has_no_log_but_can_verify_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = written(tmp_path, 1)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(PrivacyError, match="set XDG_STATE_HOME"):
        log.append("x")
    assert (verify(log.path).entries, verify(log.path).witnesses) == (2, 1)


def test_times_are_the_writers_in_utc(tmp_path: Path) -> None:
    then = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    log = AuditLog(tmp_path / "audit.jsonl", tmp_path / "audit.key", "coordinator b", lambda: then)
    log.append("x")

    found = verify(log.path)
    assert found.first == found.last == "2026-03-01T12:30:00.000+00:00"
    assert found.who == "coordinator b"
