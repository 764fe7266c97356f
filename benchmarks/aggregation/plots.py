"""Drawings of docs/benchmarks/aggregation.md, as SVG text: no font, no script, light and dark.

accuracy over uplink    one panel per situation and data set, one dot per rule
loss under attack       one bar per robust rule and attack
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from anabranch.server.svg import (
    WIDTH,
    Markup,
    Scale,
    Unit,
    axis,
    card,
    element,
    measure,
    number,
    rule,
    spread,
    tip,
    write,
)
from benchmarks.aggregation.federation import Outcome
from benchmarks.aggregation.grid import DATASETS, Job, rules
from benchmarks.aggregation.tables import OURS, TITLES, Situation, shared, units

PANEL_HEIGHT = 250.0
MARGIN = 24.0
POINTS = Unit("{:.1f}".format, "{:.4g}".format)


def accuracy_over_uplink(results: Mapping[Job, Outcome], epsilon: float) -> str:
    """Return a file with mean accuracy over kB per client and round, a panel for each pair."""
    panels = [Situation("fixed", epsilon, ranks) for ranks in ("equal", "mixed")]
    body: list[Markup] = []
    width = (WIDTH - MARGIN) / 2
    said = []
    for row, situation in enumerate(panels):
        for column, dataset in enumerate(DATASETS):
            dots = _dots(results, situation, dataset)
            title = f"{TITLES[dataset]}, {situation.ranks} ranks"
            said.append(f"{title}: " + ", ".join(f"{n} {y:.1f} %" for n, _, y in dots))
            at = f"translate({number(column * (width + MARGIN))} {number(row * PANEL_HEIGHT)})"
            body.append(element("g", *_panel(title, dots, width), transform=at))
    height = PANEL_HEIGHT * len(panels)
    private = f"ε = {epsilon:g}" if epsilon else "no DP"
    return _file(f"Accuracy over uplink, {private}", "; ".join(said), body, height)


Dot = tuple[str, float, float]  # rule, kB, accuracy in percent


def _dots(results: Mapping[Job, Outcome], situation: Situation, dataset: str) -> list[Dot]:
    found = units(results, lambda cell: situation.of(cell) and cell.dataset == dataset)
    common = shared(found)
    if not common:
        return []
    return [
        (
            name,
            statistics.mean(found[name][unit].uplink_bytes for unit in common) / 1000,
            100 * statistics.mean(found[name][unit].accuracy for unit in common),
        )
        for name in rules(situation.ranks)
        if name in found
    ]


def _panel(title: str, dots: Sequence[Dot], width: float) -> list[Markup]:
    body = [write(0, 14, title, "strong"), write(0, 32, "accuracy, %", "axis")]
    if not dots:
        return [*body, write(0, 60, "not run", "axis")]
    marks = axis([y for _, _, y in dots], POINTS, zero=False)
    steps = axis([x for _, x, _ in dots], POINTS, zero=True)
    right = width - max(measure(name) for name, _, _ in dots) - 22
    bottom = PANEL_HEIGHT - 62
    at_x, at_y = Scale(0, steps[-1], 34, right), Scale(marks[0], marks[-1], bottom, 46)
    for mark in marks:
        style = "base" if mark == marks[0] else "grid"
        body += [
            rule(34, at_y(mark), right, at_y(mark), style),
            write(28, at_y(mark) + 4, POINTS.tick(mark), "tick", "end"),
        ]
    body += [write(at_x(x), bottom + 18, POINTS.tick(x), "tick", "middle") for x in steps]
    body.append(write((34 + right) / 2, bottom + 35, "kB up, client and round", "axis", "middle"))
    order = sorted(dots, key=lambda dot: -dot[2])
    places = spread([at_y(y) for _, _, y in order], 15, 40, bottom)
    for (name, x, y), place in zip(order, places, strict=True):
        ours = name == OURS
        said = tip(f"{name}: {y:.1f} % at {x:.1f} kB")
        shade = "f0" if ours else "plain"
        body += [
            element("circle", said, cx=at_x(x), cy=at_y(y), r=5, class_=shade),
            rule(at_x(x) + 6, at_y(y), right + 12, place, "grid lead"),
            write(right + 16, place + 4, name, "strong" if ours else "tick"),
        ]
    return body


def _file(title: str, says: str, body: Sequence[Markup], height: float) -> str:
    """Return a whole SVG file on its own light or dark card."""
    whole = [
        write(MARGIN, 35, title, "head"),
        element("g", *body, transform=f"translate({number(MARGIN)} 58)"),
    ]
    return card(says, WIDTH + 2 * MARGIN, height + 76, whole)
