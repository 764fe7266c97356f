"""A row of a table as the model sees it, from the columns of the run's data contract.

    number      (x − mean) / std; 0 if empty
    category    one-hot over `values`; all 0 if empty
    optional    one more feature: 1 if the cell is empty

Columns come in the contract's order, as on a site (client/data/records.py): the same file
gives the same features on both. Cells are text, as in CSV; a number may be a JSON number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anabranch.edge.runtime.engine import Floats
from anabranch.protocols.tables import Column, ColumnType

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT64_MAX = float(np.finfo(np.float64).max)
MISSING = ("", "?")  # as on a site
FEATURES: tuple[ColumnType, ...] = ("number", "category")

Refuse = Callable[[str, int], Any]  # (problem, line) -> raises DataError


def name_of(columns: Mapping[str, Column], kind: ColumnType, otherwise: str) -> str:
    """Return the name of the only column of a type; `otherwise` if the contract has none."""
    names = [name for name, column in columns.items() if column.type == kind]
    return names[0] if len(names) == 1 else otherwise


def features(
    columns: Mapping[str, Column], rows: Sequence[tuple[int, Mapping[str, Any]]], refuse: Refuse
) -> Floats:
    """Return the features (n, F) of `rows`, pairs of line and cells by column name.

    Calls `refuse`, which raises, at the first cell that breaks the contract.
    """
    used = [(name, column) for name, column in columns.items() if column.type in FEATURES]
    table = []
    for line, row in rows:
        values: list[float] = []
        for name, column in used:
            if name not in row:
                refuse(f"column {name!r} is missing", line)
            try:
                values += _one(row[name], column)
            except ValueError as problem:
                refuse(f"column {name!r}: {problem}", line)
        table.append(values)
    return np.array(table, np.float64).astype(np.float32)


def _one(cell: Any, column: Column) -> list[float]:
    """Return the features of one cell; ValueError names the rule, never the cell."""
    empty = cell is None or (isinstance(cell, str) and cell.strip() in MISSING)
    if empty and not column.optional:
        raise ValueError("empty, and the column is not optional")
    if column.type == "number":
        values = [0.0 if empty else (_number(cell, column) - column.mean) / column.std]
        if not abs(values[0]) <= FLOAT32_MAX:
            raise ValueError("too large for float32 as (x − mean) / std")
    else:
        if not empty and cell not in column.values:
            raise ValueError(f"expected one of {', '.join(map(repr, column.values))}")
        values = [float(cell == value) for value in column.values]
    return [*values, float(empty)] if column.optional else values


def _number(cell: Any, column: Column) -> float:
    if isinstance(cell, str):
        if not NUMBER.fullmatch(cell.strip()):
            raise ValueError("expected a finite number")
        number = float(cell)
    elif isinstance(cell, int | float) and not isinstance(cell, bool):
        number = float(cell) if abs(cell) <= FLOAT64_MAX else math.inf  # of a long int: an error
    else:
        raise ValueError("expected a number")
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    if column.min is not None and number < column.min:
        raise ValueError(f"below the minimum {column.min:g}")
    if column.max is not None and number > column.max:
        raise ValueError(f"above the maximum {column.max:g}")
    return number
