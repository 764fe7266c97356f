from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.protocols.errors import DataError, RunError
from anabranch.simulations.faults.plan import FaultPlan, Late, LostAnswer, read_plan
from anabranch.simulations.faults.replay import replay_hint, replayable
from tests.simulations.faults.faulty import run_faulty
from tests.simulations.rig import config

PLAN = FaultPlan(
    seed=3,
    faults=(
        *(LostAnswer(client=i, round=2) for i in range(4)),
        Late(client=0, round=1, seconds=2.0),
    ),
)


def test_the_plan_is_written_before_anything_runs(tmp_path: Path) -> None:
    with replayable(PLAN, 7, tmp_path) as path:
        assert path == tmp_path / "faults.toml"
        assert read_plan(path) == PLAN


@pytest.mark.parametrize("kind", [RunError, DataError])
def test_a_failed_run_says_how_to_replay_it(tmp_path: Path, kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised, replayable(PLAN, 7, tmp_path):
        raise kind("round 2: 0 of 4 sites sent a delta that counts")

    assert str(raised.value) == (
        "round 2: 0 of 4 sites sent a delta that counts\n"
        "this run had seed 7 and the faults of seed 3: 1 late, 4 lost-answer. To replay it: "
        f"anabranch simulate EXPERIMENT --faults {tmp_path}/faults.toml --seed 7"
    )


def test_what_is_no_error_of_ours_goes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"^'x'$"), replayable(PLAN, 7, tmp_path):
        raise KeyError("x")


def test_the_hint_of_a_run_without_faults() -> None:
    assert "the faults of seed 0: none." in replay_hint(FaultPlan(), 1, Path("f.toml"))


def test_the_plan_that_was_written_fails_the_same_way(tmp_path: Path) -> None:
    first = run_faulty(PLAN, run=config(method="fedavg"))
    with replayable(PLAN, 7, tmp_path) as path:
        again = run_faulty(read_plan(path), run=config(method="fedavg"))

    assert first.error is not None
    assert str(again.error) == str(first.error)
    assert "round 2: 0 of 4 sites sent a delta that counts" in str(first.error)
