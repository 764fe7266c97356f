import hashlib
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from anabranch.client.data.read import Table
from anabranch.client.data.records import (
    Records,
    fingerprint,
    load_records,
    num_features,
    record_hashes,
    split,
    to_records,
)
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError

MakeConfig = Callable[..., RunConfig]

labels = st.integers(0, 3)
seeds = st.integers(0, 2**63 - 1)
shares = st.floats(0, 1, exclude_max=True)


@st.composite
def records(draw: st.DrawFn, min_size: int = 0) -> Records:
    """Texts, rows of 3 numbers or images of 2 × 2, with copies among them."""
    values = hnp.from_dtype(np.dtype(np.float32), allow_nan=False)
    kind = draw(st.sampled_from([None, (3,), (1, 2, 2)]))
    count = draw(st.integers(min_size, 25))
    chosen = np.array(draw(st.lists(labels, min_size=count, max_size=count)), np.int64)
    if kind is None:
        return Records(
            draw(st.lists(st.text("ab", max_size=3), min_size=count, max_size=count)), chosen
        )
    return Records(draw(hnp.arrays(np.float32, (count, *kind), elements=values)), chosen)


def shuffled(some: Records, seed: int) -> Records:
    return some.take(random.Random(seed).sample(range(len(some)), len(some)))


def hashes(*parts: Records) -> Counter[bytes]:
    return Counter(digest for part in parts for digest in record_hashes(part))


@given(some=records(), seed=seeds)
def test_the_fingerprint_does_not_depend_on_the_order(some: Records, seed: int) -> None:
    assert fingerprint(shuffled(some, seed)) == fingerprint(some)


@given(some=records(min_size=1), at=st.integers(0, 24))
def test_a_copy_or_a_change_changes_the_fingerprint(some: Records, at: int) -> None:
    at %= len(some)
    others = [i for i in range(len(some)) if i != at]
    relabelled = some.labels.copy()
    relabelled[at] += 1
    variants = [
        some,
        some.take([*range(len(some)), at]),
        some.take(others),
        Records(some.inputs, relabelled),
    ]

    assert len({fingerprint(variant) for variant in variants}) == len(variants)


@given(some=records(), holdout=shares, seed=seeds, order=seeds)
def test_split_does_not_depend_on_the_order(
    some: Records, holdout: float, seed: int, order: int
) -> None:
    for part, again in zip(
        split(some, holdout, seed), split(shuffled(some, order), holdout, seed), strict=True
    ):
        assert fingerprint(part) == fingerprint(again)


@given(some=records(), holdout=shares, seed=seeds)
def test_split_loses_and_doubles_no_record_and_copies_lie_on_one_side(
    some: Records, holdout: float, seed: int
) -> None:
    train, held = split(some, holdout, seed)

    assert hashes(train, held) == hashes(some)
    assert not hashes(train).keys() & hashes(held).keys()


@given(some=records(), holdout=shares, seed=seeds)
def test_every_label_keeps_a_record_in_train(some: Records, holdout: float, seed: int) -> None:
    train, _ = split(some, holdout, seed)

    assert ((train.label_counts(4) > 0) == (some.label_counts(4) > 0)).all()


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    holdout=shares,
    seed=seeds,
)
def test_split_of_different_records_holds_out_the_share_of_every_label(
    counts: list[int], holdout: float, seed: int
) -> None:
    truth = np.repeat(np.arange(len(counts)), counts)
    different = Records([str(i) for i in range(len(truth))], truth)

    _, held = split(different, holdout, seed)

    taken, exact = held.label_counts(len(counts)), holdout * np.array(counts)
    assert (np.abs(taken - exact) < 1 + 1e-9).all()
    if (exact <= np.array(counts) - 1).all():  # no label had to be kept from losing its last
        assert len(held) == round(holdout * len(truth))


def test_another_seed_is_another_split() -> None:
    many = Records([str(i) for i in range(100)], np.arange(100) % 3)

    first, second = split(many, 0.2, 0)[1], split(many, 0.2, 1)[1]

    assert len(first) == len(second) == 20
    assert len(hashes(first).keys() & hashes(second).keys()) < 15


def test_a_new_record_moves_hardly_any_other() -> None:
    many = Records([str(i) for i in range(100)], np.zeros(100, np.int64))
    more = Records([str(i) for i in range(101)], np.zeros(101, np.int64))

    moved = hashes(split(many, 0.2, 0)[1]) - hashes(split(more, 0.2, 0)[1])

    assert moved.total() <= 1


def test_a_fingerprint_is_the_hash_of_sorted_hashes_of_canonical_bytes() -> None:
    def digest(label: int, data: bytes) -> bytes:
        return hashlib.sha256(struct.pack("<q", label) + data).digest()

    texts = Records(["fièvre", ""], np.array([1, 0]))
    rows = Records(np.array([[-0.0, 1.5]], np.float32), np.array([258]))
    of_texts = sorted([digest(1, b"text\nfi\xc3\xa8vre"), digest(0, b"text\n")])
    of_rows = [digest(258, b"array (2,)\n" + struct.pack("<ff", 0.0, 1.5))]

    for some, hashes_of in ((texts, of_texts), (rows, of_rows)):
        expected = hashlib.sha256(b"anabranch records 1\n" + b"".join(hashes_of)).hexdigest()
        assert fingerprint(some) == expected


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_an_impossible_holdout_is_refused(holdout: float) -> None:
    with pytest.raises(ValueError, match=r"expected holdout in \[0, 1\)"):
        split(Records(["a"], np.array([0])), holdout, 0)


