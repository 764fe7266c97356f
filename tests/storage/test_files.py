"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.storage.files import digest_of, open_to_others, staged, sweep, write_atomic, writing


@given(data=st.binary(max_size=300))
def test_what_was_written_is_read_and_digested(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("files") / "deep" / "file"
    write_atomic(path, b"before")
    write_atomic(path, data)
    assert path.read_bytes() == data
    assert digest_of(path) == hashlib.sha256(data).hexdigest()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_file_has_the_mode_that_was_asked_for(tmp_path: Path, mode: int) -> None:
    write_atomic(tmp_path / "file", b"x", mode=mode)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@given(mode=st.integers(0, 0o777))
def test_a_file_is_open_to_others_unless_they_have_no_rights_at_all(
    tmp_path_factory: pytest.TempPathFactory, mode: int
) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    path.touch()
    path.chmod(mode)
    others = any(mode & bit for bit in (0o4, 0o2, 0o1, 0o40, 0o20, 0o10))
    assert open_to_others(path) == (f"{mode:04o}" if others else "")


def test_until_it_is_whole_only_its_owner_reads_a_file(tmp_path: Path) -> None:
    with writing(tmp_path / "file") as file:
        hidden = Path(file.name)
        assert hidden.name.startswith(".")
        assert stat.S_IMODE(hidden.stat().st_mode) == 0o600
        assert not (tmp_path / "file").exists()


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail() -> None:
        with writing(path) as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_cannot_be_made_durable_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"two")

    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged(target) as folder:
        (folder / "a").write_bytes(b"1")
        assert not target.exists()
    assert (target / "a").read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for name in ("first", "second"):
        with staged(target) as folder:
            (folder / name).write_bytes(b"")
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged(target) as folder:
        (folder / "old").write_bytes(b"")

    def fail() -> None:
        with staged(target) as folder:
            (folder / "half").write_bytes(b"")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_process_leaves_the_old_file_and_sweep_removes_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    code = (
        "import os, sys; from pathlib import Path\n"
        "from anabranch.storage.files import staged, writing\n"
        "with staged(Path(sys.argv[1]) / 'folder') as folder:\n"
        "    (folder / 'a').write_bytes(b'x')\n"
        "    with writing(Path(sys.argv[1]) / 'file') as file:\n"
        "        file.write(b'half'); file.flush(); os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 9
    assert path.read_bytes() == b"old"
    assert len(sweep(tmp_path)) == 2
    assert list(tmp_path.iterdir()) == [path]
    assert sweep(tmp_path / "absent") == []
