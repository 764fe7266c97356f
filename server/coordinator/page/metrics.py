"""A view as Prometheus metrics: text exposition format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/

    # HELP name text
    # TYPE name gauge|counter
    name{label="value"} number

Label values escape \\, " and line ends; a metric without a sample is left out. docs/watching.md
lists every name, and a test compares the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from anabranch.server.coordinator.page.shown import RunSite, RunView, SiteView, View

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[dict[str, str], float | None]

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Metric:
    """One family: its name, what it says, and its samples in a view; None is left out."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    samples: Callable[[View], Iterator[Sample]]


def metrics_text(view: View) -> str:
    """Return every metric of the view, each family once and whole."""
    return "".join(_family(metric, view) for metric in METRICS)


def _family(metric: Metric, view: View) -> str:
    samples = [(labels, value) for labels, value in metric.samples(view) if value is not None]
    if not samples:
        return ""
    lines = [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
    lines += [f"{metric.name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    written = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{written}}}"


def _escaped(value: str) -> str:
    plain = _SURROGATE.sub("\ufffd", value)
    return plain.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(value)


def _info(view: View) -> Iterator[Sample]:
    yield {"federation": view.federation, "version": view.version}, 1


def _of_view(value: Callable[[View], float | None]) -> Callable[[View], Iterator[Sample]]:
    def samples(view: View) -> Iterator[Sample]:
        yield {}, value(view)

    return samples


def _alerts(view: View) -> Iterator[Sample]:
    kinds = sorted({(alert.kind, alert.level, alert.about) for alert in view.alerts})
    for kind, level, about in kinds:
        yield {"kind": kind, "level": level, "about": about}, 1


def _of_sites(
    value: Callable[[SiteView], float | None], *, active: bool = True
) -> Callable[[View], Iterator[Sample]]:
    """Of every site or, with `active`, of those that still belong to the federation."""

    def samples(view: View) -> Iterator[Sample]:
        for site in view.sites:
            if site.status == "active" or not active:
                yield {"site": site.name}, value(site)

    return samples


def _site_state(view: View) -> Iterator[Sample]:
    for site in view.sites:
        yield {"site": site.name, "state": site.state}, 1


def _run_state(view: View) -> Iterator[Sample]:
    for run in view.runs:
        yield {"run": run.run, "name": run.name, "state": run.state}, 1


def _of_runs(value: Callable[[RunView], float | None]) -> Callable[[View], Iterator[Sample]]:
    def samples(view: View) -> Iterator[Sample]:
        for run in view.runs:
            yield {"run": run.run}, value(run)

    return samples


def _run_metric(view: View) -> Iterator[Sample]:
    for run in view.runs:
        for curve in run.curves:
            labels = {"run": run.run, "metric": curve.metric, "source": curve.source}
            yield labels, curve.points[-1][1]


def _run_bytes(view: View) -> Iterator[Sample]:
    for run in view.runs:
        for direction, value in (("up", run.bytes_up), ("down", run.bytes_down)):
            yield {"run": run.run, "direction": direction}, value


def _of_run_sites(
    value: Callable[[RunSite], float | None],
) -> Callable[[View], Iterator[Sample]]:
    def samples(view: View) -> Iterator[Sample]:
        for run in view.runs:
            for site in run.sites:
                yield {"run": run.run, "site": site.site}, value(site)

    return samples


def _up(site: SiteView) -> float:
    return site.state not in ("silent", "not heard yet")


def _waiting(run: RunView) -> float:
    return run.wait is not None


METRICS: Sequence[Metric] = (
    Metric("anabranch_info", "gauge", "Always 1; the labels say who answers.", _info),
    Metric("anabranch_alert", "gauge", "1 for each alert that is up.", _alerts),
    Metric(
        "anabranch_disk_free_bytes",
        "gauge",
        "Free space where the federation's folder is, rounded down to 100 MB.",
        _of_view(lambda view: view.disk_free),
    ),
    Metric(
        "anabranch_certificate_end_timestamp_seconds",
        "gauge",
        "End of the coordinator's own certificate.",
        _of_view(lambda view: view.certificate_ends),
    ),
    Metric(
        "anabranch_invitations_open",
        "gauge",
        "Invitations with which somebody may join now.",
        _of_view(lambda view: len(view.invitations)),
    ),
    Metric("anabranch_site_up", "gauge", "1 if the site has reported lately.", _of_sites(_up)),
    Metric("anabranch_site_state", "gauge", "1; the label says what the site does.", _site_state),
    Metric(
        "anabranch_site_ready",
        "gauge",
        "1 if its preflight checks passed.",
        _of_sites(lambda s: s.ready),
    ),
    Metric(
        "anabranch_site_last_report_timestamp_seconds",
        "gauge",
        "When the site reported last, by the coordinator's clock.",
        _of_sites(lambda s: s.heard, active=False),
    ),
    Metric(
        "anabranch_site_certificate_end_timestamp_seconds",
        "gauge",
        "End of the site's newest certificate.",
        _of_sites(lambda s: s.certificate_ends),
    ),
    Metric("anabranch_run_state", "gauge", "1; the label says what the run does.", _run_state),
    Metric(
        "anabranch_run_round",
        "gauge",
        "The last round that was merged.",
        _of_runs(lambda r: r.round),
    ),
    Metric("anabranch_run_rounds", "gauge", "Rounds planned.", _of_runs(lambda r: r.rounds)),
    Metric(
        "anabranch_run_round_seconds",
        "gauge",
        "Median duration of the last five rounds.",
        _of_runs(lambda r: r.seconds_per_round),
    ),
    Metric(
        "anabranch_run_end_timestamp_seconds",
        "gauge",
        "When the run will be over at that pace.",
        _of_runs(lambda r: r.eta),
    ),
    Metric("anabranch_run_waiting", "gauge", "1 while the run waits.", _of_runs(_waiting)),
    Metric(
        "anabranch_run_wait_until_timestamp_seconds",
        "gauge",
        "When the present wait ends.",
        _of_runs(lambda r: r.wait.until if r.wait else None),
    ),
    Metric(
        "anabranch_run_metric",
        "gauge",
        "The last value of each curve: metrics of evaluations, training loss, epsilon.",
        _run_metric,
    ),
    Metric(
        "anabranch_run_epsilon_planned",
        "gauge",
        "Epsilon that the run was planned for.",
        _of_runs(lambda r: r.epsilon_ceiling),
    ),
    Metric(
        "anabranch_run_bytes_total",
        "counter",
        "Bytes of adapters and messages: up from sites, down to them.",
        _run_bytes,
    ),
    Metric(
        "anabranch_run_restarts_total",
        "counter",
        "Restarts of the run's process.",
        _of_runs(lambda r: r.restarts),
    ),
    Metric(
        "anabranch_run_site_epsilon",
        "gauge",
        "Epsilon spent on the site's records, as it says.",
        _of_run_sites(lambda s: s.epsilon),
    ),
    Metric(
        "anabranch_run_site_rounds_total",
        "counter",
        "Deltas of the site that counted.",
        _of_run_sites(lambda s: s.rounds),
    ),
    Metric(
        "anabranch_run_site_failures_total",
        "counter",
        "Rounds in which the site failed, refused or was silent.",
        _of_run_sites(lambda s: s.failures),
    ),
)
