"""What a finished federation leaves behind: release, report.html, summary.json."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from anabranch.client.data.records import Records
from anabranch.client.models import MODELS
from anabranch.client.tuning.metrics import confusion, evaluate
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError, ReleaseError
from anabranch.protocols.secagg.agreed_noise import noise_of, values_of
from anabranch.server.aggregation.private import ClientPlan
from anabranch.server.charts import Comparison
from anabranch.server.client_privacy import plan_of
from anabranch.server.evaluation import logits, no_shared_model, require_shared_model
from anabranch.server.release import Release, make_release
from anabranch.server.report import Failure, ReleaseFile, ReportData, write_report
from anabranch.server.result import Result
from anabranch.server.series import (
    aggregation_of,
    error_curves,
    metric_curves,
    population_of,
    site_accuracy,
    site_bars,
)
from anabranch.server.statement.as_json import as_json
from anabranch.server.statement.guarantees import (
    LISTED,
    PrivacyStatement,
    RunFacts,
    SitePrivacy,
    state,
)
from anabranch.server.store import RunFolder
from anabranch.server.sums.log import sums_of
from anabranch.server.svg import Markup

PACKAGES = (
    "anabranch",
    "flwr",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-training-cpu",
    "opacus",
    "torch",
    "transformers",
)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run whose rounds are over, before its release."""

    run: str
    config: RunConfig
    folder: RunFolder
    result: Result
    label_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)  # known in simulation
    client_plan: ClientPlan | None = None  # None: that of the configuration
    listed: bool = True  # False: too many clients to name each; they are counted (`population_of`)
    withheld: str | None = None  # why nothing is released, whatever there is


def conclude(
    finished: Finished,
    *,
    test: Records | None,
    validation: Records | None,
    seconds: float,
    facts: Mapping[str, Any] | None = None,
    devices: Sequence[Markup] = (),
) -> dict[str, Any]:
    """Measure, release and report a run; write and return its summary.json, with `facts` in it.

    `devices` is what the report says of simulated devices.
    `test` and `validation` are the coordinator's own records. The release is checked on the
    first of them that is there; without any, or when the int8 model is refused, the summary
    says why there is none. Raises ConfigError for records in a run without a model of the
    coordinator's own, and what make_release raises but for ReleaseError.
    """
    require_shared_model(finished.config, validation=validation, test=test)
    name = "federated" if finished.config.privacy is None else "federated_dp"
    accuracy: dict[str, float] = {}
    macro_f1: dict[str, float] = {}
    matrix: list[list[int]] = []
    if test is not None:
        metrics, matrix = measure(finished, test)
        accuracy, macro_f1 = {name: metrics["accuracy"]}, {name: metrics["macro_f1"]}
    made, refused = _release_or_reason(finished, test if test is not None else validation)
    summary = summary_of(finished, seconds=seconds) | {
        "accuracy": accuracy,
        "macro_f1": macro_f1,
        "release": None if made is None else release_summary(made),
        "release_refused": refused,
        **(facts or {}),
    }
    why = f"There is no release: {finished.withheld}." if finished.withheld else ""
    report(finished, summary=summary, made=made, matrix=matrix, description=why, devices=devices)
    finished.folder.summarise(summary)
    return summary


def facts_of(finished: Finished) -> RunFacts:
    """Return what the model card states about the run.

    Raises PrivacyError if a site's σ, q or δ changed within the run: no plan allows that.
    """
    result, config = finished.result, finished.config
    names = sorted({name for report in result.history for name in report.trained})
    if config.privacy is not None and not finished.listed:
        names = sorted(sorted(names, key=lambda one: -(result.sites[one].epsilon or 0))[:LISTED])
    privacy = [] if config.privacy is None else [_spent(name, result) for name in names]
    return RunFacts(
        run=finished.run,
        base_name=config.model.base,
        rounds=len(result.history),
        best_round=result.best_round,
        sites=tuple(names),
        privacy=tuple(one for one in privacy if one is not None),
        client=finished.client_plan or plan_of(config),
        noise=noise_of(config, values_of(result.best_adapter.spec)),
        simulated=bool(finished.label_counts),
        versions=versions(),
    )


