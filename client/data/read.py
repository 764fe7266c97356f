"""Files to columns of cells: CSV, TSV, JSONL, Parquet, and folders of images.

    suffix        convention                                                     columns
    .csv          RFC 4180: UTF-8, comma, cells quoted with "                    first line
    .tsv          IANA text/tab-separated-values: UTF-8, tab, no quoting         first line
    .jsonl        one JSON object per line; an absent key is an empty cell       union of keys
    .parquet      Apache Parquet, one flat column per field                      schema
    a folder      <label>/<name>.png|.jpg|.jpeg, sorted by label, then name      image, label

A cell that is nothing but white space or a lone "?" (UCI's sign for it) is empty in every
format and becomes None. Blank lines are skipped, so row numbers count records: row 1 is the
first one. Nothing is guessed or repaired: the first thing that is structurally wrong ends
the reading with a DataError that says where, and shows nothing of what the file holds.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from anabranch.protocols.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MISSING = ("", "?")
EMPTY = "the file is empty; expected a header or a first record"


@dataclass(frozen=True)
class Unusable:
    """A cell no column type can hold: a list, an object, a date."""

    kind: str


Never = frozenset[str]  # names of columns that are not to be read
Cell = str | int | float | bytes | Path | Unusable | None


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length, in the order of the file."""

    source: str
    columns: dict[str, list[Cell]]
    rows: int


def read_table(path: Path, never: Never = frozenset()) -> Table:
    """Return what `path` holds, or raise DataError naming the file and, where it has one, the line.

    Every table is held in memory as a whole, but for the columns in `never`: it is as if they were
    not in the file. Cells of theirs that stand between others are passed over and not kept.
    """
    try:
        if path.is_dir():
            return _read_images(path, never)
        if not path.exists():
            _refuse(path, "no such file; check the path of the records")
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            _refuse(path, f"expected a folder of images or a file: {', '.join(_READERS)}")
        if path.stat().st_size == 0:
            _refuse(path, EMPTY)
        return reader(path, never)
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror or error}")


def _refuse(path: Path, problem: str, *, line: int | None = None) -> NoReturn:
    where = f"{path}, line {line}" if line is not None else f"{path}"
    raise DataError(f"{where}: {problem}") from None


def _read_text(path: Path) -> str:
    """Return the file as text without a byte order mark; refuse what is not UTF-8 text."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _refuse(path, "these bytes are not UTF-8; save the file as UTF-8", line=line)
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        _refuse(path, "a NUL byte, which no text holds; save the file as UTF-8", line=line)
    if not text.strip():
        _refuse(path, EMPTY)
    return text


def _read_csv(path: Path, never: Never) -> Table:
    lines = io.StringIO(_read_text(path), newline="")
    return _read_rows(path, csv.reader(lines, strict=True), never)


def _read_tsv(path: Path, never: Never) -> Table:
    lines = io.StringIO(_read_text(path), newline="")
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    return _read_rows(path, reader, never)


def _read_rows(path: Path, reader: Any, never: Never) -> Table:
    """Return the records of a csv reader; every record has as many cells as the header."""
    records = _records(path, reader)
    line, header = next(records)
    for at, name in enumerate(header):
        if name in header[:at]:
            first = header.index(name) + 1
            problem = (
                f"columns {first} and {at + 1} have the same name; "
                "every column needs its own (is the first line a header?)"
            )
            _refuse(path, problem, line=line)
    columns: dict[str, list[Cell]] = {name: [] for name in header if name not in never}
    kept = [(columns[name], at) for at, name in enumerate(header) if name not in never]
    rows = 0
    for line, record in records:
        if len(record) != len(header):
            problem = (
                f"{len(record)} cells where the header has {len(header)}; "
                "look for a separator inside a cell, or a cell that is missing"
            )
            _refuse(path, problem, line=line)
        for column, at in kept:
            column.append(_cell(record[at]))
        rows += 1
    return Table(str(path), columns, rows)


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which the record begins, cells); blank lines are no records."""
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"{error}, in the record that begins here; check its quotes"
            _refuse(path, problem, line=line)
        if record:
            yield line, record