def test_records_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 inputs, but 1 labels"):
        Records(["a", "b"], np.array([0]))


def test_printing_records_shows_none() -> None:
    assert repr(Records(["Ann Onymous"], np.array([0]))) == "Records(n=1)"


COLUMNS: dict[str, Any] = {
    "age": {"type": "number", "mean": 50, "std": 10},
    "ill": {"type": "label"},
    "pain": {"type": "category", "values": ["none", "some", "much"], "optional": True},
    "note": {"type": "text", "optional": True},
    "chol": {"type": "number", "mean": 200, "std": 40, "optional": True},
    "sex": {"type": "category", "values": ["f", "m"]},
}


def test_a_table_becomes_features_in_the_order_of_the_contract(make_config: MakeConfig) -> None:
    config = make_config("tabular", COLUMNS)
    columns: dict[str, Any] = {
        "sex": ["m", "f", "f"],
        "age": ["60", "45", "50"],
        "further": ["a", "b", "c"],
        "note": [None, "x", None],
        "chol": [None, "200", "240"],
        "pain": ["much", None, "none"],
        "ill": ["yes", "no", "yes"],
    }

    rows = to_records(Table("site.csv", columns, 3), config)

    #   age   none some much empty  chol empty  f  m
    expected = [
        [1.0, 0, 0, 1, 0, 0.0, 1, 0, 1],
        [-0.5, 0, 0, 0, 1, 0.0, 0, 1, 0],
        [0.0, 1, 0, 0, 0, 1.0, 0, 1, 0],
    ]
    assert isinstance(rows.inputs, np.ndarray)
    assert rows.inputs.dtype == np.float32
    np.testing.assert_array_equal(rows.inputs, np.array(expected, np.float32))
    assert rows.labels.tolist() == [1, 0, 1]
    assert num_features(config) == 9
    assert rows.label_counts(3).tolist() == [1, 2, 0]


@given(data=st.data())
def test_features_are_as_many_as_the_contract_says(
    data: st.DataObject, make_config: MakeConfig
) -> None:
    number = st.fixed_dictionaries({"type": st.just("number"), "optional": st.booleans()})
    values = st.lists(st.text("abc", min_size=1), min_size=1, unique=True)
    category = st.fixed_dictionaries(
        {"type": st.just("category"), "optional": st.booleans(), "values": values}
    )
    drawn: list[dict[str, Any]] = data.draw(st.lists(number | category, min_size=1, max_size=5))
    columns = dict(enumerate(drawn))
    contract = {f"c{at}": column for at, column in columns.items()} | {"y": {"type": "label"}}
    config = make_config("tabular", contract)
    cells: dict[str, Any] = {
        f"c{at}": [(*c.get("values", ()), 1.5)[0]] for at, c in columns.items()
    }

    rows = to_records(Table("site.csv", cells | {"y": ["no"]}, 1), config)

    assert isinstance(rows.inputs, np.ndarray)
    assert rows.inputs.shape == (1, num_features(config))


def test_labels_are_numbered_in_the_order_of_the_task(make_config: MakeConfig) -> None:
    columns = {"text": {"type": "text"}, "label": {"type": "label"}}
    config = make_config("text", columns, ("zebra", "ant", "cow"))
    cells: dict[str, Any] = {"text": ["a", "b", "c", "b"], "label": ["cow", "zebra", "ant", "cow"]}

    texts = to_records(Table("site.csv", cells, 4), config)

    assert texts.inputs == ["a", "b", "c", "b"]
    assert texts.labels.tolist() == [2, 0, 1, 2]
    assert texts.labels.dtype == np.int64
    assert texts.take([3, 0]).inputs == ["b", "a"]
    assert texts.take([]).inputs == []


def test_nothing_is_read_from_records_that_break_the_contract(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("text", {"text": {"type": "text"}, "y": {"type": "label"}})
    (tmp_path / "site.tsv").write_text("text\ty\nhello\tno\n?\tyes\n")

    with pytest.raises(DataError, match="text: empty cell in a column that is not optional: row 2"):
        load_records(tmp_path / "site.tsv", config)


def test_images_become_one_array(make_config: MakeConfig, tmp_path: Path) -> None:
    columns = {"image": {"type": "image"}, "label": {"type": "label"}}
    model = {"base": "vit", "channels": 3, "image_size": 16}
    for at, name in enumerate(("yes/a.png", "no/b.png", "yes/0.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 20), (51 * at, 0, 255)).save(tmp_path / name)

    pictures = load_records(tmp_path, make_config("image", columns, model=model))

    assert isinstance(pictures.inputs, np.ndarray)
    assert pictures.inputs.shape == (3, 3, 16, 16)
    assert pictures.inputs[:, :, 4, 7].tolist() == [
        pytest.approx([0.2, 0, 1]),
        pytest.approx([0.4, 0, 1]),
        pytest.approx([0.0, 0, 1]),
    ]
    assert pictures.labels.tolist() == [0, 1, 1]
