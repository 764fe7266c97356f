"""Tuning: on validation records alone, resumable, reproducible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anabranch.client.files import read_run
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.simulations.experiments.tune_plan import Parameter, read_tune
from anabranch.simulations.experiments.tuning import tune
from tests.simulations.test_experiment import BOTH, experiment

TUNE = """
[tune]
trials = 4
startup_trials = 2
[tune.parameters]
"training.learning_rate" = { low = 1e-4, high = 1e-1, log = true }
training.batch_size = { low = 8, high = 24, step = 8 }
"lora.rank" = { choices = [2, 3] }
"""


def study(folder: Path, tables: str = TUNE, options: str = BOTH) -> Path:
    path = experiment(folder, options=options)
    path.write_text(path.read_text() + tables)
    return path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tuned")
    return folder, tune(study(folder), folder / "out")


def test_the_best_trial_is_a_patch_of_the_run(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, outcome = tuned

    values = [one["value"] for one in outcome["trials"] if one["state"] == "complete"]
    assert outcome["best"]["value"] == max(values)
    assert len(outcome["trials"]) == 4
    best, settings = read_run(folder / "out" / "run.toml"), outcome["best"]["settings"]
    patch = msgspec.toml.decode((folder / "out" / "best.toml").read_bytes())
    assert patch == {
        "training": {
            "learning_rate": settings["training.learning_rate"],
            "batch_size": settings["training.batch_size"],
        },
        "lora": {"rank": settings["lora.rank"]},
    }
    assert best.training.learning_rate == settings["training.learning_rate"]
    assert best.lora.rank == settings["lora.rank"] in (2, 3)
    assert settings["training.batch_size"] in (8, 16, 24)
    assert best.seed == 3


def test_test_records_are_never_opened(tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = study(tmp_path)
    (tmp_path / "test.csv").unlink()

    outcome = tune(path, tmp_path / "out")

    assert outcome["best"] == tuned[1]["best"]
    for summary in (tmp_path / "out").rglob("summary.json"):
        assert msgspec.json.decode(summary.read_bytes())["accuracy"] == {}


KILLED = """
import os, signal, sys
from pathlib import Path
from anabranch.simulations.experiments.tuning import tune

runs = 0

def event(kind, **fields):
    global runs
    runs += kind == "run_started"
    if runs == 3 and kind == "round_aggregated":
        os.kill(os.getpid(), signal.SIGKILL)

tune(Path(sys.argv[1]), Path(sys.argv[2]), on_event=event)
"""


def test_killed_in_a_trial_it_goes_on_and_tries_the_same(
    tuned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, output = study(tmp_path), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, path, output], env=os.environ)
    assert done.returncode == -signal.SIGKILL

    outcome = tune(path, output)

    ended = [one for one in outcome["trials"] if one["state"] != "fail"]
    assert [one["state"] for one in outcome["trials"]].count("fail") == 1
    expected = tuned[1]["trials"]
    for name in ("settings", "value", "state"):
        assert [one[name] for one in ended] == [one[name] for one in expected]


def test_a_finished_study_is_only_read_and_may_be_made_longer(
    tuned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = study(tmp_path, TUNE.replace("trials = 4", "trials = 2", 1))
    tune(path, tmp_path / "out")
    ran: list[str] = []
    tune(path, tmp_path / "out", on_event=lambda kind, **fields: ran.append(kind))
    assert ran == []

    longer = study(tmp_path, TUNE)

    assert tune(longer, tmp_path / "out")["best"] == tuned[1]["best"]


def test_a_trial_that_is_worse_than_the_median_is_ended_early(tmp_path: Path) -> None:
    table = TUNE.replace("trials = 4", "trials = 8", 1)
    path = study(tmp_path, table)
    run = tmp_path / "run.toml"
    run.write_text(run.read_text().replace("rounds = 2", "rounds = 5"))

    outcome = tune(path, tmp_path / "out")

    pruned = [one for one in outcome["trials"] if one["state"] == "pruned"]
    assert pruned
    assert all(one["rounds"] < 5 for one in pruned)
    assert outcome["best"]["trial"] not in [one["trial"] for one in pruned]


def test_trials_that_all_fail_end_the_study(tmp_path: Path) -> None:
    table = '[tune]\ntrials = 2\n[tune.parameters]\n"data.min_rows" = { low = 1000, high = 2000 }\n'

    with pytest.raises(RunError, match=r"2 trials have failed, the last one with: .*1"):
        tune(study(tmp_path, table), tmp_path / "out")


def test_without_validation_records_nothing_is_tuned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tuning needs `validation`"):
        tune(study(tmp_path, options='test = "test.csv"\n'), tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_trials_of_two_studies_are_never_mixed(tmp_path: Path) -> None:
    path = study(tmp_path, TUNE.replace("trials = 4", "trials = 1", 1))
    tune(path, tmp_path / "out")

    with pytest.raises(ConfigError, match=r"another experiment or another \[tune\]"):
        tune(study(tmp_path, TUNE.replace("[2, 3]", "[2]")), tmp_path / "out")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")

    with pytest.raises(ConfigError, match="a study needs a folder of its own"):
        tune(study(tmp_path), tmp_path / "out")


def test_flowers_runtime_cannot_end_a_trial(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot end a trial early"):
        tune(study(tmp_path), tmp_path / "out", engine="flower")


def test_an_experiment_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no \[tune\]"):
        tune(study(tmp_path, ""), tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, r"\[tune.parameters\] is empty"),
        ({"parameters": {"population.alpha": {"low": 0, "high": 1}}}, "only settings of run.toml"),
        ({"parameters": {"lora.rank": {"low": 4, "high": 2}}}, r"expected low < high.*\(4, 2\)"),
        ({"parameters": {"lora.rank": {"low": 4}}}, "expected low < high"),
        ({"parameters": {"lora.rank": {"low": 0, "high": 2, "log": True}}}, "low above 0"),
        ({"parameters": {"lora.rank": {"low": 0, "high": 2, "choices": [1]}}}, "not both"),
        (
            {"parameters": {"lora.rank": {"low": 1, "high": 4, "step": 0.5}}},
            "a whole step, got 0.5",
        ),
        ({"parameters": {"lora.rank": {"lowest": 0, "high": 2}}}, "unknown field `lowest`"),
        ({"trials": 0, "parameters": {"lora.rank": {"choices": [1]}}}, "`int` >= 1"),
        ({"metric": "f1", "parameters": {"lora.rank": {"choices": [1]}}}, "Invalid enum value"),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_tune(table, "e.toml")


def test_whole_bounds_are_whole_numbers() -> None:
    assert Parameter(low=1, high=4).whole
    assert not Parameter(low=1.0, high=4.0).whole
    assert (
        read_tune({"metric": "loss", "parameters": {"lora.rank": {"choices": [1]}}}, "").direction
        == "minimize"
    )


def test_a_study_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path, output = study(tmp_path), tmp_path / "tuned"
    tune(path, output)
    (output / "study.sqlite3").write_bytes(b"garbage" * 100)

    with pytest.raises(ConfigError, match=r"study\.sqlite3: .*not a database; expected Optuna"):
        tune(path, output)
