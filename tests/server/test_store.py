from __future__ import annotations

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.store import RunFolder

SPEC = AdapterSpec(
    base="0" * 64, tokenizer="", rank=0, alpha=1.0, targets=(), tensors=(("head.weight", (3, 5)),)
)


def folder(tmp_path: Path) -> RunFolder:
    noon = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
    return RunFolder.create(tmp_path / "runs" / "a", b'name = "a"\n', now=lambda: noon)


def test_a_new_run_keeps_its_configuration_byte_for_byte(tmp_path: Path) -> None:
    run = folder(tmp_path)

    assert (run.path / "run.toml").read_bytes() == b'name = "a"\n'


def test_events_are_appended_one_line_each(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.event("round_started", round=1, sites=["a", "b"])
    RunFolder(run.path).event("site_failed", site="b", message="line one\nline two")

    first, second = (run.path / "events.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "at": "2026-01-02T12:00:00Z",
        "kind": "round_started",
        "round": 1,
        "sites": ["a", "b"],
    }
    assert json.loads(second)["message"] == "line one\nline two"


def test_an_event_is_on_the_disk_when_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    run = folder(tmp_path)
    monkeypatch.setattr(os, "fsync", synced.append)

    run.event("round_started")

    assert synced


def test_a_checkpoint_is_the_wire_format(tmp_path: Path) -> None:
    run = folder(tmp_path)
    adapter = Adapter(SPEC, {"head.weight": np.arange(15, dtype=np.float32).reshape(3, 5)})

    run.checkpoint(3, adapter)

    data = (run.path / "checkpoints" / "round-0003.adapter").read_bytes()
    np.testing.assert_array_equal(
        wire.decode_adapter(data, SPEC).arrays["head.weight"], adapter.arrays["head.weight"]
    )


def test_the_summary_is_replaced_as_a_whole(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.summarise({"accuracy": {"federated": 0.5}})
    run.summarise({"seed": 7})

    assert json.loads((run.path / "summary.json").read_text()) == {"seed": 7}
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "run.toml", "summary.json"]


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.event("round_started")
    before = (run.path / "events.jsonl").read_bytes()

    with pytest.raises(ConfigError, match="not empty; name another, or move this one away"):
        RunFolder.create(run.path, b"other")

    assert (run.path / "events.jsonl").read_bytes() == before
    assert (run.path / "run.toml").read_bytes() == b'name = "a"\n'


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    RunFolder.create(tmp_path / "out", b"x").event("round_started")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")

    with pytest.raises(ConfigError, match="a run needs a folder of its own"):
        RunFolder.create(tmp_path / "out", b"x")


# Opening again


def events_of(run: RunFolder) -> list[str]:
    lines = (run.path / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["kind"] for line in lines]


@pytest.mark.parametrize("torn", [b"", b'{"at":"2026', b'{"kind":"b"}', b"\0\0\0\n", b'{"a\n{"b'])
def test_what_a_crash_left_of_an_event_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    run = folder(tmp_path)
    run.event("a")
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(torn)

    again = RunFolder.open(run.path, b'name = "a"\n')
    again.event("c")

    assert events_of(again) == ["a", "c"]


@settings(max_examples=40)
@given(cut=st.integers(0, 300))
def test_events_cut_anywhere_are_read_as_those_that_were_whole(cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = RunFolder.create(Path(name) / "a", b"")
        for kind in ("a", "b", "c"):
            run.event(kind, sites=["x", "y"])
        file = run.path / "events.jsonl"
        data = file.read_bytes()
        file.write_bytes(data[: cut % (len(data) + 1)])
        whole = data[: cut % (len(data) + 1)].count(b"\n")

        again = RunFolder.open(run.path, b"")

        assert events_of(again) == ["a", "b", "c"][:whole]


def test_a_folder_that_is_not_there_or_was_not_finished_is_made(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "new", b"x").event("a")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / ".run.toml.abc.partial").write_bytes(b"")

    run = RunFolder.open(tmp_path / "begun", b"x")

    assert (run.path / "run.toml").read_bytes() == b"x"
    assert sorted(one.name for one in run.path.iterdir()) == ["checkpoints", "run.toml"]


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run = folder(tmp_path)

    with pytest.raises(ConfigError, match=r"run\.toml: another configuration than the one of this"):
        RunFolder.open(run.path, b'name = "b"\n')


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match="this one is not empty"):
        RunFolder.open(tmp_path, b"x")


def test_the_last_round_that_was_announced_is_found(tmp_path: Path) -> None:
    run = folder(tmp_path)
    assert run.announced() == 0
    run.event("round_aggregated", round=1)
    run.event("round_started", round=2)
    assert run.announced() == 1


@pytest.mark.parametrize("written", [0, 10])
def test_an_event_that_does_not_fit_the_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    run = folder(tmp_path)
    run.event("a")
    write = os.write

    def full(handle: int, data: bytes) -> int:
        if not written:
            raise OSError(28, "No space left on device")
        return write(handle, data[:written])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        run.event("b")
    monkeypatch.undo()

    run.event("c")
    assert events_of(run) == ["a", "c"]
