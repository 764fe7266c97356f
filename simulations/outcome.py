"""What a finished federation leaves behind: release, report.html, summary.json."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from anabranch.client.data.records import Records
from anabranch.client.site import MODELS
from anabranch.client.tuning.metrics import confusion, evaluate
from anabranch.server.card import (
    NOT_COVERED,
    RunFacts,
    SitePrivacy,
    guarantee,
    privacy_statement,
)
from anabranch.server.charts import Comparison
from anabranch.server.evaluation import logits
from anabranch.server.release import Release, make_release
from anabranch.server.report import Failure, ReleaseFile, ReportData, write_report
from anabranch.simulations.experiment import Federated

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


def facts_of(federated: Federated) -> RunFacts:
    """Return what the model card states about the run."""
    result, config = federated.result, federated.config
    last = {name: one for report in result.history for name, one in report.trained.items()}
    privacy = []
    for name, one in sorted(last.items()):
        if one.epsilon is None or config.training.local_steps is None:
            continue
        assert one.delta is not None  # a private report has all four or none
        assert one.noise_multiplier is not None
        assert one.sample_rate is not None
        privacy.append(
            SitePrivacy(
                site=name,
                epsilon=one.epsilon,
                delta=one.delta,
                noise_multiplier=one.noise_multiplier,
                sample_rate=one.sample_rate,
                steps=config.training.local_steps * result.sites[name].rounds,
            )
        )
    return RunFacts(
        run=federated.run,
        base_name=config.model.base,
        rounds=len(result.history),
        best_round=result.best_round,
        sites=tuple(sorted(last)),
        privacy=tuple(privacy),
        versions=versions(),
    )


def release(federated: Federated, held_out: Records, *, threads: int = 1) -> Release:
    """Make the release of the best adapter, checked on the coordinator's held-out records."""
    return make_release(
        MODELS.classifier(federated.config, "cpu"),
        federated.result.best_adapter,
        federated.config,
        federated.folder.path / "release",
        inputs=held_out.inputs,
        labels=held_out.labels,
        facts=facts_of(federated),
        threads=threads,
    )


def measure(federated: Federated, test: Records) -> tuple[dict[str, float], list[list[int]]]:
    """Return metrics and confusion matrix of the best adapter on records not yet touched."""
    values = logits(federated.config, federated.result.best_adapter, test)
    matrix = confusion(values.argmax(1), test.labels, len(federated.config.task.labels))
    return evaluate(values, test.labels), matrix.tolist()


def summary_of(federated: Federated, *, seconds: float) -> dict[str, Any]:
    """Return what every summary.json holds, before accuracies and release."""
    result = federated.result
    return {
        "name": federated.config.name,
        "run": federated.run,
        "folder": str(federated.folder.path),
        "config": federated.config.digest(),
        "seed": federated.config.seed,
        "rounds": len(result.history),
        "best_round": result.best_round,
        "epsilon": {
            name: row.epsilon for name, row in result.sites.items() if row.epsilon is not None
        },
        "delta": {name: row.delta for name, row in result.sites.items() if row.delta is not None},
        "num_examples": {name: row.num_examples for name, row in result.sites.items()},
        "failures": {name: row.failures for name, row in result.sites.items()},
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
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
    federated: Federated,
    *,
    summary: Mapping[str, Any],
    made: Release | None,
    matrix: Sequence[Sequence[int]] = (),
    comparison: Sequence[Comparison] = (),
    others: Mapping[str, Federated] | None = None,
    site_accuracy: Mapping[str, Mapping[str, float]] | None = None,
    **texts: Any,
) -> None:
    """Write report.html; `others` are further runs whose curves are drawn beside this one's."""
    config, result, facts = federated.config, federated.result, facts_of(federated)
    named = {_series_name(federated): federated, **(others or {})}
    histories = {name: one.result.history for name, one in named.items()}
    write_report(
        federated.folder.path / "report.html",
        ReportData(
            name=federated.run,
            labels=config.task.labels,
            comparison=comparison,
            accuracy=_curves(histories, "accuracy"),
            loss=_curves(histories, "loss"),
            site_accuracy=site_accuracy or _site_accuracy(histories),
            label_counts=federated.label_counts,
            failures=tuple(
                Failure(round=r.round, site=site, reason=f"{f.reason}: {f.message}")
                for r in result.history
                for site, f in sorted(r.failed.items())
            ),
            privacy=privacy_statement(None, facts)
            if config.privacy is None
            else guarantee(config.privacy, facts),
            not_covered=() if config.privacy is None else NOT_COVERED,
            epsilon={
                site: {
                    r.round: epsilon
                    for r in result.history
                    if site in r.trained and (epsilon := r.trained[site].epsilon) is not None
                }
                for site, row in result.sites.items()
                if row.epsilon is not None
            },
            epsilon_target=None if config.privacy is None else config.privacy.epsilon,
            bytes_up={r.round: r.bytes_up for r in result.history},
            bytes_down={r.round: r.bytes_down for r in result.history},
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


def _series_name(federated: Federated) -> str:
    return "federated" if federated.config.privacy is None else "federated with DP"


def _site_accuracy(histories: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, float]]:
    """Return series -> site -> accuracy in the last round, where sites evaluated."""
    return {
        name: {site: e.metrics["accuracy"] for site, e in history[-1].evaluated.items()}
        for name, history in histories.items()
        if history and history[-1].evaluated
    }


def _curves(histories: Mapping[str, Sequence[Any]], metric: str) -> dict[str, dict[int, float]]:
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
