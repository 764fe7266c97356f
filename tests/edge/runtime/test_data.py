import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client.data.records import Records as SiteRecords
from anabranch.client.data.records import split as site_split
from anabranch.edge.runtime.data import Records, read_records, split
from anabranch.protocols.errors import DataError
from anabranch.protocols.tables import Column

Make = Callable[..., Any]
ROWS = [("acute fracture", "bone"), ("heart failure of", "heart"), ("chronic", "other")]


def jsonl(folder: Path, rows: Any = ROWS) -> Path:
    path = folder / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in rows))
    return path


def csv(folder: Path, text: str) -> Path:
    path = folder / "records.csv"
    path.write_text(text)
    return path


def read(bundle: Any, path: Path) -> Records:
    return read_records(path, bundle.manifest, bundle.tokenizer)


# Reading


def test_texts_come_from_jsonl_and_csv_alike(make_tiny: Make, tmp_path: Path) -> None:
    bundle = make_tiny("text")
    one = read(bundle, jsonl(tmp_path))
    body = "label,text\n" + "\n".join(f"{y},{t}" for t, y in ROWS) + "\n"
    other = read(bundle, csv(tmp_path, "\ufeff" + body))

    assert one.labels.tolist() == other.labels.tolist() == [0, 1, 2]
    assert [x.tolist() for x in one.features] == [[2, 4, 6, 3], [2, 9, 10, 7, 3], [2, 5, 3]]
    assert one.digest() == other.digest()
    assert one.identities == other.identities
    assert repr(one) == "Records(n=3)"


def test_other_columns_are_not_used_but_make_another_record(
    make_tiny: Make, tmp_path: Path
) -> None:
    bundle = make_tiny("text")
    body = "text,label,id\nheart,heart,1\nheart,heart,2\n"
    got = read(bundle, csv(tmp_path, body))
    assert got.features[0].tolist() == got.features[1].tolist()
    assert got.identities[0] != got.identities[1]


def test_columns_are_those_of_the_data_contract(make_tiny: Make, tmp_path: Path) -> None:
    columns = {"note": Column(type="text"), "y": Column(type="label")}
    bundle = make_tiny("text", columns=columns)
    got = read(bundle, csv(tmp_path, "note,y\nheart,heart\n"))
    assert got.labels.tolist() == [1]
    with pytest.raises(DataError, match=r"records.csv, line 2: column 'y': expected one of 'bone'"):
        read(bundle, csv(tmp_path, "text,label\nheart,heart\n"))


def test_rows_of_a_table_come_from_csv_by_the_data_contract(
    make_tiny: Make, tmp_path: Path
) -> None:
    columns = {f"x{i}": Column(type="number", mean=1.0, std=2.0) for i in range(6)}
    bundle = make_tiny("table", columns=columns | {"y": Column(type="label")})
    head = ",".join([*(f"x{i}" for i in range(6)), "y"])
    got = read(bundle, csv(tmp_path, f"{head}\n1,3,5,1,1,1,heart\n"))
    assert np.asarray(got.features).tolist() == [[0, 1, 2, 0, 0, 0]]
    assert got.labels.tolist() == [1]
    with pytest.raises(DataError, match="line 2: column 'x2': expected a finite number"):
        read(bundle, csv(tmp_path, f"{head}\n1,3,five,1,1,1,heart\n"))


@pytest.mark.parametrize("labels", [np.array([2, 0]), np.array(["other", "bone"])])
def test_arrays_come_from_npz_with_names_or_indices(
    make_tiny: Make, tmp_path: Path, labels: Any
) -> None:
    inputs = np.arange(12.0).reshape(2, 6)
    np.savez(tmp_path / "r.npz", inputs=inputs, labels=labels)
    got = read(make_tiny("table"), tmp_path / "r.npz")
    assert got.labels.tolist() == [2, 0]
    assert got.lengths.tolist() == [1, 1]
    features = np.asarray(got.features)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, inputs)


