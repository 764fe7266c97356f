from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

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
