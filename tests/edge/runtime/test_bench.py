"""What `edge bench` reports, and where its joules come from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from anabranch.edge.runtime import bench as benching
from anabranch.edge.runtime.bench import bench, energy_counter
from anabranch.edge.runtime.measure import Job, Point
from tests.edge.made import Made

Bundles = Callable[[str], Made]
ROLES = ("infer", "train_step", "train_step_dp")


def zone(root: Path, folder: str, name: str, microjoules: str) -> Path:
    place = root / folder
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    return place


# -- the report ---------------------------------------------------------------------------------


def test_the_report_has_a_row_for_each_graph_and_is_json(
    made: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "energy_counter", lambda: None)
    bundle = made("image").open()
    report = bench(bundle, records=3, runs=2, watts=5.0)
    assert json.loads(json.dumps(report)) == report
    assert report["bundle"] == {"name": "tiny", "version": 3, "digest": bundle.digest}
    assert report["device"]["onnxruntime"] == onnxruntime.__version__
    assert (report["threads"], report["tokens"]) == (1, 1)
    assert report["energy"] == "estimated at 5 W a busy core"
    assert [row["graph"] for row in report["rows"]] == [
        f"{role}.{precision}" for precision in ("fp32", "int8", "int4") for role in ROLES
    ]
    for row in report["rows"]:
        assert row["records"] == (1 if row["graph"].startswith("infer") else 3)
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["peak_mb"] > 20
        assert row["joules"] == pytest.approx(5.0 * row["cpu_ms"] / 1000)
        assert not row["measured"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Nothing is run: every call takes 2 ms, the first one more. The jobs are kept."""
    jobs: list[Job] = []

    def measured(job: Job) -> list[Point]:
        jobs.append(job)
        ((records, tokens),) = job.points
        rest = (0.002,) * (job.repeats - 1)
        return [Point(records, tokens, (9.0, *rest), (8.0, *rest), 50 << 20)]

    monkeypatch.setattr(benching, "measure", measured)
    return jobs


def test_inference_runs_one_record_and_steps_as_many_as_asked(
    made: Bundles, asked: list[Job]
) -> None:
    bench(made("text").open(), records=6, tokens=17, threads=2, runs=5)
    assert [job.points for job in asked] == [((1, 17),), ((6, 17),), ((6, 17),)] * 3
    assert {(job.threads, job.repeats, job.folder) for job in asked} == {
        (2, 6, str(made("text").folder))
    }


def test_tokens_are_the_bundles_largest_and_one_without_texts(
    made: Bundles, asked: list[Job]
) -> None:
    assert bench(made("text").open())["tokens"] == 24
    assert bench(made("image").open(), tokens=9)["tokens"] == 1


def test_the_first_call_does_not_count(
    made: Bundles, asked: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "energy_counter", lambda: None)
    for row in bench(made("image").open(), runs=2, watts=3.0)["rows"]:
        assert (row["p50_ms"], row["p95_ms"], row["cpu_ms"]) == pytest.approx((2, 2, 2))
        assert row["joules"] == pytest.approx(0.006)
        assert row["peak_mb"] == 50


# -- energy -------------------------------------------------------------------------------------


def test_joules_are_the_packages_power_times_the_time_of_a_call(
    made: Bundles, asked: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    now: Iterator[float] = iter(range(0, 1000, 2))  # seconds
    count: Iterator[float] = iter(range(0, 10_000, 20))  # joules: 10 W
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(benching, "energy_counter", lambda: next(count))
    report = bench(made("image").open(), runs=2)
    assert report["energy"] == "measured (package)"
    assert [row["joules"] for row in report["rows"]] == pytest.approx([10 * 0.002] * 9)
    assert all(row["measured"] for row in report["rows"])


def test_a_counter_that_runs_over_makes_that_row_an_estimate(
    made: Bundles, asked: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[Any] = [float(i) for i in range(18)]
    counts[5:] = [0.5 + i for i in range(13)]  # between before and after of the third row
    monkeypatch.setattr(benching, "energy_counter", lambda: counts.pop(0))
    report = bench(made("image").open(), runs=2, watts=4.0)
    assert [row["measured"] for row in report["rows"]] == [True, True, False] + [True] * 6
    assert report["rows"][2]["joules"] == pytest.approx(0.008)
    assert report["energy"] == "measured (package) in 8 of 9, else estimated at 4 W a busy core"


def test_packages_are_summed_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", "3000000")
    zone(tmp_path, "intel-rapl:0:0", "core", "2000000")
    zone(tmp_path, "intel-rapl:0:1", "dram", "900000")
    zone(tmp_path, "intel-rapl:1", "package-1", "500000")
    zone(tmp_path, "intel-rapl:2", "psys", "70000000")
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", "3000000")
    (tmp_path / "intel-rapl").mkdir()
    assert energy_counter(tmp_path) == pytest.approx(3.5)


@pytest.mark.parametrize("text", ["", "many", "1.5"])
def test_a_counter_that_is_no_number_is_none(tmp_path: Path, text: str) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", "3000000")
    zone(tmp_path, "intel-rapl:1", "package-1", text)
    assert energy_counter(tmp_path) is None


def test_a_counter_that_may_not_be_read_is_none(tmp_path: Path) -> None:
    place = zone(tmp_path, "intel-rapl:0", "package-0", "1")
    (place / "energy_uj").unlink()
    (place / "energy_uj").mkdir()  # reading it fails, whoever runs this
    assert energy_counter(tmp_path) is None


@pytest.mark.parametrize("names", [(), ("psys",), ("core", "dram")])
def test_without_a_package_nothing_is_measured(tmp_path: Path, names: tuple[str, ...]) -> None:
    for i, name in enumerate(names):
        zone(tmp_path, f"intel-rapl:{i}", name, "1000000")
    assert energy_counter(tmp_path) is None
    assert energy_counter(tmp_path / "nowhere") is None
