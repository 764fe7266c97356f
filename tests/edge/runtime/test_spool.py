from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.edge.runtime.spool import Entry, Spool
from anabranch.protocols.errors import DeviceError

FRAME = bytes(range(256)) * 20


def put(spool: Spool, task: str = "t-1", frame: bytes = FRAME, deadline: int = 1000) -> Entry:
    return spool.put(task, frame, examples=7, steps=3, deadline_unix=deadline)


def read(spool: Spool, entry: Entry, offset: int = 0, size: int = 1000) -> bytes:
    return b"".join(data for _, data in spool.chunks(entry, offset, size))


@settings(max_examples=50, deadline=None)
@given(frame=st.binary(max_size=5000), offset=st.integers(0, 5000), size=st.integers(1, 999))
def test_chunks_are_the_frame_from_any_offset(
    frame: bytes, offset: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    entry = put(spool, frame=frame)
    chunks = list(spool.chunks(entry, offset, size))
    assert b"".join(data for _, data in chunks) == frame[offset:]
    assert all(len(data) <= size for _, data in chunks)
    assert [at for at, _ in chunks] == list(range(offset, len(frame), size))
    assert spool.is_whole(entry)


def test_an_entry_is_there_after_a_restart(tmp_path: Path) -> None:
    entry = put(Spool(tmp_path))
    again = Spool(tmp_path)
    assert again.entries() == [entry]
    assert again.get("t-1") == entry
    assert again.get("t-2") is None
    assert (entry.size, entry.examples, entry.steps) == (len(FRAME), 7, 3)
    assert next(tmp_path.glob("*.delta")).stat().st_mode & 0o777 == 0o600


def test_a_task_has_at_most_one_delta(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = put(spool)
    assert put(spool, frame=b"another training, other noise") == first
    assert read(spool, first) == FRAME
    assert len(spool.entries()) == 1


def test_the_earliest_deadline_comes_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for task, deadline in (("a", 30), ("b", 10), ("c", 20)):
        put(spool, task, deadline=deadline)
    assert [entry.task for entry in spool.entries()] == ["b", "c", "a"]
    assert spool.entries()[0].expired(10.5)
    assert not spool.entries()[0].expired(10)


def test_removed_entries_are_gone(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put(spool)
    spool.remove("t-1")
    spool.remove("t-1")
    assert spool.entries() == []
    assert spool.used() == 0


def test_a_full_spool_refuses_and_stores_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit=len(FRAME) + 1000)
    put(spool)
    with pytest.raises(DeviceError, match="above the limit of 6120"):
        put(spool, "t-2")
    assert [entry.task for entry in spool.entries()] == ["t-1"]
    assert list(tmp_path.glob(".*.partial")) == []


@pytest.mark.parametrize("cut", [0, 3, 8, 60, 300, -1])
def test_a_cut_file_is_no_entry_and_is_swept(cut: int, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put(spool)
    path = next(tmp_path.glob("*.delta"))
    path.write_bytes(path.read_bytes()[:cut])
    assert spool.entries() == []
    assert spool.recover() == [path.name]
    assert not path.exists()


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    entry = put(spool)
    path = next(tmp_path.glob("*.delta"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert not spool.is_whole(entry)


KILLED = """
import os, sys
from pathlib import Path
from anabranch.edge.runtime.spool import Spool
left = int(sys.argv[2])
def dying(real):
    def call(*arguments, **named):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return real(*arguments, **named)
    return call
os.fsync, Path.replace, os.fdopen = map(dying, (os.fsync, Path.replace, os.fdopen))
Spool(Path(sys.argv[1])).put("t-1", b"x" * 5000, examples=1, steps=1, deadline_unix=9)
print("put")
"""


def test_a_kill_at_any_step_leaves_a_whole_entry_or_none(tmp_path: Path) -> None:
    codes = []
    for steps in range(6):
        folder = tmp_path / str(steps)
        command = [sys.executable, "-c", KILLED, str(folder), str(steps)]
        codes.append(subprocess.run(command, check=False, capture_output=True).returncode)
        spool = Spool(folder)
        spool.recover()
        entries = spool.entries()
        assert all(spool.is_whole(entry) for entry in entries)
        assert len(list(folder.glob("*"))) == len(entries) <= 1
        assert put(spool) == spool.entries()[0]  # and goes on
    assert codes[0] == 9
    assert codes[-1] == 0
