"""The files that a run's progress is kept in: which are there, taken, and refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import RunError
from anabranch.server.coordinator import progress_file
from anabranch.server.coordinator.progress_file import ProgressFolder, read
from tests.server.coordinator.progress_cases import SAMPLE, data_of, private_run, progresses, run_of
from tests.simulations.rig import Events, adapter

# Examples


def test_the_newest_two_are_kept_and_the_newest_is_taken(tmp_path: Path) -> None:
    folder = ProgressFolder(tmp_path / "progress")
    assert folder.load() is None
    for progress in progresses(run_of(rounds=3)):
        folder.save(progress)

    assert sorted(file.name for file in folder.path.iterdir()) == [
        "000003-1-merged.progress",
        "000003-2-evaluated.progress",
    ]
    last = folder.load()
    assert last is not None
    assert (last.round, last.evaluated) == (3, True)


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = ProgressFolder(tmp_path)
    folder.save(SAMPLE)
    (tmp_path / ".000001-1-merged.progress.x.partial").write_bytes(b"half")

    assert folder.load() is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_an_adapter_that_is_the_best_and_the_last_is_written_once() -> None:
    one, other = adapter(), adapter()
    same = dataclasses.replace(SAMPLE, adapter=one, best=one)
    two = dataclasses.replace(SAMPLE, adapter=one, best=other)

    assert len(data_of(same)) < len(data_of(two))
    back = read(data_of(same), "a file")
    assert back.best is back.adapter


def kept(folder: Path, run: RunConfig, number: int, **fields: Any) -> ProgressFolder:
    """Return a folder that holds the first `number` progresses of a run."""
    made = ProgressFolder(folder, **fields)
    for progress in progresses(run)[:number]:
        made.save(progress)
    return made


@pytest.mark.parametrize(("number", "before"), [(2, (1, False)), (3, (1, True))])
def test_a_damaged_newest_gives_way_to_the_one_before_and_says_so(
    number: int, before: tuple[int, bool], tmp_path: Path
) -> None:
    events = Events()
    folder = kept(tmp_path, run_of(), number, event=events)
    newest = max(tmp_path.glob("*.progress"))
    newest.write_bytes(newest.read_bytes()[:-1])

    progress = folder.load()

    assert progress is not None
    assert (progress.round, progress.evaluated) == before
    (told,) = events.of("progress_damaged")
    assert told["file"] == f"{newest.name}.damaged"
    assert "its checksum does not match" in told["message"]
    assert (tmp_path / told["file"]).exists()
    assert folder.load() is not None  # and again


def test_a_private_round_that_may_have_left_is_never_made_again(tmp_path: Path) -> None:
    folder = kept(tmp_path, private_run(), 3, private=True)
    newest = max(tmp_path.glob("*.progress"))
    newest.write_bytes(newest.read_bytes()[:-1])

    with pytest.raises(RunError, match=r"2-1|000002-1-merged.*noisy mean.*is made once"):
        folder.load()


def test_a_private_round_is_evaluated_again_from_its_merge(tmp_path: Path) -> None:
    folder = kept(tmp_path, private_run(), 4, private=True)
    newest = max(tmp_path.glob("*.progress"))
    newest.write_bytes(b"")

    progress = folder.load()

    assert progress is not None
    assert (progress.round, progress.evaluated) == (2, False)
    assert len(progress.state.made) == 2


@pytest.mark.parametrize("damage", [False, True])
def test_a_sum_that_was_being_opened_is_remembered_whatever_happens_to_the_file(
    damage: bool, tmp_path: Path
) -> None:
    folder = kept(tmp_path, run_of(), 2)
    evaluated = folder.load()
    assert evaluated is not None
    folder.save(dataclasses.replace(evaluated, masked=2))
    newest = tmp_path / "000001-3-masked.progress"
    if damage:
        newest.write_bytes(newest.read_bytes()[:-1])

    for _ in range(2):
        progress = folder.load()
        assert progress is not None
        assert (progress.round, progress.evaluated, progress.masked) == (1, True, 2)
        assert len(list(tmp_path.glob("*.progress"))) <= progress_file.KEPT
    after = dataclasses.replace(evaluated, round=2, masked=2, evaluated=False)
    folder.save(after)
    again = folder.load()
    assert again is not None
    assert again.round == 2


def test_a_progress_from_before_there_were_secure_sums_is_read(tmp_path: Path) -> None:
    folder = kept(tmp_path, run_of(), 1)
    pieces: list[bytes] = []
    progress = folder.load()
    assert progress is not None
    progress_file.write(pieces.append, progress)
    text = pieces[2].replace(b',"masked":0', b"")
    assert text != pieces[2]
    body = b"".join([pieces[0], len(text).to_bytes(8, "little"), text, *pieces[3:-1]])

    found = progress_file.read(body + hashlib.sha256(body).digest(), "old")

    assert (found.round, found.masked) == (progress.round, 0)


# Refusals


def test_two_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = kept(tmp_path, run_of(), 4)
    for file in tmp_path.glob("*.progress"):
        file.write_bytes(b"no")

    with pytest.raises(RunError, match=r"000002-2.*checksum.*000002-1.*Restore one of them"):
        folder.load()


def test_a_single_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = kept(tmp_path, run_of(), 1)
    (file,) = tmp_path.glob("*.progress")
    file.write_bytes(b"no")

    with pytest.raises(RunError, match="there is none before it: restore it from a backup"):
        folder.load()


def test_a_newer_version_is_refused_and_nothing_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kept(tmp_path, run_of(), 1)
    monkeypatch.setattr(progress_file, "FORMAT", 2)
    folder.save(progresses(run_of())[1])
    monkeypatch.undo()

    with pytest.raises(RunError, match=r"newer version of anabranch \(format 2, this one reads 1"):
        folder.load()


@pytest.mark.parametrize("state", [{1: 2.0}, object(), np.array(["x"]), {"$": 1}])
def test_what_no_progress_is_made_of_is_not_written(state: Any) -> None:
    with pytest.raises(TypeError, match="a progress"):
        data_of(dataclasses.replace(SAMPLE, state=state))


def test_a_kind_that_is_not_on_the_list_is_not_made() -> None:
    class OptimizerState:
        """Another one of that name."""

    with pytest.raises(TypeError, match="a progress is not made of"):
        data_of(dataclasses.replace(SAMPLE, state=OptimizerState()))


def test_the_disk_holds_it_when_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)

    ProgressFolder(tmp_path).save(SAMPLE)

    assert len(synced) == 2  # the file, and the folder that names it


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kept(tmp_path, run_of(), 2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(progresses(run_of())[2])
    monkeypatch.undo()

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
