"""A table's row gives the same features on a device as on a site."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.data.records import load_records
from anabranch.edge.runtime.columns import features, name_of
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError
from anabranch.protocols.tables import Column, Contract, Federation, Model, Task

COLUMNS = {
    "age": Column(type="number", min=0, max=120, mean=60, std=15),
    "pressure": Column(type="number", optional=True, mean=125, std=20),
    "smoker": Column(type="category", values=("no", "yes")),
    "ward": Column(type="category", values=("a", "b", "c"), optional=True),
    "result": Column(type="label"),
}
CONFIG = RunConfig(
    name="columns",
    task=Task(kind="tabular-classification", labels=("no", "yes")),
    data=Contract(columns=COLUMNS),
    model=Model(base="logistic"),
    federation=Federation(rounds=1),
)


def refuse(problem: str, line: int) -> NoReturn:
    raise DataError(f"line {line}: {problem}")


def rows_of(path: Path) -> list[tuple[int, dict[str, str]]]:
    with path.open(newline="") as file:
        return list(enumerate(csv.DictReader(file), 2))


record = st.fixed_dictionaries(
    {
        "age": st.floats(0, 120, allow_subnormal=False).map(repr),
        "pressure": st.one_of(st.sampled_from(["", " ", "?"]), st.floats(-1e6, 1e6).map(repr)),
        "smoker": st.sampled_from(["no", "yes"]),
        "ward": st.sampled_from(["", "?", "a", "b", "c"]),
        "result": st.sampled_from(["no", "yes"]),
    }
)


@given(records=st.lists(record, min_size=1, max_size=8))
def test_a_device_and_a_site_read_the_same_features(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("table") / "records.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(records)

    expected = load_records(path, CONFIG).inputs

    np.testing.assert_array_equal(features(COLUMNS, rows_of(path), refuse), expected)


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"age": "121"}, "line 2: column 'age': above the maximum 120"),
        ({"age": "-1"}, "line 2: column 'age': below the minimum 0"),
        ({"age": ""}, "line 2: column 'age': empty, and the column is not optional"),
        ({"age": "nan"}, "line 2: column 'age': expected a finite number"),
        ({"age": "1_000"}, "line 2: column 'age': expected a finite number"),
        ({"smoker": "Yes"}, "line 2: column 'smoker': expected one of 'no', 'yes'"),
        ({"age": None}, "line 2: column 'age': empty"),
        ({"age": True}, "line 2: column 'age': expected a number"),
        ({"age": 10**400}, "line 2: column 'age': expected a finite number"),
    ],
)
def test_a_cell_that_breaks_the_contract_is_named_by_line_and_column(
    cells: dict[str, object], problem: str
) -> None:
    good = {"age": "50", "pressure": "", "smoker": "no", "ward": "a", "result": "no"}

    with pytest.raises(DataError, match=problem):
        features(COLUMNS, [(2, good | cells)], refuse)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="column 'age' is missing"):
        features(COLUMNS, [(2, {})], refuse)


def test_the_column_of_a_type_is_found_by_type() -> None:
    assert name_of(COLUMNS, "label", "y") == "result"
    assert name_of(COLUMNS, "text", "text") == "text"
