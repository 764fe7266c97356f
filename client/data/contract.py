"""The data contract: what every record must look like, checked before anything trains.

Records are parsed once, against `[data]` of the run's configuration, and every cell that
breaks a rule is found, not only the first:

    rule          broken when
    column        a column of the contract is not in the file (optional ones too)
    forbidden     a forbidden column is in the file
    empty         a cell is empty, and the column is not optional
    type          a number that is not finite or no number, a text that is no text, ...
    min, max      a number lies outside the bounds
    category      a value is not one of the column's `values`
    label         a label is not one of task.labels
    length        a text has more than max_characters characters
    image         an image cannot be read
    rows          there are fewer than min_rows records

Row 1 is the first record. Labels and categories match exactly: case and spaces count, an
integer 1 is "1" (as is 1.0), a boolean is "true" or "false". Columns the contract does not
name are dropped. A label is never optional.

A violation's message names rows, rules and what the contract allows, never what a record
holds, so it can be sent to the coordinator; what the cells hold is kept beside it, in
`values`, for the eyes of whoever may see the records. The name of an image file is such a
value: files are named after people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.client.data.images import UnreadableImage, decode
from anabranch.client.data.read import Cell, Table, Unusable
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError
from anabranch.protocols.tables import Column

Rule = Literal[
    "column", "forbidden", "empty", "type", "min", "max",
    "category", "label", "length", "image", "rows",
]  # fmt: skip

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
FLOAT32_MAX = float(np.finfo(np.float32).max)
NOT_CHOSEN = -1  # index of an empty optional category


@dataclass(frozen=True)
class Violation:
    """One rule broken in one column, with every row that breaks it."""

    column: str  # "" when it is about the file as a whole
    rule: Rule
    rows: tuple[int, ...]  # 1 is the first record; ascending and complete
    message: str
    values: tuple[str, ...] = field(default=(), repr=False)  # what the rows hold: confidential


@dataclass(frozen=True, eq=False)
class Parsed:
    """A table that has been through the contract; whole only if `violations` is empty."""

    violations: list[Violation]
    columns: dict[str, list[Any]]  # float (NaN if empty), index, str, or (channels, size, size)


def parse(table: Table, config: RunConfig) -> Parsed:
    """Return the columns of the contract and everything that breaks it, in contract order."""
    found: list[Violation] = []
    columns: dict[str, list[Any]] = {}
    for name in config.data.forbidden:
        if name in table.columns:
            message = "forbidden column: take it out of the file"
            found.append(Violation(name, "forbidden", (), message))
    for name, column in config.data.columns.items():
        if name not in table.columns:
            found.append(Violation(name, "column", (), _missing(column)))
            continue
        read = _reader(column, config, Path(table.source))
        columns[name], broken = _parse_column(name, column, table.columns[name], read)
        found.extend(broken)
    if table.rows < config.data.min_rows:
        message = f"records: {table.rows}, at least {config.data.min_rows} are needed"
        found.append(Violation("", "rows", (), message))
    return Parsed(found, columns)


def check(table: Table, config: RunConfig) -> list[Violation]:
    """Return everything in which the table breaks the contract; [] means that it holds."""
    return parse(table, config).violations


def require(table: Table, config: RunConfig) -> None:
    """Raise DataError listing every violation, unless the contract holds."""
    accept(table, config)


def accept(table: Table, config: RunConfig) -> dict[str, list[Any]]:
    """Return the parsed columns, or raise DataError listing every violation."""
    parsed = parse(table, config)
    if parsed.violations:
        raise DataError(describe(parsed.violations, source=table.source))
    return parsed.columns


def describe(violations: Sequence[Violation], *, source: str, show_values: bool = False) -> str:
    """Return one line per violation, under a head line. `show_values` prints records' content."""
    count = f"{len(violations)} violation{'s' if len(violations) != 1 else ''}"
    lines = [f"{source}: {count} of the data contract; nothing was trained"]
    for violation in violations:
        line = f"{violation.column}: {violation.message}" if violation.column else violation.message
        if violation.rows:
            line += f": {'rows' if len(violation.rows) > 1 else 'row'} {ranges(violation.rows)}"
        lines.append(f"  {line}")
        if show_values:
            pairs = zip(violation.rows, violation.values, strict=False)
            lines.extend(f"    row {row}: {value}" for row, value in pairs)
    return "\n".join(lines)


