import csv
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from anabranch.client.data.read import Unusable, read_table
from anabranch.protocols.errors import DataError

SECRET = "Ann Onymous"  # stands for what no message may show

lines = st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="\x85")
texts = st.text(lines | st.sampled_from(',"\t?'), max_size=8)
names = st.lists(st.text(lines, min_size=1, max_size=5), min_size=1, max_size=4, unique=True)


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Column names, and up to 5 records with a cell for each."""
    header = draw(names.filter(lambda names: any(name.strip() for name in names)))
    row = st.lists(texts, min_size=len(header), max_size=len(header))
    return header, draw(st.lists(row.filter(any), max_size=5))


def expected(header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, list[str | None]]:
    """Return the columns that reading must give: white space and a lone ? are empty."""
    return {
        name: [None if row[at].strip() in ("", "?") else row[at] for row in rows]
        for at, name in enumerate(header)
    }


@given(rectangle=rectangles(), newline=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_what_the_csv_writer_writes_is_read_back(
    rectangle: tuple[list[str], list[list[str]]],
    newline: str,
    bom: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    header, rows = rectangle
    file = tmp_path_factory.mktemp("csv") / "records.csv"
    with file.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator=newline, quoting=csv.QUOTE_ALL)
        writer.writerows([header, *rows])

    table = read_table(file)

    assert table.columns == expected(header, rows)
    assert table.rows == len(rows)


@given(rectangle=rectangles())
def test_csv_and_jsonl_and_parquet_agree(
    rectangle: tuple[list[str], list[list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    header, rows = rectangle
    folder = tmp_path_factory.mktemp("same")
    objects = [dict(zip(header, row, strict=True)) for row in rows]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n")
    arrays = [pa.array([row[at] for row in rows], pa.string()) for at in range(len(header))]
    parquet.write_table(pa.table(arrays, names=header), folder / "records.parquet")

    assert read_table(folder / "records.parquet").columns == expected(header, rows)
    if rows:
        assert read_table(folder / "records.jsonl").columns == expected(header, rows)


@given(data=st.binary(max_size=60), suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]))
def test_any_bytes_are_a_table_or_one_clear_error(
    data: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("any") / f"records{suffix}"
    file.write_bytes(data)

    try:
        table = read_table(file)
    except DataError as error:
        said, lengths = str(error), set()
    else:
        said, lengths = f"{file}", {len(column) for column in table.columns.values()} - {table.rows}

    assert said.startswith(str(file))
    assert not lengths


def test_csv_keeps_text_as_it_is_and_knows_missing_cells(tmp_path: Path) -> None:
    file = tmp_path / "records.csv"
    file.write_bytes(b'\xef\xbb\xbfage,note\r\n63,"line one\r\nline ""two"""\r\n\r\n?, \r\n')

    table = read_table(file)

    assert table.columns == {"age": ["63", None], "note": ['line one\r\nline "two"', None]}
    assert (table.rows, table.source) == (2, str(file))


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    file = tmp_path / "records.TSV"
    file.write_text('label\ttext\nham\t"Ok" lar, he said "hi\n')

    assert read_table(file).columns == {"label": ["ham"], "text": ['"Ok" lar, he said "hi']}


def test_a_header_alone_is_a_table_without_records(tmp_path: Path) -> None:
    file = tmp_path / "records.csv"
    file.write_text("age,sex")

    table = read_table(file)

    assert (table.columns, table.rows) == ({"age": [], "sex": []}, 0)


