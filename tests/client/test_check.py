"""`anabranch site check`: what a data engineer reads before anything trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anabranch.client.check import check_data
from anabranch.protocols.errors import ConfigError, DataError
from tests.runs import PRIVATE, table_text, write_table


def run_file(tmp_path: Path, *replacements: tuple[str, str], extra: str = "") -> Path:
    path = tmp_path / "run.toml"
    path.write_text(table_text(*replacements, extra=extra))
    return path


def test_good_records_are_counted_and_named_by_a_fingerprint(tmp_path: Path) -> None:
    data = write_table(tmp_path / "records.csv", n=30)

    found = check_data(data, run_file(tmp_path))

    assert found.ok
    assert sum(found.counts.values()) == found.rows == 30
    assert "30 records keep the data contract" in found.text()
    assert "this run is NOT private" in found.text()


def test_a_private_run_says_what_it_will_cost(tmp_path: Path) -> None:
    data = write_table(tmp_path / "records.csv", n=30)
    run = run_file(tmp_path, ("local_epochs = 2", "local_steps = 3"), extra=PRIVATE)

    found = check_data(data, run)

    assert found.plan is not None
    assert 7.9 < found.plan.epsilon <= 8.0
    assert f"costs each record epsilon {found.plan.epsilon:.2f} at delta 3.3e-03" in found.text()


def test_the_fingerprint_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    data = write_table(tmp_path / "records.csv", n=12)
    head, *rows = data.read_text().splitlines()
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join([head, *reversed(rows)]) + "\n")
    run = run_file(tmp_path)

    assert check_data(data, run).fingerprint == check_data(turned, run).fingerprint


def test_every_violation_is_listed_and_no_cell_is_shown_unless_asked(tmp_path: Path) -> None:
    data = tmp_path / "records.csv"
    data.write_text("a,b,y\n1,2,yes\nsecret-a,2,yes\n1,nan,secret-label\n1,2,no\n")
    run = run_file(tmp_path)

    found = check_data(data, run)
    shown = check_data(data, run, show_values=True)

    assert not found.ok
    assert [(v.column, v.rows) for v in found.violations] == [("a", (2,)), ("b", (3,)), ("y", (3,))]
    assert "secret" not in found.text() + json.dumps(found.as_dict())
    assert "secret-a" in shown.text()
    assert "secret-label" in shown.text()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    data = tmp_path / "records.csv"
    data.write_text("a,y\n1,yes\n")

    found = check_data(data, run_file(tmp_path))

    assert [v.column for v in found.violations] == ["b"]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "records.csv"
    data.write_text("")

    with pytest.raises(DataError, match=r"records\.csv.*empty"):
        check_data(data, run_file(tmp_path))


def test_a_missing_run_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: No such file.*give the path of a run\.toml"):
        check_data(tmp_path / "records.csv", tmp_path / "run.toml")
