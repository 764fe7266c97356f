"""A population to look at: a table for the terminal, and one page with charts.

`anabranch simulate experiment.toml --show-population` prints `describe` and writes
population.html. Both are pure: the population in, text out. The page is made of the same parts
as report.html: no script, no request, and under every chart a table with its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

import numpy as np

from anabranch.server.charts import Bars, Line, grouped_bars, line_chart, stacked_bars
from anabranch.server.heat import Heat, heat_map
from anabranch.server.page import figure, paragraph, table
from anabranch.server.svg import PERCENT, STYLE, Markup, Unit, element, integer, percent, size, text
from anabranch.simulations.population.clients import client_name
from anabranch.simulations.population.devices import Devices, Floats, Ints
from anabranch.simulations.population.measures import (
    WEEK_HOURS,
    Histogram,
    histogram,
    label_counts,
    online_hours,
    shares_of,
)
from anabranch.simulations.population.regions import regions
from anabranch.simulations.population.table import Built
from anabranch.storage.files import write_atomic

SAMPLE: Final = 32  # clients in the heat map of labels
MOST_LABELS: Final = 24  # columns of the heat map; rarer labels are added up
MOST_LINES: Final = 5
COUNT: Final = Unit(integer, lambda v: f"{v:,.0f}".replace(",", "\u202f"))


def describe(built: Built, labels: Sequence[str]) -> str:
    """Return the population as a few lines of text, for a terminal."""
    whole = np.diff(built.partition.start)
    lines = [
        *(f"{name:<24}{value}" for name, value in _facts(built, whole)),
        "",
        f"{'records per client':<24}{_spread(whole)}",
        f"{'labels per client':<24}{_spread((label_counts(built, len(labels)) > 0).sum(axis=1))}",
    ]
    if built.devices is None:
        return "\n".join([*lines, "", "no [devices]: all clients are equal and always online"])
    hours = online_hours(built)
    online = shares_of(hours, built.devices.kind, len(built.devices.kinds))
    head = f"{'class':<14}{'clients':>9}{'GFLOP/s':>10}{'Mbit/s up':>11}{'down':>9}{'online':>9}"
    lines += ["", "medians, and the share online over a week", head]
    for index, kind in enumerate(built.devices.kinds):
        mine = built.devices.kind == index
        if mine.any():
            speed, up, down = (float(np.median(v[mine])) for v in _speeds(built.devices))
            share = percent(float(online[index].mean()))
            lines.append(
                f"{kind:<14}{integer(int(mine.sum())):>9}{speed:>10.3g}{up:>11.3g}{down:>9.3g}"
                f"{share:>9}"
            )
    everyone = hours.mean(axis=1)
    low, high = float(everyone.min()), float(everyone.max())
    lines += ["", f"{'online, all':<24}{percent(low)} to {percent(high)} by hour of the week"]
    return "\n".join([*lines, f"{'regions':<24}{_region_list(built.devices)}"])


def write_page(path: Path, built: Built, labels: Sequence[str], *, title: str, says: str) -> None:
    """Write the page whole or not at all."""
    write_atomic(path, page(built, labels, title=title, says=says).encode("utf-8"))


def page(built: Built, labels: Sequence[str], *, title: str, says: str = "") -> str:
    """Return population.html; `says` is a sentence about how the population was made."""
    sections = {"Records": _records(built, labels)}
    if built.devices is not None:
        sections["Devices"] = _devices(built.devices)
        sections["Availability"] = _availability(built, built.devices)
        sections["Regions"] = [_regions(built.devices)]
    links = [element("a", text(name), href=f"#{name.lower()}") for name in sections]
    facts = _facts(built, np.diff(built.partition.start))
    boxes = [
        element("div", element("b", text(value)), element("span", text(name)), class_="figure")
        for name, value in facts
    ]
    template = resources.files("anabranch.server").joinpath("report_template.html")
    return Template(template.read_text("utf-8")).substitute(
        title=text(f"{title}: population"),
        kicker="Population",
        heading=text(title),
        lede=paragraph(says, "lede") if says else "",
        nav=element("nav", *links, aria_label="Sections") if len(links) > 1 else "",
        figures=element("div", *boxes, class_="figures"),
        sections="\n".join(
            element("section", element("h2", text(name)), *parts, id=name.lower(), aria_label=name)
            for name, parts in sections.items()
        ),
        style=STYLE,
    )


def _records(built: Built, labels: Sequence[str]) -> list[Markup]:
    whole = np.diff(built.partition.start)
    return [
        _histogram(
            "Records per client",
            "Training and held-out records together.",
            histogram(whole.astype(np.float64), np.zeros(len(whole), np.int64), ["clients"]),
            "records",
        ),
        _label_figure(built, labels),
    ]


def _label_figure(built: Built, labels: Sequence[str]) -> Markup:
    """Return the heat map of some clients: an even sample, sorted by what they have most of."""
    counts = label_counts(built, len(labels))
    columns = list(labels)
    if len(columns) > MOST_LABELS:
        order = np.argsort(-counts.sum(axis=0), kind="stable")
        counts, columns = counts[:, order], [labels[k] for k in order]
        rest = counts[:, MOST_LABELS - 1 :].sum(axis=1, keepdims=True)
        columns = [*columns[: MOST_LABELS - 1], f"{len(columns) - MOST_LABELS + 1} others"]
        counts = np.concatenate([counts[:, : MOST_LABELS - 1], rest], axis=1)
    sample = np.unique(np.linspace(0, len(counts) - 1, min(SAMPLE, len(counts))).astype(int))
    shares = counts[sample] / np.maximum(counts[sample].sum(axis=1, keepdims=True), 1)
    top = shares.argmax(axis=1)
    sample = sample[np.lexsort((-shares.max(axis=1), top))]
    names = tuple(_client(built, int(i)) for i in sample)
    cells = tuple(tuple(row) for row in counts[sample].tolist())
    heat = Heat(
        rows=names,
        columns=tuple(columns),
        counts=cells,
        by="row",
        margin=("records", *(integer(sum(row)) for row in cells)),
    )
    chart = heat_map(heat, label="Labels per client", row_title="client", column_title="label")
    here = (
        "All clients" if len(sample) == len(counts) else f"{len(sample)} of {len(counts)} clients"
    )
    says = f"{here}, sorted by the label they have most of; the darker, the larger its share."
    rows = [[name, *map(str, row)] for name, row in zip(names, cells, strict=True)]
    numbers = table(["client", *columns], rows, kinds="t" + "n" * len(columns), dense=True)
    return figure("Labels per client", says, chart, numbers)


def _devices(devices: Devices) -> list[Markup]:
    """Return the distributions by class; classes stand in the order of their median speed."""
    speeds = _speeds(devices)
    order = _by_speed(devices)
    kind = np.argsort(order)[devices.kind]
    names = [devices.kinds[k] for k in order]
    titles = (
        ("Training speed", "Sustained, 10⁹ operations per second.", "GFLOP/s"),
        ("Uplink", "From client to coordinator.", "Mbit/s"),
        ("Downlink", "From coordinator to client.", "Mbit/s"),
    )
    charts = [
        _histogram(title, says, histogram(values, kind, names), unit)
        for (title, says, unit), values in zip(titles, speeds, strict=True)
    ]
    rows = []
    for k in order:
        mine = devices.kind == k
        if not mine.any():
            continue
        rows.append(
            [
                devices.kinds[k],
                integer(int(mine.sum())),
                *(f"{np.median(values[mine]):.3g}" for values in speeds),
                size(float(np.median(devices.memory_bytes[mine]))),
                f"{np.median(devices.compute_watts[mine]):.3g} W",
                f"{np.median(devices.network_watts[mine]):.3g} W",
                percent(float(devices.dropout[mine].mean())),
            ]
        )
    head = "class,clients,GFLOP/s,Mbit/s up,Mbit/s down,memory,training,network,drop-outs"
    return [table(head.split(","), rows, kinds="tnnnnnnnn", caption="Medians by class"), *charts]


def _availability(built: Built, devices: Devices) -> list[Markup]:
    """Return who is online over a week: all, by class, and in the largest regions."""
    online = online_hours(built)
    everyone = {"all": online.mean(axis=1)}
    classes = shares_of(online, devices.kind, len(devices.kinds))
    places = shares_of(online, devices.region, len(devices.regions))
    largest = np.argsort(-np.bincount(devices.region), kind="stable")[: MOST_LINES - 1]
    by_class = {devices.kinds[k]: classes[k] for k in _by_speed(devices)[: MOST_LINES - 1]}
    by_place = {regions()[devices.regions[k]].name: places[k] for k in largest}
    says = "Share of the clients that could be asked, at half past every hour of the first week."
    parts = [_curves("Online over a week, by class", says, everyone | by_class)]
    if len(devices.regions) > 1:
        parts.append(_curves("Online over a week, by region", says, everyone | by_place))
    return parts


def _curves(title: str, says: str, shares: Mapping[str, Floats]) -> Markup:
    """Return curves over the hours of a week, and a table of their means by hour of the day."""
    days = [(hour + 0.5) / 24 for hour in range(WEEK_HOURS)]
    lines = [
        Line(name, tuple(zip(days, values.tolist(), strict=True)))
        for name, values in shares.items()
    ]
    chart = line_chart(
        lines,
        label=title,
        unit=PERCENT,
        y_title="online",
        x_title="days since the run began: Monday, 00:00 UTC, unless it has a start hour",
        zero=True,
    )
    means = [values.reshape(7, 24).mean(axis=0) for values in shares.values()]
    rows = [[f"{h:02d}:30", *(percent(float(mean[h])) for mean in means)] for h in range(24)]
    kinds = "t" + "n" * len(means)
    caption = "Mean over the seven days"
    return figure(
        title,
        says,
        chart,
        table(["hour of the day since the run began", *shares], rows, kinds=kinds, caption=caption),
    )


def _regions(devices: Devices) -> Markup:
    known = regions()
    counts = np.bincount(devices.region, minlength=len(devices.regions))
    order = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
    names = [known[devices.regions[k]].name for k in order]
    shares = counts[order] / max(len(devices), 1)
    chart = grouped_bars(
        names, [Bars("clients", tuple(shares.tolist()))], label="Clients by region", unit=PERCENT
    )
    rows = []
    for k in order:
        one = known[devices.regions[k]]
        cells = [integer(int(counts[k])), f"{one.g_per_kwh:.0f}", str(one.year), one.source]
        rows.append([one.name, f"UTC{one.utc_offset_h:+g}", *cells])
    head = ["region", "time", "clients", "g CO₂ per kWh", "year", "source"]
    numbers = table(head, rows, kinds="ttnnnt")
    return figure("Clients by region", "", chart, numbers, unfold=True)


def _histogram(title: str, says: str, found: Histogram, unit: str) -> Markup:
    names = [f"{edge:,.4g}".replace(",", "\u202f") for edge in found.edges]
    bins = names[:-1]
    series = [Bars(n, c) for n, c in zip(found.names, found.counts, strict=True) if sum(c)]
    chart = stacked_bars(bins, series, label=title, unit=COUNT, x_title=f"{unit}, from")
    rows = [
        [f"{names[i]} to {names[i + 1]}", *(integer(bars.values[i] or 0) for bars in series)]
        for i in range(len(bins))
    ]
    head = [unit, *(bars.name for bars in series)]
    return figure(title, says, chart, table(head, rows, kinds="t" + "n" * len(series)))


def _facts(built: Built, whole: Ints) -> list[tuple[str, str]]:
    distinct = len(np.unique(built.partition.rows))
    facts = [
        ("clients", integer(len(whole))),
        ("records dealt", integer(int(whole.sum()))),
        ("different records", f"{integer(distinct)} of {integer(len(built.records))}"),
        ("records, median client", integer(float(np.median(whole)))),
        ("held out", integer(int(built.partition.held.sum()))),
    ]
    if built.devices is not None:
        facts.append(("device classes", str(len(built.devices.kinds))))
    return facts


def _speeds(devices: Devices) -> tuple[Floats, Floats, Floats]:
    """Return GFLOP/s, and Mbit/s up and down."""
    up, down = devices.uplink_bps / 1e6, devices.downlink_bps / 1e6
    return devices.gflops.astype(np.float64), up.astype(np.float64), down.astype(np.float64)


def _by_speed(devices: Devices) -> list[int]:
    medians = [
        float(np.median(devices.gflops[devices.kind == k])) if (devices.kind == k).any() else 0.0
        for k in range(len(devices.kinds))
    ]
    return [int(k) for k in np.argsort(medians, kind="stable")]


def _spread(values: Ints) -> str:
    low, middle, high = (integer(v) for v in np.quantile(values, (0.1, 0.5, 0.9)))
    ends = f"{integer(int(values.min()))} to {integer(int(values.max()))}"
    return f"{ends}, median {middle}, 10 % below {low}, 10 % above {high}"


def _region_list(devices: Devices) -> str:
    counts = np.bincount(devices.region, minlength=len(devices.regions))
    order = np.argsort(-counts, kind="stable")
    return ", ".join(
        f"{devices.regions[k]} {percent(float(counts[k] / len(devices)))}"
        for k in order
        if counts[k]
    )


def _client(built: Built, index: int) -> str:
    return built.values[index] if built.values else client_name(index)
