"""A secure sum in which every message is answered by another process, as under Flower's nodes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.sums import between
from anabranch.client.sums.between import InMemoryFile, Left
from anabranch.protocols.errors import ConfigError, ProtocolError, RunError
from anabranch.protocols.part import Part
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import Request
from tests.client.sums.summing_sites import (
    ASSIGNMENT,
    MODEL,
    NAMES,
    RUN,
    VALUES,
    Sites,
    a_delta,
)
from tests.secure_cases import carried
from tests.simulations.rig import SPEC, adapter


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    return Sites(tmp_path)


def mean_of(aggregation: Aggregation) -> Any:
    assert aggregation.stage == "done", aggregation.reason
    (opened,) = aggregation.sums
    return contribution.mean_of(
        opened.total, aggregation.terms, SPEC, Part(), normalize_steps=False, by_rank=False
    )


def require_mean(aggregation: Aggregation, names: tuple[str, ...]) -> None:
    expected = np.mean([VALUES[name] for name in names])
    got = mean_of(aggregation)
    for name, array in MODEL.arrays.items():
        at_one = a_delta(1.0).arrays[name] - a_delta(0.0).arrays[name]
        wanted = a_delta(0.0).arrays[name] + expected * at_one
        np.testing.assert_allclose(got.arrays[name], wanted, atol=1e-4)
        assert array.shape == got.arrays[name].shape


def test_the_sum_is_that_of_long_lived_processes(sites: Sites) -> None:
    require_mean(carried(sites.invite(), sites.answer), NAMES)

    assert not any(sites.file(name).exists() for name in NAMES)  # secrets went with the last answer


def test_who_is_lost_is_recovered_from(sites: Sites) -> None:
    def answer(name: str, request: Request) -> Answer | None:
        lost = name == NAMES[0] and type(request).__name__ == "Delivery"
        return None if lost else sites.answer(name, request)

    require_mean(carried(sites.invite(), answer), NAMES[1:])


def test_what_lies_between_is_for_its_owner_alone_and_is_never_shown(sites: Sites) -> None:
    carried(sites.invite(), sites.answer, "mask")

    for name in NAMES:
        assert sites.file(name).stat().st_mode & 0o777 == 0o600
        left = InMemoryFile(sites.file(name)).read()
        assert left is not None
        assert repr(left) == f"Left(Paused({name!r}, next='mask'))"


@pytest.mark.parametrize("stage", ["mask", "agree", "reveal"])
def test_a_stage_that_was_answered_is_answered_no_second_time(sites: Sites, stage: str) -> None:
    """Nor with the same words: what was said is not kept, and nothing else may be said."""
    asked: dict[str, list[Request]] = {name: [] for name in NAMES}

    def answer(name: str, request: Request) -> Answer:
        asked[name].append(request)
        return sites.answer(name, request)

    carried(sites.invite(), answer, stage)
    for name in NAMES:
        before = sites.file(name).read_bytes()
        with pytest.raises(ProtocolError, match="out of turn"):
            sites.answer(name, asked[name][-1])
        assert sites.file(name).read_bytes() == before


def test_a_process_that_ends_after_masking_masks_no_second_time(sites: Sites) -> None:
    aggregation = carried(sites.invite(), sites.answer, "mask")
    name, request = next(iter(aggregation.requests().items()))
    before = sites.file(name).read_bytes()
    sites.answer(name, request)
    sites.file(name).write_bytes(before)  # the round was written down as given, this was not

    with pytest.raises(ProtocolError, match="in another process, which ended before"):
        sites.answer(name, request)


def test_a_newer_attempt_replaces_the_older_in_all_processes(sites: Sites) -> None:
    carried(sites.invite("ab" * 32), sites.answer, "mask")

    require_mean(carried(sites.invite("cd" * 32), sites.answer), NAMES)

    with pytest.raises(ProtocolError, match="has given its update to a sum already"):
        sites.answer(NAMES[0], sites.invite("ab" * 32))


def test_an_attempt_that_was_given_up_stays_so(sites: Sites) -> None:
    carried(sites.invite("ab" * 32), sites.answer, "share")
    carried(sites.invite("cd" * 32), sites.answer, "share")

    with pytest.raises(ProtocolError, match="given up for a newer one"):
        sites.answer(NAMES[0], sites.invite("ab" * 32))


@pytest.mark.parametrize("stage", ["share", "mask"])
def test_the_same_delta_kept_again_changes_nothing(sites: Sites, stage: str) -> None:
    """As when a `train` is asked again that was answered before: the answer comes from its file."""
    aggregation = carried(sites.invite(), sites.answer, stage)
    name = NAMES[1]
    before = sites.file(name).read_bytes()

    sites.process(name).keep(ASSIGNMENT, MODEL, a_delta(VALUES[name]))

    assert sites.file(name).read_bytes() == before
    while aggregation.stage not in ("done", "aborted"):
        for one, request in aggregation.requests().items():
            answer = sites.answer(one, request)
            aggregation.take(one, answer.reply, answer.data)
        aggregation.close()
    require_mean(aggregation, NAMES)


def test_a_delta_of_another_model_ends_the_sum(sites: Sites) -> None:
    aggregation = carried(sites.invite(), sites.answer, "mask")
    name, request = next(iter(aggregation.requests().items()))

    sites.process(name).keep(ASSIGNMENT, adapter(0.75), a_delta(7.0))

    assert not sites.file(name).exists()
    with pytest.raises(ProtocolError, match="is in no secure sum of it"):
        sites.answer(name, request)


def test_what_is_damaged_keeps_no_delta_from_being_kept(sites: Sites) -> None:
    carried(sites.invite(), sites.answer, "mask")
    sites.file(NAMES[0]).write_bytes(b"{")

    sites.process(NAMES[0]).keep(ASSIGNMENT, MODEL, a_delta(0.0))

    assert not sites.file(NAMES[0]).exists()
    require_mean(carried(sites.invite("cd" * 32), sites.answer), NAMES)


def test_a_round_that_is_trained_meanwhile_ends_the_sum(sites: Sites) -> None:
    aggregation = carried(sites.invite(), sites.answer, "mask")
    name, request = next(iter(aggregation.requests().items()))
    following = msgspec.structs.replace(ASSIGNMENT, round=2)
    sites.process(name).keep(following, MODEL, a_delta(7.0))

    assert not sites.file(name).exists()
    with pytest.raises(ProtocolError, match="is in no secure sum of it"):
        sites.answer(name, request)


def test_a_delta_of_another_round_is_never_masked_in_a_sum(sites: Sites) -> None:
    """Even if a process trained it while another one was in the sum."""
    aggregation = carried(sites.invite(), sites.answer, "mask")
    name, request = next(iter(aggregation.requests().items()))
    there = sites.file(name).read_bytes()
    following = msgspec.structs.replace(ASSIGNMENT, round=2)
    sites.process(name).keep(following, MODEL, a_delta(7.0))
    sites.file(name).write_bytes(there)

    with pytest.raises(ProtocolError, match="keeps no delta of this round"):
        sites.answer(name, request)


def test_a_machine_that_was_started_anew_is_a_dropout(sites: Sites) -> None:
    aggregation = carried(sites.invite(), sites.answer, "mask")
    shutil.rmtree(sites.folder / "memory")

    for name, request in aggregation.requests().items():
        with pytest.raises(ProtocolError, match="is in no secure sum of it"):
            sites.answer(name, request)


def test_what_is_damaged_is_refused(sites: Sites) -> None:
    aggregation = carried(sites.invite(), sites.answer, "mask")
    name, request = next(iter(aggregation.requests().items()))
    whole = sites.file(name).read_bytes()
    sites.file(name).write_bytes(whole[: len(whole) // 2])

    with pytest.raises(RunError, match="is damaged: it is lost to this sum"):
        sites.answer(name, request)


def test_a_key_of_another_site_resumes_nothing(sites: Sites) -> None:
    aggregation = carried(sites.invite(), sites.answer, "mask")
    name, request = next(iter(aggregation.requests().items()))
    sites.keys[name] = Ed25519PrivateKey.generate()

    with pytest.raises(ProtocolError, match="with its own key"):
        sites.answer(name, request)


# --- the folder in memory


def mounts(tmp_path: Path, kind: str) -> Path:
    file = tmp_path / "mounts"
    file.write_text(f"/dev/vda / ext4 rw 0 0\nnone {tmp_path} {kind} rw 0 0\n")
    return file


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_a_folder_in_memory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    at = tmp_path / "user"
    at.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(at))

    assert between.memory(mounts(tmp_path, kind)) == at


@pytest.mark.parametrize("text", ["", "nonsense\n", "/dev/vda / ext4 rw 0 0\n"])
def test_no_secret_goes_to_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "mounts").write_text(text)

    with pytest.raises(ConfigError, match="`anabranch site serve` is one process"):
        between.memory(tmp_path / "mounts")


def test_a_folder_that_others_may_read_is_refused(tmp_path: Path) -> None:
    folder = between.own_folder(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)

    with pytest.raises(ConfigError, match="not a folder for this user alone"):
        between.own_folder(tmp_path)


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"anabranch-{os.getuid()}").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match="not a folder for this user alone"):
        between.own_folder(tmp_path)


def test_what_a_sum_left_goes_when_it_is_over(tmp_path: Path) -> None:
    """Whoever's it is; what cannot be read is being written, or was by a process that is gone."""
    folder, now = between.own_folder(tmp_path), time.monotonic()
    (folder / "over").write_text(f'{{"seed": "s", "until": {now - 1}}}')
    (folder / ".over.x.partial").write_text(f'{{"seed": "s", "until": {now - 1}}}')
    (folder / "runs").write_text(f'{{"seed": "s", "until": {now + 600}}}')
    old = time.time() - between.TORN_S - 60
    for name in ("torn", ".torn.x.partial", ".old.lock"):
        (folder / name).write_text('{"seed": "s", ')
        os.utime(folder / name, (old, old))
    (folder / "written").write_text('{"seed": "s", ')

    between.own_folder(tmp_path)

    left = {file.name for file in folder.iterdir()} - {".over.lock", ".torn.lock"}
    assert left == {"runs", "written", ".old.lock"}


