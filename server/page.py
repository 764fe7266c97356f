"""Parts of an HTML page that charts stand on: tables and figures, accessible and escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from anabranch.server.svg import Markup, element, text

ABSENT: Final = "\u2013"  # a value that is not there, unlike 0
_CLASSES: Final = {"t": "said", "n": "n", "m": "mono"}


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    kinds: str,
    caption: str = "",
    foot: Sequence[str] = (),
    ours: Sequence[bool] = (),
    dense: bool = False,
) -> Markup:
    """Return a table whose first column names the rows.

    `kinds` has one letter per column: t text, n number, m monospaced. `foot` is a last row of
    sums, `ours` marks rows. Raises ValueError for a row that is not as long as the head.
    """
    for row in (*rows, *([foot] if foot else [])):
        if not len(row) == len(head) == len(kinds):
            raise ValueError(f"{caption!r}: expected {len(head)} cells, got {len(row)}: {row[:1]}")
    titles = zip(head, kinds.replace("m", "t"), strict=True)
    top = [_cell("th", name, kind, scope="col") for name, kind in titles]
    marked = ours or [False] * len(rows)
    body = [
        element("tr", *_row(row, kinds), **({"class_": "ours"} if mark else {}))
        for row, mark in zip(rows, marked, strict=True)
    ]
    parts = [element("caption", text(caption))] if caption else []
    parts += [element("thead", element("tr", *top)), element("tbody", *body)]
    parts += [element("tfoot", element("tr", *_row(foot, kinds)))] if foot else []
    class_ = "dense" if dense else "pairs" if len(head) == 2 else "wide"
    written = element("table", *parts, class_=class_)
    return scroll(written, caption or head[0])


def figure(title: str, says: str, chart: Markup, *tables: Markup, unfold: bool = False) -> Markup:
    """Return a chart with its caption above and the same numbers as tables under it."""
    caption = element(
        "figcaption", element("b", text(title)), text(". " if says else ""), text(says)
    )
    name = "As a table" if len(tables) == 1 else "As tables"
    folded = element("details", element("summary", text(name)), *tables)
    under = tables if unfold else (folded,)
    return element("figure", caption, scroll(chart, title, "scroll chart"), *under)


def scroll(content: Markup, name: str, class_: str = "scroll") -> Markup:
    """Return a box that scrolls sideways on a narrow screen, also with the keyboard."""
    return element("div", content, class_=class_, tabindex="0", role="group", aria_label=name)


def paragraph(value: str, class_: str = "") -> Markup:
    """Return one paragraph of plain text."""
    return element("p", text(value), **({"class_": class_} if class_ else {}))


def bullets(values: Sequence[str]) -> Markup:
    """Return a list of plain texts."""
    return element("ul", *(element("li", text(value)) for value in values))


def _row(cells: Sequence[str], kinds: str) -> list[Markup]:
    first = _cell("th", cells[0], kinds[0], scope="row")
    return [first, *(_cell("td", c, k) for c, k in zip(cells[1:], kinds[1:], strict=True))]


def _cell(tag: str, value: str, kind: str, **attributes: str) -> Markup:
    return element(tag, text(value), class_=_CLASSES[kind], **attributes)