def statement_of(finished: Finished) -> PrivacyStatement:
    """Return what the run guarantees; PrivacyError if a number of it is missing."""
    return state(finished.config, facts_of(finished))


def _spent(site: str, result: Result) -> SitePrivacy | None:
    """Return what a site said that it spent, over its deltas that counted; None: it did not."""
    counted = [report for report in result.history if site in report.trained]
    said = [report.trained[site] for report in counted]
    last = said[-1]
    asked = counted[-1].round - counted[-1].ages.get(site, 0)  # when its last delta was asked for
    mechanisms = {(one.noise_multiplier, one.sample_rate, one.delta) for one in said}
    if len(mechanisms) > 1:
        raise PrivacyError(
            f"site {site!r} states {len(mechanisms)} different (σ, q, δ) in one run: "
            f"{sorted(mechanisms, key=str)}. Its records or its configuration changed on the way, "
            "so no single guarantee can be stated; nothing is released"
        )
    numbers = (last.epsilon, last.delta, last.noise_multiplier, last.sample_rate)
    if None in numbers:
        return None
    epsilon, delta, noise_multiplier, sample_rate = (float(n) for n in numbers if n is not None)
    return SitePrivacy(
        site=site,
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        steps=sum(one.steps for one in said),
        engine=", ".join(sorted({one.engine for one in said if one.engine is not None})) or None,
        ledger=last.ledger,
        unheard=sum(one.round > asked and site in one.asked for one in result.history),
    )


def release(finished: Finished, held_out: Records, *, threads: int = 1) -> Release:
    """Make the release of the best adapter, checked on the coordinator's held-out records."""
    return make_release(
        MODELS.classifier(finished.config, "cpu"),
        finished.result.best_adapter,
        finished.config,
        finished.folder.path / "release",
        inputs=held_out.inputs,
        labels=held_out.labels,
        facts=facts_of(finished),
        threads=threads,
    )


def measure(finished: Finished, test: Records) -> tuple[dict[str, float], list[list[int]]]:
    """Return metrics and confusion matrix of the best adapter on records not yet touched."""
    values = logits(finished.config, finished.result.best_adapter, test)
    matrix = confusion(values.argmax(1), test.labels, len(finished.config.task.labels))
    return evaluate(values, test.labels), matrix.tolist()


def summary_of(finished: Finished, *, seconds: float) -> dict[str, Any]:
    """Return what every summary.json holds, before accuracies and release.

    With [client_privacy] nothing in it tells who took part, or how many: what is computed from
    that is empty or None. Raises PrivacyError if the run's guarantees cannot be stated.
    """
    result, named = finished.result, finished.config.client_privacy is None
    sites = result.sites if finished.listed else {}
    return {
        "name": finished.config.name,
        "run": finished.run,
        "folder": str(finished.folder.path),
        "config": finished.config.digest(),
        "seed": finished.config.seed,
        "rounds": len(result.history),
        "best_round": result.best_round,
        "epsilon": {name: row.epsilon for name, row in sites.items() if row.epsilon is not None},
        "delta": {name: row.delta for name, row in sites.items() if row.delta is not None},
        "num_examples": {name: row.num_examples for name, row in sites.items()},
        "failures": {name: row.failures for name, row in sites.items()},
        "sites": {name: msgspec.structs.asdict(row) for name, row in sites.items()},
        "population": None if finished.listed else population_of(result),
        "site_accuracy": site_accuracy(result) if finished.listed else {},
        "aggregation": aggregation_of(finished.config),
        "aggregation_error": [r.aggregation_error for r in result.history] if named else [],
        "privacy": as_json(statement_of(finished)),
        "bytes_up": result.bytes_up if named else None,
        "bytes_down": result.bytes_down if named else None,
        "seconds": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions(),
    }


