"""Faults in runs with [secure_aggregation]: at the five stages, and of clients that lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anabranch.client.sums.participant import PARTICIPANTS
from anabranch.protocols.secagg.messages import STAGES
from anabranch.simulations.engines import Engine
from anabranch.simulations.faults.plan import (
    ClockSkew,
    Corrupt,
    Crash,
    Duplicate,
    Fault,
    Late,
    LostAnswer,
    LostRequest,
    Restart,
    Scale,
    SignFlip,
)
from tests.secure_cases import SummingToy, furthest, secured
from tests.simulations.faults.faulty import Ran, Steady, run_faulty
from tests.simulations.faults.liars import accuracy, federate
from tests.simulations.rig import config

COUNT = 6  # five of six are enough
ROUND = secured(
    config(rounds=1, weighting="uniform", client_evaluation=False), range=64.0, value_bits=28
)
SUMS = '[secure_aggregation]\nrange = 64.0\nvalue_bits = 28\nkeystream = "chacha20"\n'


def toys() -> list[SummingToy]:
    return [SummingToy(f"toy-{i}", 10 + i, step=float(2**i)) for i in range(COUNT)]


def run(*faults: Fault, run: Any = ROUND, **more: Any) -> Ran:
    return run_faulty(faults, run=run, sites=toys(), **more)


def value(ran: Ran) -> float:
    return float(ran.done.adapter.arrays["head.weight"][0, 0])


def mean_without(*clients: int) -> float:
    return float(np.mean([2.0**i for i in range(COUNT) if i not in clients]))


def lost(ran: Ran) -> list[tuple[str, str]]:
    return [(one["site"], one["stage"]) for one in ran.events.of("secure_dropout")]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [LostRequest, LostAnswer, Late, Corrupt])
def test_what_is_lost_late_or_spoilt_at_a_stage_is_a_dropout(kind: Any, stage: Any) -> None:
    how: dict[Any, dict[str, Any]] = {
        Late: {"seconds": 500.0},
        Corrupt: {"part": "json", "how": "garbage"},
    }
    fields = how.get(kind, {})

    ran = run(kind(client=3, round=1, asked=stage, **fields), journeys=Steady(COUNT))

    masked = stage in ("agree", "reveal")
    assert lost(ran) == [("toy-3", stage)]
    assert value(ran) == pytest.approx(mean_without(*() if masked else (3,)), abs=1e-5)


@pytest.mark.parametrize("of", ["request", "answer"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_comes_twice_changes_nothing(stage: Any, of: Any) -> None:
    ran = run(*(Duplicate(client=i, round=1, asked=stage, of=of) for i in range(COUNT)))

    assert lost(ran) == []
    assert value(ran) == pytest.approx(mean_without(), abs=1e-5)


def test_too_many_losses_at_a_stage_strike_every_attempt() -> None:
    ran = run(*(LostAnswer(client=i, round=1, asked="share") for i in (0, 3)))

    assert value(ran) == pytest.approx(mean_without(0, 3), abs=1e-5)
    assert [one["opened"] for one in ran.events.of("secure_sum")] == [False, False, True]


def test_a_client_that_dies_in_training_is_no_member() -> None:
    ran = run(Crash(client=2, round=1))

    (told,) = ran.events.of("secure_sum")
    assert "toy-2" not in told["members"]
    assert value(ran) == pytest.approx(mean_without(2), abs=1e-5)


def test_a_wrong_clock_is_a_wrong_clock_where_the_delta_is_kept() -> None:
    ran = run(ClockSkew(client=1, seconds=100.0))

    said = {one["site"]: one["seconds"] for one in ran.events.of("site_trained")}
    assert said["toy-1"] == 100.5
    assert said["toy-0"] == 0.5


@pytest.mark.parametrize("at", ["training", "merging", "before-checkpoint", "after-round"])
def test_a_coordinator_that_dies_opens_no_sum_twice(at: Any) -> None:
    two = secured(
        config(rounds=2, weighting="uniform", client_evaluation=False), range=64.0, value_bits=28
    )

    ran = run(Restart(round=1, at=at), run=two)

    merged = [2] if at == "merging" else [1, 2]
    assert [report.round for report in ran.done.history] == merged
    assert len(ran.events.of("round_lost")) == (at == "merging")
    assert value(ran) == pytest.approx(len(merged) * mean_without(), abs=1e-4)


LIARS = (SignFlip(client=2, factor=2.0), Scale(client=5, factor=3.0, round=2))


@pytest.mark.parametrize("engine", ["cohort", "sequential"])
def test_a_lie_is_in_the_sum_as_it_is_in_the_clear(tmp_path: Path, engine: Engine) -> None:
    clear = federate(tmp_path / "clear", LIARS, engine=engine)
    honest = federate(tmp_path / "honest", (), extra=SUMS, engine=engine)

    got = federate(tmp_path / "sum", LIARS, extra=SUMS, engine=engine)

    assert furthest(got.adapter, clear.adapter) < 1e-4
    assert furthest(got.adapter, honest.adapter) > 0.01
    assert PARTICIPANTS._runs.get("digits-1") is None


def test_a_lie_beyond_the_range_is_the_largest_within_it(tmp_path: Path) -> None:
    lie = (SignFlip(client=0, factor=1e9),)

    for reach in ("0.7", "1.1"):  # as float32 one is below it, the other above
        got = federate(tmp_path / reach, lie, extra=SUMS.replace("64.0", reach))
        assert all("client-000000" in report.trained for report in got.history)


def test_a_robust_rule_over_groups_bears_a_liar_that_spoils_the_mean(tmp_path: Path) -> None:
    lie = (SignFlip(client=4, factor=1e9),)
    groups = f'weighting = "uniform"\n{SUMS}group = 3\ncolluding = 0.0\n[robust]\nrule = "median"\n'

    spoilt = accuracy(federate(tmp_path / "mean", lie, extra=SUMS))
    borne = accuracy(federate(tmp_path / "median", lie, extra=groups))

    assert spoilt < 0.5
    assert borne > 0.75
