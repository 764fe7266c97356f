"""`anabranch simulate` from its files to its run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anabranch.client.tuning.adapter_files import read_any
from anabranch.protocols.errors import ConfigError, DataError
from anabranch.simulations.experiment import load
from anabranch.simulations.simulate import simulate
from tests.runs import PRIVATE, table_text, write_table


def experiment(
    folder: Path, *replacements: tuple[str, str], extra: str = "", options: str = ""
) -> Path:
    for seed, name in enumerate(("north", "south")):
        write_table(folder / f"{name}.csv", n=60, seed=seed)
    write_table(folder / "dev.csv", n=60, seed=8)
    write_table(folder / "test.csv", n=90, seed=9)
    (folder / "run.toml").write_text(table_text(*replacements, extra=extra))
    path = folder / "experiment.toml"
    path.write_text(
        f'run = "run.toml"\n{options}[sites]\nnorth = "north.csv"\nsouth = "south.csv"\n'
    )
    return path


BOTH = 'validation = "dev.csv"\ntest = "test.csv"\n'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("experiment")
    path = experiment(folder, ("rounds = 2", "rounds = 3"), options=BOTH)
    return folder / "out", simulate(path, folder / "out")


def test_a_run_learns_and_writes_its_summary(finished: tuple[Path, dict[str, Any]]) -> None:
    output, summary = finished

    assert json.loads((output / "summary.json").read_text()) == summary
    assert summary["accuracy"]["federated"] > 0.8
    assert summary["epsilon"] == {}
    assert summary["rounds"] == 3
    assert summary["bytes_up"] > 0
    assert summary["peak_rss_bytes"] > 1 << 20
    assert summary["release"]["int8_bytes"] > 0
    assert summary["versions"]["torch"].startswith("2.13")


def test_events_tell_the_run_from_start_to_finish(finished: tuple[Path, dict[str, Any]]) -> None:
    output, summary = finished
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]

    kinds = [event["kind"] for event in events]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert kinds.count("round_aggregated") == 3
    assert events[0]["run"] == summary["run"]


def test_the_release_is_the_best_checkpoint(finished: tuple[Path, dict[str, Any]]) -> None:
    output, summary = finished
    best = output / "checkpoints" / f"round-{summary['best_round']:04d}.adapter"

    released, kept = read_any(output / "release" / "adapter"), read_any(best)

    assert all((released.arrays[name] == array).all() for name, array in kept.arrays.items())


def test_the_report_is_one_page_without_references(finished: tuple[Path, dict[str, Any]]) -> None:
    page = (finished[0] / "report.html").read_text()

    assert "north" in page
    assert "There is no differential privacy" in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_same_seed_gives_the_same_adapter(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    simulate(experiment(tmp_path, ("rounds = 2", "rounds = 3"), options=BOTH), tmp_path / "out")

    for number in (1, 2, 3):
        name = f"checkpoints/round-{number:04d}.adapter"
        assert (tmp_path / "out" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_a_private_run_reports_epsilon_of_every_site(tmp_path: Path) -> None:
    path = experiment(
        tmp_path, ("local_epochs = 2", "local_steps = 3"), extra=PRIVATE, options=BOTH
    )

    summary = simulate(path, tmp_path / "out")

    assert set(summary["epsilon"]) == {"north", "south"}
    assert all(7.9 < e <= 8.0 for e in summary["epsilon"].values())
    assert "federated_dp" in summary["accuracy"]
    card = (tmp_path / "out" / "release" / "README.md").read_text()
    assert "with respect to adding or removing one record" in card


def test_ranks_are_written_into_the_sites_own_files(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    path.write_text(path.read_text() + "[ranks]\nsouth = 2\n")

    simulate(path, tmp_path / "out")

    north, south = (tmp_path / "out" / "sites" / n / "site.toml" for n in ("north", "south"))
    assert "max_rank = 2" in south.read_text().splitlines()
    assert "max_rank" not in north.read_text()


def test_without_records_of_the_coordinator_nothing_is_released_and_it_says_why(
    tmp_path: Path,
) -> None:
    summary = simulate(experiment(tmp_path), tmp_path / "out")

    assert summary["release"] is None
    assert "give `test` or `validation`" in summary["release_refused"]
    assert not (tmp_path / "out" / "release").exists()


def test_violations_of_all_sites_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    (tmp_path / "north.csv").write_text("a,b,y\n1,x,yes\n")
    (tmp_path / "south.csv").write_text("a,y\n1,perhaps\n")

    with pytest.raises(DataError) as caught:
        simulate(path, tmp_path / "out")

    text = str(caught.value)
    assert "site north" in text
    assert "site south" in text
    assert "row 1" in text
    assert "perhaps" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"missing required field `run`"),
        ('run = "run.toml"\n[sites]\n', r"\[sites\] is empty"),
        ('run = "run.toml"\nengine = "magic"\n[sites]\na = "a.csv"', r"Invalid enum value 'magic'"),
        (
            'run = "run.toml"\n[sites]\na = "a.csv"\n[ranks]\nb = 4\n',
            r"experiment\.toml: \[ranks\] names 'b', which is not in \[sites\]: .*\['a'\]",
        ),
        ('run = "run.toml"\n[sites]\na = "a.csv"\n[ranks]\na = 0\n', "Expected `int` >= 1"),
        ('run = "none.toml"\n[sites]\na = "a.csv"', r"none\.toml: No such file"),
    ],
)
def test_a_wrong_experiment_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "run.toml").write_text(table_text())
    path = tmp_path / "experiment.toml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=says):
        load(path)


def test_cuda_is_never_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    with pytest.raises(ConfigError, match=r'set device = "cpu"'):
        simulate(experiment(tmp_path), tmp_path / "out", device="cuda")