def ranges(rows: Iterable[int]) -> str:
    """Return ascending numbers as text, runs of three and more joined: "1, 2, 5-9"."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], row)
        else:
            runs.append((row, row))
    parts: list[int | str] = []
    for first, last in runs:
        parts += [f"{first}-{last}"] if last > first + 1 else sorted({first, last})
    return ", ".join(str(part) for part in parts)


class _Broken(Exception):
    """A cell breaks a rule. Raised by readers, caught for every cell."""

    def __init__(self, rule: Rule, message: str) -> None:
        super().__init__(message)
        self.rule: Rule = rule
        self.message = message


def _missing(column: Column) -> str:
    hint = "; an optional column may hold empty cells, but must be there" * column.optional
    return f"column missing (expected type {column.type}){hint}"


def _parse_column(
    name: str, column: Column, cells: Sequence[Cell], read: Callable[[Cell], Any]
) -> tuple[list[Any], list[Violation]]:
    """Return the values of the good cells, and the broken ones grouped by rule and message."""
    optional = column.optional and column.type != "label"
    empty = {"number": math.nan, "category": NOT_CHOSEN, "text": ""}.get(column.type)
    values: list[Any] = []
    groups: dict[tuple[Rule, str], list[tuple[int, str]]] = {}
    for row, cell in enumerate(cells, 1):
        try:
            if cell is not None:
                values.append(read(cell))
            elif optional and empty is not None:
                values.append(empty)
            else:
                raise _Broken("empty", "empty cell in a column that is not optional")
        except _Broken as broken:
            groups.setdefault((broken.rule, broken.message), []).append((row, _shown(cell)))
    violations = [
        Violation(name, rule, tuple(r for r, _ in rows), message, tuple(v for _, v in rows))
        for (rule, message), rows in groups.items()
    ]
    return values, violations


def _shown(cell: Cell) -> str:
    if isinstance(cell, bytes):
        return f"{len(cell)} bytes"
    return repr(str(cell)) if isinstance(cell, str | Path) else str(cell)


def _reader(column: Column, config: RunConfig, source: Path) -> Callable[[Cell], Any]:
    """Return the function that turns one cell that is not empty into a value, or raises _Broken."""
    match column.type:
        case "number":
            return lambda cell: _number(cell, column)
        case "category":
            values = _index(column.values)
            return lambda cell: _choice(cell, "category", values)
        case "label":
            labels = _index(config.task.labels)
            return lambda cell: _choice(cell, "label", labels)
        case "text":
            return lambda cell: _text(cell, config.data.max_characters)
        case "image":
            folder = source if source.is_dir() else source.parent
            return lambda cell: _image(cell, folder, config)


def _number(cell: Cell, column: Column) -> float:
    number = _finite(cell)
    if column.min is not None and number < column.min:
        raise _Broken("min", f"below the minimum {column.min:g}")
    if column.max is not None and number > column.max:
        raise _Broken("max", f"above the maximum {column.max:g}")
    if not abs((number - column.mean) / column.std) <= FLOAT32_MAX:
        raise _Broken("type", "too large for float32 as (x − mean) / std")
    return number


def _finite(cell: Cell) -> float:
    if isinstance(cell, str):
        text = cell.strip()
        if not NUMBER.fullmatch(text):
            spelled = text.lower().lstrip("+-") in ("nan", "inf", "infinity")
            raise _Broken("type", _NOT_FINITE if spelled else "not a number")
        number = float(text)
    elif isinstance(cell, int | float):
        try:
            number = float(cell)
        except OverflowError:
            number = math.inf
    else:
        raise _Broken("type", f"expected a number, got {_type_of(cell)}")
    if not math.isfinite(number):
        raise _Broken("type", _NOT_FINITE)
    return number


_NOT_FINITE = "not a finite number (NaN or infinite); leave the cell empty if it is unknown"


def _index(names: Sequence[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


def _choice(cell: Cell, rule: Literal["category", "label"], allowed: Mapping[str, int]) -> int:
    match cell:
        case bool():
            name = "true" if cell else "false"
        case int():
            name = str(cell)
        case float():
            name = str(int(cell)) if cell.is_integer() else repr(cell)
        case str():
            name = cell
        case _:
            raise _Broken("type", f"expected a {rule}, got {_type_of(cell)}")
    if name not in allowed:
        what = "label" if rule == "label" else "value"
        raise _Broken(rule, f"unknown {what} (allowed, spelled exactly so: {', '.join(allowed)})")
    return allowed[name]


def _text(cell: Cell, max_characters: int) -> str:
    if not isinstance(cell, str):
        raise _Broken("type", f"expected text, got {_type_of(cell)}")
    if len(cell) > max_characters:
        raise _Broken("length", f"longer than {max_characters} characters")
    return cell


def _image(cell: Cell, folder: Path, config: RunConfig) -> NDArray[np.float32]:
    """Read an image given as bytes, or as a path relative to the table it stands in."""
    if not isinstance(cell, str | Path | bytes):
        raise _Broken("type", f"expected an image, got {_type_of(cell)}")
    image = folder / cell if isinstance(cell, str) else cell
    try:
        return decode(image, channels=config.model.channels, size=config.model.image_size)
    except UnreadableImage as error:
        raise _Broken("image", f"the image cannot be read ({error})") from None


def _type_of(cell: Cell) -> str:
    if isinstance(cell, Unusable):
        return cell.kind
    kinds = {bool: "true or false", int: "a number", float: "a number", bytes: "bytes"}
    return kinds.get(type(cell), "text")
