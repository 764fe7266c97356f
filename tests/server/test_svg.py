import itertools
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.server.svg import (
    BYTES,
    EPSILON,
    PERCENT,
    axis,
    element,
    fit,
    integer,
    measure,
    number,
    percent,
    size,
    spread,
    text,
    ticks,
)

values = st.floats(-1e6, 1e6).map(lambda v: round(v, 3))


@given(st.text())
def test_any_text_gives_well_formed_xml(value: str) -> None:
    parsed = ElementTree.fromstring(element("g", element("title", text(value)), aria_label=value))
    assert [child.tag for child in parsed] == ["title"]
    assert set(parsed.attrib) == {"aria-label"}


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_printable_text_comes_back_as_it_was(value: str) -> None:
    parsed = ElementTree.fromstring(element("g", text(value), id=value))
    assert (parsed.text or "") == value
    assert parsed.get("id") == value


def test_characters_that_turn_or_hide_text_are_replaced() -> None:
    assert text("a\x00b\u202ecod\u2066e\ud800") == "a\ufffdb\ufffdcod\ufffde\ufffd"


@given(st.tuples(values, values).filter(lambda v: v[0] < v[1]), st.integers(5, 12))
def test_ticks_lie_in_the_range_evenly_and_are_few(edges: tuple[float, float], most: int) -> None:
    low, high = edges
    marks = ticks(low, high, most)
    slack = (high - low) * 1e-6
    assert 2 <= len(marks) <= most + 1
    assert all(low - slack <= mark <= high + slack for mark in marks)
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert all(step == pytest.approx(steps[0], rel=1e-6) for step in steps)


def test_whole_ticks_are_never_between_rounds() -> None:
    assert ticks(1, 3, 10, whole=True) == [1, 2, 3]
    assert ticks(1, 60, 10, whole=True) == [10, 20, 30, 40, 50, 60]


@given(st.lists(values, min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_all_its_values(points: list[float], zero: bool) -> None:
    marks = axis(points, EPSILON, zero=zero)
    slack = (marks[-1] - marks[0]) * 1e-6
    assert 2 <= len(marks) <= 8
    assert marks[0] - slack <= min(points)
    assert max(points) <= marks[-1] + slack
    assert not zero or marks[0] <= 0 <= marks[-1]


@pytest.mark.parametrize(
    ("points", "low", "high"), [([1.0], 0.9, 1.0), ([0.0, 0.0], 0.0, 1.0), ([0.5], 0.44, 0.56)]
)
def test_an_axis_of_equal_shares_stays_within_0_and_1(
    points: list[float], low: float, high: float
) -> None:
    marks = axis(points, PERCENT, zero=False)
    assert [marks[0], marks[-1]] == pytest.approx([low, high], abs=0.02)
    assert 0 <= marks[0] < marks[-1] <= 1.0000001


@given(st.lists(st.floats(0, 200), min_size=1, max_size=12).map(sorted))
def test_spread_places_keep_order_distance_and_range(wanted: list[float]) -> None:
    places = spread(wanted, 15, 0, 200)
    assert all(b - a >= 15 - 1e-6 for a, b in itertools.pairwise(places))
    assert places[0] >= -1e-6
    assert places[-1] <= 200 + 1e-6


def test_spread_moves_only_what_collides_and_to_both_sides() -> None:
    assert spread([10, 50, 52], 15, 0, 100) == [10, 43.5, 58.5]
    assert spread([99, 99], 15, 0, 100) == [85, 100]


@given(st.text(max_size=80), st.floats(16, 400))
def test_a_fitted_text_is_no_wider_than_its_room(value: str, width: float) -> None:
    short = fit(value, width)
    assert measure(short) <= width
    assert short == value or value.startswith(short[:-1])


def test_numbers_are_written_with_the_stated_digits() -> None:
    assert percent(0.7142) == "71.4\u202f%"
    assert integer(1234567) == "1\u202f234\u202f567"
    assert [number(v) for v in (0, 12.5, 100, 0.126)] == ["0", "12.5", "100", "0.13"]
    assert [PERCENT.tick(v) for v in (0.2, 0.125)] == ["20\u202f%", "12.5\u202f%"]


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (2_411_332, "2.41 MB"), (99_960, "100 kB"),
     (999_600, "1.00 MB"), (90_868_376, "90.9 MB"), (3.2e9, "3.20 GB"), (5e15, "5000 TB")],
)  # fmt: skip
def test_sizes_have_three_digits(value: float, written: str) -> None:
    assert size(value) == written.replace(" ", "\u202f")


def test_byte_ticks_have_no_needless_zeros() -> None:
    written = [BYTES.tick(v).replace("\u202f", " ") for v in (0, 2e6, 1.5e6, 500e3, 20e6, 200)]
    assert written == ["0", "2 MB", "1.5 MB", "500 kB", "20 MB", "200 B"]