def release_summary(made: Release) -> dict[str, Any]:
    """Return the release's part of summary.json."""
    checks = made.checks
    return {
        "fp32_bytes": made.fp32_bytes,
        "int8_bytes": made.int8_bytes,
        "fp32_accuracy": checks.fp32_accuracy,
        "int8_accuracy": checks.int8_accuracy,
        "fp32_latency_ms": checks.fp32_latency_ms,
        "int8_latency_ms": checks.int8_latency_ms,
        "num_records": checks.num_records,
        "manifest_sha256": made.manifest_sha256,
    }


def report(
    finished: Finished,
    *,
    summary: Mapping[str, Any],
    made: Release | None,
    matrix: Sequence[Sequence[int]] = (),
    comparison: Sequence[Comparison] = (),
    others: Mapping[str, Finished] | None = None,
    at_sites: Mapping[str, Mapping[str, float]] | None = None,
    **texts: Any,
) -> None:
    """Write report.html; `others` are further runs whose curves are drawn beside this one's."""
    config, result = finished.config, finished.result
    hidden = config.client_privacy is not None  # who took part
    unnamed = hidden or not finished.listed
    named = {_series_name(finished): finished, **(others or {})}
    histories = {name: one.result.history for name, one in named.items()}
    write_report(
        finished.folder.path / "report.html",
        ReportData(
            name=finished.run,
            labels=config.task.labels,
            comparison=comparison,
            accuracy=metric_curves(histories, "accuracy"),
            loss=metric_curves(histories, "loss"),
            site_accuracy=at_sites
            or site_bars({name: one.result for name, one in named.items() if one.listed}),
            aggregation_error={} if hidden else error_curves(histories),
            aggregation=aggregation_of(config),
            label_counts={} if unnamed else finished.label_counts,
            sums=() if hidden else sums_of(finished.folder.path / "events.jsonl"),
            failures=None
            if unnamed
            else tuple(
                Failure(round=r.round, site=site, reason=f"{f.reason}: {f.message}")
                for r in result.history
                for site, f in sorted(r.failed.items())
            ),
            privacy=statement_of(finished),
            epsilon={
                site: {
                    r.round: epsilon
                    for r in result.history
                    if site in r.trained and (epsilon := r.trained[site].epsilon) is not None
                }
                for site, row in result.sites.items()
                if finished.listed and row.epsilon is not None
            },
            epsilon_target=None if config.privacy is None else config.privacy.epsilon,
            bytes_up={} if hidden else {r.round: r.bytes_up for r in result.history},
            bytes_down={} if hidden else {r.round: r.bytes_down for r in result.history},
            confusion=matrix,
            release=() if made is None else _release_files(made),
            seed=config.seed,
            digests={"configuration": config.digest(), "base": result.adapter.spec.base},
            versions=summary["versions"],
            **texts,
        ),
    )


def versions() -> dict[str, str]:
    """Return the installed versions of what the numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime or its training build: one is absent
            continue
    return found


def _release_or_reason(
    finished: Finished, records: Records | None
) -> tuple[Release | None, str | None]:
    """Return the release, or None and why there is none."""
    if finished.withheld is not None:
        return None, finished.withheld
    if finished.config.kept is not None:
        return None, no_shared_model(finished.config)
    if records is None:
        return None, (
            "a release is checked on records of the coordinator, and there are none: give "
            "`test` or `validation`"
        )
    try:
        return release(finished, records), None
    except ReleaseError as error:
        finished.folder.event("release_refused", message=str(error))
        return None, str(error)


def _series_name(finished: Finished) -> str:
    return "federated" if finished.config.privacy is None else "federated with DP"


def _release_files(made: Release) -> list[ReleaseFile]:
    checks = made.checks
    return [
        ReleaseFile(
            name="onnx/model.onnx",
            size_bytes=made.fp32_bytes,
            accuracy=checks.fp32_accuracy,
            latency_ms=checks.fp32_latency_ms,
        ),
        ReleaseFile(
            name="onnx/model-int8.onnx",
            size_bytes=made.int8_bytes,
            accuracy=checks.int8_accuracy,
            latency_ms=checks.int8_latency_ms,
        ),
    ]
