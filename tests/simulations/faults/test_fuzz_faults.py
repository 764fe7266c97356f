"""Hundreds of small runs under drawn plans: each ends with a result, or with reasons."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.protocols.config import RunConfig
from anabranch.simulations.faults.drawing import Rates, draw
from anabranch.simulations.faults.plan import FaultPlan, Restart, to_toml
from tests.simulations.faults.faulty import Ran, Steady, expected_value, run_faulty, toys
from tests.simulations.rig import config

REASONS = ("deadline", "rejected", "protocol", "flower", "are needed", "surplus")
STEPS = {site.name: float(site.step or 0) for site in toys(6)}

# How rounds are run: the fields of [federation].
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "cohort": {"cohort": 3, "quorum": 2},
    "over-selection": {"cohort": 3, "over_selection": 0.5},
    "tiers": {"cohort": 2, "tiers": 2},
    "buffer": {"buffer": 3},
    "buffer of a cohort": {"buffer": 2, "cohort": 3, "quorum": 2},
}


def way(name: str, **tables: Any) -> RunConfig:
    run = config(rounds=4, method="fedavg", weighting="uniform", deadline_s=90.0, **WAYS[name])
    return msgspec.convert(msgspec.to_builtins(run) | tables, RunConfig)


def drawn(seed: int, *, lies: bool = False) -> FaultPlan:
    """Return a plan of few or of many faults, by the seed."""
    chance = 0.08 if seed % 3 else 0.3
    rates = Rates(
        lost_request=chance / 2,
        lost_answer=chance / 2,
        duplicate=chance,
        late=chance,
        late_s=60.0,
        corrupt=chance,
        crash=chance / 2,
        clock_skew=chance,
        restart=chance,
        sign_flip=0.2 if lies else 0.0,
        scale=0.3 if lies else 0.0,
        scale_factor=10.0 ** (seed % 40),
    )
    plan = draw(rates, seed=seed, clients=6, rounds=4)
    others = [f for f in plan.faults if seed % 2 or not isinstance(f, Restart)]
    return msgspec.structs.replace(plan, faults=tuple(others))


def check(ran: Ran, plan: FaultPlan, *, honest: bool = True, buffered: bool = False) -> None:
    """Assert what holds of every run under faults."""
    says = to_toml(plan)
    if ran.error is not None:
        assert any(reason in str(ran.error) for reason in REASONS), (str(ran.error), says)
        return
    assert all(np.isfinite(array).all() for array in ran.done.adapter.arrays.values()), says
    rounds = sum(len(report.trained) for report in ran.done.history)
    assert rounds == sum(row.rounds for row in ran.done.sites.values()), says
    if not buffered:  # there, what failed in one round is told beside what counts in the next
        assert all(not set(r.trained) & set(r.failed) for r in ran.done.history), says
    if honest:
        value = float(ran.done.adapter.arrays["layer.lora_B.weight"][0, 0])
        assert value == pytest.approx(expected_value(ran.done, STEPS), rel=1e-5), says


@pytest.mark.parametrize("name", WAYS)
def test_a_few_runs_under_faults(name: str) -> None:
    for seed in range(6):
        plan = drawn(seed)
        ran = run_faulty(plan, run=way(name), sites=toys(6), journeys=Steady(6, 20.0))
        check(ran, plan, buffered="buffer" in WAYS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_many_runs_under_faults(name: str) -> None:
    for seed in range(100, 180):
        plan = drawn(seed)
        ran = run_faulty(plan, run=way(name), sites=toys(6), journeys=Steady(6, 20.0))
        check(ran, plan, buffered="buffer" in WAYS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"server": {"optimizer": "adam", "learning_rate": 0.1}},
        {"uplink": {"codec": "fp16"}},
        {"uplink": {"codec": "top-k", "keep": 0.5}},
    ],
)
def test_many_runs_with_liars(tables: dict[str, Any]) -> None:
    for seed in range(200, 260):
        plan = drawn(seed, lies=True)
        ran = run_faulty(plan, run=way("all", **tables), sites=toys(6), journeys=Steady(6, 20.0))
        check(ran, plan, honest=False)
