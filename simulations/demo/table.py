"""The demo's table in words: rows of a summary, no computation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "majority": "majority class",
    "linear_probe": "linear probe on frozen embeddings",
    "local_mean": "hospitals alone, mean",
    "federated": "federated",
    "federated_secure": "federated, secure aggregation",
    "federated_dp": "federated with DP",
    "pooled": "pooled (upper bound)",
}


def rows_of(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return [name, accuracy, macro-F1] in the order of the table, percent with one decimal."""
    accuracy, macro_f1 = summary["accuracy"], summary["macro_f1"]
    alone = {n: f"alone: {n.removeprefix('local.')}" for n in accuracy if n.startswith("local.")}
    order = {**NAMES, **alone}
    keys = ["majority", "linear_probe", *alone, "local_mean", "federated_dp", "federated"]
    keys += ["federated_secure", "pooled"]
    rows = []
    for key in (key for key in keys if key in accuracy):
        name = order[key]
        if key == "federated_dp":
            name += f", epsilon = {summary['target_epsilon']:g}"
        rows.append([name, f"{100 * accuracy[key]:.1f}", f"{100 * macro_f1[key]:.1f}"])
    return rows


def facts_of(summary: Mapping[str, Any]) -> list[str]:
    """Return what stands under the table."""
    release, open_run = summary["release"], summary["without_privacy"]
    spent = ", ".join(f"{name} {e:.2f}" for name, e in summary["epsilon"].items())
    return [
        *secure_facts(summary["secure_aggregation"]),
        f"epsilon spent: {spent}",
        f"bytes with DP: {_mb(summary['bytes_up'])} up, {_mb(summary['bytes_down'])} down; "
        f"without: {_mb(open_run['bytes_up'])} up, {_mb(open_run['bytes_down'])} down",
        f"{summary['seconds']:.0f} s, peak memory {summary['peak_rss_bytes'] / 2**30:.2f} GiB",
        f"release: int8 {_mb(release['int8_bytes'])} of fp32's {_mb(release['fp32_bytes'])}, "
        f"accuracy {100 * release['int8_accuracy']:.1f} of {100 * release['fp32_accuracy']:.1f}, "
        f"{release['int8_latency_ms']:.1f} ms a text",
    ]


def secure_facts(secure: Mapping[str, float] | None) -> list[str]:
    """Return what secure aggregation took; nothing of a demo without it."""
    if secure is None:
        return []
    return [
        f"secure aggregation: {secure['seconds_per_round']:.2f} s and "
        f"{secure['bytes_up_per_round'] / 1e6:.2f} MB up a round "
        f"({secure['bytes_up_per_round_plain'] / 1e6:.2f} MB without), accuracy within "
        f"{secure['accuracy_difference_points']:.2f} points",
    ]


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
