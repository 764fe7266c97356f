"""Every line of docs/threat_model.md names a test, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "threat_model.md").read_text()
NAMED = "tests/server/coordinator/"
FILES = [f"{NAMED}test_{name}.py" for name in ("intruders", "lying_site", "gate")]


def rows(page: str) -> list[list[str]]:
    """Return the cells of the table, without its head."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def problems(cells: list[str]) -> list[str]:
    """Return what a line names that is not there; a line has four cells and names something."""
    if len(cells) != 4 or not all(cells):
        return [f"expected four cells, got {cells}"]
    named = re.findall(r"`([^`]+)`", cells[3])
    if not named:
        return [f"{cells[1]}: no test"]
    return [one for one in named if not there(one)]


def there(named: str) -> bool:
    """Whether a test, a file or a folder of them is there: `name`, `path`, `path::name`."""
    path, _, name = named.rpartition("::") if "::" in named else ("", "", named)
    if name.startswith("tests/"):
        found = ROOT / name
        return any(found.glob("test_*.py")) if found.is_dir() else found.is_file()
    return any(name in written_in(ROOT / file) for file in ([path] if path else FILES))


def written_in(file: Path) -> set[str]:
    """Return the names of the tests in a file; none if it is not there."""
    if not file.is_file():
        return set()
    body = ast.parse(file.read_text()).body
    return {one.name for one in body if isinstance(one, ast.FunctionDef)}


@pytest.mark.parametrize("cells", rows(PAGE), ids=lambda cells: cells[1][:40])
def test_every_line_names_tests_that_are_there(cells: list[str]) -> None:
    assert problems(cells) == []


@pytest.mark.parametrize(
    "cells",
    [
        ["stranger", "tries", "nothing stops it", "none"],
        ["stranger", "tries", "nothing stops it", "`test_that_nobody_wrote`"],
        ["stranger", "tries", "nothing stops it", "`tests/nowhere/`"],
        ["stranger", "tries", "nothing stops it", "`tests/test_threat_model.py::test_no`"],
        ["stranger", "tries", "`test_it`"],
    ],
)
def test_a_line_without_its_test_is_found(cells: list[str]) -> None:
    assert problems(cells) != []


def test_the_table_is_read() -> None:
    assert len(rows(PAGE)) > 20
