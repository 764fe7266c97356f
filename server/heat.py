"""Heat maps as inline SVG: a matrix of counts as tinted cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from anabranch.server.svg import (
    WIDTH,
    Markup,
    element,
    fit,
    image,
    measure,
    number,
    text,
    tip,
    write,
)

ON: Final = 0.64  # a shade from which a cell's number is written in the colour of the paper


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A matrix of counts >= 0 and its names. Raises ValueError for other shapes or values.

    Shades are in [0, 1]. By "log": log(1 + c) / log(1 + the greatest count), so that small
    and large counts both show. By "row": c / Σ of its row.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    by: Literal["log", "row"]
    margin: tuple[str, ...] = ()  # a title, then one text after each row
    footer: tuple[str, ...] = ()  # a title, then one text below each column
    diagonal: bool = False  # outline it

    def __post_init__(self) -> None:
        widths = sorted({len(row) for row in self.counts})
        if not self.columns or len(self.counts) != len(self.rows) or widths != [len(self.columns)]:
            raise ValueError(
                f"counts: expected {len(self.rows)} rows of {len(self.columns)} values, "
                f"got {len(self.counts)} rows of {widths}"
            )
        if min(map(min, self.counts)) < 0:
            raise ValueError(f"counts: expected numbers >= 0, got {min(map(min, self.counts))}")

    @property
    def shades(self) -> tuple[tuple[float, ...], ...]:
        """Return the shade of every cell."""
        if self.by == "row":
            return tuple(tuple(c / (sum(row) or 1) for c in row) for row in self.counts)
        most = math.log1p(max(map(max, self.counts))) or 1.0
        return tuple(tuple(math.log1p(c) / most for c in row) for row in self.counts)


def heat_map(heat: Heat, *, label: str, row_title: str, column_title: str) -> Markup:
    """Draw a matrix with its counts in the cells, darker for a greater shade; 0 is a dot."""
    left = min(180.0, max(map(measure, (*heat.rows, row_title, *heat.footer[:1])))) + 12
    side = max((measure(t) for t in heat.margin), default=0.0) + 14 if heat.margin else 0.0
    wide = min(112.0, (WIDTH - left - side) / len(heat.columns))
    tall = min(wide, 24.0) if wide > 20 else 20.0
    body, top = _column_names(heat.columns, left, wide, column_title)
    body.append(write(left - 10, top - 7, row_title, "axis", "end"))
    end, shades = left + wide * len(heat.columns), heat.shades
    for i, name in enumerate(heat.rows):
        y = top + i * tall
        short = fit(name, left - 12)
        body.append(write(left - 10, y + tall / 2 + 4, short, "name", "end", full=name))
        for j, column in enumerate(heat.columns):
            said = f"{row_title} {name}, {column_title} {column}: {heat.counts[i][j]}"
            box = (left + j * wide, y, wide, tall)
            body += _cell(box, heat.counts[i][j], shades[i][j], said)
            if heat.diagonal and i == j:
                x, y_, w, h = box
                body.append(
                    element("rect", x=x + 1, y=y_ + 1, width=w - 2, height=h - 2, class_="own")
                )
        if heat.margin:
            body.append(write(end + side, y + tall / 2 + 4, heat.margin[i + 1], "value sub", "end"))
    if heat.margin:
        body.append(write(end + side, top - 7, heat.margin[0], "axis", "end"))
    bottom = top + tall * len(heat.rows)
    for j, note in enumerate(heat.footer):
        x, anchor = (left - 10, "end") if j == 0 else (left + (j - 0.5) * wide, "middle")
        body.append(write(x, bottom + 17, note, "axis" if j == 0 else "value sub", anchor))
    return image(label, bottom + (24 if heat.footer else 4), body)


def _column_names(
    names: Sequence[str], left: float, wide: float, title: str
) -> tuple[list[Markup], float]:
    """Return the names above the cells, upright if three lines hold each, and the cells' top."""
    lines = [_wrap(name, wide - 8) for name in names]
    parts = [write(left, 14, title, "axis")]
    if all(lines):
        top = 22 + 15.0 * max(map(len, lines))
        for j, words in enumerate(lines):
            for k, line in enumerate(reversed(words)):
                x, y = left + (j + 0.5) * wide, top - 7 - 14 * k
                parts.append(write(x, y, line, "name", "middle"))
        return parts, top
    top = min(150.0, max(map(measure, names))) * 0.77 + 34
    for j in range(0, len(names), math.ceil(13 / wide)):
        x = left + (j + 0.5) * wide
        short = fit(names[j], min(150.0, (WIDTH - x) / 0.64))  # 0.64 = cos 50°
        turn = f"translate({number(x + 3)} {number(top - 6)}) rotate(-50)"
        said = [text(short), tip(names[j])]
        parts.append(element("text", *said, transform=turn, class_="name"))
    return parts, top


def _wrap(name: str, width: float) -> list[str]:
    """Return `name` on at most three lines of `width`, broken at spaces; [] if it does not fit."""
    lines: list[str] = []
    for word in name.split():
        if lines and measure(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if len(lines) <= 3 and all(measure(line) <= width for line in lines) else []


def _cell(
    box: tuple[float, float, float, float], count: int, shade: float, said: str
) -> list[Markup]:
    """Return one cell: a tinted box and its count, as large as fits or not at all."""
    x, y, wide, tall = box
    tint = {"class_": "cell f0" if count else "cell none", "fill_opacity": max(0.06, shade)}
    parts = [element("rect", tip(said), x=x, y=y, width=wide, height=tall, **tint)]
    written = str(count) if count else "·"
    size = min(11.5, (wide - 3) / measure(written, 1.0))
    if size >= 6:
        ink = "value on" if count and shade >= ON else "value" if count else "off"
        style = f"font-size:{number(size)}px;pointer-events:none"
        at = {"x": x + wide / 2, "y": y + tall / 2 + size * 0.35}
        parts.append(
            element("text", text(written), text_anchor="middle", class_=ink, style=style, **at)
        )
    return parts
