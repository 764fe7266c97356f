import math
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.server.heat import Heat, heat_map

LABELS = [*(f"Chapter {k}" for k in range(19)), "Musculoskeletal", "External causes"]


def drawn(heat: Heat) -> Element:
    chart = heat_map(heat, label="Heat", row_title="label", column_title="site")
    return ElementTree.fromstring(chart)


def cells(svg: Element) -> list[Element]:
    return [e for e in svg.iter("rect") if "cell" in (e.get("class") or "")]


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=3, max_size=3), min_size=1, max_size=6))
def test_shades_are_shares_and_grow_with_the_count(matrix: list[list[int]]) -> None:
    counts = tuple(map(tuple, matrix))
    names = tuple(str(i) for i in range(len(counts)))
    log = Heat(rows=names, columns=("a", "b", "c"), counts=counts, by="log").shades
    flat = sorted((c, s) for row, shades in zip(counts, log, strict=True)
                  for c, s in zip(row, shades, strict=True))  # fmt: skip
    assert [s for _, s in flat] == sorted(s for _, s in flat)
    row = Heat(rows=names, columns=("a", "b", "c"), counts=counts, by="row").shades
    for one, shades in zip(counts, row, strict=True):
        assert sum(shades) == pytest.approx(1.0 if sum(one) else 0.0)
    assert all(0 <= s <= 1 for shades in (*log, *row) for s in shades)


def test_cells_of_a_literal_example_stand_in_rows_and_columns() -> None:
    heat = Heat(rows=("x", "y"), columns=("a", "b", "c"), counts=((9, 0, 99), (0, 1, 2)), by="log")
    svg = drawn(heat)
    boxes = [(float(e.get("x", "nan")), float(e.get("y", "nan"))) for e in cells(svg)]
    left, top = boxes[0]
    assert boxes == [(left + 112 * j, top + 24 * i) for i in range(2) for j in range(3)]
    assert [e[0].text for e in cells(svg)][:3] == [
        "label x, site a: 9", "label x, site b: 0", "label x, site c: 99",
    ]  # fmt: skip
    shades = [float(e.get("fill-opacity", "nan")) for e in cells(svg)]
    expected = [math.log(10) / math.log(100), 0.06, 1.0, 0.06]
    assert shades[:4] == pytest.approx(expected, abs=0.005)
    values = [e for e in svg.iter("text") if "value" in (e.get("class") or "")]
    assert [e.text for e in values] == ["9", "99", "1", "2"]
    assert values[1].get("class") == "value on"  # light on dark


def test_rows_of_truth_are_shaded_by_their_shares_and_the_diagonal_is_outlined() -> None:
    heat = Heat(
        rows=("x", "y"), columns=("x", "y"), counts=((3, 1), (0, 0)), by="row", diagonal=True
    )
    assert heat.shades == ((0.75, 0.25), (0.0, 0.0))
    own = [e for e in drawn(heat).iter("rect") if e.get("class") == "own"]
    assert len(own) == 2


def test_twenty_one_labels_and_twelve_sites_with_long_names_fit() -> None:
    sites = tuple(f"hospital {k} with a long name in the north of the region" for k in range(12))
    counts = tuple(tuple(10**6 if j == 3 else 7 for j in range(12)) for _ in LABELS)
    heat = Heat(
        rows=tuple(LABELS), columns=sites, counts=counts, by="log",
        margin=("all", *["11000077"] * 21), footer=("records", *["147"] * 12),
    )  # fmt: skip
    svg = drawn(heat)
    *_, width, height = map(float, svg.get("viewBox", "").split())
    last = cells(svg)[-1]
    assert float(last.get("x", "nan")) + float(last.get("width", "nan")) < width - 50
    assert float(last.get("y", "nan")) + float(last.get("height", "nan")) < height
    assert len(cells(svg)) == 252
    assert [e for e in svg.iter("text") if e.text == "1000000"]  # smaller, but all there
    tips = [e.text for e in svg.iter("title")]
    assert sites[11] in tips


def test_cells_too_small_for_their_number_keep_it_as_a_tooltip() -> None:
    names = tuple(f"label {k}" for k in range(100))
    counts = tuple(tuple(12345 for _ in names) for _ in names)
    svg = drawn(Heat(rows=names, columns=names, counts=counts, by="log"))
    assert [e.text for e in svg.iter("text") if e.text == "12345"] == []
    assert cells(svg)[101][0].text == "label label 1, site label 1: 12345"


def test_names_break_at_spaces_before_they_are_turned() -> None:
    site = "cardiology and pulmonology"
    svg = drawn(Heat(rows=("x",), columns=(site, "b"), counts=((1, 2),), by="log"))
    said = [e.text for e in svg.iter("text")]
    assert said[1:4] == ["pulmonology", "cardiology and", "b"]  # from below
    assert not [e for e in svg.iter("text") if e.get("transform")]


def test_counts_of_another_shape_or_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 2 rows of 3 values, got 1 rows of \[2\]"):
        Heat(rows=("x", "y"), columns=("a", "b", "c"), counts=((1, 2),), by="log")
    with pytest.raises(ValueError, match="expected numbers >= 0, got -1"):
        Heat(rows=("x",), columns=("a", "b"), counts=((1, -1),), by="log")
    with pytest.raises(ValueError, match="expected 0 rows of 0 values"):
        Heat(rows=(), columns=(), counts=(), by="log")
