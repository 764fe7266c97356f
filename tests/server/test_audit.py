"""The whole command: a run folder in, audit.json and an exit code out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anabranch.cli.main import run as command
from anabranch.client.audit.report import FALSE_ALARM, Report, text
from anabranch.protocols.config import parse
from anabranch.protocols.errors import ConfigError, PrivacyError
from anabranch.server.audit import audit
from anabranch.server.evaluation import initial_adapter
from anabranch.server.store import RunFolder
from tests.client.audit import audit_rig as rig
from tests.runs import table_text, write_site, write_table

ROOT = Path(__file__).parents[2]
PRIVATE = "\n[privacy]\nepsilon = 4.0\ndelta = 1e-3\n"
LOCAL = ("batch_size = 8", "batch_size = 8\nlocal_steps = 3\nholdout = 0.3")
CLIENTS = "\n[client_privacy]\nepsilon = 8.0\npopulation = 200\n"


def run_folder(tmp_path: Path, *changes: tuple[str, str], extra: str = PRIVATE) -> Path:
    """Make the folder of a finished run of two sites, its adapter that of the start."""
    toml = table_text(LOCAL, *changes, extra=extra)
    folder = RunFolder.create(tmp_path / "run", toml.encode())
    folder.checkpoint(2, initial_adapter(parse(toml, source="run.toml")))
    for number, (name, rows) in enumerate({"east": 60, "west": 40}.items()):
        data = write_table(tmp_path / f"{name}.csv", n=rows, seed=number)
        write_site(folder.path / "sites" / name, name, data)
    folder.summarise({"run": "tiny-1", "sites": {}})
    return folder.path


def test_every_site_is_audited_and_the_report_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.fix_keys(monkeypatch, 0)
    path = run_folder(tmp_path)

    report = audit(path, canaries=80, seed=1)

    assert report.passed
    assert [part.subject for part in report.parts] == ["east", "west"]
    assert msgspec.json.decode((path / "audit.json").read_bytes(), type=Report) == report
    assert sum(row.level for part in report.parts for row in part.checks) <= FALSE_ALARM
    for part in report.parts:
        assert part.bound.epsilon_lower <= part.bound.reach
        assert part.bound.canaries == 80
        assert part.membership is not None
        assert part.membership.auc == 0.5  # the adapter is that of the start: all scores are 0
        assert part.membership.tpr_at_1_percent_fpr is None
        assert "100" in part.membership.note
    assert not list(path.rglob("ledger.sqlite"))


def test_the_report_says_what_was_claimed_found_and_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.fix_keys(monkeypatch, 0)

    found = text(audit(run_folder(tmp_path), sites=["west"], canaries=40, seed=1))

    for words in (
        "PASS",
        "ε = ",
        "δ = 0.001",
        "95% confidence",
        "m = 40",
        "r = ",
        "threat model",
        "no privacy ledger is charged",
        "proves nothing",
    ):
        assert words in found
    assert "east" not in found


def test_the_command_exits_1_when_the_audit_contradicts_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.fix_keys(monkeypatch, 0)
    path = run_folder(tmp_path)
    arguments = ["audit", str(path), "--site", "east", "--canaries", "40", "--seed", "1", "--json"]

    assert command(arguments) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True

    rig.sigma_halved(monkeypatch)
    assert command(arguments) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    rows = {row["name"]: row["passed"] for row in report["parts"][0]["checks"]}
    assert rows["noise level"] is False
    assert json.loads((path / "audit.json").read_text()) == report


def test_noise_that_is_off_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.noise_off(monkeypatch)

    with pytest.raises(PrivacyError, match=r"audit FAILS.*no noise"):
        audit(run_folder(tmp_path), canaries=40, seed=1)


def test_a_report_of_less_than_was_spent_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh accountant per round: the site reports what one round of two costs."""
    rig.fix_keys(monkeypatch, 0)
    path = run_folder(tmp_path)
    row: dict[str, Any] = {"rounds": 2, "delta": 1e-3}
    for epsilon, passed in ((1.0, False), (4.0, True)):
        summary = {"run": "tiny-1", "sites": {"east": row | {"epsilon": epsilon}}}
        RunFolder(path).summarise(summary)

        (part,) = audit(path, sites=["east"], canaries=40, seed=1).parts

        assert {c.name: c.passed for c in part.checks}["recorded ε"] is passed


def test_a_site_audits_itself_with_its_own_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.fix_keys(monkeypatch, 0)
    mine = write_table(tmp_path / "mine.csv", n=50, seed=5)
    others = write_table(tmp_path / "others.csv", n=120, seed=6)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "run.toml").write_text(table_text(LOCAL, extra=PRIVATE))

    report = audit(tmp_path / "alone", data=mine, non_members=others, canaries=40, seed=1)

    (part,) = report.parts
    assert (part.subject, report.run) == ("this site", "alone")
    assert part.membership is None
    assert "no checkpoint" in (part.membership_left_out or "")


def test_clients_are_audited_beside_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.fix_keys(monkeypatch, 0)
    uniform = (
        "rounds = 2",
        'rounds = 2\ncohort = 40\nweighting = "uniform"\nclient_evaluation = false',
    )
    path = run_folder(tmp_path, uniform, extra=PRIVATE + CLIENTS)

    report = audit(path, sites=["west"], canaries=40, seed=1)

    assert [part.unit for part in report.parts] == ["record", "client"]


def test_the_commands_of_the_document_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are run here and not with all other documents: here, the noise is fixed."""
    rig.fix_keys(monkeypatch, 0)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^\$ anabranch (.*)$", (ROOT / "docs/audit.md").read_text(), re.MULTILINE)

    assert len(lines) == 2
    for line in lines:
        assert command(shlex.split(line)) == 0, capsys.readouterr()
    assert "600 non-members" in capsys.readouterr().out


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml"):
        audit(tmp_path / "nowhere")
    path = run_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"north.*expected one of east, west"):
        audit(path, sites=["north"])
    (path / "run.toml").write_text(table_text(LOCAL))
    with pytest.raises(PrivacyError, match="no claim to audit"):
        audit(path)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "run.toml").write_text(table_text(LOCAL, extra=PRIVATE))
    with pytest.raises(ConfigError, match="--data FILE"):
        audit(alone)
