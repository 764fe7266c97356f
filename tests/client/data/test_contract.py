from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anabranch.client.data.contract import Violation, check, describe, parse, ranges, require
from anabranch.client.data.read import Cell, Table, Unusable, read_table
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError

MakeConfig = Callable[..., RunConfig]
SECRET = "Ann Onymous"

COLUMNS: dict[str, Any] = {
    "age": {"type": "number", "min": 0, "max": 120},
    "chol": {"type": "number", "optional": True},
    "pain": {"type": "category", "values": ["none", "some", "1"]},
    "sex": {"type": "category", "values": ["f", "m"], "optional": True},
    "ill": {"type": "label"},
}
GOOD: dict[str, Cell] = {"age": "63", "chol": "2.5e2", "pain": "some", "sex": "f", "ill": "yes"}


def table(*records: dict[str, Any], source: str = "site.csv") -> Table:
    """Records that differ from a good one in the cells given."""
    rows = [{**GOOD, **record} for record in records]
    return Table(source, {name: [row[name] for row in rows] for name in GOOD}, len(rows))


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> RunConfig:
    return make_config("tabular", COLUMNS)


numbers = st.floats(-200, 300) | st.integers(-10, 10**400) | st.sampled_from(["x", "nan", "1_0"])
cells = {
    "age": numbers | st.none(),
    "chol": numbers | st.none(),
    "pain": st.sampled_from(["none", "None", 1, 1.0, 2, "?", True, None]),
    "sex": st.sampled_from(["f", "m", "x", None]),
    "ill": st.sampled_from(["yes", "no", "maybe", None, b"yes"]),
}


@given(records=st.lists(st.fixed_dictionaries(cells), min_size=1, max_size=8))
def test_all_violations_are_those_of_each_record_alone(
    records: list[dict[str, Any]], config: RunConfig
) -> None:
    """None is hidden, none is invented, each has its row: check is a sum over records."""
    alone = {
        (v.column, v.rule, v.message, row)
        for row, record in enumerate(records, 1)
        for v in check(table(record), config)
    }
    together = check(table(*records), config)

    assert {(v.column, v.rule, v.message, row) for v in together for row in v.rows} == alone
    assert len({(v.column, v.rule, v.message) for v in together}) == len(together)


@given(records=st.lists(st.fixed_dictionaries(cells), min_size=1, max_size=8))
def test_values_are_parsed_for_every_row_exactly_if_nothing_is_broken(
    records: list[dict[str, Any]], config: RunConfig
) -> None:
    parsed = parse(table(*records), config)

    whole = all(len(values) == len(records) for values in parsed.columns.values())
    assert whole == (not parsed.violations)


@given(rows=st.sets(st.integers(1, 40)).map(sorted))
def test_ranges_name_every_row_and_no_other(rows: list[int]) -> None:
    named: list[int] = []
    for part in filter(None, ranges(rows).split(", ")):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)

    assert named == rows


def test_ranges_join_runs_of_three() -> None:
    assert ranges([1, 2, 5, 6, 7, 9]) == "1, 2, 5-7, 9"


def test_good_records_break_nothing(config: RunConfig) -> None:
    good = table(
        {}, {"age": " .7 ", "chol": None, "sex": None}, {"age": 120, "pain": 1.0}, {"age": "0"}
    )

    assert check(good, config) == []
    require(good, config)


ALLOWED = r"\(allowed, spelled exactly so: "

BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"age": None}, "empty", "age: empty cell in a column that is not optional: row 2"),
    ({"ill": None}, "empty", "ill: empty cell in a column that is not optional: row 2"),
    ({"age": "x"}, "type", "age: not a number: row 2"),
    ({"age": "1_000"}, "type", "age: not a number: row 2"),
    ({"age": "1,5"}, "type", "age: not a number: row 2"),
    ({"age": "NaN"}, "type", r"age: not a finite number \(NaN or infinite\); leave the cell empty"),
    ({"age": float("nan")}, "type", r"age: not a finite number \(NaN or infinite\).*: row 2"),
    ({"chol": "-inf"}, "type", "chol: not a finite number"),
    ({"chol": "1e999"}, "type", "chol: not a finite number"),
    ({"chol": 10**400}, "type", "chol: not a finite number"),
    ({"chol": 1e300}, "type", r"chol: too large for float32 as \(x − mean\) / std: row 2"),
    ({"chol": b"1"}, "type", "chol: expected a number, got bytes: row 2"),
    ({"chol": Unusable("list")}, "type", "chol: expected a number, got list: row 2"),
    ({"age": -1}, "min", "age: below the minimum 0: row 2"),
    ({"age": "120.5"}, "max", "age: above the maximum 120: row 2"),
    ({"pain": SECRET}, "category", f"pain: unknown value {ALLOWED}none, some, 1\\): row 2"),
    ({"pain": "Some"}, "category", "pain: unknown value"),
    ({"pain": True}, "category", "pain: unknown value"),
    ({"pain": "1.0"}, "category", "pain: unknown value"),
    ({"sex": Unusable("object")}, "type", "sex: expected a category, got object: row 2"),
    ({"ill": SECRET}, "label", f"ill: unknown label {ALLOWED}no, yes\\): row 2"),
    ({"ill": "yes "}, "label", "ill: unknown label"),
    ({"ill": 1}, "label", "ill: unknown label"),
]