def test_what_is_over_stays_while_a_process_answers_a_stage_of_it(tmp_path: Path) -> None:
    """It may be about to put a new sum there; and nobody waits for it."""
    file = InMemoryFile(between.own_folder(tmp_path) / "over")
    file.path.write_text(f'{{"until": {time.monotonic() - 1}}}')

    with file.alone():
        between.own_folder(tmp_path)
        assert file.path.exists()
    between.own_folder(tmp_path)
    assert not file.path.exists()


def test_a_sum_that_was_put_in_the_place_of_one_that_is_over_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process wrote it after this one had looked, and before this one had the lock."""
    file, over = between.own_folder(tmp_path) / "sum", between._over
    file.write_text(f'{{"until": {time.monotonic() - 1}}}')

    def looked(path: Path) -> bool:
        monkeypatch.setattr(between, "_over", over)
        found = over(path)
        path.write_text(f'{{"until": {time.monotonic() + 600}}}')
        return found

    monkeypatch.setattr(between, "_over", looked)
    between.own_folder(tmp_path)

    assert file.exists()


def test_sums_that_are_over_go_from_every_folder_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the shared one is from a process without $XDG_RUNTIME_DIR."""
    user, shared = tmp_path / "user", tmp_path / "shared"
    user.mkdir()
    shared.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(user))
    monkeypatch.setattr(between, "SHARED", shared)
    folders = between.memories(mounts(tmp_path, "tmpfs"))
    assert folders == (user, shared)
    files = [between.own_folder(folder) / "over" for folder in folders]
    for file in files:
        file.write_text(f'{{"until": {time.monotonic() - 1}}}')
    monkeypatch.setattr(between, "memories", lambda: folders)

    between.sweep()

    assert [file.exists() for file in files] == [False, False]


