"""The identity of a row as the site's file has it, whatever a run makes of it.

A row's hash is the SHA-256 of all its cells, also of columns that a data contract does not
name: the contract comes from the coordinator, who must not be able to give an old record a new
identity. Nor do the order of rows or columns, an empty column, or another file format change
it. The canonical bytes are "anabranch row 1\\n" and, for every cell that is not empty, by
ascending name of the column,

    len(name) name kind len(value) value        lengths: 8 bytes, little-endian

    cell                  kind    value
    text of a number      n       repr of the float64: "1", "1.0" and 1 are one value
    int, float, Decimal   n       the same
    boolean               t       "true" or "false"; so are their texts, in any case
    other text            t       the text without white space around it
    bytes                 b       the bytes
    image file            f       SHA-256 of its content; its name does not matter
    what no column holds  u       its kind (a date, a list): two of a kind are one value

Where two values count as one, two records are charged for each other's training: never less
than was spent. The hash is not secret: who knows all cells can compute it. It stays at the
site, and the ledger keys it (ledger.py).
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

from anabranch.client.data.read import Cell, Table, Unusable
from anabranch.protocols.errors import DataError

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

BOOLEANS = ("true", "false")


def row_hashes(table: Table) -> tuple[bytes, ...]:
    """Return the SHA-256 of every row, in the order of the table.

    Raises DataError if a file that a cell stands for cannot be read.
    """
    columns = [(_field(name.encode()), table.columns[name]) for name in sorted(table.columns)]
    return tuple(
        hashlib.sha256(
            b"anabranch row 1\n"
            + b"".join(
                name + _value(cells[row]) for name, cells in columns if cells[row] is not None
            )
        ).digest()
        for row in range(table.rows)
    )


def _value(cell: Cell) -> bytes:
    match cell:
        case bool():
            return b"t" + _field(str(cell).lower().encode())
        case int() | float():
            return b"n" + _field(_number(cell))
        case str():
            text = cell.strip()
            if NUMBER.fullmatch(text):
                return b"n" + _field(_number(text))
            return b"t" + _field((text.lower() if text.lower() in BOOLEANS else text).encode())
        case bytes():
            return b"b" + _field(cell)
        case Path():
            return b"f" + _field(_content(cell))
        case Unusable():
            return b"u" + _field(cell.kind.encode())
        case _:
            return b""  # empty: row_hashes leaves it out


def _number(value: str | int | float) -> bytes:
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    return repr(number + 0.0).encode()  # −0.0 becomes 0.0: they are equal


def _field(value: bytes) -> bytes:
    return len(value).to_bytes(8, "little") + value


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
