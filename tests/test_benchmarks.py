"""Benchmarks say what they measured: figures from a summary, tables from figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as bench
from benchmarks import harness
from benchmarks.demo.run import figures, over_seeds
from benchmarks.fed_heart.data import data_folder
from benchmarks.network.intruders import Counted, counted
from benchmarks.network.overhead import overheads
from benchmarks.network.run import cost, survived
from benchmarks.network.survival import Sample, Soak
from tests.faults.killing import Storm

EXACT = {  # figures of the network benchmark that are not measured times or sizes
    "join.commands": 1,
    "join.strings": 1,
    "join.transfers": 0,
    "join.questions": 0,
    "updates_lost": 0,
    "updates_double": 0,
    "adapters_different": 0,
    "intruders_in": 0,
}
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


def test_overhead_is_what_the_longest_training_leaves_of_a_round() -> None:
    events: list[dict[str, Any]] = [
        {"at": "2026-01-01T00:00:00Z", "kind": "site_trained", "seconds": 50.0},
        {"at": "2026-01-01T00:01:00Z", "kind": "round_aggregated"},
        {"at": "2026-01-01T00:01:02Z", "kind": "site_trained", "seconds": 1.0},
        {"at": "2026-01-01T00:01:03Z", "kind": "site_trained", "seconds": 2.5},
        {"at": "2026-01-01T00:01:04.5Z", "kind": "round_aggregated"},
        {"at": "2026-01-01T00:01:05Z", "kind": "round_aggregated"},
    ]

    assert overheads(events) == pytest.approx([2.0, 0.5])


def test_the_peer_of_the_network_path_is_named_with_its_figure() -> None:
    found = cost("1mb", [0.5, 0.75, 2.0], [8.0, 9.0])

    assert (found.figure, found.value) == ("round.overhead_seconds_1mb", 0.75)
    assert (found.spread, found.reached) == ((0.5, 2.0), True)
    assert found.peer is not None
    assert found.peer.startswith("8.5 s over 2 rounds")


def test_kills_of_all_runs_are_added_up_and_the_slowest_recovery_counts() -> None:
    storms = [
        Storm(kills=2, recoveries_s=(1.0, 31.0), lost=0, doubled=4, equal=True),
        Storm(kills=1, recoveries_s=(2.0,), lost=1, doubled=0, equal=False),
    ]

    found = {figure.figure: (figure.value, figure.reached) for figure in survived(storms)}

    assert found == {
        "recovery.seconds_max": (31.0, False),
        "kills": (3, False),
        "updates_lost": (1, False),
        "updates_double": (4, False),
        "adapters_different": (1, False),
    }


def test_growth_is_the_last_quarter_over_the_second() -> None:
    storm = Storm(kills=1, recoveries_s=(1.0,), lost=0, doubled=0, equal=True)
    memory = [9, 9, 100, 102, 90, 90, 150, 153]
    samples = [Sample(round=i, memory=m, files=7, disk=i) for i, m in enumerate(memory, 1)]
    soak = Soak(storm=storm, samples=samples, rounds=8)

    assert soak.growth(lambda one: one.memory) == pytest.approx(1.5)
    assert soak.growth(lambda one: one.files) == 1.0


def test_an_attack_that_could_not_be_tried_counts_as_one_that_got_in() -> None:
    case = '<testcase name="{}">{}</testcase>'
    said = [("a", ""), ("b", "<failure/>"), ("c", "<skipped/>"), ("d", "<error/>")]
    xml = "".join(case.format(*one) for one in said)

    assert counted(f"<testsuites>{xml}</testsuites>") == Counted(tried=4, inside=3)
    with pytest.raises(ValueError, match="no attack was tried"):
        counted("<testsuites/>")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_network_benchmark_writes_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    try:
        data_folder()
    except SystemExit as missing:
        pytest.skip(str(missing))
    file = tmp_path / "figures.json"
    script = harness.ROOT / "benchmarks" / "network" / "run.py"

    subprocess.run([sys.executable, str(script), "--quick", "--json", str(file)], check=True)

    content = json.loads(file.read_text())
    found = {figure["figure"]: figure["value"] for figure in content["figures"]}
    assert {name: found[name] for name in EXACT} == EXACT
    assert found["kills"] >= 1
    assert found["intruders_tried"] >= 20
    assert set(found) == {
        *EXACT, "join.seconds", "round.overhead_seconds_1mb", "round.overhead_seconds_15mb",
        "recovery.seconds_max", "kills", "intruders_tried", "soak.memory_growth_ratio",
        "soak.files_growth", "soak.disk_growth_ratio",
    }  # fmt: skip


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
