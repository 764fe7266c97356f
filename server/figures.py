"""The report's figures: each a chart, its caption, and a table with every number it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anabranch.server.charts import Bars, Comparison, Line, grouped_bars, line_chart, stacked_bars
from anabranch.server.heat import Heat, heat_map
from anabranch.server.page import ABSENT, figure, table
from anabranch.server.svg import BYTES, PERCENT, Markup, Unit, integer, percent, size

Curves = Mapping[str, Mapping[int, float]]  # series or site -> round -> value
Counts = tuple[tuple[int, ...], ...]


def comparison(rows: Sequence[Comparison], says: str) -> Markup:
    """Draw accuracies as bars; the table adds macro-F1 and notes."""
    chart = grouped_bars(
        [row.name for row in rows],
        [Bars("accuracy", tuple(row.accuracy for row in rows))],
        label="Accuracy by way of training: one bar per row of the table",
        unit=PERCENT,
        strong=[row.ours for row in rows],
    )
    cells = [
        [
            row.name,
            percent(row.accuracy),
            ABSENT if row.macro_f1 is None else f"{row.macro_f1:.3f}",
            row.note,
        ]
        for row in rows
    ]
    head = ["way of training", "accuracy", "macro\u00a0F1", "note"]
    numbers = table(head, cells, kinds="tnnt", ours=[row.ours for row in rows])
    return figure("Accuracy", says, chart, numbers, unfold=True)


def curves(
    title: str,
    says: str,
    series: Curves,
    *,
    unit: Unit,
    y_title: str,
    limit: tuple[str, float] | None = None,
    zero: bool = False,
) -> list[Markup]:
    """Draw one line per series over rounds; nothing when no series has a value."""
    lines = [Line(name, tuple(sorted(v.items()))) for name, v in series.items() if v]
    if not lines:
        return []
    limits = [] if limit is None else [limit]
    label = f"{title}: line chart, one line each for {', '.join(line.name for line in lines)}"
    chart = line_chart(lines, label=label, unit=unit, y_title=y_title, limits=limits, zero=zero)
    rounds = sorted({round_ for values in series.values() for round_ in values})
    names = [line.name for line in lines]
    cells = [
        [str(round_), *(_known(series[name].get(round_), unit) for name in names)]
        for round_ in rounds
    ]
    if limit is not None:
        cells.append([limit[0], *[unit.value(limit[1])] * len(names)])
    numbers = table(["round", *names], cells, kinds="t" + "n" * len(names), dense=len(names) > 6)
    return [figure(title, says, chart, numbers)]


def site_bars(title: str, says: str, series: Mapping[str, Mapping[str, float]]) -> list[Markup]:
    """Draw one group of bars per site; nothing when no series has a value."""
    shown = {name: values for name, values in series.items() if values}
    if not shown:
        return []
    sites = list(dict.fromkeys(site for values in shown.values() for site in values))
    bars = [Bars(name, tuple(v.get(site) for site in sites)) for name, v in shown.items()]
    label = f"{title}: bars, one group per site"
    chart = grouped_bars(sites, bars, label=label, unit=PERCENT)
    cells = [[site, *(_known(v.get(site), PERCENT) for v in shown.values())] for site in sites]
    numbers = table(["site", *shown], cells, kinds="t" + "n" * len(shown))
    return [figure(title, says, chart, numbers)]


def label_counts(labels: tuple[str, ...], counts: Mapping[str, Sequence[int]]) -> Markup:
    """Draw records per label and site. Raises ValueError if a site has not one count per label."""
    for site, row in counts.items():
        if len(row) != len(labels):
            raise ValueError(f"{site!r}: expected {len(labels)} label counts, got {len(row)}")
    sites = tuple(counts)
    matrix: Counts = tuple(tuple(int(counts[s][i]) for s in sites) for i in range(len(labels)))
    sums = [str(sum(map(int, counts[site]))) for site in sites]
    rows = [str(sum(row)) for row in matrix]
    heat = Heat(
        rows=labels,
        columns=sites,
        counts=matrix,
        by="log",
        margin=("all", *rows),
        footer=("records", *sums),
    )
    label = f"Records per label and site: heat map of {len(labels)} labels and {len(sites)} sites"
    chart = heat_map(heat, label=label, row_title="label", column_title="site")
    numbers = table(
        ["label", *sites, "all"],
        [[n, *map(str, r), every] for n, r, every in zip(labels, matrix, rows, strict=True)],
        kinds="t" + "n" * (len(sites) + 1),
        foot=["records", *sums, str(sum(map(sum, matrix)))],
        dense=len(sites) > 6,
    )
    says = "The colour grows with the logarithm of the count; a dot is none."
    return figure("Records per label and site", says, chart, numbers)


def traffic(up: Mapping[int, int], down: Mapping[int, int]) -> list[Markup]:
    """Draw bytes per round as stacked columns; nothing when there are no rounds."""
    rounds = sorted({*up, *down})
    if not rounds:
        return []
    series = {"up, from the sites": up, "down, to the sites": down}
    bars = [Bars(name, tuple(v.get(r, 0) for r in rounds)) for name, v in series.items()]
    label = "Bytes per round: stacked columns, up and down"
    chart = stacked_bars([str(r) for r in rounds], bars, label=label, unit=BYTES)
    cells = [_traffic_row(str(r), up.get(r, 0), down.get(r, 0)) for r in rounds]
    foot = _traffic_row("all", sum(up.values()), sum(down.values()))
    head = ["round", "up", "bytes up", "down", "bytes down", "both"]
    numbers = table(head, cells, kinds="tnnnnn", foot=foot)
    return [figure("Bytes per round", "All sites together, as encoded.", chart, numbers)]


def confusion(labels: tuple[str, ...], matrix: Sequence[Sequence[int]], says: str) -> Markup:
    """Draw rows of truth against predictions. Raises ValueError unless (labels, labels)."""
    counts: Counts = tuple(tuple(int(c) for c in row) for row in matrix)
    sums = [sum(row) for row in counts]
    hits = [row[i] for i, row in enumerate(counts) if i < len(row)]
    recall = [_share(hit, n) for hit, n in zip(hits, sums, strict=False)]
    heat = Heat(
        rows=labels,
        columns=labels,
        counts=counts,
        by="row",
        margin=("recall", *recall),
        diagonal=True,
    )
    label = f"Confusion matrix of {len(labels)} labels; rows are the truth"
    chart = heat_map(heat, label=label, row_title="truth", column_title="predicted")
    found = [_share(hit, sum(row[i] for row in counts)) for i, hit in enumerate(hits)]
    each = table(
        ["label", "records", "recall", "precision"],
        [list(cells) for cells in zip(labels, map(str, sums), recall, found, strict=True)],
        kinds="tnnn",
        caption="Per label",
    )
    square = table(
        ["truth", *labels],
        [[name, *map(str, row)] for name, row in zip(labels, counts, strict=True)],
        kinds="t" + "n" * len(labels),
        caption="Records by truth (rows) and prediction (columns)",
        dense=True,
    )
    says += " Colours are shares of a row of truth; outlined cells are correct; a dot is none."
    return figure("Confusion matrix", says.strip(), chart, each, square)


def confused(labels: tuple[str, ...], matrix: Sequence[Sequence[int]], most: int = 5) -> Markup:
    """Return a table of the pairs of labels that are taken for each other most often."""
    pairs = [
        (int(count), i, j)
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    cells = [
        [labels[i], labels[j], str(count), _share(count, sum(map(int, matrix[i])))]
        for count, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:most]
    ]
    head = ["truth", "predicted", "records", "share of the truth"]
    return table(head, cells, kinds="ttnn", caption="Most frequent confusions")


def _traffic_row(name: str, up: int, down: int) -> list[str]:
    return [name, size(up), integer(up), size(down), integer(down), size(up + down)]


def _known(value: float | None, unit: Unit) -> str:
    return ABSENT if value is None else unit.value(value)


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else ABSENT
