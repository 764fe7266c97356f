"""Every failure that was found, as the plan that found it, and what holds now.

To add one: run the failing plan again (`anabranch simulate EXPERIMENT --faults RUN/faults.toml`, or
what a failed test printed), delete faults until every one that is left is needed, and write it
down here with a name that says what went wrong, the smallest run that shows it, and what must
hold instead. A plan stays even where the code that failed is gone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.client.data.records import load_records
from anabranch.protocols.config import RunConfig
from anabranch.server.evaluation import initial_adapter
from anabranch.simulations import engines
from anabranch.simulations.faults.plan import (
    Corrupt,
    Crash,
    Duplicate,
    LostAnswer,
    LostRequest,
    Restart,
    Scale,
)
from anabranch.simulations.population.books import SimulatedBooks
from anabranch.simulations.population.clients import Partition, PopulationClients
from tests.runs import table_run, write_table
from tests.simulations.faults.faulty import Steady, expected_value, run_faulty, toys
from tests.simulations.faults.liars import clients, digits_run, faults_of
from tests.simulations.rig import config

STEPS = {site.name: float(site.step or 0) for site in toys()}


def with_tables(run: RunConfig, **tables: Any) -> RunConfig:
    return msgspec.convert(msgspec.to_builtins(run) | tables, RunConfig)


def test_a_coordinator_that_restarts_before_an_evaluation_still_knows_whom_to_ask() -> None:
    """The new process had met nobody yet, so the round was evaluated by nobody."""
    ran = run_faulty([Restart(round=2, at="before-checkpoint")], run=config(method="fedavg"))

    assert [len(report.evaluated) for report in ran.done.history] == [4, 4]


@pytest.mark.parametrize(
    ("method", "tables"),
    [
        ("fedavg", {"server": {"optimizer": "momentum", "learning_rate": 1.0}}),
        ("flexlora", {}),
        ("altqr", {}),
    ],
)
def test_valid_deltas_that_are_too_large_to_be_merged_end_the_run_with_a_reason(
    method: str, tables: dict[str, Any]
) -> None:
    """A merge of values near the largest float32 left the engine as IncompatibleAdapter."""
    run = with_tables(config(rounds=3, method=method), lora={"rank": 2}, **tables)
    liars = [Scale(client=i, factor=1e39) for i in range(6)]

    ran = run_faulty(liars, run=run, sites=toys(6))

    assert "what the sites sent cannot be merged" in str(ran.error)
    assert "site_trained event" in str(ran.error)


@pytest.mark.parametrize("fault", [LostRequest(client=2, round=1), LostAnswer(client=2, round=1)])
def test_a_client_whose_message_was_lost_comes_back_as_it_does_with_flower(fault: Any) -> None:
    """Nothing ever answered in its stead, so it had something left to answer for ever."""
    run = config(rounds=5, method="fedavg", deadline_s=30000.0, client_evaluation=False)

    ran = run_faulty([fault], run=run, journeys=Steady(4, 10000.0))

    assert "toy-2" in ran.done.history[-1].asked


def test_an_answer_that_is_there_at_once_is_not_slept_past() -> None:
    """With no time on the way, the first wait went to its end: 60 s to learn who is there."""
    ran = run_faulty(run=config(rounds=1, method="fedavg"))

    assert ran.grid is not None
    assert ran.grid.clock() == 0.0


def test_old_letters_do_not_stand_in_the_way_of_new_ones() -> None:
    """What was under way before a restart came first in the batch, and new answers were empty."""
    run = config(rounds=2, method="fedavg", weighting="uniform", client_evaluation=False)
    plan = [Restart(round=1, at="training", answers=0)]

    ran = run_faulty(plan, run=run, journeys=Steady(4), ahead=1)

    value = float(ran.done.adapter.arrays["head.weight"][0, 0])
    assert value == pytest.approx(expected_value(ran.done, STEPS), rel=1e-6)


def test_a_request_that_arrives_broken_does_not_reach_the_others() -> None:
    """Sites of one part share one message."""
    run = config(rounds=1, method="fedavg", client_evaluation=False)

    ran = run_faulty([Corrupt(client=0, round=1, of="request")], run=run, kind="cohort")

    assert set(ran.done.history[0].failed) == {"toy-0"}


# What is spent stays spent


def spent(folder: Path, *plan: Any) -> tuple[int, list[str]]:
    """Return how many rounds client 0 has reserved, and the reasons for which it failed."""
    run = digits_run()
    training = {**msgspec.to_builtins(run.training), "local_steps": 5}
    run = with_tables(run, training=training, privacy={"epsilon": 8.0})
    books, population = SimulatedBooks(), clients(folder)
    faults = faults_of(plan, population, run)
    result = engines.run(
        "sequential",
        run,
        dataclasses.replace(population, books=books, conduct=faults.conduct()),
        initial_adapter(run),
        run_name="digits-1",
        journeys=faults.journeys(),
        tampering=faults.tampering,
        restarts=faults.restarts,
    )
    name = population.names[0]
    failed = [r.failed[name].reason for r in result.history if name in r.failed]
    return len(books.of(name).history("digits-1")), failed


def test_a_crash_in_training_leaves_its_reserve_spent(tmp_path: Path) -> None:
    assert spent(tmp_path, Crash(client=0, round=3)) == (3, ["deadline"])


def test_who_is_asked_twice_spends_twice_and_is_refused_in_the_last_round(tmp_path: Path) -> None:
    """Known: a simulated client, unlike a site, keeps no answer: asked twice, it spends twice."""
    assert spent(tmp_path, Duplicate(client=0, round=1, of="request")) == (3, ["privacy"])


# What a site keeps goes on


def trained_again(folder: Path, method: str, at: str) -> bool:
    """Whether real clients end with the same adapter as without a restart in round 1."""
    adapters = []
    for i, plan in enumerate(([], [msgspec.convert({**RESTART, "at": at}, Restart)])):
        run = table_run(("rounds = 2", f'rounds = 2\nmethod = "{method}"'))
        write_table(folder / "t.csv", n=60)
        starts, none = np.arange(4, dtype=np.int64) * 20, np.zeros(3, np.int64)
        parts = Partition(np.arange(60, dtype=np.int64), starts, none)
        records = load_records(folder / "t.csv", run)
        population = PopulationClients(records, parts, folder / str(i))
        faults = faults_of(plan, population, run)
        result = engines.run(
            "sequential",
            run,
            population,
            initial_adapter(run),
            run_name="tiny-1",
            journeys=faults.journeys(),
            tampering=faults.tampering,
            restarts=faults.restarts,
        )
        adapters.append(b"".join(a.tobytes() for a in result.adapter.arrays.values()))
    return adapters[0] == adapters[1]


RESTART = {"kind": "restart", "round": 1, "answers": 3}


@pytest.mark.parametrize("method", ["fedavg", "altqr"])
@pytest.mark.parametrize("at", ["training", "merging"])
def test_clients_that_keep_nothing_answer_the_same_again(
    tmp_path: Path, method: str, at: str
) -> None:
    assert trained_again(tmp_path, method, at)


def test_clients_that_keep_a_part_go_on_from_their_first_answer(tmp_path: Path) -> None:
    """Known: simulated clients, unlike sites, keep what the last answer left, merged or not."""
    assert trained_again(tmp_path, "fedsa", "before-checkpoint")
    (tmp_path / "again").mkdir()
    assert not trained_again(tmp_path / "again", "fedsa", "merging")
