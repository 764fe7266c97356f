"""A row keeps its identity, whatever a contract, an order or a format makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from anabranch.client.data.read import Table, Unusable, read_table
from anabranch.client.data.records import Records, load_records, record_hashes, split
from anabranch.client.data.rows import row_hashes
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError
from tests.runs import table_run, write_table

MakeConfig = Callable[..., RunConfig]
cells = st.one_of(st.none(), st.integers(-5, 5), st.text("ab ", max_size=3), st.booleans())


def one(**cells: Any) -> bytes:
    """Return the hash of a table's only row."""
    (found,) = row_hashes(Table("site.csv", {k: [v] for k, v in cells.items()}, 1))
    return found


# Laws


@given(
    table=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6),
    data=st.data(),
)
def test_neither_order_of_rows_nor_of_columns_nor_an_empty_column_matters(
    table: list[tuple[Any, Any, Any]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(table))))
    columns: dict[str, list[Any]] = {n: [row[i] for row in table] for i, n in enumerate("xyz")}
    turned: dict[str, list[Any]] = {n: [columns[n][i] for i in order] for n in "zyx"}
    turned["empty"] = [None] * len(table)

    hashes = row_hashes(Table("a", columns, len(table)))

    assert list(row_hashes(Table("b", turned, len(table)))) == [hashes[i] for i in order]


@given(st.tuples(st.text(max_size=4), st.text(max_size=4)), st.tuples(st.text(), st.text()))
def test_cells_never_run_into_each_other(a: tuple[str, str], b: tuple[str, str]) -> None:
    same = one(**{a[0]: "v", "other": a[1]}) == one(**{b[0]: "v", "other": b[1]})

    assert same == ({a[0]: "v", "other": a[1].strip()} == {b[0]: "v", "other": b[1].strip()})


# Examples


def test_a_row_is_the_hash_of_its_canonical_bytes() -> None:
    def field(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text

    expected = b"anabranch row 1\n" + field(b"age") + b"n" + field(b"63.0")
    expected += field(b"note") + b"t" + field("fièvre".encode())

    found = one(note=" fièvre ", age="63", empty=None)

    assert found == hashlib.sha256(expected).digest()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1", 1),
        ("1.50", 1.5),
        (1, 1.0),
        ("-0", 0),
        ("1e3", "1000"),
        ("TRUE", True),
        ("false", False),
        (" a", "a "),
        ("9" * 400, float("inf")),
        (10**400, float("inf")),
        (Unusable("date"), Unusable("date")),
    ],
)
def test_one_value_written_in_two_ways_is_one_value(a: Any, b: Any) -> None:
    assert one(x=a) == one(x=b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("a", "b"),
        ("A", "a"),
        (1, 2),
        (1, True),
        ("1 2", "12"),
        (b"a", "a"),
        (0, None),
        (Unusable("date"), Unusable("list")),
    ],
)
def test_other_values_are_others(a: Any, b: Any) -> None:
    assert one(x=a) != one(x=b)
    assert one(x=a, y="c") != one(x="c", y=a)


def test_another_format_of_the_file_is_the_same_rows(tmp_path: Path) -> None:
    csv = write_table(tmp_path / "records.csv", n=5)
    header, *lines = (line.split(",") for line in csv.read_text().splitlines())
    rows = [{"a": float(a), "b": float(b), "y": y} for a, b, y in lines]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "records.tsv").write_text("\n".join("\t".join(line) for line in [header, *lines]))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "records.parquet")

    expected = row_hashes(read_table(csv))

    for suffix in ("jsonl", "tsv", "parquet"):
        assert row_hashes(read_table(tmp_path / f"records.{suffix}")) == expected


def test_no_contract_gives_a_row_another_identity(tmp_path: Path) -> None:
    file = write_table(tmp_path / "records.csv", n=12)
    file.write_text(file.read_text().replace("a,b,y", "a,b,y,note").replace("s\n", "s,x\n"))
    file.write_text(file.read_text().replace(",no\n", ",no,y\n"))
    configs = [
        table_run(),
        table_run(("mean = 1.0, std = 2.0", "mean = 7.0, std = 3.0")),
        table_run(('b = { type = "number" }', 'note = { type = "category", values = ["x", "y"] }')),
        table_run(
            ("seed = 3", "seed = 4"), ("local_epochs = 2", "local_epochs = 2\nholdout = 0.4")
        ),
    ]

    found = [load_records(file, config) for config in configs]

    assert len({one.identities() for one in found}) == 1
    assert len({tuple(record_hashes(one)) for one in found}) == 3


def test_identities_go_with_their_records(tmp_path: Path) -> None:
    file = write_table(tmp_path / "records.csv", n=20)
    everything = load_records(file, table_run())
    by_content = dict(zip(record_hashes(everything), everything.identities(), strict=True))

    for part in (*split(everything, 0.3, 0), everything.take([5, 5, 1])):
        expected = tuple(by_content[content] for content in record_hashes(part))
        assert part.identities() == expected


def test_records_without_a_file_are_what_the_model_sees() -> None:

    some = Records(["a", "b"], np.array([0, 1]))

    assert some.identities() == tuple(record_hashes(some))


def test_an_image_is_its_content_and_label(tmp_path: Path) -> None:
    for label, name, shade in (("cat", "1", 0), ("cat", "2", 200), ("dog", "3", 0)):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.new("L", (4, 4), shade).save(tmp_path / label / f"{name}.png")
    before = row_hashes(read_table(tmp_path))
    (tmp_path / "cat" / "1.png").rename(tmp_path / "cat" / "9.png")

    renamed = row_hashes(read_table(tmp_path))

    assert len(set(before)) == 3
    assert set(renamed) == set(before)


# Refusals


def test_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: cannot be read: No such file"):
        one(image=tmp_path / "gone.png")


def test_a_hash_for_every_record_or_for_none() -> None:

    with pytest.raises(ValueError, match="1 row hashes, but 2 labels"):
        Records(["a", "b"], np.array([0, 1]), (b"x" * 32,))
