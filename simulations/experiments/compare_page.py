"""What `anabranch simulate compare` shows: one HTML page, the same tables as text, CSV, Parquet.

The page is made of the parts of a run's report (server/page.py, charts.py): no script, no request
to any other place, and under every chart a table of its numbers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Final

from anabranch.server import report
from anabranch.server.charts import Band, Line, line_chart
from anabranch.server.page import ABSENT, figure, paragraph, table
from anabranch.server.svg import BYTES, LOSS, PERCENT, STYLE, Markup, Unit, element, size, text
from anabranch.simulations.experiments.comparing import (
    Compared,
    Group,
    Mean,
    Point,
    curve,
    final,
    long_rows,
    mean_of,
)
from anabranch.simulations.experiments.rounds import Round, time_to_accuracy
from anabranch.storage.files import write_atomic

ROWS: Final = 20  # of a table under a curve over time or bytes
SPANS: Final = ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))
METRICS: Final[Mapping[str, tuple[str, Unit]]] = {
    "accuracy": ("Accuracy", PERCENT),
    "loss": ("Loss", LOSS),
}
COLUMNS: Final = ("setting", "runs", "accuracy", "macro-F1", "best round", "time", "bytes")
PLAIN: Final = Unit("{:.4g}".format, "{:.4g}".format)

Cells = list[list[str]]


def write_page(path: Path, compared: Compared) -> list[Path]:
    """Write the page, and all rounds as CSV and Parquet beside it; return the three files."""
    rows = long_rows(compared)
    beside = [path, path.with_suffix(".csv"), path.with_suffix(".parquet")]
    write_atomic(path, render(compared).encode())
    write_atomic(beside[1], as_csv(rows))
    write_atomic(beside[2], as_parquet(rows))
    return beside


def render(compared: Compared) -> str:
    """Return the page."""
    seconds, unit = time_scale(compared)
    axes: list[tuple[str, str, Callable[[Round], float | None] | None, Unit | None]] = [
        ("round", "round", None, None),
        ("bytes", "bytes moved, up and down", lambda one: one.bytes, BYTES),
    ]
    if compared.time is not None:
        title = f"{compared.time} time, {unit}"
        axes.insert(1, ("time", title, lambda one: one.seconds / seconds, PLAIN))
    sections = {"Result": _result(compared)}
    for metric in METRICS:
        figures = [part for axis in axes for part in _figure(compared, metric, *axis)]
        if figures:
            sections[METRICS[metric][0]] = figures
    sections["Runs"] = _runs(compared)
    names = ", ".join(group.name for group in compared.groups)
    count = sum(len(group.runs) for group in compared.groups)
    page = Template(Path(report.__file__).with_name("report_template.html").read_text("utf-8"))
    return page.substitute(
        title="Comparison",
        kicker=text(f"{count} runs"),
        heading="Comparison",
        lede=paragraph(f"Settings: {names}.", "lede"),
        nav=element(
            "nav",
            *(element("a", text(name), href=f"#{name.lower()}") for name in sections),
            aria_label="Sections",
        ),
        figures="",
        sections="\n".join(
            element("section", element("h2", text(n)), *parts, id=n.lower(), aria_label=n)
            for n, parts in sections.items()
        ),
        style=STYLE,
    )


def final_table(compared: Compared) -> Cells:
    """Return the cells under COLUMNS, a row per group: mean ± standard deviation."""
    rows = []
    for group in compared.groups:
        ends = [final(run) for run in group.runs]
        columns = {name: mean_of([end[name] for end in ends]) for name in ends[0]}
        rows.append(
            [
                group.name,
                str(len(group.runs)),
                _mean(columns["accuracy"], lambda v: f"{100 * v:.2f}", "%"),
                _mean(columns["macro_f1"], "{:.4f}".format),
                _mean(columns["best_round"], "{:.1f}".format),
                _mean(columns["seconds"], "{:,.1f}".format, _seconds(compared, group)),
                ABSENT if columns["bytes"] is None else size(columns["bytes"].mean),
            ]
        )
    return rows


def target_table(compared: Compared) -> Cells:
    """Return setting, accuracy, runs that reached it, and the mean round, seconds and bytes."""
    rows = []
    for group in compared.groups:
        reached = [time_to_accuracy(run.rounds, compared.targets) for run in group.runs]
        for target, found in zip(compared.targets, zip(*reached, strict=True), strict=True):
            means = {name: mean_of([one[name] for one in found]) for name in found[0]}
            got = sum(one["round"] is not None for one in found)
            moved = means["bytes"]
            rows.append(
                [
                    group.name,
                    f"{100 * target:g}\u202f%",
                    f"{got} of {len(found)}",
                    _mean(means["round"], "{:.1f}".format),
                    _mean(means["seconds"], "{:,.1f}".format, _seconds(compared, group)),
                    ABSENT if moved is None else size(moved.mean),
                ]
            )
    return rows


def _seconds(compared: Compared, group: Group) -> str:
    """Return the unit of a group's times; it says which where the runs have both."""
    return "s" if compared.time is not None else f"s {group.runs[0].about.time}"


