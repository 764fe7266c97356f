"""[sweep]: which runs there are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.experiments.sweep_plan import LONGEST, plan, read_sweep, slugs
from tests.runs import table_text, write_table

VALUES = st.integers() | st.floats(allow_nan=False) | st.text(max_size=100) | st.booleans()
LISTS = st.lists(VALUES, min_size=1, max_size=3)
PATHS = st.sampled_from(
    ["training.learning_rate", "lora.rank", "personal.rank", "population.alpha", "engine"]
)


@given(st.dictionaries(PATHS, LISTS, min_size=1, max_size=3))
def test_a_grid_is_every_combination_once(settings: dict[str, list[Any]]) -> None:
    sweep = read_sweep(settings, "e.toml")

    rows = [tuple(one.values()) for one in sweep.combinations]
    assert rows == list(itertools.product(*settings.values()))
    assert all(list(one) == list(settings) for one in sweep.combinations)


@given(st.lists(st.fixed_dictionaries({"lora.rank": VALUES, "engine": VALUES}), max_size=6))
def test_different_combinations_have_different_folders(rows: list[dict[str, Any]]) -> None:
    names = slugs(rows)

    for (a, one), (b, other) in itertools.combinations(zip(names, rows, strict=True), 2):
        if repr(one) != repr(other):
            assert a != b
        else:
            assert a == b
    for name in names:
        assert len(name) <= LONGEST
        assert "/" not in name
        assert name not in ("", ".", "..")
        assert not name.startswith(".")


def test_names_are_short_where_they_can_be() -> None:
    assert slugs([{"training.learning_rate": 0.01, "lora.alpha": 4}]) == [
        "learning_rate-0.01_alpha-4"
    ]
    assert slugs([{"lora.rank": 2, "personal.rank": 3}]) == ["lora.rank-2_personal.rank-3"]
    assert slugs([{}]) == ["base"]


def test_names_that_would_be_taken_for_others_end_in_a_hash() -> None:
    names = slugs(
        [{"lora.rank": 1}, {"lora.rank": "1"}, {"lora.rank": "a_b"}, {"lora.rank": "a/b"}]
    )

    assert names[0] == "rank-1"
    assert names[1].startswith("rank-1-")
    assert names[2].startswith("rank-a_b-")
    assert names[3].startswith("rank-a-b-")


def test_zip_goes_through_the_lists_together() -> None:
    sweep = read_sweep(
        {"combine": "zip", "seeds": [4, 5], "lora": {"rank": [2, 4], "alpha": [4.0, 8.0]}}, "e.toml"
    )

    assert sweep.seeds == (4, 5)
    assert sweep.combinations == (
        {"lora.rank": 2, "lora.alpha": 4.0},
        {"lora.rank": 4, "lora.alpha": 8.0},
    )


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, r"\[sweep\] is empty"),
        ({"combine": "all", "seeds": [1]}, 'sweep.combine: expected "grid" or "zip", got \'all\''),
        ({"seeds": []}, "sweep.seeds: expected a list of whole numbers"),
        ({"seeds": [1.5]}, "sweep.seeds: expected a list of whole numbers"),
        ({"seeds": [-1]}, "sweep.seeds: expected a list of whole numbers"),
        ({"lora.rank": 4}, r"\[sweep\] lora.rank: expected a list of values"),
        ({"lora.rank": []}, r"\[sweep\] lora.rank: expected a list of values"),
        ({"colour": ["red"]}, r"'colour' is no setting"),
        ({"seed": [1]}, "seeds are listed in `seeds`"),
        (
            {"combine": "zip", "lora.rank": [1], "lora.alpha": [1.0, 2.0]},
            "one length, got lora.rank: 1, lora.alpha: 2",
        ),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_sweep(table, "e.toml")


def experiment(folder: Path, sweep: str) -> Path:
    write_table(folder / "a.csv")
    (folder / "run.toml").write_text(table_text())
    path = folder / "e.toml"
    path.write_text(f'run = "run.toml"\n[sites]\na = "a.csv"\n[sweep]\n{sweep}')
    return path


def test_every_run_has_its_own_configuration_and_digest(tmp_path: Path) -> None:
    path = experiment(tmp_path, 'seeds = [0, 7]\n"lora.rank" = [2, 3]\n')

    runs = plan(path)

    assert [one.folder for one in runs] == [
        "rank-2/seed-0", "rank-2/seed-7", "rank-3/seed-0", "rank-3/seed-7",
    ]  # fmt: skip
    assert [one.experiment.config.lora.rank for one in runs] == [2, 2, 3, 3]
    assert [one.experiment.config.seed for one in runs] == [0, 7, 0, 7]
    assert len({one.digest for one in runs}) == 4
    assert [one.digest for one in plan(path)] == [one.digest for one in runs]


def test_other_records_are_another_digest(tmp_path: Path) -> None:
    path = experiment(tmp_path, "seeds = [0]\n")
    before = plan(path)[0].digest

    write_table(tmp_path / "a.csv", seed=1)

    assert plan(path)[0].digest != before


def test_without_seeds_the_runs_have_that_of_the_run(tmp_path: Path) -> None:
    path = experiment(tmp_path, '"lora.rank" = [2]\n')

    assert [one.folder for one in plan(path)] == ["rank-2/seed-3"]
    assert [one.folder for one in plan(path, seed=9)] == ["rank-2/seed-9"]


def test_a_combination_that_cannot_be_run_is_named_before_anything_is(tmp_path: Path) -> None:
    path = experiment(tmp_path, '"training.learning_rate" = [0.1, -1.0]\n')

    with pytest.raises(ConfigError, match=r"\[sweep\] learning_rate--1\.0: .*run\.toml: .* > 0"):
        plan(path)


def test_a_run_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the run base/seed-1 more than once"):
        plan(experiment(tmp_path, "seeds = [1, 1]\n"))
