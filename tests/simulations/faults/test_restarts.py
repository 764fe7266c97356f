"""A coordinator that died goes on as if it never had."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import RunError
from anabranch.server.progress import Progress
from anabranch.server.rounds import RoundEngine
from anabranch.simulations.faults.plan import Restart
from anabranch.simulations.virtual_grid import VirtualGrid
from tests.simulations.faults.faulty import (
    Ran,
    Steady,
    executor,
    expected_value,
    run_faulty,
    toys,
)
from tests.simulations.rig import SIZES, ToySite, config

POINTS = ["training", "merging", "before-checkpoint", "after-checkpoint", "after-round"]
METHODS = ["fedavg", "ffa", "rolora", "altqr", "fedex", "flora", "flexlora", "hetlora", "fedsa"]
ROBUST = ["norm-clipping", "median", "trimmed-mean", "krum", "geometric-median"]


def with_tables(run: RunConfig, **tables: Any) -> RunConfig:
    """Return the run with other tables."""
    return msgspec.convert(msgspec.to_builtins(run) | tables, RunConfig)


def noisy() -> list[ToySite]:
    """Return sites whose deltas depend on site, round and what they were sent."""
    return [ToySite(name, SIZES[name]) for name in sorted(SIZES)]


def restart(number: int, at: str, **fields: Any) -> Restart:
    return msgspec.convert({"kind": "restart", "round": number, "at": at, **fields}, Restart)


def assert_same(run: RunConfig, *restarts: Restart, **engine: Any) -> Ran:
    """Assert that a run with restarts ends as one without, bit for bit."""
    plain = run_faulty(run=run, sites=noisy(), journeys=Steady(4), **engine)
    ran = run_faulty(restarts, run=run, sites=noisy(), journeys=Steady(4), **engine)

    assert len(ran.events.of("restarted")) == len(restarts)
    assert ran.bytes() == plain.bytes()
    assert [r.trained for r in ran.done.history] == [r.trained for r in plain.done.history]
    assert [r.client for r in ran.done.history] == [r.client for r in plain.done.history]
    assert ran.done.best_round == plain.done.best_round
    assert [row.rounds for row in ran.done.sites.values()] == [
        row.rounds for row in plain.done.sites.values()
    ]
    return ran


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", POINTS)
def test_a_run_that_was_restarted_ends_with_the_same_adapter(method: str, at: str) -> None:
    run = config(rounds=4, cohort=3, method=method)
    sized = with_tables(run, lora={"rank": 2 if method not in ("fedex", "flora") else 1})
    if method in ("fedex", "flora"):
        sized = with_tables(sized, federation={**_federation(sized), "residual_rank": 1})

    assert_same(sized, restart(2, at))


def _federation(run: RunConfig) -> dict[str, Any]:
    return dict(msgspec.to_builtins(run.federation))


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi", "adagrad"])
def test_the_moments_of_a_server_optimiser_are_kept(optimizer: str) -> None:
    run = with_tables(
        config(rounds=4, method="fedavg"), server={"optimizer": optimizer, "learning_rate": 0.1}
    )

    assert_same(run, restart(2, "merging"), restart(3, "after-round"))


@pytest.mark.parametrize("rule", ROBUST)
def test_robust_rules_go_on(rule: str) -> None:
    run = with_tables(
        config(rounds=3, method="ffa"), robust={"rule": rule, "byzantine": 0, "trim": 0.25}
    )

    assert_same(run, restart(2, "before-checkpoint"))


def test_tiers_remember_how_fast_everybody_was() -> None:
    run = config(rounds=6, cohort=2, method="fedavg", tiers=2)

    ran = assert_same(run, restart(4, "after-round"))

    assert len({r.asked for r in ran.done.history}) > 1


def test_patience_that_was_at_its_end_is_not_begun_anew() -> None:
    run = config(rounds=6, method="fedavg", early_stopping=1)
    scores = iter([0.5, 0.4])

    ran = run_faulty(
        [restart(2, "after-round")],
        run=run,
        evaluate=lambda adapter: {"accuracy": next(scores)},
    )

    assert [r.round for r in ran.done.history] == [1, 2]
    assert ran.done.best_round == 1


def test_a_restart_after_the_last_round_is_a_restart_of_nothing() -> None:
    assert_same(config(rounds=2, method="fedavg"), restart(2, "after-round"))


def test_many_restarts_of_one_round() -> None:
    assert_same(
        config(rounds=3, method="fedavg"),
        restart(2, "training", answers=0),
        restart(2, "training", answers=1),
        restart(2, "training", answers=3),
        restart(2, "merging"),
        restart(2, "after-checkpoint"),
        restart(2, "after-round"),
    )


def test_a_round_that_was_under_way_is_asked_again_and_counted_once() -> None:
    run = config(rounds=2, method="fedavg", weighting="uniform", client_evaluation=False)
    steps = {site.name: float(site.step or 0) for site in toys()}

    ran = run_faulty([restart(1, "training", answers=3)], run=run, journeys=Steady(4))

    started = [event["round"] for event in ran.events.of("round_started")]
    assert started == [1, 1, 2]
    assert len(ran.events.of("site_trained")) == 3 + 4 + 4
    value = float(ran.done.adapter.arrays["head.weight"][0, 0])
    assert value == pytest.approx(expected_value(ran.done, steps), rel=1e-6)


def test_a_merge_that_was_kept_is_not_asked_for_again() -> None:
    ran = run_faulty([restart(1, "before-checkpoint")], run=config(method="fedavg"))

    assert [event["round"] for event in ran.events.of("round_started")] == [1, 2]
    assert [event["round"] for event in ran.events.of("round_aggregated")] == [1, 2]


def test_an_outage_takes_its_time() -> None:
    plain = run_faulty(run=config(method="fedavg"), journeys=Steady(4))
    ran = run_faulty(
        [restart(1, "after-round", seconds=500.0)],
        run=config(method="fedavg"),
        journeys=Steady(4),
    )

    assert plain.grid is not None
    assert ran.grid is not None
    assert ran.grid.clock() >= plain.grid.clock() + 500.0


def test_a_buffer_loses_what_was_under_way_and_asks_again() -> None:
    run = config(rounds=6, method="fedavg", buffer=2, weighting="uniform", client_evaluation=False)
    steps = {site.name: float(site.step or 0) for site in toys()}

    ran = run_faulty([restart(3, "training")], run=run, journeys=Steady(4))

    assert len(ran.done.history) == 6
    value = float(ran.done.adapter.arrays["head.weight"][0, 0])
    assert value == pytest.approx(expected_value(ran.done, steps), rel=1e-5)


# Client-level privacy


def private_run() -> RunConfig:
    return with_tables(
        config(rounds=3, method="fedavg", cohort=60, weighting="uniform", client_evaluation=False),
        client_privacy={"epsilon": 20.0, "population": 100},
    )


def private(*restarts: Restart) -> Ran:
    sites = [ToySite(f"toy-{i:03}", 10) for i in range(100)]
    randomness = Randomness.reproducible(torch.Generator().manual_seed(5))
    return run_faulty(restarts, run=private_run(), sites=sites, randomness=randomness)


@pytest.mark.parametrize("at", ["before-checkpoint", "after-checkpoint", "after-round"])
def test_a_private_round_that_was_kept_is_noised_once(at: str) -> None:
    ran = private(restart(2, at))

    assert ran.bytes() == private().bytes()
    assert [event["round"] for event in ran.events.of("client_noise")] == [1, 2, 3]


@pytest.mark.parametrize("at", ["training", "merging"])
def test_a_private_round_that_was_not_kept_has_left_nothing(at: str) -> None:
    written: list[int] = []
    sites = [ToySite(f"toy-{i:03}", 10) for i in range(100)]

    ran = run_faulty(
        [restart(2, at)],
        run=private_run(),
        sites=sites,
        checkpoint=lambda number, adapter: written.append(number),
    )

    assert written == [1, 2, 3]
    assert ran.done.adapter.arrays["head.weight"].std() > 0


# Progress


def progresses(run: RunConfig) -> list[Progress]:
    kept: list[Progress] = []
    run_faulty(run=run, progress=kept.append)
    return kept


def test_progress_is_handed_out_after_every_merge_and_every_evaluation() -> None:
    kept = progresses(config(method="fedavg"))

    assert [(one.round, one.evaluated) for one in kept] == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    ]
    assert [len(one.history) for one in kept] == [1, 1, 2, 2]
    assert kept[0].history[0].client == {}
    assert kept[1].history[0].client != {}
    assert kept[1].best_round == 1


def test_a_progress_does_not_change_once_it_was_handed_out() -> None:
    first, *_ = progresses(config(method="fedavg"))
    again, *_ = progresses(config(method="fedavg"))

    for name, array in first.adapter.arrays.items():
        np.testing.assert_array_equal(array, again.adapter.arrays[name])
    assert first.sites["toy-0"].rounds == 1


def test_a_progress_of_another_run_is_refused() -> None:
    (first, *_) = progresses(config(method="fedavg"))
    stranger = dataclasses.replace(first, run="other-1")
    engine = RoundEngine(VirtualGrid(executor(toys()), 4), config(method="fedavg"), run="toy-1")

    with pytest.raises(RunError, match=r"run toy-1 .* cannot go on from round 1 of run other-1"):
        engine.run(first.adapter, stranger)


def test_a_progress_says_what_client_level_privacy_was_spent() -> None:
    kept: list[Progress] = []
    sites = [ToySite(f"toy-{i:03}", 10) for i in range(100)]
    run_faulty(run=private_run(), sites=sites, progress=kept.append)

    assert [len(one.state.made) for one in kept] == [1, 1, 2, 2, 3, 3]
    assert len(kept[-1].met) == 100
