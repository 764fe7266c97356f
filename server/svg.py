"""SVG as text: escaping, elements, number formats, axis ticks, and the style of all charts.

All text goes through `text`, which escapes it; `Markup` is the type of what is already safe,
so a type checker finds every string that is not. Units are CSS pixels.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NewType

Markup = NewType("Markup", str)

WIDTH: Final = 760.0  # of every chart
SIZE: Final = 12.0  # of chart type
SHADES: Final = 6  # of the accent family: classes f0 to f5 fill, k0 to k5 draw lines

# Control characters are not XML, and bidirectional ones can make a name read as another.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufffe\uffff]"
)

# Colours by class only, so that one drawing serves light, dark and print. One family of blues
# and greens, grey for what is only compared with, and one warm colour for limits.
STYLE: Final = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b2429;--soft:#5b676e;--grid:#e3e8ea;
--rule:#c3ccd0;--s0:#0b4f6c;--s1:#3a9bb3;--s2:#12806a;--s3:#7c92c4;--s4:#54707f;--s5:#5f9e83;
--plain:#a9b7be;--limit:#b1471f}
@media screen and (prefers-color-scheme:dark){:root{--paper:#12181b;--ink:#e6ecee;--soft:#9aa8af;
--grid:#273035;--rule:#3d494f;--s0:#6cc3e0;--s1:#2f8aa8;--s2:#6fd0b4;--s3:#9fb2ea;--s4:#a5b8c2;
--s5:#4fa184;--plain:#56656d;--limit:#ee8e66}}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;fill:var(--ink)}
svg .tick,svg .axis,svg .sub{fill:var(--soft)}svg .strong{font-weight:600}
svg tspan.value{font-weight:600}
svg .head{font-size:16px;font-weight:600}
svg .grid{stroke:var(--grid);fill:none}svg .base{stroke:var(--rule);fill:none}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .dash{stroke-dasharray:5 4}svg .lead{fill:none;opacity:.55}svg .halo{stroke:var(--paper)}
svg .k0{stroke:var(--s0)}svg .k1{stroke:var(--s1)}svg .k2{stroke:var(--s2)}
svg .k3{stroke:var(--s3)}svg .k4{stroke:var(--s4)}svg .k5{stroke:var(--s5)}
svg .f0{fill:var(--s0)}svg .f1{fill:var(--s1)}svg .f2{fill:var(--s2)}
svg .f3{fill:var(--s3)}svg .f4{fill:var(--s4)}svg .f5{fill:var(--s5)}
svg .kl{stroke:var(--limit);stroke-dasharray:6 3}svg text.limit{fill:var(--limit)}
svg .plain{fill:var(--plain)}svg .cell{stroke:var(--paper)}svg .none{fill:var(--grid)}
svg text.on{fill:var(--paper)}svg text.off{fill:var(--soft)}
svg .own{fill:none;stroke:var(--ink)}svg .card{fill:var(--paper);stroke:var(--grid)}
"""


@dataclass(frozen=True)
class Unit:
    """How numbers are written: measured values in full, axis ticks short."""

    value: Callable[[float], str]
    tick: Callable[[float], str]
    most: float = math.inf  # no axis goes beyond it


def percent(value: float) -> str:
    """Return 0.714 as "71.4 %" (with a narrow space that does not break)."""
    return f"{100 * value:.1f}\u202f%"


def integer(value: float) -> str:
    """Return 1234567 as "1 234 567" (with narrow spaces that do not break)."""
    return f"{round(value):,}".replace(",", "\u202f")


def size(value: float) -> str:
    """Return a number of bytes with three digits in decimal units: 2411332 is "2.41 MB"."""
    units = ("kB", "MB", "GB", "TB")
    if value < 999.5:
        return f"{value:.0f}\u202fB"
    power = next((p for p in range(1, 5) if value / 1000**p < 999.5), 4)
    scaled = value / 1000**power
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f}\u202f{units[power - 1]}"


def _short_size(value: float) -> str:
    """Return a size without needless zeros, for axes."""
    if value < 999.5:
        return f"{value:g}\u202fB" if value else "0"
    amount, unit = size(value).split("\u202f")
    return f"{float(amount):g}\u202f{unit}"


PERCENT: Final = Unit(percent, lambda v: f"{100 * v:.4g}\u202f%", most=1.0)
BYTES: Final = Unit(size, _short_size)
EPSILON: Final = Unit("{:.2f}".format, "{:.4g}".format)
LOSS: Final = Unit("{:.3f}".format, "{:.4g}".format)