# Refusals


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "text,label\nheart,lung\n",
            r"records.csv, line 2: column 'label': expected one of 'bone'",
        ),
        ("text,label\nheart,bone\n\n\nsecret,Bone\n", "line 5: column 'label'"),
        ("text,label\n ,bone\n", "line 2: column 'text': expected text that is not empty"),
        ("text,y\nheart,bone\n", "line 2: column 'label'"),
        ("text,text\nheart,bone\n", "line 1: two columns have the same name"),
        ("text,label\nheart,bone,secret\n", "line 2: 3 cells where the header has 2"),
        ('text,label\n"a\nb",bone\n"secret', "line 4: unexpected end of data"),
        ("text,label\n", "no records in it"),
        ("", "no records in it"),
    ],
)
def test_what_is_wrong_in_a_csv_is_named_and_not_shown(
    make_tiny: Make, tmp_path: Path, body: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(make_tiny("text"), csv(tmp_path, body))
    assert "secret" not in str(error.value)
    assert "lung" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected one JSON object per line"),
        ('{"text": "secret", "text": "b", "label": "bone"}', "line 2: a key twice"),
        ('{"text": "\\ud800", "label": "bone"}', "line 2: a key twice, nested too deeply, or no"),
        ('{"text": 7, "label": "bone"}', "line 2: column 'text': expected text"),
        ('{"text": "secret"}', "line 2: column 'label': expected one of 'bone', 'heart', 'other'"),
        ('{"text": "secret", "label": ["bone"]}', "line 2: column 'label'"),
    ],
)
def test_what_is_wrong_in_a_jsonl_is_named_and_not_shown(
    make_tiny: Make, tmp_path: Path, line: str, message: str
) -> None:
    path = jsonl(tmp_path, ROWS[:1])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=message) as error:
        read(make_tiny("text"), path)
    assert "secret" not in str(error.value)


def arrays(**changes: Any) -> dict[str, Any]:
    return {"inputs": np.zeros((2, 6), np.float32), "labels": np.array([0, 1])} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (arrays(extra=np.zeros(1)), r"expected the arrays inputs and labels, got \['extra'"),
        (arrays(inputs=np.zeros((2, 5))), r"expected float32 \(n, 6\), got float64 \(2, 5\)"),
        (arrays(inputs=np.zeros((2, 6), int)), "got int64"),
        (arrays(inputs=np.zeros((0, 6))), "no records in it"),
        (arrays(inputs=np.array([[0.0] * 6, [np.nan] * 6])), "record 2 holds NaN or infinite"),
        (arrays(inputs=np.full((2, 6), 1e300)), "record 1 holds NaN or infinite"),
        (arrays(labels=np.array([0, 3])), "record 2: expected 0 to 2 or one of 'bone'"),
        (arrays(labels=np.array(["bone", "x"])), "record 2: expected 0 to 2 or one of 'bone'"),
        (arrays(labels=np.array([0.0, 1.0])), "expected names or indices, got float64"),
        (arrays(labels=np.array([0])), r"expected shape \(2,\), got \(1,\)"),
        (arrays(labels=np.array([{}, {}], object)), "no .npz file of plain arrays"),
    ],
)
def test_what_is_wrong_in_an_npz_is_named(
    make_tiny: Make, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "r.npz", **content)
    with pytest.raises(DataError, match=message):
        read(make_tiny("table"), tmp_path / "r.npz")


