"""A sweep can be killed anywhere and started again; nothing is lost, mixed or done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.experiments.sweep import Entry, discard, read_manifest, run_sweep
from tests.runs import table_text, write_table

SWEEP = 'seeds = [0, 1]\n"training.learning_rate" = [0.01, 0.05]\n'
FOLDERS = [f"learning_rate-{rate}/seed-{seed}" for rate in ("0.01", "0.05") for seed in (0, 1)]


def experiment(folder: Path, sweep: str = SWEEP, *replacements: tuple[str, str]) -> Path:
    write_table(folder / "a.csv", n=30)
    write_table(folder / "dev.csv", n=30, seed=8)
    (folder / "run.toml").write_text(table_text(*replacements))
    path = folder / "e.toml"
    text = 'run = "run.toml"\nvalidation = "dev.csv"\n[sites]\na = "a.csv"\n'
    path.write_text(f"{text}[sweep]\n{sweep}")
    return path


def adapters(output: Path) -> dict[str, bytes]:
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*.adapter"))
    }


def test_every_combination_has_a_finished_run_folder(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    outcome = run_sweep(
        experiment(tmp_path),
        tmp_path / "out",
        on_run=lambda entry, place, total: seen.append((entry.folder, place, total)),
    )

    assert outcome["finished"] == 4
    assert seen == [(folder, i, 4) for i, folder in enumerate(FOLDERS, 1)]
    for folder in FOLDERS:
        summary = json.loads((tmp_path / "out" / folder / "summary.json").read_text())
        about = json.loads((tmp_path / "out" / folder / "experiment.json").read_text())
        assert summary["digest"] == about["digest"]
        assert summary["seed"] == about["seed"] == int(folder[-1])
        assert str(about["changes"]["training.learning_rate"]) in folder
        assert "measured, not released" in summary["release_refused"]
        assert not (tmp_path / "out" / folder / "release").exists()
    assert len(set(adapters(tmp_path / "out").values())) == 8  # two rounds of four runs


def test_a_sweep_started_again_does_nothing_twice(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    run_sweep(path, tmp_path / "out")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("summary.json")}

    outcome = run_sweep(path, tmp_path / "out")

    assert outcome["skipped"] == 4
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


KILLED = """
import os, signal, sys
from pathlib import Path
from anabranch.simulations.experiments.sweep import run_sweep

runs = 0

def event(kind, **fields):
    global runs
    runs += kind == "run_started"
    if runs == 2 and kind == "round_aggregated" and fields["round"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)

