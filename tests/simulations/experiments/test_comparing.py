"""Runs laid beside each other: curves by hand, what may be compared, files."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.experiments.about import About, read_about
from anabranch.simulations.experiments.compare import compare
from anabranch.simulations.experiments.compare_page import render, time_scale
from anabranch.simulations.experiments.comparing import (
    Compared,
    Group,
    Run,
    curve,
    gather,
    mean_of,
    require_comparable,
)
from anabranch.simulations.experiments.rounds import Round
from anabranch.simulations.experiments.sweep import run_sweep
from anabranch.simulations.simulate import simulate
from tests.simulations.test_experiment import BOTH, experiment

ACCURACIES = st.floats(0, 1)


def a_run(values: Sequence[float], pace: float = 1.0, **about: Any) -> Run:
    """Return a run whose round i ends at i · pace seconds with accuracy values[i − 1]."""
    facts: dict[str, Any] = {
        "name": "a", "digest": "d", "group": "g", "seed": 0, "engine": "cohort", "time": "virtual",
        "labels": ("no", "yes"), "test": "t", "validation": "v",
    }  # fmt: skip
    return Run(
        folder=Path("run"),
        about=About(**{**facts, **about}),
        rounds=[
            Round(
                round=i,
                seconds=i * pace,
                bytes_up=10 * i,
                bytes_down=20 * i,
                asked=2,
                trained=2,
                failed=0,
                metrics={"validation.accuracy": value},
            )
            for i, value in enumerate(values, 1)
        ],
        summary={"accuracy": {"federated": values[-1]}, "macro_f1": {}, "best_round": len(values)},
    )


def test_by_round_the_band_goes_from_the_smallest_to_the_largest() -> None:
    group = Group(name="a", runs=[a_run([0.2, 0.5, 0.6]), a_run([0.4, 0.5, 0.9])])

    points = curve(group, "accuracy")

    assert points == [
        (1, (0.2 + 0.4) / 2, 0.2, 0.4),
        (2, 0.5, 0.5, 0.5),
        (3, (0.6 + 0.9) / 2, 0.6, 0.9),
    ]


def test_by_time_a_run_is_worth_its_last_evaluation() -> None:
    group = Group(name="a", runs=[a_run([0.2, 0.4], pace=10.0), a_run([0.6, 0.8], pace=15.0)])

    points = curve(group, "accuracy", lambda one: one.seconds)

    # runs at 10, 20 s and at 15, 30 s: both have a value from 15 s, and one ends at 20 s
    assert points == [
        (15.0, (0.2 + 0.6) / 2, 0.2, 0.6),
        (20.0, (0.4 + 0.6) / 2, 0.4, 0.6),
    ]


def test_runs_that_share_no_time_have_no_curve() -> None:
    group = Group(name="a", runs=[a_run([0.2], pace=10.0), a_run([0.6], pace=15.0)])

    assert curve(group, "accuracy", lambda one: one.seconds) == []
    assert curve(group, "loss") == []


@given(st.lists(st.lists(ACCURACIES, min_size=2, max_size=80), min_size=1, max_size=4))
def test_means_lie_in_their_bands_and_x_grows(values: list[list[float]]) -> None:
    runs = [a_run(row, pace=1.0 + i) for i, row in enumerate(values)]

    for of in (None, lambda one: one.seconds, lambda one: one.bytes):
        points = curve(Group(name="a", runs=runs), "accuracy", of)
        assert all(low <= mean <= high for _, mean, low, high in points)
        xs = [x for x, *_ in points]
        assert xs == sorted(set(xs))


@given(st.lists(ACCURACIES, min_size=2, max_size=80))
def test_a_single_run_is_its_own_curve(values: list[float]) -> None:
    points = curve(Group(name="a", runs=[a_run(values)]), "accuracy")

    assert [(x, y) for x, y, _, _ in points] == list(enumerate(values, 1))


def test_a_standard_deviation_needs_two() -> None:
    one, two = mean_of([0.5, None]), mean_of([0.5, 0.7])

    assert one is not None
    assert two is not None
    assert (one.mean, one.std, one.count) == (0.5, None, 1)
    assert two.mean == pytest.approx(0.6)
    assert two.std == pytest.approx(0.2 / 2**0.5)
    assert mean_of([None]) is None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"labels": ("no", "perhaps")}, "labels differ"),
        ({"test": "another"}, r"test records differ \(another, there t\)"),
        ({"validation": None}, "validation records differ .none, there v"),
    ],
)
def test_runs_that_were_measured_otherwise_are_refused(other: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be compared.*{says}"):
        require_comparable([a_run([0.5]), a_run([0.5], **other)])


def compared(*groups: Group, time: str | None = "virtual") -> Compared:
    return Compared(
        groups=groups, source="validation", time=time, targets=(0.5,), missing=["x: failed"]
    )


def test_the_page_has_a_chart_for_every_axis_and_needs_nothing_but_itself() -> None:
    groups = [
        Group(name="slow <b>", runs=[a_run([0.2, 0.4], 4000.0), a_run([0.3, 0.6], 5000.0)]),
        Group(name="fast", runs=[a_run([0.4, 0.9], 1000.0)]),
    ]

    page = render(compared(*groups))

    for title in ("Accuracy by round", "Accuracy by time", "Accuracy by bytes"):
        assert title in page
    assert "virtual time, hours" in page
    assert page.count('opacity="0.16"') == 3  # one band per axis: one group has a spread
    assert "slow &lt;b&gt;" in page
    assert "<b>" not in page.replace("<b>Accuracy", "")
    assert "x: failed" in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"\$[a-z]", page)


def test_times_of_two_kinds_are_not_drawn_over_each_other() -> None:
    page = render(compared(Group(name="a", runs=[a_run([0.2, 0.4])]), time=None))

    assert "Accuracy by time" not in page
    assert "Some runs are in virtual time and some in real time" in page
    assert "s virtual" in page


@pytest.mark.parametrize(
    ("pace", "unit"), [(1.0, "seconds"), (100.0, "minutes"), (9000.0, "hours"), (1e6, "days")]
)
def test_the_axis_of_time_has_a_fitting_unit(pace: float, unit: str) -> None:
    assert time_scale(compared(Group(name="a", runs=[a_run([0.1, 0.2], pace)])))[1] == unit


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    path = experiment(folder, options=BOTH + "targets = [0.5, 1.0]\n")
    sweep = '[sweep]\nseeds = [0, 1]\n"training.learning_rate" = [0.01, 0.05]\n'
    path.write_text(path.read_text() + sweep)
    run_sweep(path, folder / "out")
    return folder


def test_a_sweep_is_its_groups_and_its_files_hold_every_round(swept: Path) -> None:
    found, numbers = compare([swept / "out"], output=swept / "c.html")

    assert [group.name for group in found.groups] == ["learning_rate-0.01", "learning_rate-0.05"]
    assert [one["seeds"] for one in numbers["groups"]] == [[0, 1], [0, 1]]
    for one in numbers["groups"]:
        assert one["final"]["accuracy"]["count"] == 2
        assert [t["accuracy"] for t in one["time_to_accuracy"]] == [0.5, 1.0]
    rows = list(csv.DictReader((swept / "c.csv").read_text().splitlines()))
    assert len(rows) == 4 * 2 * len({row["metric"] for row in rows})
    assert {row["measured_on"] for row in rows} == {"validation"}
    parquet = pq.read_table(swept / "c.parquet").to_pylist()
    assert [row["value"] for row in parquet] == [float(row["value"]) for row in rows]
    assert (swept / "c.html").read_text().startswith("<!doctype html>")


def test_run_folders_one_by_one_are_the_same_as_their_sweep(swept: Path) -> None:
    folders = [path.parent for path in sorted((swept / "out").rglob("summary.json"))]

    _, whole = compare([swept / "out"])
    _, single = compare([*folders, folders[0]])  # a run that is named twice counts once

    assert single == whole


def test_another_target_can_be_asked_for(swept: Path) -> None:
    _, numbers = compare([swept / "out"], targets=[0.6])

    times = numbers["groups"][1]["time_to_accuracy"]
    assert [one["accuracy"] for one in times] == [0.5, 0.6, 1.0]
    assert times[-1]["round"] is None
    assert times[-1]["reached"] == 0


def test_repetitions_are_one_group_wherever_they_are(swept: Path) -> None:
    text = (swept / "experiment.toml").read_text().split("[sweep]")[0]
    (swept / "plain.toml").write_text(text)
    for seed in (5, 6):
        simulate(swept / "plain.toml", swept / f"run-{seed}", seed=seed)

    found = gather([swept / "run-5", swept / "run-6"])

    assert [group.name for group in found.groups] == ["plain"]
    assert read_about(swept / "run-5").digest != read_about(swept / "run-6").digest


def test_a_run_on_other_test_records_is_refused(swept: Path, tmp_path: Path) -> None:
    path = experiment(tmp_path, options='validation = "dev.csv"\ntest = "north.csv"\n')
    simulate(path, tmp_path / "out")

    with pytest.raises(ConfigError, match="test records differ"):
        compare([swept / "out", tmp_path / "out"])


@pytest.mark.parametrize(
    ("files", "says"),
    [([], "there is no experiment.json"), (["experiment.json"], "experiment.json: Input data was")],
)
def test_what_is_no_run_is_refused(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_text("")

    with pytest.raises(ConfigError, match=says):
        compare([tmp_path])


def test_a_run_that_is_not_finished_is_refused(swept: Path, tmp_path: Path) -> None:
    about = next((swept / "out").rglob("experiment.json")).read_bytes()
    (tmp_path / "experiment.json").write_bytes(about)

    with pytest.raises(ConfigError, match="the run is not finished"):
        compare([tmp_path])


@pytest.mark.parametrize("name", ["page.csv", "page", "folder.html"])
def test_a_page_that_is_no_html_file_is_refused_and_nothing_is_written(
    swept: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.html").mkdir()

    with pytest.raises(ConfigError, match=rf"{name}: expected a file that ends in \.html"):
        compare([swept], output=tmp_path / name)

    assert [one.name for one in tmp_path.iterdir()] == ["folder.html"]


def test_a_summary_without_what_is_compared_is_refused(swept: Path, tmp_path: Path) -> None:
    folder = next(path.parent for path in sorted(swept.rglob("summary.json")))
    for name in ("experiment.json", "rounds.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "summary.json").write_text("{}")

    with pytest.raises(ConfigError, match=r"summary\.json: there is no 'accuracy'"):
        gather([tmp_path])
