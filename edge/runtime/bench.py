"""`anabranch edge bench`: what a bundle costs on this device.

Every row is measured in a process of its own (measure.py). Energy is read where the machine
tells it (Linux powercap: Intel and AMD RAPL, whole package); elsewhere, and where the counter
ran over, it is CPU time × the watts given, and the row says that it is an estimate.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.edge.runtime.bundle import Bundle
from anabranch.edge.runtime.bundle_manifest import Precision, Role
from anabranch.edge.runtime.measure import Job, Point, measure

POWERCAP = Path("/sys/class/powercap")
WATTS = 3.0  # of one busy core of a phone or board, when nothing measures it
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
RUNS = 30


@dataclass(frozen=True)
class Row:
    """One graph at one shape."""

    graph: str
    records: int
    p50_ms: float
    p95_ms: float
    cpu_ms: float
    peak_mb: float
    joules: float
    measured: bool  # joules; else they are an estimate


def bench(
    bundle: Bundle,
    *,
    records: int = 8,
    tokens: int | None = None,
    threads: int = 1,
    runs: int = RUNS,
    watts: float = WATTS,
) -> dict[str, Any]:
    """Return a JSON-like report: this device, and a row for each graph.

    Inference runs one record, a training step `records` of `tokens` tokens (the bundle's
    largest, if None).
    """
    manifest = bundle.manifest
    length = 1 if manifest.shape else tokens or manifest.limits.max_tokens
    rows = []
    counts: dict[Role, int] = {"infer": 1, "train_step": records, "train_step_dp": records}
    for precision in PRECISIONS:
        for role, count in counts.items():
            if manifest.graph(role, precision) is None:
                continue
            rows.append(_row(bundle, role, precision, count, length, threads, runs, watts))
    return {
        "bundle": {"name": manifest.name, "version": manifest.version, "digest": bundle.digest},
        "device": device(),
        "threads": threads,
        "tokens": length,
        "energy": _energy(rows, watts),
        "rows": [vars(row) for row in rows],
    }


def _row(
    bundle: Bundle,
    role: Role,
    precision: Precision,
    records: int,
    tokens: int,
    threads: int,
    runs: int,
    watts: float,
) -> Row:
    before, began = energy_counter(), time.perf_counter()
    (point,) = measure(
        Job(
            folder=str(bundle.folder),
            role=role,
            precision=precision,
            points=((records, tokens),),
            threads=threads,
            repeats=runs + 1,
        )
    )
    seconds, after = time.perf_counter() - began, energy_counter()
    wall = np.array(point.wall[1:]) * 1000  # the first call allocates
    measured = before is not None and after is not None and after > before
    if before is not None and after is not None and measured:
        joules = (after - before) / seconds * float(np.median(wall)) / 1000
    else:
        joules = watts * _cpu_ms(point) / 1000
    return Row(
        graph=f"{role}.{precision}",
        records=records,
        p50_ms=float(np.percentile(wall, 50)),
        p95_ms=float(np.percentile(wall, 95)),
        cpu_ms=_cpu_ms(point),
        peak_mb=point.peak / 2**20,
        joules=joules,
        measured=measured,
    )


def _energy(rows: Sequence[Row], watts: float) -> str:
    """Return how the rows' joules came about."""
    count = sum(row.measured for row in rows)
    estimated = f"estimated at {watts:g} W a busy core"
    if count == len(rows):
        return "measured (package)"
    return f"measured (package) in {count} of {len(rows)}, else {estimated}" if count else estimated


def _cpu_ms(point: Point) -> float:
    return 1000 * float(np.median(point.cpu[1:]))


def energy_counter(root: Path = POWERCAP) -> float | None:
    """Return joules used by all processor packages so far, or None where nothing counts them.

    Other zones are parts of a package (core, dram), or hold the packages (psys).
    """
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if (zone / "energy_uj").exists()]
    try:
        packages = [z for z in zones if (z / "name").read_text().startswith("package")]
        counts = [int((zone / "energy_uj").read_text()) for zone in packages]
        return sum(counts) / 1e6 if counts else None
    except (OSError, ValueError):
        return None  # only root may read it on most systems


def device() -> dict[str, Any]:
    """Return what this device is."""
    import onnxruntime

    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }
