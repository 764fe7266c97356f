"""Benchmarks say what they measured: figures from a summary, tables from figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import all as bench
from benchmarks import harness
from benchmarks.demo.run import figures, over_seeds

SUMMARY = {
    "seed": 4,
    "num_test": 1000,
    "seconds": 200.0,
    "peak_rss_bytes": 2_000_000_000,
    "best_local": 0.45,
    "accuracy": {
        "majority": 0.1,
        "linear_probe": 0.7,
        "local_mean": 0.4,
        "federated": 0.72,
        "federated_dp": 0.6,
        "pooled": 0.76,
    },
    "release": {
        "fp32_bytes": 90_000_000,
        "int8_bytes": 23_000_000,
        "fp32_accuracy": 0.6,
        "int8_accuracy": 0.595,
    },
}


def test_the_demo_s_figures_follow_from_its_summary() -> None:
    found = {f.figure: f for f in figures(SUMMARY)}

    values = {name: round(f.value, 6) for name, f in found.items()}
    assert values == {
        "seconds": 200.0,
        "peak_rss_bytes": 2e9,
        "federated_minus_local": 32.0,
        "pooled_minus_federated": 4.0,
        "federated_minus_probe": 2.0,
        "dp_accuracy": 60.0,
        "dp_minus_best_local": 15.0,
        "int8.size_ratio": round(23 / 90, 6),
        "int8.accuracy_loss_points": 0.5,
    }
    assert [name for name, f in found.items() if not f.reached] == [
        "pooled_minus_federated",
        "dp_accuracy",
    ]


def test_figures_of_several_seeds_are_medians_with_their_range() -> None:
    others = [SUMMARY | {"seed": 5, "seconds": 100.0}, SUMMARY | {"seed": 6, "seconds": 260.0}]

    found = {f.figure: f for f in over_seeds([SUMMARY, *others])}

    assert found["seconds"].value == 200.0
    assert found["seconds"].spread == (100.0, 260.0)
    assert found["federated_minus_local"].spread == pytest.approx((32.0, 32.0))
    assert found["seconds"].note == "seeds 4, 5, 6"


def test_every_benchmark_has_a_page_with_markers() -> None:
    for name in bench.names():
        page = (harness.ROOT / "docs" / "benchmarks" / f"{name}.md").read_text()
        assert page.index("<!-- figures -->") < page.index("<!-- /figures -->")


def test_a_missed_target_stays_in_the_table() -> None:
    figure = {"figure": "x", "value": 2.0, "unit": "s", "target": "<= 1", "spread": None}
    head = {"machine": "m", "cores": 2, "threads": 1, "seed": 0, "commit": "c", "versions": {}}

    text = bench.table({"header": head, "figures": [figure | {"peer": None, "note": ""}]})

    assert "| `x` | 2 s | <= 1 | **no** |" in text


def test_only_what_is_between_the_markers_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")

    harness.write_between_markers(page, "x", "new")

    assert page.read_text() == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"
    with pytest.raises(ValueError, match=r"has no <!-- y --> … <!-- /y -->"):
        harness.write_between_markers(page, "y", "new")


@pytest.mark.slow
def test_the_frozen_prefix_benchmark_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    script = harness.ROOT / "benchmarks" / "frozen_prefix" / "run.py"

    subprocess.run([sys.executable, str(script), "--quick", "--json", str(file)], check=True)

    content = json.loads(file.read_text())
    found = {figure["figure"]: figure["value"] for figure in content["figures"]}
    assert set(found) == {"cache.speedup_last2", "cache.max_error"}
    assert found["cache.max_error"] <= 1e-5
    assert content["header"]["quick"] is True