def test_files_that_are_not_there_damaged_or_of_another_kind(
    make_tiny: Make, tmp_path: Path
) -> None:
    text, table = make_tiny("text"), make_tiny("table")
    for bundle, name in ((text, "a.csv"), (table, "a.npz")):
        with pytest.raises(DataError, match="cannot be read: No such file"):
            read(bundle, tmp_path / name)
    for bundle, name in ((text, "a.npz"), (table, "a.csv"), (text, "a.txt")):
        with pytest.raises(DataError, match="reads records from"):
            read(bundle, tmp_path / name)
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff,bone\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2: these bytes are not UTF-8"):
        read(text, tmp_path / "a.csv")
    np.savez(tmp_path / "b.npz", **arrays())
    whole = (tmp_path / "b.npz").read_bytes()
    for damaged in (b"", b"no zip", whole[:100], whole[:60] + b"????" + whole[64:]):
        (tmp_path / "b.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"no \.npz file of plain arrays|expected the arrays"):
            read(table, tmp_path / "b.npz")


# Batches


@given(st.lists(st.integers(0, 29), max_size=12), st.booleans())
def test_a_batch_holds_its_rows_padded_on_the_right(
    make_tiny: Make, make_records: Make, rows: list[int], text: bool
) -> None:
    records = make_records(make_tiny("text" if text else "table"), 30)
    weights = np.arange(len(rows), dtype=np.float32)
    batch = records.batch(rows, weights)
    assert batch.labels.tolist() == [records.labels[i] for i in rows]
    assert batch.weights.tolist() == weights.tolist()
    if not text:
        np.testing.assert_array_equal(batch.feeds["features"], records.features[rows])
        return
    ids, mask = batch.feeds["input_ids"], batch.feeds["attention_mask"]
    assert ids.shape == mask.shape
    for got, real, row in zip(ids, mask, rows, strict=True):
        expected = records.features[row].tolist()
        assert real.tolist() == [1] * len(expected) + [0] * (len(got) - len(expected))
        assert got[real == 1].tolist() == expected
        assert not got[real == 0].any()


def test_the_digest_tells_records_labels_and_order_apart(
    make_tiny: Make, make_records: Make
) -> None:
    records = make_records(make_tiny("text"), 9)
    others = [
        records.take(range(8)),
        records.take([1, 0, *range(2, 9)]),
        Records(records.names, records.features, (records.labels + 1) % 3, records.identities),
    ]
    digests = {one.digest() for one in [records, *others]}
    assert len(digests) == 4
    assert records.take(range(9)).digest() == records.digest()


def test_records_of_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="as many labels and identities as inputs"):
        Records(("x",), np.zeros((2, 1), np.float32), np.zeros(3, np.int64), (b"",) * 2)


# The held-out part


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=40),
    st.floats(0, 0.9),
    st.integers(0, 9),
    st.randoms(use_true_random=False),
)
def test_the_split_does_not_depend_on_order_and_keeps_copies_and_labels_together(
    rows: list[tuple[int, int]], share: float, seed: int, shuffle: Any
) -> None:
    def records_of(some: list[tuple[int, int]]) -> Records:
        labels = np.array([y for y, _ in some], np.int64)
        x = np.array([[v] for _, v in some], np.float32)
        identities = tuple(b"%d %d" % one for one in some)
        return Records(("x",), x, labels, identities)

    train, held = split(records_of(rows), share, seed)
    shuffled = rows.copy()
    shuffle.shuffle(shuffled)
    again, other = split(records_of(shuffled), share, seed)

    assert sorted(train.identities) == sorted(again.identities)
    assert sorted(held.identities) == sorted(other.identities)
    assert sorted([*train.identities, *held.identities]) == sorted(records_of(rows).identities)
    assert not set(train.identities) & set(held.identities)
    assert set(train.labels.tolist()) == {y for y, _ in rows}
    assert len(held) <= round(share * len(rows)) + 1


def test_the_counts_are_those_of_a_site(make_tiny: Make, make_records: Make) -> None:
    records = make_records(make_tiny("table"), 53)
    train, held = split(records, 0.2, seed=3)
    site = SiteRecords(np.asarray(records.features), records.labels)
    theirs = site_split(site, 0.2, seed=3)
    assert np.bincount(held.labels).tolist() == np.bincount(theirs[1].labels).tolist()
    assert len(train) == len(theirs[0])
    assert split(records, 0.2, seed=4)[1].identities != held.identities


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(make_tiny: Make, make_records: Make, share: float) -> None:
    with pytest.raises(ValueError, match=r"a share in \[0, 1\)"):
        split(make_records(make_tiny("table"), 5), share, 0)
