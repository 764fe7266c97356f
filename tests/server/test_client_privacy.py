"""Client-level privacy of a whole run: the plan, cohorts, rounds, and what is published."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.cli.main import run as anabranch
from anabranch.client.privacy import Spend, epsilon_of
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, PrivacyError, RunError
from anabranch.protocols.tables import ClientPrivacy, Federation
from anabranch.server.aggregation.choose import rule_for
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.client_privacy import (
    ClientPlan,
    PoissonCohorts,
    default_delta,
    epsilon_after,
    plan_for,
    plan_of,
)
from anabranch.server.evaluation import initial_adapter
from anabranch.server.result import Result
from anabranch.simulations.engines import run as run_engine
from tests.runs import table_run, table_text, write_site, write_table
from tests.simulations.federation import NAMES, arrays_of
from tests.simulations.federation import Federation as Rounds
from tests.simulations.rig import NEVER, SIZES, Events, ToySite, config

PRIVACY: dict[str, Any] = {"epsilon": 8.0, "population": 200, "max_examples": 20}


def client_private(
    *, seed: int = 7, privacy: dict[str, Any] | None = None, **federation: Any
) -> RunConfig:
    """Return the toy run with [client_privacy]."""
    fields = {"holdout": 0.0, "seed": seed, "cohort": 100, "rounds": 3, **federation}
    run = config(**fields)
    table = msgspec.convert({**PRIVACY, **(privacy or {})}, ClientPrivacy)
    return msgspec.structs.replace(run, client_privacy=table)


def secret(seed: int) -> Randomness:
    return Randomness.reproducible(torch.Generator().manual_seed(seed))


def planned(**fields: Any) -> ClientPlan:
    return plan_for(ClientPrivacy(**{**PRIVACY, **fields}), Federation(rounds=10, cohort=20))


# The plan


@pytest.mark.parametrize(
    ("population", "cohort", "rounds", "needed"),
    [
        (100, 20, 100, (5.35, 2.25, 1.18)),
        (1000, 100, 100, (3.42, 1.50, 0.86)),
        (10_000, 200, 200, (1.38, 0.83, 0.58)),
    ],
)
def test_the_noise_multiplier_is_the_known_one(
    population: int, cohort: int, rounds: int, needed: tuple[float, ...]
) -> None:
    for epsilon, z in zip((1.0, 3.0, 8.0), needed, strict=True):
        plan = plan_for(
            ClientPrivacy(epsilon=epsilon, population=population),
            Federation(rounds=rounds, cohort=cohort),
        )

        assert plan.noise_multiplier == pytest.approx(z, rel=0.01)
        assert plan.delta == min(1e-3, 1 / (10 * population))
        assert plan.epsilon <= epsilon
        less = Spend(
            noise_multiplier=plan.noise_multiplier - 0.002,
            sample_rate=plan.sample_rate,
            steps=rounds,
        )
        assert epsilon_of([less], plan.delta) > epsilon * 0.999


def test_the_plan_takes_all_else_from_the_tables() -> None:
    plan = planned(clipping="adaptive", clipping_norm=0.3, target_quantile=0.8, delta=1e-5)

    assert (plan.sample_rate, plan.rounds, plan.population) == (0.1, 10, 200)
    assert (plan.adaptive, plan.clipping_norm, plan.target_quantile) == (True, 0.3, 0.8)
    assert (plan.max_examples, plan.delta) == (20, 1e-5)


@pytest.mark.parametrize(("cohort", "rate"), [(None, 1.0), (1000, 1.0), (50, 0.25)])
def test_without_a_cohort_every_client_is_in_every_round(cohort: int | None, rate: float) -> None:
    plan = plan_for(ClientPrivacy(epsilon=8.0, population=200), Federation(rounds=2, cohort=cohort))

    assert plan.sample_rate == rate


def test_epsilon_grows_by_rounds_to_that_of_the_plan() -> None:
    plan = planned()
    costs = [epsilon_after(plan, rounds) for rounds in (0, 1, 5, 10)]

    assert costs[0] == 0
    assert costs == sorted(costs)
    assert costs[-1] == plan.epsilon


def test_too_few_clients_are_told_the_noise_they_would_need_and_what_to_do() -> None:
    with pytest.raises(PrivacyError) as refused:
        plan_for(ClientPrivacy(epsilon=3.0, population=20), Federation(rounds=50))

    said = str(refused.value)
    assert said.startswith("client_privacy.population = 20: too few clients")
    assert "at least 100" in said
    assert "noise multiplier 7.36, in every round noise of 0.368 x clipping_norm" in said
    assert "leave [client_privacy] out and set [privacy]" in said


def test_a_hundred_clients_are_enough() -> None:
    assert planned(population=100).population == 100
    with pytest.raises(PrivacyError, match="population = 99: too few"):
        planned(population=99)


def test_a_delta_that_would_release_a_client_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"not below 1/N = 0.005 of 200 clients.*0.0005"):
        planned(delta=0.005)
    assert [default_delta(n) for n in (50, 100, 1000)] == [1e-3, 1e-3, 1e-4]


def test_an_epsilon_that_no_noise_reaches_is_refused_with_its_own_name() -> None:
    with pytest.raises(PrivacyError, match=r"client_privacy.epsilon = 1e-06.*a smaller cohort"):
        planned(epsilon=1e-6)


def test_a_rule_without_a_plan_is_refused() -> None:
    with pytest.raises(PrivacyError, match="needs the run's plan and a source of noise"):
        rule_for(client_private())


# Cohorts


@settings(max_examples=30)
@given(connected=st.integers(0, 200), seed=st.integers(0, 2**32 - 1))
def test_a_cohort_is_of_connected_clients_in_their_order(connected: int, seed: int) -> None:
    names = [f"client-{i:03}" for i in range(connected)]

    drawn = PoissonCohorts(planned(), secret(seed).sample).draw(names)

    assert set(drawn) <= set(names)
    assert drawn == sorted(drawn)


def test_every_client_is_drawn_with_the_sampling_rate_independently() -> None:
    cohorts = PoissonCohorts(planned(), secret(1).sample)  # q = 0.1
    names = [f"client-{i:03}" for i in range(200)]

    draws = [cohorts.draw(names) for _ in range(1000)]

    counts = Counter(name for draw in draws for name in draw)
    assert len(counts) == 200
    standard = np.sqrt(1000 * 0.1 * 0.9)
    assert max(abs(count - 100) for count in counts.values()) < 5 * standard
    sizes = np.array([len(draw) for draw in draws])
    # A Poisson sample's size varies as a binomial's; a cohort of fixed size would not vary.
    assert sizes.mean() == pytest.approx(20, abs=5 * np.sqrt(18 / 1000))
    assert sizes.var() == pytest.approx(18, rel=0.25)


def test_more_clients_than_the_population_are_refused_even_in_turn() -> None:
    cohorts = PoissonCohorts(planned(population=100), secret(1).sample)
    cohorts.draw([f"early-{i}" for i in range(60)])
    cohorts.draw([f"early-{i}" for i in range(60)])

    with pytest.raises(PrivacyError, match=r"101 clients have been connected.*population = 100"):
        cohorts.draw([f"late-{i}" for i in range(41)])


# Rounds


def told(events: Events) -> list[list[str]]:
    return [event["sites"] for event in events.of("round_started")]


def test_a_run_is_decided_by_its_secret_and_not_by_its_seed() -> None:
    def run(**engine: Any) -> tuple[list[list[str]], bytes]:
        federation = Rounds(run=client_private(seed=1, rounds=20, cohort=100), **engine)
        result = federation.run()
        return told(federation.events), arrays_of(result)

    same = [run(randomness=secret(4)) for _ in range(2)]
    fresh = [run() for _ in range(2)]  # of the operating system: 2^-80 for equal cohorts

    assert same[0] == same[1]
    assert fresh[0][0] != fresh[1][0]
    assert fresh[0][1] != fresh[1][1]


def test_noise_and_plan_are_in_the_events_of_every_round() -> None:
    run = client_private(privacy={"clipping": "adaptive", "clipping_norm": 0.5})
    federation = Rounds(run=run, randomness=secret(2))
    federation.run()
    plan, noises = plan_of(run), federation.events.of("client_noise")

    assert plan is not None
    assert [event["round"] for event in noises] == [1, 2, 3]
    assert [event["noisy_rounds"] for event in noises] == [1, 2, 3]
    assert all(e["noise_multiplier"] == pytest.approx(plan.noise_multiplier) for e in noises)
    assert noises[0]["clipping_norm"] == 0.5
    for before, after in pairwise(noises):
        moved = before["clipping_norm"] * np.exp(-0.2 * (before["share_within"] - 0.5))
        assert after["clipping_norm"] == before["next_clipping_norm"] == pytest.approx(moved)
    assert noises[-1]["epsilon"] == plan.epsilon


def test_the_mean_has_a_fixed_denominator_and_capped_weights() -> None:
    loud = {"epsilon": 90.0, "clipping_norm": 6.0, "max_examples": 40}
    sites = [ToySite(name, n, step=1.0) for name, n in SIZES.items()]  # norm √29 < 6
    run = client_private(cohort=None, rounds=1, privacy=loud)

    result = Rounds(sites, run=run, randomness=secret(6)).run()

    plan = plan_of(run)
    assert plan is not None
    values = np.concatenate([a.ravel() for a in result.adapter.arrays.values()])
    error = plan.noise_multiplier * 6.0 / 200 / np.sqrt(values.size)
    weights = (30 + 10 + 20 + 40) / 40  # of four clients, over N = 200
    assert error < 1e-3
    assert values.mean() == pytest.approx(weights / 200, abs=4 * error)


@pytest.mark.parametrize("silent", [[], NAMES[:1], NAMES])
def test_few_deltas_or_none_are_a_round_as_any_other(silent: list[str]) -> None:
    run = client_private(rounds=1, cohort=None)
    federation = Rounds(run=run, delays=dict.fromkeys(silent, NEVER), randomness=secret(3))

    result = federation.run()

    (noise,) = federation.events.of("client_noise")
    assert len(federation.events.of("site_failed")) == len(silent)
    plan = plan_of(run)
    assert plan is not None
    assert noise["noise_multiplier"] == plan.noise_multiplier
    assert result.adapter.arrays["head.weight"].all()


def test_a_cohort_of_nobody_is_a_round_of_noise() -> None:
    run = client_private(cohort=1, rounds=3)  # q = 1/200 of 4 sites

    federation = Rounds(run=run, randomness=secret(5))
    result = federation.run()

    assert told(federation.events) == [[], [], []]
    assert len(federation.events.of("client_noise")) == 3
    assert all(report.update_norm > 0 for report in result.history)


def test_nothing_that_is_published_tells_who_took_part() -> None:
    run = client_private(cohort=None)
    federation = Rounds(run=run, tamper={NAMES[0]: lambda content: content.clear()})

    result = federation.run()

    assert federation.events.of("site_trained")  # the coordinator's own view
    assert federation.events.of("site_failed")
    assert (result.sites, result.bytes_up, result.bytes_down) == ({}, 0, 0)
    for report in result.history:
        assert not report.asked
        assert not report.trained
        assert not report.failed
        assert not report.delta_norms
        assert not report.evaluated
        assert report.aggregation_error is None
        assert (report.bytes_up, report.bytes_down) == (0, 0)
    text = repr(result.history)
    assert not any(name in text for name in NAMES)
    assert all(e["num_examples"] == 0 for e in federation.events.of("round_aggregated"))


def test_metrics_of_clients_are_never_asked_for() -> None:
    federation = Rounds(run=client_private(client_evaluation=False, holdout=0.2))

    result = federation.run()

    assert federation.events.of("site_evaluated") == []
    assert result.best_round == 3  # nothing compares rounds: the last one


def test_a_site_of_lower_rank_ends_the_run_with_its_name() -> None:
    sites = [ToySite(name, n) for name, n in SIZES.items()]
    sites[2] = ToySite("cork", 20, max_rank=1)

    with pytest.raises(RunError, match=r"no part for site cork: \[client_privacy\].*up to 1 of 2"):
        Rounds(sites, run=client_private(cohort=None)).run()


def test_another_rule_is_refused_in_a_client_private_run() -> None:
    with pytest.raises(ConfigError, match=r"built around the rule of run\.toml"):
        Rounds(run=client_private(), rule=fedavg())


def test_too_few_clients_are_refused_before_anybody_is_asked() -> None:
    with pytest.raises(PrivacyError, match="population = 4: too few clients"):
        Rounds(run=client_private(privacy={"population": 4, "delta": 0.01}))


def test_a_round_of_less_noise_than_planned_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = ClientPlan.__dict__["update_noise"].fget
    monkeypatch.setattr(ClientPlan, "update_noise", property(lambda plan: right(plan) / 2))
    written: list[int] = []
    federation = Rounds(
        run=client_private(), checkpoint=lambda number, adapter: written.append(number)
    )

    with pytest.raises(PrivacyError, match="Publish nothing of this run"):
        federation.run()
    assert written == []


# Files and commands

LOGISTIC = (
    ('base = "mlp"\nhidden = [5, 7]', 'base = "logistic"'),
    ('[lora]\nrank = 3\nalpha = 6.0\ntargets = ["hidden.*"]\n', "[lora]\nrank = 0\n"),
    ("rounds = 2", 'rounds = 2\ncohort = 10\nweighting = "uniform"\nclient_evaluation = false'),
)
TABLE = '\n[client_privacy]\nepsilon = 8.0\npopulation = {}\nclipping = "adaptive"\n'


def experiment(folder: Path, population: int) -> Path:
    """Write an experiment of two sites, cohorts of two."""
    text = table_text(*LOGISTIC, extra=TABLE.format(population))
    (folder / "run.toml").write_text(text.replace("cohort = 10", "cohort = 2"))
    for seed, name in enumerate(("north", "south")):
        write_table(folder / f"{name}.csv", seed=seed)
    sites = '[sites]\nnorth = "north.csv"\nsouth = "south.csv"\n'
    write_table(folder / "test.csv", n=60, seed=9)
    (folder / "experiment.toml").write_text(f'run = "run.toml"\ntest = "test.csv"\n{sites}')
    return folder / "experiment.toml"


def test_simulate_refuses_too_few_clients_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"

    code = anabranch(["simulate", str(experiment(tmp_path, 4)), "--output", str(output)])

    said = capsys.readouterr().err
    assert code == 1
    assert said.startswith("anabranch: client_privacy.population = 4: too few clients")
    assert said.count("\n") == 1
    assert not output.exists()


def test_simulate_publishes_no_site(tmp_path: Path) -> None:
    output = tmp_path / "out"

    code = anabranch(["simulate", str(experiment(tmp_path, 100)), "--output", str(output)])

    summary = json.loads((output / "summary.json").read_text())
    assert code == 0
    assert summary["rounds"] == 2
    assert (summary["sites"], summary["num_examples"], summary["failures"]) == ({}, {}, {})
    events = (output / "events.jsonl").read_text()
    assert events.count('"client_noise"') == 2


def test_a_hundred_clients_end_to_end(tmp_path: Path) -> None:
    folders = {}
    for i in range(100):
        name = f"client-{i:03}"
        data = write_table(tmp_path / f"{name}.csv", n=12, seed=i)
        folders[name] = write_site(tmp_path / "sites" / name, name, data)
    run = table_run(*LOGISTIC, extra=TABLE.format(100))
    events = Events()

    result: Result = run_engine(
        "sequential",
        run,
        folders,
        initial_adapter(run),
        run_name="many-1",
        event=events,
        randomness=secret(11),
    )

    sizes = [len(names) for names in told(events)]
    assert len(result.history) == 2
    assert all(2 <= size <= 25 for size in sizes)  # q N = 10, six standard deviations
    assert len(events.of("site_trained")) == sum(sizes)
    assert events.of("client_noise")[-1]["epsilon"] <= 8.0
    assert result.history[0].method == "fedavg+client-privacy"
