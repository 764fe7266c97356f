from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.client.data.records import Records
from anabranch.protocols.errors import ConfigError
from anabranch.simulations.faults.drawing import Rates, draw
from anabranch.simulations.faults.plan import (
    Backdoor,
    Crash,
    FaultPlan,
    LabelFlip,
    Late,
    Restart,
    Trigger,
    write_plan,
)
from anabranch.simulations.faults.table import Faults, FaultsTable, build
from anabranch.simulations.population.client import HONEST, Conduct

NAMES = ["a", "b", "c"]


def built(table: FaultsTable | FaultPlan, folder: Path = Path(), **fields: Any) -> Faults:
    given: dict[str, Any] = {"rounds": 5, "num_labels": 2, "folder": folder, "seed": 7}
    return build(table, NAMES, **{**given, **fields})


def table(text: str) -> FaultsTable:
    return msgspec.toml.decode(text, type=FaultsTable)


def test_rates_are_drawn_with_the_experiments_seed_or_their_own() -> None:
    rates = Rates(late=0.5, restart=0.3)

    assert built(table("late = 0.5\nrestart = 0.3")).plan == draw(
        rates, seed=7, clients=3, rounds=5
    )
    assert built(table("seed = 1\nlate = 0.5\nrestart = 0.3")).plan == draw(
        rates, seed=1, clients=3, rounds=5
    )


def test_a_plan_file_takes_the_place_of_rates(tmp_path: Path) -> None:
    plan = FaultPlan(seed=3, faults=(Late(client=1, round=2, seconds=3.0),))
    write_plan(tmp_path / "f.toml", plan)

    assert built(table('plan = "f.toml"'), tmp_path).plan == plan


def test_a_plan_may_be_given_to_be_replayed() -> None:
    plan = FaultPlan(faults=(Restart(round=5),))

    faults = built(plan)

    assert faults.plan is plan
    assert faults.restarts == (Restart(round=5),)


def test_the_conduct_of_clients_goes_through_processes() -> None:
    plan = FaultPlan(faults=(LabelFlip(client=0), Crash(client=2, round=1, steps=4)))

    conduct = pickle.loads(pickle.dumps(built(plan).conduct()))  # noqa: S301 - our own

    records = Records(np.zeros((2, 1), np.float32), np.array([0, 1], np.int64))
    assert list(conduct.poisoned("a", records).labels) == [1, 0]
    assert conduct.poisoned("b", records) is records
    assert (conduct.crash("c", 1), conduct.crash("c", 2), conduct.crash("a", 1)) == (4, None, None)


def test_a_plan_without_liars_leaves_conduct_as_it_was() -> None:
    other = Conduct(noise_seed=3)

    assert built(FaultPlan()).conduct(other) == other
    assert built(FaultPlan()).conduct() == HONEST


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (FaultPlan(faults=(LabelFlip(client=3),)), r"faults\[0\].client = 3: there are 3"),
        (FaultPlan(faults=(Crash(client=0, round=6),)), r"faults\[0\].round = 6: the run has 5"),
        (FaultPlan(faults=(Backdoor(client=0, target=2),)), r"faults\[0\].target = 2: there are 2"),
    ],
)
def test_a_plan_of_another_run_is_refused(plan: FaultPlan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(plan)


@pytest.mark.parametrize("text", ["late = 0.1", "seed = 3", "[trigger]\npatch = 3"])
def test_a_plan_and_rates_are_one_too_many(text: str) -> None:
    with pytest.raises(ConfigError, match=r"faults\.plan names every fault: leave the rates"):
        built(table(f'plan = "f.toml"\n{text}'))


def test_infinite_rates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"faults\.late_s: expected a finite number"):
        built(table("late = 0.1\nlate_s = inf"))


def test_the_trigger_of_the_table_is_the_plans() -> None:
    assert built(table("backdoor = 0.5\n[trigger]\npatch = 3")).plan.trigger == Trigger(patch=3)
