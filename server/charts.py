"""Charts as inline SVG: pure functions from numbers to text; no script, no font, no reference.

A chart is WIDTH wide and as high as it needs; x grows to the right, y downwards, and the page
scales it through its viewBox. Every mark carries its exact value as a tooltip. Text of class
`value` is a measured number, of class `tick` a number or name on an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from anabranch.server.svg import (
    PERCENT,
    SHADES,
    WIDTH,
    Markup,
    Scale,
    Unit,
    axis,
    card,
    element,
    fit,
    image,
    measure,
    number,
    percent,
    rule,
    spread,
    text,
    tick_width,
    ticks,
    tip,
    write,
)

GAP: Final = 16.0  # between two lines of chart type


@dataclass(frozen=True)
class Line:
    """One named curve. Raises ValueError for no points, x not ascending, NaN or infinity."""

    name: str
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        _require_finite(self.name, [value for point in self.points for value in point])
        xs = [x for x, _ in self.points]
        if not xs or any(a >= b for a, b in pairwise(xs)):
            raise ValueError(f"{self.name!r}: expected points with ascending x, got x = {xs}")


@dataclass(frozen=True)
class Band:
    """What lies around the line of this name: (x, low, high), x ascending. Raises as Line does."""

    name: str
    points: tuple[tuple[float, float, float], ...]

    def __post_init__(self) -> None:
        Line(self.name, tuple((x, low) for x, low, _ in self.points))
        _require_finite(self.name, [high for _, _, high in self.points])


@dataclass(frozen=True)
class Bars:
    """One named value >= 0 per category; None draws nothing. Raises ValueError for others."""

    name: str
    values: tuple[float | None, ...]

    def __post_init__(self) -> None:
        known = [value for value in self.values if value is not None]
        _require_finite(self.name, known)
        if min(known, default=0) < 0:
            raise ValueError(f"{self.name!r}: expected values >= 0, got {min(known)}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the comparison table; a row that is `ours` is drawn in the accent colour."""

    name: str
    accuracy: float  # share, 0 to 1
    macro_f1: float | None = None
    note: str = ""
    ours: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    unit: Unit,
    y_title: str,
    x_title: str = "round",
    limits: Sequence[tuple[str, float]] = (),
    zero: bool = False,
    bands: Sequence[Band] = (),
    x_unit: Unit | None = None,
) -> Markup:
    """Draw curves, each named at its end; `limits` are dashed horizontal lines.

    x is whole unless it has a unit. `bands` are shaded behind the lines of their names.

    Raises ValueError for no line at all, and for limits that are not finite.
    """
    if not lines:
        raise ValueError(f"{label!r}: expected at least one line")
    _require_finite(label, [value for _, value in limits])
    ends = [(line.name, line.points[-1][1]) for line in lines] + list(limits)
    ends = [(fit(name, 190), value) for name, value in ends]
    ys = [y for line in lines for _, y in line.points] + [value for _, value in limits]
    ys += [y for band in bands for _, *edges_ in band.points for y in edges_]
    marks = axis(ys, unit, zero=zero)
    xs = sorted({x for line in lines for x, _ in line.points})
    edges = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 0.5, xs[0] + 0.5)
    height = max(280.0, GAP * len(ends) + 90)
    right = WIDTH - 28 - max(measure(f"{name} {unit.value(value)} ") for name, value in ends)
    left, bottom = tick_width(unit, marks), height - 42
    at_x = Scale(*edges, left + 8, right - 8)
    at_y = Scale(marks[0], marks[-1], bottom, 32)
    body = [write(0, 14, y_title, "axis")]
    for mark in marks:
        body.append(
            rule(left, at_y(mark), right, at_y(mark), "grid" if mark != marks[0] else "base")
        )
        body.append(write(left - 8, at_y(mark) + 4, unit.tick(mark), "tick", "end"))
    for x in ticks(*edges, 10 if x_unit is None else 7, whole=x_unit is None) if xs[1:] else xs:
        said = f"{x:g}" if x_unit is None else x_unit.tick(x)
        body.append(write(at_x(x), bottom + 18, said, "tick", "middle"))
    body.append(write((left + right) / 2, bottom + 35, x_title, "axis", "middle"))
    body += [rule(left, at_y(value), right, at_y(value), "kl") for _, value in limits]
    shades = {line.name: index % SHADES for index, line in enumerate(lines)}
    body += [_shade(shades[band.name], band, at_x, at_y) for band in bands]
    for index, line in enumerate(lines):
        body += _curve(index, line, at_x, at_y, unit)
    return image(label, height, body + _ends(ends, len(lines), at_y, right, unit))


