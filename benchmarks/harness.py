"""What all benchmarks share: the header, the figures, alternate timing, the JSON file.

    {"header": {"benchmark": …, "versions": {…}, "cores": …, "threads": …, "seed": …,
                "commit": …, "quick": …},
     "figures": [{"figure": "step.ratio_torch", "value": 0.98, "unit": "ratio",
                  "target": "<= 1.1", "spread": [0.96, 1.01], "peer": "torch 2.13.0",
                  "note": "…"}, …]}

A figure that fell short of its target is written like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<=": lambda value, limit: value <= limit,
    ">=": lambda value, limit: value >= limit,
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number. `spread` is its smallest and largest value over the repeats."""

    figure: str
    value: float
    unit: str
    target: str | None = None  # "<= 1.1" or ">= 2"
    spread: tuple[float, float] | None = None
    peer: str | None = None  # what it was compared with, and its version
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Return whether the target was reached; None without a target."""
        if self.target is None:
            return None
        sign, _, limit = self.target.partition(" ")
        return COMPARE[sign](self.value, float(limit))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line that every benchmark has."""

    quick: bool
    json: Path | None


def options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Parse [--quick] [--json FILE]."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="less work, within two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and figures here")
    parsed = parser.parse_args(argv)
    return Options(quick=parsed.quick, json=parsed.json)


def header(
    benchmark: str, *, packages: Sequence[str], threads: int, seed: int, quick: bool
) -> dict[str, object]:
    """Return what a reader needs to judge the figures, and to run them again."""
    return {
        "benchmark": benchmark,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "seed": seed,
        "commit": _commit(),
        "quick": quick,
    }


def _commit() -> str:
    """Return the commit that is checked out, "+" behind it if files differ; "" outside git."""
    run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def alternate(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each variant, run in turn `repeats` times.

    What else the machine does then hits all variants alike. Work of one thread may be measured
    in CPU seconds (`clock=time.process_time`), which other processes disturb less. Warm up
    before, if it matters.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the median of slow / fast over repeats that ran in turn, and its range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(ratios), (min(ratios), max(ratios))


def write_between_markers(page: Path, name: str, text: str) -> None:
    """Replace what stands between <!-- name --> and <!-- /name -->; ValueError if they are not."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, first, rest = page.read_text().partition(begin)
    _, second, after = rest.partition(end)
    if not first or not second:
        raise ValueError(f"{page} has no {begin} … {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def report(head: Mapping[str, object], figures: Sequence[Figure], file: Path | None) -> None:
    """Print the figures, and write them with their header to `file`."""
    for f in figures:
        verdict = {None: "", True: "  reached", False: "  MISSED"}[f.reached]
        target = f"  (target {f.target})" if f.target else ""
        print(f"{f.figure:40} {f.value:12.6g} {f.unit:8}{target}{verdict}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"header": dict(head), "figures": [asdict(f) for f in figures]}
        file.write_text(json.dumps(content, indent=2) + "\n")
