from __future__ import annotations

import json
from pathlib import Path

import pytest

from anabranch.cli.edge_ledger import ledger
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.ledger_report import ledger_of
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.rdp import epsilon_of
from anabranch.protocols.spend import Spend

SPEND = Spend(noise_multiplier=1.2, sample_rate=0.064, steps=10)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    home = Home(tmp_path / "device")
    mine = ledger_of(home)
    mine.settle(mine.reserve(SPEND, "round-1", 50), SPEND)
    mine.reserve(SPEND, "round-2", 50)
    return home


def test_the_command_tells_a_person_and_a_machine_the_same(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.folder / "device.toml").write_text("[budget]\nepsilon = 4\ndelta = 1e-4\n")
    epsilon = epsilon_of([SPEND, SPEND], 1e-4)

    assert ledger(home.folder) == 0
    text = capsys.readouterr().out
    assert ledger(home.folder, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["epsilon"] == epsilon
    assert [row["settled"] for row in found["trainings"]] == [True, False]
    assert f"at most: epsilon {epsilon:.3f} at 1.0e-04" in text
    assert f"{4 - epsilon:.3f} left" in text
    assert "round-2" in text
    assert found["head"] in text


def test_delta_may_be_asked_for(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(home.folder, delta=1e-6, as_json=True)

    assert json.loads(capsys.readouterr().out)["epsilon"] == epsilon_of([SPEND] * 2, 1e-6)


def test_a_lost_ledger_is_refused_until_it_is_accepted(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    home.ledger.unlink()
    with pytest.raises(PrivacyError, match="the privacy ledger is missing"):
        ledger(home.folder)

    assert ledger(home.folder, adopt=True) == 0
    assert "accepted and recorded" in capsys.readouterr().out
    assert ledger(home.folder, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == 0.0
