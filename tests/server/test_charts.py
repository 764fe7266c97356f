import itertools
import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.server.charts import (
    Bars,
    Comparison,
    Line,
    comparison_svg,
    grouped_bars,
    line_chart,
    stacked_bars,
)
from anabranch.server.svg import BYTES, EPSILON, LOSS, PERCENT, WIDTH, measure, stacked

SITES = [
    f"hospital {number} with quite a long name, department of medicine" for number in range(12)
]
ROWS = [
    Comparison(name="majority", accuracy=0.25),
    Comparison(name="federated", accuracy=0.5, macro_f1=0.4, ours=True),
    Comparison(name="<pooled> & more", accuracy=0.6, note="upper bound"),
]


def parse(svg: str) -> Element:
    return ElementTree.fromstring(svg)


def written(svg: Element, class_: str) -> list[Element]:
    return [e for e in svg.iter() if class_ in (e.get("class") or "").split()]


def places(svg: Element, name: str, tag: str) -> list[float]:
    return [float(e.get(name, "nan")) for e in svg.iter(tag)]


def require_inside(svg: Element) -> None:
    """Fail if a text that is not turned, as wide as we measure it, leaves the drawing."""
    *_, width, height = map(float, svg.get("viewBox", "").split())
    for e in svg.iter("text"):
        if e.get("transform"):
            continue
        said = "".join(t for t in e.itertext() if e.find("title") is None) or (e.text or "")
        x, y, wide = float(e.get("x", "nan")), float(e.get("y", "nan")), measure(said)
        start = {"end": x - wide, "middle": x - wide / 2}.get(e.get("text-anchor", ""), x)
        assert -1 <= start <= start + wide <= width + 1, said
        assert 0 < y <= height, said


def lines(*series: Sequence[float]) -> list[Line]:
    return [
        Line(f"series {k}", tuple((float(r), v) for r, v in enumerate(values, 1)))
        for k, values in enumerate(series)
    ]


# --- laws

points = st.lists(st.floats(0, 1).map(lambda v: round(v, 4)), min_size=1, max_size=12)


@given(st.lists(points, min_size=1, max_size=4))
def test_a_greater_value_is_drawn_higher_and_a_later_round_further_right(
    series: list[list[float]],
) -> None:
    svg = parse(line_chart(lines(*series), label="x", unit=PERCENT, y_title="accuracy"))
    dots = list(zip(places(svg, "cx", "circle"), places(svg, "cy", "circle"), strict=True))
    values = [v for one in series for v in one]
    rounds = [r for one in series for r in range(len(one))]
    for i, j in itertools.combinations(range(len(dots)), 2):
        if values[i] < values[j]:
            assert dots[i][1] >= dots[j][1]
        assert (rounds[i] < rounds[j]) == (dots[i][0] < dots[j][0])
    require_inside(svg)


@given(points)
def test_bars_are_as_long_as_their_values_say(values: list[float]) -> None:
    names = [f"site {i}" for i in range(len(values))]
    chart = grouped_bars(names, [Bars("a", tuple(values))], label="x", unit=PERCENT)
    wide = places(parse(chart), "width", "rect")
    unit_ = max(wide) / (max(values) or 1)
    assert wide == pytest.approx([v * unit_ for v in values], abs=0.02)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=30))
def test_stacked_columns_stand_on_each_other(pairs: list[tuple[int, int]]) -> None:
    series = [Bars("up", tuple(u for u, _ in pairs)), Bars("down", tuple(d for _, d in pairs))]
    names = [str(i + 1) for i in range(len(pairs))]
    svg = parse(stacked_bars(names, series, label="x", unit=BYTES))
    boxes = [e for e in svg.iter("rect") if e.find("title") is not None]
    for low, high in zip(boxes[::2], boxes[1::2], strict=True):
        bottom = float(high.get("y", "nan")) + float(high.get("height", "nan"))
        assert bottom == pytest.approx(float(low.get("y", "nan")), abs=0.02)
    require_inside(svg)


# --- literal examples


