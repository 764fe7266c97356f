"""The events of a population: few lines, and a table of clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from anabranch.server.store import RunFolder
from anabranch.simulations.experiments.recorder import Recorder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", b"")


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    text = (folder.path / "events.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def table(folder: RunFolder) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ds.dataset(folder.path / "clients").to_table().to_pylist()
    return rows


def a_round(recorder: Recorder, number: int, clients: int) -> None:
    names = [f"client-{i:06d}" for i in range(clients)]
    recorder("round_started", round=number, sites=names)
    for name in names:
        recorder("site_trained", site=name, round=number, num_examples=5, steps=2, loss=0.5)
    recorder("site_failed", site="x", round=number, asked="train", reason="deadline", message="m")
    recorder("round_aggregated", round=number, sites=names, ages={"client-000001": 2})


def test_a_round_of_a_thousand_clients_is_two_lines_and_one_file(folder: RunFolder) -> None:
    recorder = Recorder(folder)

    for number in (1, 2):
        a_round(recorder, number, 1000)

    events = lines(folder)
    assert [(e["kind"], e["round"], e["sites"]) for e in events] == [
        ("round_started", 1, 1000),
        ("round_aggregated", 1, 1000),
        ("round_started", 2, 1000),
        ("round_aggregated", 2, 1000),
    ]
    assert events[1]["ages"] == 1
    assert events[1]["clients"] == {"site_failed": 1, "site_trained": 1000}
    assert events[1]["failed"] == {"deadline": 1}
    assert len(list((folder.path / "clients").iterdir())) == 2
    assert sum(path.stat().st_size for path in (folder.path / "clients").iterdir()) < 100_000


def test_every_clients_facts_are_in_the_table(folder: RunFolder) -> None:
    recorder = Recorder(folder)
    recorder("site_joined", site="a", num_examples=7, held_out=2, max_rank=None)
    recorder("site_evaluated", site="a", round=1, num_examples=2, metrics={"accuracy": 0.5})
    recorder("node_refused", node=1001, reason="config", message="no")
    a_round(recorder, 1, 1)

    rows = table(folder)

    assert [(r["kind"], r["client"]) for r in rows] == [
        ("site_joined", "a"),
        ("site_evaluated", "a"),
        ("node_refused", "1001"),
        ("site_trained", "client-000000"),
        ("site_failed", "x"),
    ]
    assert rows[0]["held_out"] == 2
    assert rows[1]["accuracy"] == 0.5
    assert rows[3]["loss"] == 0.5
    assert rows[4]["reason"] == "deadline"


def test_the_table_is_on_the_disk_before_the_line_that_ends_the_round(folder: RunFolder) -> None:
    seen: list[tuple[str, int]] = []

    def look(kind: str, **fields: Any) -> None:
        clients = folder.path / "clients"
        seen.append((kind, len(list(clients.iterdir())) if clients.exists() else 0))

    a_round(Recorder(folder, look), 1, 3)

    assert seen == [("round_started", 0), ("round_aggregated", 1)]


def test_what_is_left_is_written_by_flush_once(folder: RunFolder) -> None:
    recorder = Recorder(folder)
    recorder("site_joined", site="a", num_examples=7)

    recorder.flush()
    recorder.flush()

    assert [row["client"] for row in table(folder)] == ["a"]
    assert len(list((folder.path / "clients").iterdir())) == 1