def test_absent_keys_in_jsonl_are_empty_cells(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": 1}\n\n{"b": "x\\u2028y", "a": null}\n{"b": true, "c": [1], "a": 2.5}\n')

    table = read_table(file)

    assert table.rows == 3
    assert table.columns == {
        "a": [1, None, 2.5],
        "b": [None, "x\u2028y", True],
        "c": [None, None, Unusable("list")],
    }


def test_nan_in_jsonl_reaches_the_contract_which_lists_every_row(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": NaN}\n{"a": -Infinity}\n')

    assert [str(cell) for cell in read_table(file).columns["a"]] == ["nan", "-inf"]


def test_parquet_types_become_cells_and_other_types_say_so(tmp_path: Path) -> None:
    file = tmp_path / "records.parquet"
    columns: dict[str, Any] = {
        "int": pa.array([1, None], pa.int32()),
        "float": pa.array([float("inf"), 0.5], pa.float32()),
        "half": pa.array(np.array([0.5, 2], np.float16)),
        "decimal": pa.array([Decimal("1.50"), None]),
        "name": pa.array(["x", ""]).dictionary_encode(),
        "image": pa.array([b"\x89PNG", None]),
        "day": pa.array([datetime(2020, 1, 1, tzinfo=UTC), None], pa.timestamp("ns", "UTC")),
        "list": pa.array([[1], None]),
    }
    parquet.write_table(pa.table(columns), file)

    table = read_table(file)

    assert table.columns == {
        "int": [1, None],
        "float": [float("inf"), 0.5],
        "half": [0.5, 2.0],
        "decimal": [1.5, None],
        "name": ["x", None],
        "image": [b"\x89PNG", None],
        "day": [Unusable("timestamp[ns, tz=UTC]"), None],
        "list": [Unusable("list"), None],
    }


def test_a_folder_of_parquet_style_name_does_not_add_columns(tmp_path: Path) -> None:
    file = tmp_path / "site=3" / "records.parquet"
    file.parent.mkdir()
    parquet.write_table(pa.table({"a": [1]}), file)

    assert list(read_table(file).columns) == ["a"]


def picture(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("L", (5, 3)).save(path)
    return path


def test_images_are_sorted_by_label_then_name(tmp_path: Path) -> None:
    files = [picture(tmp_path / name) for name in ("b/2.png", "a/10.jpeg", "b/1.JPG", "a/9.png")]
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "a" / ".hidden").touch()

    table = read_table(tmp_path)

    assert table.columns == {
        "image": [files[1], files[3], files[2], files[0]],
        "label": ["a", "a", "b", "b"],
    }


REFUSED_TEXT = [
    ("r.csv", b"", r"r\.csv: the file is empty; expected a header or a first record"),
    ("r.csv", b"\xef\xbb\xbf\n \r\n", r"r\.csv: the file is empty"),
    ("r.jsonl", b"\n\n", r"r\.jsonl: the file is empty"),
    ("r.parquet", b"", r"r\.parquet: the file is empty"),
    ("r.csv", b"a,b\n1,2\n3\n", r"line 3: 1 cells where the header has 2; look for a separator"),
    ("r.csv", b"a,b\n1,2,3\n", r"line 2: 3 cells where the header has 2"),
    ("r.tsv", b"a\tb\n1\t2\n\n3\t4\t5\n", r"line 4: 3 cells where the header has 2"),
    ("r.csv", b'a,b\n"x\ny",2\n3\n', r"line 4: 1 cells where"),
    ("r.csv", b'a\nx\n"Ann Onymous\n\n', r"line 3: unexpected end of data.*check its quotes"),
    ("r.csv", b'a\n"Ann" Onymous\n', r"line 2: ',' expected after '\"'.*check its quotes"),
    ("r.csv", b"a\n" + b"x" * 200_000, r"line 2: field larger than field limit"),
    ("r.csv", b"a\n1\n\x00\n", r"line 3: a NUL byte, which no text holds; save the file as UTF-8"),
    ("r.csv", b"a\n1\n2\nAnn \xe9\n", r"line 4: these bytes are not UTF-8; save the file as UTF-8"),
    ("r.csv", "a,b\n1,2\n".encode("utf-16"), r"line 1: these bytes are not UTF-8"),
    ("r.csv", b"\n63,Ann Onymous,63\n", r"line 2: columns 1 and 3 have the same name.*header\?"),
    ("r.jsonl", b'{"a": 1}\n{"a": Ann Onymous}\n', r"line 2: not JSON: Expecting value at char"),
    ("r.jsonl", b'{"a": 1}\n\n["Ann Onymous"]\n', r"line 3: expected one JSON object.*got list"),
    ("r.jsonl", b'{"a": 1, "a": 2}\n', r"line 1: a key appears twice in one object"),
    ("r.jsonl", b'{"a": "\\uD83d"}\n', r"line 1: half a surrogate pair"),
    ("r.jsonl", b'{"a": ' + b"[" * 99_999, r"line 1: nested too deeply"),
    ("r.jsonl", b'{"a": ' + b"9" * 9_999 + b"}", r"line 1: .* a number of too many digits"),
    ("r.jsonl", b'{"a": "\xff"}', r"line 1: these bytes are not UTF-8"),
    ("r.parquet", b"PAR1Ann OnymousPAR1", r"not a complete Parquet file \(Arrow.*write it again"),
    ("r.xlsx", b"PK", r"expected a folder of images or a file: \.csv, \.tsv, \.jsonl, \.parquet"),
]


@pytest.mark.parametrize(("name", "data", "says"), REFUSED_TEXT)
def test_a_broken_file_is_refused_with_its_line(
    name: str, data: bytes, says: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(data)

    with pytest.raises(DataError, match=says) as refusal:
        read_table(file)

    assert str(refusal.value).startswith(str(file))
    assert SECRET not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__


def test_a_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": "\\uD83D\\uDE00"}\n')

    assert read_table(file).columns == {"a": ["\N{GRINNING FACE}"]}


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no such file; check the path"):
        read_table(tmp_path / "none.csv")


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "records.parquet"
    parquet.write_table(pa.table({"a": list(range(100))}), file)
    file.write_bytes(file.read_bytes()[:-20])

    with pytest.raises(DataError, match=r"records\.parquet: not a complete Parquet file"):
        read_table(file)


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_parquet_file_is_a_table_or_one_clear_error(
    at: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "records.parquet"
    parquet.write_table(pa.table({"a": ["x", "y", None], "b": [1, 2, 3]}), file)
    data = bytearray(file.read_bytes())
    data[at % len(data)] = value
    file.write_bytes(data)

    try:
        said = read_table(file).source
    except DataError as error:
        said = str(error)

    assert said.startswith(str(file))


def test_parquet_columns_of_one_name_and_broken_text_are_refused(tmp_path: Path) -> None:
    twice, broken = tmp_path / "twice.parquet", tmp_path / "broken.parquet"
    parquet.write_table(pa.table([[1], [2]], names=["a", "a"]), twice)
    text = pa.array([b"Ann \xe9"], pa.binary()).cast(pa.string(), safe=False)
    parquet.write_table(pa.table({"a": text}), broken)

    with pytest.raises(DataError, match="two columns have the same name"):
        read_table(twice)
    with pytest.raises(DataError, match="column 1 holds bytes that are not UTF-8"):
        read_table(broken)


@pytest.mark.parametrize(
    ("stray", "says"),
    [
        ("x.png", r"x\.png: expected a sub-folder per label"),
        ("a/x.tiff", r"x\.tiff: expected an image \(\.png, \.jpg, \.jpeg\); move it out"),
        ("a/deeper/x.png", r"deeper: expected an image"),
    ],
)
def test_nothing_in_a_folder_of_images_is_passed_over(
    stray: str, says: str, tmp_path: Path
) -> None:
    picture(tmp_path / "a" / "good.png")
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).touch()

    with pytest.raises(DataError, match=says):
        read_table(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "label").mkdir()

    with pytest.raises(DataError, match=r"no images; expected <label>/<name>\.png"):
        read_table(tmp_path)