def grouped_bars(
    categories: Sequence[str],
    series: Sequence[Bars],
    *,
    label: str,
    unit: Unit,
    strong: Sequence[bool] | None = None,
) -> Markup:
    """Draw horizontal bars from 0, a group per category; not `strong` means in plain grey.

    Raises ValueError for no category, or a series that is not as long as the categories.
    """
    body, height = _horizontal(categories, series, label=label, unit=unit, strong=strong)
    return image(label, height, body)


def stacked_bars(
    categories: Sequence[str],
    series: Sequence[Bars],
    *,
    label: str,
    unit: Unit,
    x_title: str = "round",
) -> Markup:
    """Draw one column per category, the series on top of each other, the total above.

    Raises ValueError for no category, or a series that is not as long as the categories.
    """
    _require_lengths(label, categories, series)
    totals = [sum(bars.values[i] or 0 for bars in series) for i in range(len(categories))]
    marks = axis(totals, unit, zero=True)
    body, top = _legend([bars.name for bars in series])
    left, right, bottom = tick_width(unit, marks), WIDTH - 10, top + 190
    at_y = Scale(marks[0], marks[-1], bottom, top + 16)
    for mark in marks:
        body.append(rule(left, at_y(mark), right, at_y(mark), "grid" if mark else "base"))
        body.append(write(left - 8, at_y(mark) + 4, unit.tick(mark), "tick", "end"))
    pitch = (right - left) / len(categories)
    thick = min(46.0, pitch * 0.62)
    room = (max(map(measure, categories)) + 16) / pitch
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 10_000) if n >= min(room, 10_000))
    roomy = max(measure(unit.value(total)) for total in totals) + 4 <= pitch
    for index, name in enumerate(categories):
        middle, below = left + pitch * (index + 0.5), 0.0
        for k, bars in enumerate(series):
            value = bars.values[index] or 0
            y, base = at_y(below + value), at_y(below)
            box = {"x": middle - thick / 2, "y": y, "width": thick, "height": base - y}
            said = f"{x_title} {name}, {bars.name}: {unit.value(value)}"
            body.append(element("rect", tip(said), class_=f"f{k % SHADES}", **box))
            below += value
        if roomy:
            body.append(write(middle, at_y(below) - 6, unit.value(below), "value", "middle"))
        if (index + 1) % every == 0:
            body.append(write(middle, bottom + 18, name, "tick", "middle"))
    body.append(write((left + right) / 2, bottom + 35, x_title, "axis", "middle"))
    return image(label, bottom + 42, body)


def comparison_svg(rows: Sequence[Comparison], *, title: str, subtitle: str = "") -> str:
    """Return a whole SVG file: the comparison as bars, on its own light or dark card."""
    bars = [Bars("accuracy", tuple(row.accuracy for row in rows))]
    names, ours = [row.name for row in rows], [row.ours for row in rows]
    body, inner = _horizontal(names, bars, label=title, unit=PERCENT, strong=ours)
    says = f"{title}: " + ", ".join(f"{row.name} {percent(row.accuracy)}" for row in rows)
    top = 76.0 if subtitle else 54.0
    whole = [
        write(24, 35, fit(title, WIDTH, 16), "head"),
        write(24, 56, fit(subtitle, WIDTH), "sub"),
        element("g", *body, transform=f"translate(24 {number(top)})"),
    ]
    return card(says, WIDTH + 48, inner + top + 18, whole)


