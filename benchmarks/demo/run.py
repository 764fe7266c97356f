"""The figures of `anabranch demo`, from the summary.json it writes.

    seconds, peak_rss_bytes        of the whole demo, one process
    federated_minus_local          points of accuracy above the mean of hospitals alone
    pooled_minus_federated         points below training on all records in one place
    federated_minus_probe          points above a linear probe on frozen embeddings
    dp_accuracy                    of the private run (epsilon 8); the first version's was 68.4
    dp_minus_best_local            points of the private run above the best hospital
    int8.size_ratio                int8 file / fp32 file
    int8.accuracy_loss_points      points that int8 loses against fp32

Medians over the seeds, with the range. --summary FILE, once per demo, reads demos that were run
before; else SEEDS are run. --readme writes the first one's table and picture into the README.
--quick runs the small demo (fewer texts and rounds): its figures say that the machinery works,
not what it can reach.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from anabranch.simulations.demo.table import facts_of, rows_of
from benchmarks.harness import ROOT, Figure, header, report, write_between_markers

SEEDS = (0, 1, 2)
THREADS = 2
PACKAGES = ("torch", "flwr", "opacus", "transformers", "onnxruntime-training-cpu")


def figures(summary: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of one summary.json."""
    accuracy, release = summary["accuracy"], summary["release"]
    note = f"seed {summary['seed']}, {summary['num_test']} test records"

    def points(first: str, second: float, name: str, target: str, peer: str) -> Figure:
        value = 100 * (accuracy[first] - second)
        return Figure(figure=name, value=value, unit="points", target=target, peer=peer, note=note)

    federated = accuracy["federated"]
    return [
        Figure(figure="seconds", value=summary["seconds"], unit="s", target="<= 360", note=note),
        Figure(
            figure="peak_rss_bytes",
            value=summary["peak_rss_bytes"],
            unit="bytes",
            target="<= 3e9",
            note=note,
        ),
        points(
            "federated",
            accuracy["local_mean"],
            "federated_minus_local",
            ">= 15",
            "each hospital alone, mean",
        ),
        points("pooled", federated, "pooled_minus_federated", "<= 3", "federated"),
        points(
            "federated",
            accuracy["linear_probe"],
            "federated_minus_probe",
            ">= 0",
            "linear probe, pooled records",
        ),
        Figure(
            figure="dp_accuracy",
            value=100 * accuracy["federated_dp"],
            unit="%",
            target=">= 68.4",
            note=note,
        ),
        points(
            "federated_dp",
            summary["best_local"],
            "dp_minus_best_local",
            ">= 0",
            "best hospital alone",
        ),
        Figure(
            figure="int8.size_ratio",
            value=release["int8_bytes"] / release["fp32_bytes"],
            unit="ratio",
            target="<= 0.3",
            peer="onnx fp32",
        ),
        Figure(
            figure="int8.accuracy_loss_points",
            value=100 * (release["fp32_accuracy"] - release["int8_accuracy"]),
            unit="points",
            target="<= 1",
            peer="onnx fp32",
            note=note,
        ),
    ]


def over_seeds(summaries: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return the median of every figure over demos of several seeds, with its range."""
    columns = zip(*(figures(summary) for summary in summaries), strict=True)
    seeds = ", ".join(str(summary["seed"]) for summary in summaries)
    return [
        dataclasses.replace(
            column[0],
            value=statistics.median(f.value for f in column),
            spread=(min(f.value for f in column), max(f.value for f in column)),
            note=f"seeds {seeds}",
        )
        for column in columns
    ]


def readme_table(summary: Mapping[str, Any]) -> str:
    """Return the demo's table and the facts under it as Markdown."""
    rows = [f"| {' | '.join(row)} |" for row in rows_of(summary)]
    facts = [f"* {fact}" for fact in facts_of(summary)]
    head = ["| trained by | accuracy % | macro-F1 % |", "|---|--:|--:|"]
    return "\n".join([*head, *rows, "", *facts])


def run_demo(seed: int, quick: bool) -> dict[str, Any]:
    """Run the demo as a user would, in a process of its own, and return its summary."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo"
        command = [sys.executable, "-m", "anabranch.cli.main", "demo", "--output", str(output)]
        command += [
            "--seed",
            str(seed),
            "--threads",
            str(THREADS),
            "--json",
            *(["--quick"] if quick else []),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        summary: dict[str, Any] = json.loads(done.stdout)
        return summary


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small demo, two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and figures here")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", action="append", help="of a demo that was run"
    )
    parser.add_argument("--readme", action="store_true", help="write the README's table, too")
    chosen = parser.parse_args(argv)
    if chosen.summary is not None:
        summaries = [json.loads(path.read_text()) for path in chosen.summary]
    else:
        summaries = [run_demo(s, chosen.quick) for s in (SEEDS[:1] if chosen.quick else SEEDS)]
    summary = summaries[0]
    head = header(
        "demo", packages=PACKAGES, threads=THREADS, seed=summary["seed"], quick=chosen.quick
    )
    report(head, over_seeds(summaries), chosen.json)
    if chosen.readme:
        write_between_markers(ROOT / "README.md", "demo", readme_table(summary))
        picture = Path(summary["folder"]) / "comparison.svg"
        shutil.copyfile(picture, ROOT / "docs" / "images" / "demo.svg")


if __name__ == "__main__":
    main()
