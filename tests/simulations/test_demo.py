"""The demo: its records, its configurations, and the whole of it as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anabranch.cli.main import run
from anabranch.protocols.config import parse
from anabranch.simulations.demo import icd
from anabranch.simulations.demo.run import CONFIGURATIONS, run_toml
from tests.test_docs import BY_DEMO, anabranch_commands


@pytest.fixture(scope="module")
def records() -> icd.Records:
    return icd.build(0)


def test_no_category_and_no_text_is_in_two_parts(records: icd.Records) -> None:
    train = [one for part in records.train.values() for one in part]
    parts = [train, records.validation, records.test]

    for i, first in enumerate(parts):
        for second in parts[i + 1 :]:
            assert not {r.category for r in first} & {r.category for r in second}
            assert not {r.text.casefold() for r in first} & {r.text.casefold() for r in second}
    assert len({r.text.casefold() for r in train}) == len(train)


def test_hospitals_are_unequal_and_have_mostly_their_own_chapters(records: icd.Records) -> None:
    position = {chapter: label for label, chapter in enumerate(icd.CHAPTERS)}
    sizes = {name: len(part) for name, part in records.train.items()}

    assert max(sizes.values()) > 2 * min(sizes.values())
    for name, part in records.train.items():
        own = {position[chapter] for chapter in icd.SPECIALITIES[name]}
        share = sum(r.label in own for r in part) / len(part)
        assert share == pytest.approx(icd.OWN_SHARE, abs=0.02)
        assert len({r.label for r in part}) > len(own)  # a trickle of the others


def test_every_chapter_is_tested_and_the_seed_decides(records: icd.Records) -> None:
    assert set(Counter(r.label for r in records.test)) == set(range(len(icd.CHAPTERS)))
    assert icd.build(0) == records
    assert icd.build(1).test != records.test


@pytest.mark.parametrize("quick", [False, True])
def test_the_three_configurations_are_of_one_task(quick: bool) -> None:
    configs = [parse(run_toml(name, 5, quick), source=name) for name in CONFIGURATIONS]

    assert {c.seed for c in configs} == {5}
    for table in ("task", "data", "model"):
        values = {msgspec.json.encode(getattr(c, table)) for c in configs}
        assert len(values) == 1, table
    assert configs[0].task.labels == tuple(icd.CHAPTERS.values())
    assert [c.privacy is not None for c in configs] == [False, False, True]
    assert configs[2].privacy is not None
    assert configs[2].privacy.epsilon == 8.0


def check_folder(output: Path, summary: dict[str, Any]) -> None:
    """Check what every demo leaves behind, whatever its size."""
    rows = {"majority", "linear_probe", "local_mean", "federated", "federated_dp", "pooled"}
    for metric in ("accuracy", "macro_f1"):
        assert rows <= set(summary[metric])
        assert all(0 <= value <= 1 for value in summary[metric].values())
    assert set(summary["epsilon"]) == set(icd.SPECIALITIES)
    assert all(7.9 < e <= 8.0 for e in summary["epsilon"].values())
    for key in ("bytes_up", "bytes_down", "seconds", "peak_rss_bytes"):
        assert summary[key] > 0
    sizes = summary["release"]
    assert sizes["int8_bytes"] < 0.3 * sizes["fp32_bytes"]
    assert json.loads((output / "summary.json").read_text()) == summary
    for name in ("run.toml", "events.jsonl", "report.html", "comparison.svg", "release/README.md"):
        assert (output / name).is_file(), name


@pytest.mark.slow
def test_the_small_demo_as_a_user_runs_it(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "anabranch.cli.main", "demo", "--quick", "--secure", "--json"]

    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # a pipe is quiet
    summary = json.loads(done.stdout)
    check_folder(output, summary)
    secure, accuracy = summary["secure_aggregation"], summary["accuracy"]
    assert secure["rounds"] == 3
    change = accuracy["federated_secure"] - accuracy["federated"]
    assert secure["accuracy_difference_points"] == pytest.approx(100 * abs(change))
    assert abs(change) < 0.003
    assert 0 < secure["bytes_up_per_round"] < secure["bytes_up_per_round_plain"]


@pytest.mark.slow
def test_the_whole_demo_reaches_what_the_readme_says_and_its_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert run(["demo", "--output", BY_DEMO]) == 0

    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / BY_DEMO / "summary.json").read_text())
    check_folder(tmp_path / BY_DEMO, summary)
    accuracy = summary["accuracy"]
    assert accuracy["federated"] > accuracy["local_mean"] + 0.15
    assert accuracy["federated"] > accuracy["pooled"] - 0.03
    assert accuracy["federated"] > accuracy["linear_probe"]
    assert accuracy["federated_dp"] > summary["best_local"]
    assert summary["release"]["int8_accuracy"] > summary["release"]["fp32_accuracy"] - 0.01
    assert summary["peak_rss_bytes"] < 3e9
    assert f"{100 * accuracy['federated']:.1f}" in printed
    for arguments in anabranch_commands(by_demo=True):
        if arguments[0] != "demo":
            assert run(arguments) == 0, arguments