def test_points_of_a_line_stand_at_the_ticks_of_their_values() -> None:
    svg = parse(line_chart(lines([0.2, 0.6, 0.4]), label="x", unit=PERCENT, y_title="accuracy"))
    heights = {
        e.text: float(e.get("y", "nan")) - 4
        for e in written(svg, "tick")
        if (e.text or "").endswith("%")
    }
    assert places(svg, "cy", "circle") == pytest.approx(
        [heights["20\u202f%"], heights["60\u202f%"], heights["40\u202f%"]]
    )
    rounds = {e.text: float(e.get("x", "nan")) for e in written(svg, "tick")}
    assert places(svg, "cx", "circle") == pytest.approx([rounds["1"], rounds["2"], rounds["3"]])
    assert heights["20\u202f%"] == 238  # height 280, 42 below the axis, 32 above
    assert heights["60\u202f%"] == 32


def test_a_limit_is_a_dashed_line_with_its_name() -> None:
    chart = line_chart(
        lines([2.0, 4.0]), label="x", unit=EPSILON, y_title="ε", limits=[("target", 8.0)], zero=True
    )
    svg = parse(chart)
    (rule,) = [e for e in svg.iter("line") if e.get("class") == "kl"]
    assert rule.get("y1") == rule.get("y2") == "32"  # 8 is the top of the axis 0..8
    assert "target 8.00" in ["".join(e.itertext()) for e in written(svg, "limit")]


def test_bars_of_a_literal_example_have_literal_lengths() -> None:
    chart = grouped_bars(["a", "b"], [Bars("s", (0.5, 1.0))], label="x", unit=PERCENT)
    svg = parse(chart)
    left = places(svg, "x", "rect")
    ends = {e.text: float(e.get("x", "nan")) for e in written(svg, "tick")}
    wide = places(svg, "width", "rect")
    assert left == [ends["0\u202f%"]] * 2
    assert wide[1] == pytest.approx(2 * wide[0], abs=0.02)
    assert left[1] + wide[1] == pytest.approx(ends["100\u202f%"])
    assert [e.text for e in written(svg, "value")] == ["50.0\u202f%", "100.0\u202f%"]


def test_a_bar_that_is_not_known_is_not_drawn_as_zero() -> None:
    series = [Bars("s", (None, 0.0, 0.3))]
    svg = parse(grouped_bars(["a", "b", "c"], series, label="x", unit=PERCENT))
    assert len(list(svg.iter("rect"))) == 2
    assert [e.text for e in written(svg, "value")] == ["0.0\u202f%", "30.0\u202f%"]
    assert "not known" in [e.text for e in svg.iter("text")]


def test_the_comparison_file_stands_alone_in_light_and_dark() -> None:
    svg = comparison_svg(ROWS, title="Result", subtitle="4 hospitals")
    root = ElementTree.fromstring(svg)
    says = "Result: majority 25.0 %, federated 50.0 %, <pooled> & more 60.0 %"
    assert root.get("aria-label") == says.replace(" %", "\u202f%")
    assert root[0].text == root.get("aria-label")
    assert re.findall(r"https?:", svg.replace("http://www.w3.org/2000/svg", "")) == []
    assert "prefers-color-scheme:dark" in svg
    spaced = "{http://www.w3.org/2000/svg}"
    bars = [e for e in root.iter(spaced + "rect") if e.get("class") != "card"]
    assert [e.get("class") for e in bars] == ["plain", "f0", "plain"]


def test_charts_of_one_file_stand_under_one_another_inside_its_card() -> None:
    chart = line_chart(lines([1.0, 2.0]), label="loss", unit=LOSS, y_title="loss")

    root = parse(stacked("a & b", [chart, chart, chart], panel=280.0))

    tag = "{http://www.w3.org/2000/svg}svg"
    inner = [one.attrib for one in root.findall(tag)]
    tops = [float(one["y"]) for one in inner]
    assert all(below >= above + 280 for above, below in itertools.pairwise(tops))
    assert tops[-1] + 280 <= float(root.attrib["height"])
    assert all(float(one["x"]) + WIDTH <= float(root.attrib["width"]) for one in inner)
    assert root.attrib["aria-label"] == "a & b"


# --- edges


@pytest.mark.parametrize("values", [[0.4], [0.4, 0.4, 0.4], [0.0, 0.0], [1.0]])
def test_one_point_equal_values_and_zeros_draw_a_whole_chart(values: list[float]) -> None:
    for unit in (PERCENT, LOSS):
        svg = parse(line_chart(lines(values), label="x", unit=unit, y_title="y"))
        heights = places(svg, "cy", "circle")
        assert all(32 <= y <= 238 for y in heights)
        assert "nan" not in ElementTree.tostring(svg, encoding="unicode")
    bars = Bars("s", tuple(values))
    names = [str(i) for i in range(len(values))]
    require_inside(parse(grouped_bars(names, [bars], label="x", unit=PERCENT)))
    require_inside(parse(stacked_bars(names, [bars], label="x", unit=BYTES)))