@pytest.mark.parametrize(("record", "rule", "says"), BROKEN)
def test_a_broken_cell_is_refused_with_its_row(
    record: dict[str, Any], rule: str, says: str, config: RunConfig
) -> None:
    broken = table({}, record, {})

    with pytest.raises(DataError, match=says) as refusal:
        require(broken, config)

    assert [(v.rule, v.rows) for v in check(broken, config)] == [(rule, (2,))]
    assert "site.csv: 1 violation of the data contract; nothing was trained" in str(refusal.value)
    assert SECRET not in str(refusal.value)


def test_every_violation_is_listed_at_once_in_contract_order(config: RunConfig) -> None:
    broken = table({"ill": "a"}, {"age": -1}, {"age": "x", "ill": "b"}, {"age": -2}, {"age": -3})

    with pytest.raises(DataError) as refusal:
        require(broken, config)

    assert str(refusal.value).split("\n") == [
        "site.csv: 3 violations of the data contract; nothing was trained",
        "  age: below the minimum 0: rows 2, 4, 5",
        "  age: not a number: row 3",
        "  ill: unknown label (allowed, spelled exactly so: no, yes): rows 1, 3",
    ]


def test_wrong_forbidden_and_further_columns(make_config: MakeConfig) -> None:
    config = make_config("tabular", COLUMNS, forbidden=["name", "born"], min_rows=3)
    columns: dict[str, list[Cell]] = {name: [GOOD[name]] for name in ("age", "pain", "ill")}
    columns |= {"name": [SECRET], "Sex": ["f"], "height": [1]}

    with pytest.raises(DataError) as refusal:
        require(Table("site.csv", columns, 1), config)

    hint = "an optional column may hold empty cells, but must be there"
    assert str(refusal.value).split("\n") == [
        "site.csv: 4 violations of the data contract; nothing was trained",
        "  name: forbidden column: take it out of the file",
        f"  chol: column missing (expected type number); {hint}",
        f"  sex: column missing (expected type category); {hint}",
        "  records: 1, at least 3 are needed",
    ]
    assert [(v.column, v.rule, v.rows) for v in check(Table("site.csv", columns, 1), config)] == [
        ("name", "forbidden", ()),
        ("chol", "column", ()),
        ("sex", "column", ()),
        ("", "rows", ()),
    ]


def test_a_file_with_a_header_alone_has_too_few_records(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "site.csv").write_text(",".join(GOOD) + "\n")

    with pytest.raises(
        DataError, match=r"site\.csv: 1 vio(.|\n)*records: 0, at least 1 are needed"
    ):
        require(read_table(tmp_path / "site.csv"), config)


def test_text_is_text_and_not_too_long(make_config: MakeConfig) -> None:
    columns = {"text": {"type": "text"}, "spam": {"type": "label"}}
    config = make_config("text", columns, max_characters=4)
    texts: list[Cell] = ["four", "fives", 7, "sixsix"]
    sms = Table("sms.jsonl", {"text": texts, "spam": [True, "no", "no", "no"]}, 4)
    truth = make_config("text", columns, ("true", "no"), max_characters=4)

    assert [(v.rule, v.rows, v.message) for v in check(sms, config)] == [
        ("length", (2, 4), "longer than 4 characters"),
        ("type", (3,), "expected text, got a number"),
        ("label", (1,), "unknown label (allowed, spelled exactly so: no, yes)"),
    ]
    assert [v.column for v in check(sms, truth)] == ["text", "text"]


def test_values_are_shown_only_when_asked(config: RunConfig) -> None:
    found = check(table({"ill": SECRET}, {}, {"pain": b"12", "ill": "Bob"}), config)

    hidden = describe(found, source="site.csv")
    shown = describe(found, source="site.csv", show_values=True)

    assert SECRET not in hidden + repr(found)
    assert shown.split("\n")[1:] == [
        "  pain: expected a category, got bytes: row 3",
        "    row 3: 2 bytes",
        "  ill: unknown label (allowed, spelled exactly so: no, yes): rows 1, 3",
        "    row 1: 'Ann Onymous'",
        "    row 3: 'Bob'",
    ]


def test_unreadable_images_are_all_named(make_config: MakeConfig, tmp_path: Path) -> None:
    for name in ("no/1.png", "no/2.png", "yes/3.jpg", "maybe/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (6, 9)).save(tmp_path / name)
    (tmp_path / "no" / "2.png").write_bytes(b"")
    (tmp_path / "yes" / "3.jpg").write_bytes((tmp_path / "yes" / "3.jpg").read_bytes()[:100])
    columns = {"image": {"type": "image"}, "label": {"type": "label"}}

    found = check(read_table(tmp_path), make_config("image", columns))

    assert [(v.column, v.rule, v.rows, v.message) for v in found] == [
        ("image", "image", (3,), "the image cannot be read (not a PNG or JPEG image)"),
        ("image", "image", (4,), "the image cannot be read (a damaged image)"),
        ("label", "label", (1,), "unknown label (allowed, spelled exactly so: no, yes)"),
    ]


def test_images_named_in_a_table_lie_beside_it(make_config: MakeConfig, tmp_path: Path) -> None:
    Image.new("L", (6, 9)).save(tmp_path / "1.png")
    (tmp_path / "site.csv").write_text("scan,ill\n1.png,no\n2.png,no\n")
    config = make_config("image", {"scan": {"type": "image"}, "ill": {"type": "label"}})

    assert check(read_table(tmp_path / "site.csv"), config) == [
        Violation("scan", "image", (2,), "the image cannot be read (no such image file)",
                  ("'2.png'",)),
    ]  # fmt: skip
