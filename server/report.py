"""report.html: one run on one page that needs nothing but itself.

`render` is pure: data in, HTML out. Every string goes through `svg.text`, the page's content
security policy allows no script and no request, and each chart has a table under it with the
same numbers. A section whose data are absent is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Final

from anabranch.server import figures
from anabranch.server.charts import Comparison
from anabranch.server.figures import Curves
from anabranch.server.page import ABSENT, paragraph, table
from anabranch.server.report_parts import privacy_statement, secure_sums
from anabranch.server.statement.guarantees import PrivacyStatement
from anabranch.server.sums.log import SumEvent
from anabranch.server.svg import (
    EPSILON,
    LOSS,
    PERCENT,
    STYLE,
    Markup,
    Unit,
    element,
    integer,
    percent,
    size,
    text,
)
from anabranch.storage.files import write_atomic

__all__ = ["Comparison", "Failure", "ReleaseFile", "ReportData", "render", "write_report"]

# Errors lie between float32 rounding, 1e-8, and 1.
ERROR: Final = Unit("{:.2g}".format, "{:.2g}".format)
MISSED: Final = (
    "How far the merged products B A are from the mean of the sites' products: "
    "‖Σ p_k B_k A_k − B A‖ / ‖Σ p_k B_k A_k‖ over all layers."
)

_TEMPLATE: Final = Path(__file__).with_name("report_template.html")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One client that did not deliver in one round, and why."""

    round: int
    site: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReleaseFile:
    """One file of the release, and what was measured with it."""

    name: str
    size_bytes: int
    accuracy: float | None = None  # share, 0 to 1
    latency_ms: float | None = None  # per record
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What the page shows. Accuracies are shares, 0 to 1; everything but `name` may be absent."""

    name: str  # of the run
    title: str = ""
    description: str = ""  # a sentence or two: what was trained, on what
    evaluated_on: str = ""  # what accuracies were measured on: "2 310 held-out diagnoses"
    rounds_evaluated_on: str = ""  # what the curves were measured on, if it is something else
    sites_evaluated_on: str = "each site's own held-out records"
    comparison: Sequence[Comparison] = ()
    accuracy: Curves = field(default_factory=dict)  # series -> round -> of the global adapter
    loss: Curves = field(default_factory=dict)
    aggregation_error: Curves = field(default_factory=dict)  # relative, of the merged products
    site_accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # series -> site
    labels: Sequence[str] = ()  # order = index
    label_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)  # site -> per label
    sums: Sequence[SumEvent] = ()  # every attempt to make a secure sum, in order
    failures: Sequence[Failure] | None = None  # None: not known; (): there were none
    privacy: PrivacyStatement | None = None  # None: nothing is said; not "no privacy"
    epsilon: Curves = field(default_factory=dict)  # site -> round -> spent so far, cumulative
    epsilon_target: float | None = None
    bytes_up: Mapping[int, int] = field(default_factory=dict)  # round -> sites to coordinator
    bytes_down: Mapping[int, int] = field(default_factory=dict)  # round -> coordinator to sites
    devices: Sequence[Markup] = ()  # of a simulation: what it cost its devices, as page parts
    confusion: Sequence[Sequence[int]] = ()  # rows = truth, columns = predicted
    confusion_of: str = ""  # which model, on what
    release: Sequence[ReleaseFile] = ()
    seed: int | None = None
    aggregation: Mapping[str, str] = field(default_factory=dict)  # "method" -> "altqr"
    facts: Mapping[str, str] = field(default_factory=dict)  # "time" -> "4 min 10 s"
    digests: Mapping[str, str] = field(default_factory=dict)  # what -> SHA-256, hex
    versions: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, data: ReportData) -> None:
    """Write the page whole or not at all; raises ValueError like `render`."""
    write_atomic(path, render(data).encode("utf-8"))


def render(data: ReportData) -> str:
    """Return the page. Raises ValueError, with the name, for NaN and for shapes that differ."""
    parts = [(name, content) for name, make in _SECTIONS.items() if (content := make(data))]
    links = [element("a", text(name), href=f"#{name.lower()}") for name, _ in parts]
    sections = [
        element("section", element("h2", text(name)), *content, id=name.lower(), aria_label=name)
        for name, content in parts
    ]
    return Template(_TEMPLATE.read_text("utf-8")).substitute(
        title=text(data.title or data.name),
        kicker=text(f"Run {data.name}" if data.title else "Run"),
        heading=text(data.title or data.name),
        lede=paragraph(data.description, "lede") if data.description else "",
        nav=element("nav", *links, aria_label="Sections") if len(links) > 1 else "",
        figures=_headline(data),
        sections="\n".join(sections),
        style=STYLE,
    )


def _headline(data: ReportData) -> Markup:
    """Return the few numbers to see first."""
    shown = [
        (percent(row.accuracy), f"accuracy, {row.name}") for row in data.comparison if row.ours
    ]
    shown += _epsilons(data)
    up, down = sum(data.bytes_up.values()), sum(data.bytes_down.values())
    if up or down:
        shown.append((size(up + down), f"moved: {size(up)} up, {size(down)} down"))
    models = [file for file in data.release if file.accuracy is not None]
    if models:
        small = min(models, key=lambda file: file.size_bytes)
        shown.append((size(small.size_bytes), f"smallest released model, {small.name}"))
    boxes = [
        element("div", element("b", text(value)), element("span", text(what)), class_="figure")
        for value, what in shown
    ]
    return element("div", *boxes, class_="figures") if boxes else Markup("")


def _epsilons(data: ReportData) -> list[tuple[str, str]]:
    """Return what the run cost a record, and what it cost a client, each by itself."""
    shown, stated = [], data.privacy
    spent = [value for rounds in data.epsilon.values() for value in rounds.values()]
    if stated is not None and stated.record is not None:
        spent.append(stated.record.epsilon)
    if spent:
        target = data.epsilon_target
        aim = "" if target is None else f"; target {EPSILON.value(target)}"
        shown.append((f"ε = {EPSILON.value(max(spent))}", f"a record, most of any site{aim}"))
    if stated is not None and (plan := stated.client) is not None:
        what = f"a client with all its records; {plan.population} clients"
        shown.append((f"ε = {EPSILON.value(plan.epsilon)}", what))
    if stated is not None and (sums := stated.of_clients) is not None:
        shown.append((f"ε = {EPSILON.value(sums.noise.epsilon)}", "the updates of a client"))
    return shown


def _result(data: ReportData) -> list[Markup]:
    return [figures.comparison(data.comparison, _measured(data))] if data.comparison else []


def _rounds(data: ReportData) -> list[Markup]:
    title, loss = "Accuracy after each round", "Mean cross-entropy; lower is better."
    says = f"Measured on {data.rounds_evaluated_on}." if data.rounds_evaluated_on else ""
    return [
        *figures.curves(
            title, says or _measured(data), data.accuracy, unit=PERCENT, y_title="accuracy"
        ),
        *figures.curves("Loss after each round", loss, data.loss, unit=LOSS, y_title="loss"),
        *figures.curves(
            "Aggregation error",
            MISSED,
            data.aggregation_error,
            unit=ERROR,
            y_title="relative error",
        ),
        *secure_sums(data.sums),
    ]


def _sites(data: ReportData) -> list[Markup]:
    says = f"Each model on {data.sites_evaluated_on}."
    parts = figures.site_bars("Accuracy per site", says, data.site_accuracy)
    if data.label_counts:
        parts.append(figures.label_counts(_labels(data), data.label_counts))
    if data.failures is None:
        return parts
    parts.append(element("h3", text("Sites that did not deliver")))
    if not data.failures:
        return [*parts, paragraph("None: every site that was asked delivered in every round.")]
    cells = [[str(f.round), f.site, f.reason] for f in data.failures]
    return [*parts, table(["round", "site", "reason"], cells, kinds="ttt")]


def _privacy(data: ReportData) -> list[Markup]:
    parts = [] if data.privacy is None else privacy_statement(data.privacy)
    target = None if data.epsilon_target is None else ("target", data.epsilon_target)
    says = "Cumulative: after each round, all steps so far composed."
    return parts + figures.curves(
        "ε spent per site", says, data.epsilon, unit=EPSILON, y_title="ε", limit=target, zero=True
    )


def _traffic(data: ReportData) -> list[Markup]:
    return figures.traffic(data.bytes_up, data.bytes_down)


def _errors(data: ReportData) -> list[Markup]:
    if not len(data.confusion):
        return []
    says = f"{data.confusion_of}." if data.confusion_of else ""
    matrix, labels = data.confusion, _labels(data)
    return [figures.confusion(labels, matrix, says), figures.confused(labels, matrix)]


def _release(data: ReportData) -> list[Markup]:
    if not data.release:
        return []
    cells = [
        [
            file.name,
            size(file.size_bytes),
            integer(file.size_bytes),
            ABSENT if file.accuracy is None else percent(file.accuracy),
            ABSENT if file.latency_ms is None else f"{file.latency_ms:.1f} ms",
        ]
        for file in data.release
    ]
    head = ["file", "size", "bytes", "accuracy", "latency per record"]
    parts = [table(head, cells, kinds="tnnnn")]
    sums = [[file.name, file.sha256] for file in data.release if file.sha256]
    return [*parts, table(["file", "SHA-256"], sums, kinds="tm")] if sums else parts


def _provenance(data: ReportData) -> list[Markup]:
    facts = dict(data.facts) | ({} if data.seed is None else {"seed": str(data.seed)})
    groups = [
        ("run", "value", facts, "tt"),
        ("aggregation", "value", data.aggregation, "tt"),
        ("software", "version", data.versions, "tt"),
        ("digest of", "SHA-256", data.digests, "tm"),
    ]
    return [
        table([what, value], [list(item) for item in items.items()], kinds=kinds)
        for what, value, items, kinds in groups
        if items
    ]


def _measured(data: ReportData) -> str:
    return f"Measured on {data.evaluated_on}." if data.evaluated_on else ""


def _labels(data: ReportData) -> tuple[str, ...]:
    if not data.labels:
        raise ValueError("labels: expected the names of all labels, got none")
    return tuple(data.labels)


_SECTIONS: Final[Mapping[str, Callable[[ReportData], list[Markup]]]] = {
    "Result": _result,
    "Rounds": _rounds,
    "Devices": lambda data: list(data.devices),
    "Sites": _sites,
    "Privacy": _privacy,
    "Traffic": _traffic,
    "Errors": _errors,
    "Release": _release,
    "Provenance": _provenance,
}