def _read_jsonl(path: Path, never: Never) -> Table:
    columns: dict[str, list[Cell]] = {}
    rows = 0
    for line, text in enumerate(_read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        for name, value in _parse_object(path, line, text).items():
            if name in never:
                continue
            column = columns.setdefault(name, [])
            column.extend([None] * (rows - len(column)))
            column.append(_cell(value))
        rows += 1
    for column in columns.values():
        column.extend([None] * (rows - len(column)))
    return Table(str(path), columns, rows)


def _parse_object(path: Path, line: int, text: str) -> dict[str, Any]:
    """Return one line's object. NaN and Infinity are read (they are numbers to Python, which
    writes such files), so that the contract can list every row that holds one.
    """
    try:
        value = json.loads(text, object_pairs_hook=_pairs)
        if "\\ud" in text.lower():  # escaped surrogates: in pairs they are one character
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        _refuse(path, f"not JSON: {error.msg} at character {error.pos + 1}", line=line)
    except _RepeatedKey:
        _refuse(path, "a key appears twice in one object; every key needs its own name", line=line)
    except UnicodeEncodeError:
        _refuse(path, r"half a surrogate pair (\ud800 to \udfff), which is no character", line=line)
    except (RecursionError, ValueError):
        _refuse(path, "nested too deeply, or a number of too many digits", line=line)
    if not isinstance(value, dict):
        _refuse(path, f"expected one JSON object per line, got {_kind(value)}", line=line)
    return value


class _RepeatedKey(Exception):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _RepeatedKey
    return result


def _read_parquet(path: Path, never: Never) -> Table:
    import pyarrow  # here and not above: it takes longer to import than the rest together
    from pyarrow import parquet

    with path.open("rb") as file:
        try:
            opened = parquet.ParquetFile(file)
            wanted = [name for name in opened.schema_arrow.names if name not in never]
            table = opened.read(columns=wanted if never else None)
        except Exception as error:  # noqa: BLE001 -- pyarrow has no one error for damaged bytes
            _refuse(path, f"not a complete Parquet file ({type(error).__name__}); write it again")
    names = table.column_names
    if len(set(names)) != len(names):
        _refuse(path, "two columns have the same name; every column needs its own")
    columns: dict[str, list[Cell]] = {}
    for at, name in enumerate(names, 1):
        if name in never:  # "a" brings "a.b" with it
            continue
        try:
            columns[name] = _arrow_cells(table.column(name))
        except (pyarrow.ArrowException, UnicodeDecodeError):
            _refuse(
                path, f"column {at} holds bytes that are not UTF-8; write it as binary or mend it"
            )
    return Table(str(path), columns, table.num_rows)


def _arrow_cells(column: Any) -> list[Cell]:
    """Return an Arrow column as cells; dates and nested values are not unpacked."""
    from pyarrow import types

    if types.is_nested(column.type) or types.is_temporal(column.type):
        unusable = Unusable(str(column.type).split("<")[0])
        return [None if empty else unusable for empty in column.is_null().to_pylist()]
    return [_cell(value) for value in column.to_pylist()]


def _read_images(folder: Path, never: Never) -> Table:
    images: list[Cell] = []
    labels: list[Cell] = []
    for label in _visible(folder):
        if not label.is_dir():
            _refuse(label, "expected a sub-folder per label; move the file into one or out")
        for image in _visible(label):
            if image.suffix.lower() not in IMAGE_SUFFIXES or not image.is_file():
                _refuse(image, f"expected an image ({', '.join(IMAGE_SUFFIXES)}); move it out")
            images.append(image)
            labels.append(label.name)
    if not images:
        _refuse(folder, "no images; expected <label>/<name>.png in it")
    columns = {"image": images, "label": labels}
    kept = {name: cells for name, cells in columns.items() if name not in never}
    return Table(str(folder), kept, len(images))


def _visible(folder: Path) -> list[Path]:
    """Return what lies in a folder by name, without hidden files such as .DS_Store."""
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        _refuse(folder, f"cannot be listed: {error.strerror or error}")
    return [entry for entry in entries if not entry.name.startswith(".")]


def _cell(value: Any) -> Cell:
    """Return a value as a cell; `None` stands for every way of being empty."""
    match value:
        case str():
            return None if value.strip() in MISSING else value
        case None | int() | float() | bytes():  # bool is an int
            return value
        case Decimal():
            return float(value)
        case _:
            return Unusable(_kind(value))


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text", type(None): "null"}.get(
        type(value), type(value).__name__
    )


_READERS: dict[str, Callable[[Path, Never], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
