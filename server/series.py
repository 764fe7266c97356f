"""From the results of runs to what the report draws and summary.json lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Federation, SecureAggregation
from anabranch.server.result import Result, RoundReport

Histories = Mapping[str, Sequence[RoundReport]]  # series -> its rounds
PER_SITE = {"shared": "accuracy", "personal": "personal_accuracy"}  # kind -> metric


def aggregation_of(config: RunConfig) -> dict[str, str]:
    """Return what decided how deltas travelled and were merged: name -> value."""
    federation, uplink = config.federation, config.uplink
    feedback = ", error feedback" if uplink.error_feedback else ""
    share = f", {uplink.keep:g} of the values" if uplink.codec == "top-k" else ""
    secure = config.secure_aggregation
    codec = f"{uplink.codec}{share}{feedback}" if secure is None else "whole numbers, masked"
    summed = {} if secure is None else {"secure sums": _summed(secure)}
    return {
        "method": config.method,
        "merged": _merged(federation),
        "weights": _weights(config),
        "robust rule": "none" if config.robust is None else config.robust.rule,
        "server optimiser": "none" if config.server is None else config.server.optimizer,
        "codec": codec,
        "kept at the sites": _kept(config),
    } | summed


def population_of(result: Result) -> dict[str, Any]:
    """Return what summary.json says of clients that are too many to be named: sums and maxima."""
    rows = result.sites.values()
    known = [row.epsilon for row in rows if row.epsilon is not None]
    counts = [row.num_examples for row in rows]
    return {
        "clients": len(rows),  # that were asked or heard
        "trained": sum(row.rounds > 0 for row in rows),
        "num_examples": None if None in counts else sum(n for n in counts if n is not None),
        "deltas": sum(row.rounds for row in rows),
        "failures": sum(row.failures for row in rows),
        "late": sum(row.late for row in rows),
        "stale": sum(row.stale for row in rows),
        "training_seconds": sum(row.seconds for row in rows),
        "epsilon": max(known, default=None),
        "delta": max((row.delta for row in rows if row.delta is not None), default=None),
    }


def site_accuracy(result: Result) -> dict[str, dict[str, float]]:
    """Return "shared" (and "personal") -> site -> accuracy in the last evaluation by the sites.

    "personal" is that of the site's own adapter beside the shared one ([personal] rank). Empty
    if no site evaluated.
    """
    last = next((r.evaluated for r in reversed(result.history) if r.evaluated), {})
    found = {
        kind: {site: e.metrics[name] for site, e in sorted(last.items()) if name in e.metrics}
        for kind, name in PER_SITE.items()
    }
    return {kind: values for kind, values in found.items() if values}


def site_bars(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """Return series -> site -> accuracy, of every run whose sites evaluated.

    A run whose sites have private adapters, too, has the series "shared" and "personal".
    """
    bars: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        found = site_accuracy(result)
        prefix = f"{name}, " if len(results) > 1 else ""
        for kind, values in found.items():
            bars[name if "personal" not in found else prefix + kind] = values
    return bars


def metric_curves(histories: Histories, metric: str) -> dict[str, dict[int, float]]:
    """Return series -> round -> metric, the coordinator's or else the sites' mean."""
    curves = {
        name: {
            r.round: value
            for r in history
            if (value := r.coordinator.get(metric, r.client.get(metric))) is not None
        }
        for name, history in histories.items()
    }
    return {name: curve for name, curve in curves.items() if curve}


def error_curves(histories: Histories) -> dict[str, dict[int, float]]:
    """Return series -> round -> relative error of aggregation, where it is known."""
    curves = {
        name: {r.round: r.aggregation_error for r in history if r.aggregation_error is not None}
        for name, history in histories.items()
    }
    return {name: curve for name, curve in curves.items() if curve}


def _merged(federation: Federation) -> str:
    if federation.buffer is not None:
        return f"as soon as {federation.buffer} deltas are there"
    tiers = f", drawn from {federation.tiers} tiers of equal speed" if federation.tiers else ""
    if federation.over_selection:
        return (
            f"the first {federation.cohort} deltas, {federation.over_selection:.0%} more asked"
            + tiers
        )
    return "every round's cohort" + tiers


def _summed(secure: SecureAggregation) -> str:
    said = f"at least {secure.minimum} updates, more than {secure.threshold:.4g} of the members"
    return said if secure.group is None else f"{said}; groups of {secure.group} or more"


def _weights(config: RunConfig) -> str:
    if config.method == "hetlora":
        return "by norm"
    equal = config.robust is not None or config.federation.weighting == "uniform"
    return "equal" if equal else "by examples"


def _kept(config: RunConfig) -> str:
    if config.method == "fedsa":
        return "B of every layer" + (", the head" if config.personal.head == "local" else "")
    if config.personal.head == "local":
        return "the head"
    if config.personal.rank:
        return f"a private adapter of rank {config.personal.rank}"
    return "nothing"