run_sweep(Path(sys.argv[1]), Path(sys.argv[2]), on_event=event)
"""


def test_killed_in_the_middle_of_a_run_it_completes_exactly_what_is_missing(tmp_path: Path) -> None:
    path, output = experiment(tmp_path), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, path, output], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    half = output / FOLDERS[1]
    assert (output / FOLDERS[0] / "summary.json").exists()
    assert (half / "checkpoints" / "round-0001.adapter").exists()
    assert not (half / "summary.json").exists()
    (half / "of-the-half").write_text("must not survive")
    first = (output / FOLDERS[0] / "summary.json").stat().st_mtime_ns
    ran: list[str] = []

    outcome = run_sweep(path, output, on_event=lambda kind, **f: ran.append(kind))

    assert outcome["skipped"] == 1
    assert outcome["finished"] == 4
    assert ran.count("run_started") == 3
    assert (output / FOLDERS[0] / "summary.json").stat().st_mtime_ns == first
    assert not (half / "of-the-half").exists()
    kinds = [json.loads(line)["kind"] for line in (half / "events.jsonl").read_text().splitlines()]
    assert kinds.count("run_started") == kinds.count("run_finished") == 1
    run_sweep(path, tmp_path / "whole")
    assert adapters(output) == adapters(tmp_path / "whole")
    assert not [p for p in output.rglob(".*") if p.suffix == ".partial"]


def test_interrupted_from_the_keyboard_it_goes_on(tmp_path: Path) -> None:
    path, output = experiment(tmp_path), tmp_path / "out"

    def stop(entry: Entry, place: int, total: int) -> None:
        if place == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(path, output, on_run=stop)

    assert [e.state for e in read_manifest(output).runs] == [*["finished"] * 3, "unfinished"]
    assert run_sweep(path, output)["skipped"] == 3


def test_a_run_that_fails_is_written_down_and_the_others_go_on(tmp_path: Path) -> None:
    path = experiment(tmp_path, '"data.min_rows" = [1, 1000]\nseeds = [0]\n')

    outcome = run_sweep(path, tmp_path / "out")

    assert [one["state"] for one in outcome["runs"]] == ["finished", "failed"]
    assert outcome["failed"] == 1
    assert "1000" in outcome["runs"][1]["error"]
    assert read_manifest(tmp_path / "out").runs[1].error == outcome["runs"][1]["error"]


def test_a_failed_run_is_tried_again(tmp_path: Path) -> None:
    path = experiment(tmp_path, '"data.min_rows" = [1, 1000]\n')
    run_sweep(path, tmp_path / "out")

    outcome = run_sweep(path, tmp_path / "out")

    assert outcome["skipped"] == 1
    assert outcome["failed"] == 1


def test_a_sweep_may_grow(tmp_path: Path) -> None:
    path = experiment(tmp_path, "seeds = [0]\n")
    run_sweep(path, tmp_path / "out")

    outcome = run_sweep(experiment(tmp_path, "seeds = [0, 1]\n"), tmp_path / "out")

    assert outcome["skipped"] == 1
    assert outcome["finished"] == 2


def test_finished_runs_of_another_configuration_are_never_touched(tmp_path: Path) -> None:
    path = experiment(tmp_path, "seeds = [0]\n")
    run_sweep(path, tmp_path / "out")
    before = adapters(tmp_path / "out")

    with pytest.raises(ConfigError, match="is a finished run of another configuration"):
        run_sweep(experiment(tmp_path, "seeds = [0]\n", ("rank = 3", "rank = 2")), tmp_path / "out")

    assert adapters(tmp_path / "out") == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")

    with pytest.raises(ConfigError, match="a sweep needs a folder of its own"):
        run_sweep(experiment(tmp_path), tmp_path / "out")

    assert [p.name for p in (tmp_path / "out").iterdir() if p.name[0] != "."] == ["precious"]


def test_a_folder_in_the_way_that_is_no_run_of_the_sweep_is_refused(tmp_path: Path) -> None:
    path = experiment(tmp_path, "seeds = [0]\n")
    run_sweep(path, tmp_path / "out")
    (tmp_path / "out" / "base" / "seed-1").mkdir()
    (tmp_path / "out" / "base" / "seed-1" / "precious").write_text("keep me")

    with pytest.raises(ConfigError, match="is no run of this sweep"):
        run_sweep(experiment(tmp_path, "seeds = [0, 1]\n"), tmp_path / "out")

    assert (tmp_path / "out" / "base" / "seed-1" / "precious").exists()


def test_what_a_crash_left_of_a_removal_is_swept(tmp_path: Path) -> None:
    path = experiment(tmp_path, "seeds = [0]\n")
    run_sweep(path, tmp_path / "out")
    left = tmp_path / "out" / "base" / ".seed-0.abc.partial"
    (left / "half").mkdir(parents=True)

    run_sweep(path, tmp_path / "out")

    assert not left.exists()


def test_discarding_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "events.jsonl").write_text("{}")

    discard(tmp_path / "run")
    discard(tmp_path / "run")  # there is nothing: nothing happens

    assert list(tmp_path.iterdir()) == []


def test_an_experiment_without_a_sweep_is_refused(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    path.write_text(path.read_text().split("[sweep]")[0])

    with pytest.raises(ConfigError, match=r"there is no \[sweep\]"):
        run_sweep(path, tmp_path / "out")