def test_twelve_sites_with_long_names_do_not_overlap_and_stay_inside() -> None:
    series = [Line(site, ((1.0, 2.0), (2.0, 7.9 + k / 1000))) for k, site in enumerate(SITES)]
    chart = line_chart(
        series, label="x", unit=EPSILON, y_title="ε", limits=[("target", 8.0)], zero=True
    )
    svg = parse(chart)
    require_inside(svg)
    heights = sorted(
        float(e.get("y", "nan")) for e in svg.iter("text") if e.find("tspan") is not None
    )
    assert len(heights) == 13
    ends = {"".join(e.itertext())[-5:]: float(e.get("y", "nan")) for e in svg.iter("text")}
    assert ends[" 8.00"] < ends[" 7.91"] < ends[" 7.90"]  # the names stand in the lines' order
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 15.9
    bars = [Bars(name, tuple(k / 12 for k in range(12))) for name in ("a", "b", "c")]
    rows = parse(grouped_bars(SITES, bars, label="x", unit=PERCENT))
    require_inside(rows)
    assert SITES[3] in [e.text for e in rows.iter("title")]  # cut, but whole in the tooltip


def test_more_series_than_shades_are_dashed() -> None:
    svg = parse(line_chart(lines(*[[0.1, 0.2]] * 8), label="x", unit=PERCENT, y_title="y"))
    kinds = [e.get("class") for e in written(svg, "line")]
    assert kinds[0] == "line k0"
    assert kinds[6:] == ["line k0 dash", "line k1 dash"]


def test_sixty_rounds_leave_out_points_and_names_that_have_no_room() -> None:
    svg = parse(
        line_chart(lines([k / 60 for k in range(60)]), label="x", unit=PERCENT, y_title="y")
    )
    assert list(svg.iter("circle")) == []
    names = [str(k) for k in range(1, 61)]
    columns = [Bars("up", (1.0,) * 60)]
    svg = parse(stacked_bars(names, columns, label="x", unit=BYTES))
    shown = [e.text for e in written(svg, "tick") if float(e.get("x", "0")) > 60]
    assert shown[:3] == ["5", "10", "15"]
    assert written(svg, "value") == []


def test_a_chart_is_one_named_image_with_a_tooltip_on_every_mark() -> None:
    svg = parse(line_chart(lines([0.1, 0.2]), label="Accuracy", unit=PERCENT, y_title="y"))
    assert (svg.get("role"), svg.get("aria-label"), svg[0].text) == ("img", "Accuracy", "Accuracy")
    assert float(svg.get("viewBox", "").split()[2]) == WIDTH
    assert [e[0].text for e in svg.iter("circle")] == [
        "series 0, 1: 10.0\u202f%",
        "series 0, 2: 20.0\u202f%",
    ]


# --- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match="'loss': expected finite numbers, got"):
        Line("loss", ((1.0, 0.5), (2.0, bad)))
    with pytest.raises(ValueError, match="'site': expected finite numbers, got"):
        Bars("site", (0.1, bad))
    with pytest.raises(ValueError, match="'chart': expected finite numbers, got"):
        line_chart(lines([1.0]), label="chart", unit=LOSS, y_title="y", limits=[("target", bad)])


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected points with ascending x, got x = \[\]"):
        Line("loss", ())
    with pytest.raises(ValueError, match=r"ascending x, got x = \[2\.0, 1\.0\]"):
        Line("loss", ((2.0, 0.5), (1.0, 0.5)))
    with pytest.raises(ValueError, match="'s': expected values >= 0, got -1"):
        Bars("s", (-1.0,))
    with pytest.raises(ValueError, match="'s': expected 2 values, got 1"):
        grouped_bars(["a", "b"], [Bars("s", (1.0,))], label="x", unit=PERCENT)
    with pytest.raises(ValueError, match="'x': expected at least one category and one series"):
        stacked_bars([], [Bars("s", ())], label="x", unit=PERCENT)
    with pytest.raises(ValueError, match="'x': expected at least one line"):
        line_chart([], label="x", unit=PERCENT, y_title="y")