def test_a_folder_that_is_refused_keeps_no_other_from_being_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all, own = tmp_path / "a", tmp_path / "b"
    for folder in (open_to_all, own):
        folder.mkdir()
        (between.own_folder(folder) / "over").write_text(f'{{"until": {time.monotonic() - 1}}}')
    between._folder_in(open_to_all).chmod(0o755)
    monkeypatch.setattr(between, "memories", lambda: (open_to_all, own))

    between.sweep()

    assert not (between._folder_in(own) / "over").exists()


def test_a_file_that_another_process_has_just_put_in_its_place_is_no_error(tmp_path: Path) -> None:
    """Two nodes of one user share the folder: what was listed may be gone when it is looked at."""
    assert not between._over(between.own_folder(tmp_path) / ".gone.partial")


def test_two_places_have_two_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(between, "memory", lambda: tmp_path)

    paths = {InMemoryFile.of(place).path for place in ("/srv/a/run-1", "/srv/a/run-2", "/srv/b/r")}

    assert len(paths) == 3
    assert all(len(path.name) == 64 for path in paths)


def test_what_is_left_is_read_as_it_was_written(sites: Sites) -> None:
    carried(sites.invite(), sites.answer, "agree")
    at = InMemoryFile(sites.file(NAMES[0]))
    left = at.read()
    assert isinstance(left, Left)

    at.write(left)

    assert at.read() == left
    assert left.member.next == "agree"
    assert RUN.digest() == left.about.config.digest()