TARGET_COLUMNS: Final = ("setting", "accuracy", "reached", "round", "time", "bytes")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as CSV with a head."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file, compression="zstd")
    return file.getvalue()


def time_scale(compared: Compared) -> tuple[float, str]:
    """Return the unit of the time axis, in seconds, and its name."""
    longest = max(run.rounds[-1].seconds for group in compared.groups for run in group.runs)
    found = ((unit, name) for least, unit, name in SPANS if longest >= least)
    return next(found, (1.0, "seconds"))


def _result(compared: Compared) -> list[Markup]:
    on = "the test records" if compared.groups[0].runs[0].about.test else "the best round"
    parts = [
        table(
            COLUMNS,
            final_table(compared),
            kinds="tnnnnnn",
            caption=f"Mean ± standard deviation over seeds; accuracy on {on}",
        )
    ]
    if compared.targets:
        caption = f"When each accuracy was reached, on the {compared.source} records"
        parts.append(table(TARGET_COLUMNS, target_table(compared), kinds="tnnnnn", caption=caption))
    if compared.time is None:
        parts.append(
            paragraph("Some runs are in virtual time and some in real time: no curves over time.")
        )
    parts += [paragraph(f"Not finished: {one}") for one in compared.missing]
    return parts


def _figure(
    compared: Compared,
    metric: str,
    by: str,
    x_title: str,
    of: Callable[[Round], float | None] | None,
    x_unit: Unit | None,
) -> list[Markup]:
    """Draw one metric over one axis; nothing where nothing is known."""
    title, unit = METRICS[metric]
    found = {group.name: curve(group, metric, of) for group in compared.groups}
    curves = {name: points for name, points in found.items() if points}
    if not curves:
        return []
    chart = line_chart(
        [Line(name, tuple((x, y) for x, y, _, _ in ps)) for name, ps in curves.items()],
        bands=[
            Band(name, tuple((x, low, high) for x, _, low, high in points))
            for name, points in curves.items()
            if any(low < high for _, _, low, high in points)
        ],
        label=f"{title} by {by}: a line per setting, with its spread",
        unit=unit,
        y_title=metric,
        x_title=x_title,
        x_unit=x_unit,
    )
    says = f"On {compared.source} records. Lines are means over seeds, bands reach from the "
    says += "smallest to the largest."
    tables = [_points(name, ps, x_title, x_unit, unit) for name, ps in curves.items()]
    return [figure(f"{title} by {by}", says, chart, *tables)]


def _points(
    name: str, points: Sequence[Point], x_title: str, x_unit: Unit | None, unit: Unit
) -> Markup:
    if x_unit is not None and len(points) > ROWS:
        points = [points[round(i * (len(points) - 1) / (ROWS - 1))] for i in range(ROWS)]
    cells = [
        [f"{x:g}" if x_unit is None else x_unit.value(x), *map(unit.value, (mean, low, high))]
        for x, mean, low, high in points
    ]
    return table([x_title, "mean", "smallest", "largest"], cells, kinds="tnnn", caption=name)


def _runs(compared: Compared) -> list[Markup]:
    cells = [
        [str(run.folder), group.name, str(run.about.seed), run.about.engine, run.about.digest]
        for group in compared.groups
        for run in group.runs
    ]
    return [table(["folder", "setting", "seed", "engine", "digest"], cells, kinds="ttntm")]


def _mean(value: Mean | None, write: Callable[[float], str], unit: str = "") -> str:
    if value is None:
        return ABSENT
    spread = "" if value.std is None else f" ± {write(value.std)}"
    return f"{write(value.mean)}{spread}" + (f"\u202f{unit}" if unit else "")