@dataclass(frozen=True)
class Scale:
    """Maps values [low, high] to places [start, end], linearly; the places may fall."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def text(value: str) -> Markup:
    """Return `value` escaped for XML and HTML, in content and in quoted attributes."""
    return Markup(html.escape(_UNSAFE.sub("\ufffd", value), quote=True))


def element(tag: str, *children: Markup, **attributes: str | float) -> Markup:
    """Return one element; `class_` is written class, `stroke_width` stroke-width."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(v) if isinstance(v, str) else number(v)}"'
        for name, v in attributes.items()
    )
    inner = "".join(children)
    return Markup(f"<{tag}{written}>{inner}</{tag}>" if children else f"<{tag}{written}/>")


def ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Return the multiples of a step of 1, 2 or 5 times a power of ten that lie in [low, high].

    At most `most` + 1 of them. With `whole` the step is at least 1. Needs low < high.
    """
    step = max(_step(high - low, most), 1.0) if whole else _step(high - low, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def axis(values: Sequence[float], unit: Unit, *, zero: bool) -> list[float]:
    """Return the ticks of an axis that holds all `values`, from its low end to its high end."""
    low, high = min(values), max(values)
    positive = low >= 0
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        pad = abs(high) * 0.1 or 1.0
        low = max(0.0, low - pad) if positive else low - pad
        high = max(high, min(high + pad, unit.most))
    step = _step(high - low, 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places as near to `wanted` (ascending) as can be, `gap` apart and in [low, high].

    Least squares: with t_i = wanted_i - i·gap the places must not fall, so equal runs are
    pooled (pool adjacent violators), then clipped. More than fit overflow `high`.
    """
    pools: list[tuple[float, int]] = []
    for index, place in enumerate(wanted):
        total, count = place - index * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    flat = [total / count for total, count in pools for _ in range(count)]
    limit = max(low, high - gap * (len(flat) - 1))
    return [min(max(t, low), limit) + i * gap for i, t in enumerate(flat)]


def tick_width(unit: Unit, marks: Sequence[float]) -> float:
    """Return the room that the numbers of a vertical axis take, with their distance to it."""
    return max(measure(unit.tick(mark)) for mark in marks) + 10


def measure(value: str, size: float = SIZE) -> float:
    """Return about how wide `value` is in a sans-serif face of `size` px, rather too wide."""
    return sum(map(_em, value)) * size


def fit(value: str, width: float, size: float = SIZE) -> str:
    """Return `value`, or its longest start with an ellipsis that is at most `width` wide."""
    if measure(value, size) <= width:
        return value
    end = len(value)
    while end and measure(value[:end].rstrip() + "…", size) > width:
        end -= 1
    return value[:end].rstrip() + "…"


def write(
    x: float, y: float, value: str, class_: str, anchor: str = "start", full: str = ""
) -> Markup:
    """Return text at a place; `full` is shown as a tooltip when `value` is a part of it."""
    said = [text(value), *([tip(full)] if full and full != value else [])]
    return element("text", *said, x=x, y=y, text_anchor=anchor, class_=class_)


def rule(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def tip(value: str) -> Markup:
    """Return a tooltip, which is also the accessible name of the element around it."""
    return element("title", text(value))


def image(label: str, height: float, body: Sequence[Markup]) -> Markup:
    """Return the drawing as one image for assistive technology, named `label`."""
    box = f"0 0 {number(WIDTH)} {number(height)}"
    return element("svg", tip(label), *body, viewBox=box, role="img", aria_label=label)


def card(says: str, width: float, height: float, body: Sequence[Markup]) -> str:
    """Return a whole SVG file on its own light or dark card; `says` is all of it in words."""
    frame = {"x": 0.5, "y": 0.5, "width": width - 1, "height": height - 1, "rx": 8}
    return element(
        "svg",
        element("title", text(says)),
        element("style", Markup(STYLE)),
        element("rect", class_="card", **frame),
        *body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=says,
    )


def stacked(says: str, charts: Sequence[Markup], panel: float, margin: float = 24.0) -> str:
    """Return a whole SVG file with charts `panel` high, one under another."""
    body = [
        element(
            "svg", chart, x=margin, y=margin + row * (panel + margin), width=WIDTH, height=panel
        )
        for row, chart in enumerate(charts)
    ]
    return card(says, WIDTH + 2 * margin, margin + len(charts) * (panel + margin), body)


def number(value: float) -> str:
    """Return a coordinate with at most two decimals: 12.50 is "12.5"."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _step(span: float, most: int) -> float:
    """Return the smallest of 1, 2, 5 · 10^k that divides `span` into at most `most` parts."""
    raw = span / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * (1 - 1e-9))


def _em(character: str) -> float:
    if character in "iljtf.,:;'|!()[] \u202f":
        return 0.36
    if character in "mwMW@%…" or unicodedata.east_asian_width(character) in ("W", "F"):
        return 1.0
    return 0.72 if character.isupper() else 0.62
