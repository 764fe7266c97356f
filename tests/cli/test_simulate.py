"""anabranch simulate and its verbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anabranch.cli.main import run
from anabranch.simulations import simulate
from tests.runs import table_text, write_table


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    write_table(tmp_path / "a.csv")
    write_table(tmp_path / "dev.csv", n=30, seed=8)
    (tmp_path / "run.toml").write_text(table_text(("rounds = 2", "rounds = 1")))
    path = tmp_path / "e.toml"
    path.write_text('run = "run.toml"\nvalidation = "dev.csv"\n[sites]\na = "a.csv"\n')
    return path


def add(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_an_experiment_is_run_with_or_without_the_verb(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = experiment.parent

    assert run(["simulate", str(experiment), "--output", str(folder / "a")]) == 0
    assert run(["simulate", "run", str(experiment), "--output", str(folder / "b")]) == 0
    assert run(["simulate", "--output", str(folder / "c"), str(experiment), "--seed", "5"]) == 0

    out, err = capsys.readouterr()
    assert err == ""
    assert f"run folder: {folder / 'a'}" in out
    seeds = [json.loads((folder / n / "summary.json").read_text())["seed"] for n in "abc"]
    assert seeds == [3, 3, 5]


def test_a_sweep_is_completed_and_compared(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(experiment, "[sweep]\nseeds = [0, 1]\n")
    out = str(experiment.parent / "out")

    assert run(["simulate", str(experiment), "--output", out]) == 0
    assert "2 of 2 runs finished, 0 of them before; 0 failed" in capsys.readouterr().out
    assert run(["simulate", str(experiment), "--output", out]) == 0
    assert "2 of 2 runs finished, 2 of them before" in capsys.readouterr().out
    page = experiment.parent / "c.html"
    arguments = ["simulate", "compare", out, "--output", str(page), "--target", "0.5"]
    assert run(arguments) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert "base" in text
    assert f"written: {page.with_suffix('.parquet')}" in text
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["seeds"] == [0, 1]


def test_a_failed_run_is_exit_code_1_and_named(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(experiment, '[sweep]\n"data.min_rows" = [1, 1000]\n')

    assert run(["simulate", str(experiment), "--output", str(experiment.parent / "out")]) == 1

    out = capsys.readouterr().out
    assert "1 of 2 runs finished" in out
    assert "min_rows-1000/seed-3: " in out


def test_settings_are_tuned(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(experiment, '[tune]\ntrials = 1\n[tune.parameters]\n"lora.rank" = { choices = [2, 3] }\n')
    out = experiment.parent / "study"

    assert run(["simulate", "tune", str(experiment), "--output", str(out)]) == 0

    text, err = capsys.readouterr()
    assert err == ""
    assert "best: trial 0" in text
    assert (out / "best.toml").is_file()


def test_a_population_is_shown_and_nothing_is_run(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    population = '[population]\ndata = "a.csv"\nclients = 4\n'
    experiment.write_text(f'run = "run.toml"\n{population}')
    page = experiment.parent / "population.html"

    assert run(["simulate", str(experiment), "--show-population", "--output", str(page)]) == 0

    assert "clients" in capsys.readouterr().out
    assert page.is_file()
    assert not (experiment.parent / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "nowhere"], "there is no experiment.json"),
        (["tune", "e.toml"], r"there is no [tune]"),
        (["compare.toml"], "compare.toml: No such file"),
        (["e.toml", "--show-population"], "has [sites], and no [population]"),
        (["e.toml", "--faults", "none.toml"], "faults strike a [population]"),
        (["e.toml", "--engine", "flower", "--workers", "0"], "0 is not in the range"),
    ],
)
def test_a_mistake_is_one_line(
    experiment: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(experiment.parent)

    assert run(["simulate", *arguments]) in (1, 2)

    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


def test_without_arguments_it_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate"]) == 2
    assert run(["simulate", "--help"]) == 0
    assert "compare" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["taken", "taken/deeper"])
def test_an_output_that_is_a_file_is_one_line(
    experiment: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (experiment.parent / "taken").write_text("mine")
    add(experiment, "[sweep]\nseeds = [0]\n")

    code = run(["simulate", str(experiment), "--output", str(experiment.parent / name)])
    said = capsys.readouterr().err

    assert code == 1
    assert said.startswith("anabranch: ")
    assert "taken" in said
    assert said.count("\n") == 1


def test_an_interrupted_run_says_that_it_stopped(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "simulate", interrupted)

    assert run(["simulate", str(experiment)]) == 1
    assert capsys.readouterr().err == "anabranch: stopped\n"