def _horizontal(
    categories: Sequence[str],
    series: Sequence[Bars],
    *,
    label: str,
    unit: Unit,
    strong: Sequence[bool] | None,
) -> tuple[list[Markup], float]:
    """Return the parts of a horizontal bar chart and its height."""
    _require_lengths(label, categories, series)
    known = [value for bars in series for value in bars.values if value is not None]
    marks = axis([0.0, *known], unit, zero=True)
    body, top = _legend([bars.name for bars in series]) if len(series) > 1 else ([], 0.0)
    left = min(230.0, max(map(measure, categories))) + 14
    room = max((measure(unit.value(value)) for value in known), default=0.0) + 10
    at_x = Scale(0.0, marks[-1], left, WIDTH - max(room, measure(unit.tick(marks[-1])) / 2))
    thick = 16.0 if len(series) == 1 else 14.0
    pitch = thick * len(series) + (8 if len(series) == 1 else 12)
    bottom = top + pitch * len(categories) + 4
    for mark in marks:
        body.append(rule(at_x(mark), top, at_x(mark), bottom, "grid" if mark else "base"))
        body.append(write(at_x(mark), bottom + 17, unit.tick(mark), "tick", "middle"))
    for index, name in enumerate(categories):
        y = top + pitch * index + (pitch - thick * len(series)) / 2 + 2
        middle = y + thick * len(series) / 2 + 4
        plain = strong is not None and any(strong) and not strong[index]
        kind = "strong" if strong is not None and strong[index] else "name"
        body.append(write(left - 10, middle, fit(name, left - 14), kind, "end", full=name))
        for k, bars in enumerate(series):
            value, at = bars.values[index], y + k * thick
            if value is None:
                body.append(write(left + 6, at + thick / 2 + 4, "not known", "tick"))
                continue
            box = {"x": left, "y": at, "width": at_x(value) - left, "height": thick - 1}
            said = f"{name}, {bars.name}: {unit.value(value)}"
            shade = "plain" if plain else f"f{k % SHADES}"
            body.append(element("rect", tip(said), class_=shade, **box))
            kind_ = "value strong" if kind == "strong" else "value"
            body.append(write(at_x(value) + 6, at + thick / 2 + 4, unit.value(value), kind_))
    return body, bottom + 24


def _shade(shade: int, band: Band, at_x: Scale, at_y: Scale) -> Markup:
    """Return the area between the low and the high edge of a band."""
    upper = [(x, high) for x, _, high in band.points]
    lower = [(x, low) for x, low, _ in reversed(band.points)]
    places = [f"{number(at_x(x))} {number(at_y(y))}" for x, y in upper + lower]
    return element("path", d="M" + "L".join(places) + "Z", class_=f"f{shade}", opacity=0.16)


def _curve(index: int, line: Line, at_x: Scale, at_y: Scale, unit: Unit) -> list[Markup]:
    """Return the path of one line and, where there is room, its points."""
    kind = f"k{index % SHADES}" + (" dash" if index >= SHADES else "")
    places = [f"{number(at_x(x))} {number(at_y(y))}" for x, y in line.points]
    parts = [element("path", d="M" + "L".join(places), class_=f"line {kind}")]
    if len(places) <= 40:
        for x, y in line.points:
            said = f"{line.name}, {x:g}: {unit.value(y)}"
            dot = {"cx": at_x(x), "cy": at_y(y), "r": 3.5, "stroke_width": 1.5}
            parts.append(element("circle", tip(said), class_=f"halo f{index % SHADES}", **dot))
    return parts


def _ends(
    ends: Sequence[tuple[str, float]], lines: int, at_y: Scale, right: float, unit: Unit
) -> list[Markup]:
    """Return the names at the right, moved apart, each with a thin line to its own end."""
    order = sorted(range(len(ends)), key=lambda i: -ends[i][1])
    places = spread([at_y(ends[i][1]) for i in order], GAP, at_y.end, at_y.start)
    parts = []
    for i, place in zip(order, places, strict=True):
        (name, value), limit = ends[i], i >= lines
        path = f"M{number(right)} {number(at_y(value))}L{number(right + 20)} {number(place)}"
        parts.append(
            element("path", d=path, class_="lead " + ("kl" if limit else f"k{i % SHADES}"))
        )
        what = element("tspan", text(unit.value(value)), class_="value")
        kind = "limit" if limit else "name"
        said = [text(f"{name} "), what]
        parts.append(element("text", *said, x=right + 24, y=place + 4, class_=kind))
    return parts


def _legend(names: Sequence[str]) -> tuple[list[Markup], float]:
    """Return swatches with names in rows, and the height they take."""
    parts, x, y = [], 0.0, 0.0
    for index, name in enumerate(names):
        short = fit(name, 260)
        step = measure(short) + 34
        if x and x + step > WIDTH:
            x, y = 0.0, y + 19
        swatch = {"x": x, "y": y + 2, "width": 11.0, "height": 11.0}
        parts.append(element("rect", class_=f"f{index % SHADES}", **swatch))
        parts.append(write(x + 17, y + 12, short, "name", full=name))
        x += step
    return parts, y + 28


def _require_finite(name: str, values: Sequence[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{name!r}: expected finite numbers, got {value}")


def _require_lengths(label: str, categories: Sequence[str], series: Sequence[Bars]) -> None:
    if not categories or not series:
        raise ValueError(f"{label!r}: expected at least one category and one series")
    for bars in series:
        if len(bars.values) != len(categories):
            raise ValueError(
                f"{bars.name!r}: expected {len(categories)} values, got {len(bars.values)}"
            )
