from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError
from anabranch.simulations.faults.drawing import STREAMS, Rates, draw
from anabranch.simulations.faults.plan import (
    Backdoor,
    ClockSkew,
    Fault,
    FaultPlan,
    Late,
    LostAnswer,
    Restart,
    Trigger,
    kind_of,
    read_plan,
    to_toml,
    write_plan,
)

shares = st.sampled_from([0.0, 0.1, 0.6])
rates = st.builds(
    Rates,
    lost_request=shares,
    lost_answer=shares,
    duplicate=shares,
    late=shares,
    corrupt=shares,
    crash=shares,
    clock_skew=shares,
    sign_flip=shares,
    scale=shares,
    label_flip=shares,
    backdoor=shares,
    restart=shares,
)
seeds = st.integers(0, 2**32)

EVERY = Rates(
    lost_request=0.5,
    lost_answer=0.5,
    duplicate=0.5,
    late=0.5,
    corrupt=0.5,
    crash=0.5,
    clock_skew=0.5,
    sign_flip=0.5,
    scale=0.5,
    label_flip=0.5,
    backdoor=0.5,
    restart=0.5,
)


def of(plan: FaultPlan, clients: int, rounds: int) -> list[Fault]:
    """Return the faults of a plan that strike these clients and rounds."""
    return [
        fault
        for fault in plan.faults
        if getattr(fault, "client", 0) < clients and (getattr(fault, "round", 0) or 0) <= rounds
    ]


@given(rates=rates, seed=seeds, clients=st.integers(1, 30), rounds=st.integers(1, 8))
def test_the_same_seed_gives_the_same_plan(
    rates: Rates, seed: int, clients: int, rounds: int
) -> None:
    plan = draw(rates, seed=seed, clients=clients, rounds=rounds)

    assert plan == draw(rates, seed=seed, clients=clients, rounds=rounds)


@given(rates=rates, seed=seeds, more=st.integers(0, 20), longer=st.integers(0, 5))
def test_a_larger_run_has_the_same_faults_for_those_there_were(
    rates: Rates, seed: int, more: int, longer: int
) -> None:
    small = draw(rates, seed=seed, clients=8, rounds=4)
    large = draw(rates, seed=seed, clients=8 + more, rounds=4 + longer)

    assert of(large, 8, 4) == list(small.faults)


@given(rates=rates, seed=seeds)
def test_a_rate_of_one_kind_does_not_move_the_others(rates: Rates, seed: int) -> None:
    other = msgspec.structs.replace(rates, late=0.9)

    plans = (draw(one, seed=seed, clients=10, rounds=5) for one in (rates, other))
    first, second = ([f for f in plan.faults if not isinstance(f, Late)] for plan in plans)
    assert first == second


@settings(max_examples=50)
@given(rates=rates, seed=seeds, suffix=st.sampled_from(["toml", "json"]))
def test_a_plan_that_was_written_is_read_again(
    rates: Rates, seed: int, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("plan") / f"faults.{suffix}"
    plan = draw(rates, seed=seed, clients=10, rounds=5, trigger=Trigger(token='"cf"\\', value=1e-9))

    write_plan(path, plan)

    assert read_plan(path) == plan


def test_every_kind_can_be_drawn() -> None:
    plan = draw(EVERY, seed=1, clients=20, rounds=10)

    assert set(plan.counts()) == set(STREAMS)
    assert {kind_of(fault) for fault in plan.faults} == set(STREAMS)


def test_rates_are_shares_of_clients_and_rounds() -> None:
    plan = draw(Rates(late=0.1, late_s=50.0, sign_flip=0.2), seed=3, clients=1000, rounds=20)

    counts = plan.counts()
    assert 1800 < counts["late"] < 2200
    assert 160 < counts["sign-flip"] < 240
    seconds = [fault.seconds for fault in plan.of(Late)]
    assert 45 < sum(seconds) / len(seconds) < 55


def test_a_plan_reads_as_its_file() -> None:
    plan = FaultPlan(
        seed=3,
        faults=(
            Late(client=17, round=2, seconds=30.0),
            ClockSkew(client=1, seconds=-5.0),
            Restart(round=1),
        ),
    )

    assert to_toml(plan) == (
        "seed = 3\n"
        '\n[[faults]]\nkind = "late"\nclient = 17\nround = 2\nasked = "train"\nseconds = 30.0\n'
        '\n[[faults]]\nkind = "clock-skew"\nclient = 1\nseconds = -5.0\n'
        '\n[[faults]]\nkind = "restart"\nround = 1\nat = "after-round"\nanswers = 1\n'
        "seconds = 0.0\n"
    )


def test_a_hand_written_plan_needs_only_what_is_not_given(tmp_path: Path) -> None:
    path = tmp_path / "faults.toml"
    path.write_text(
        '[[faults]]\nkind = "lost-answer"\nclient = 0\nround = 0\nasked = "describe"\n'
        '[[faults]]\nkind = "backdoor"\nclient = 2\ntarget = 1\n'
    )

    assert read_plan(path).faults == (
        LostAnswer(client=0, round=0, asked="describe"),
        Backdoor(client=2, target=1),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[faults]]\nkind = "tired"\nclient = 0', r"Invalid value 'tired'"),
        ('[[faults]]\nkind = "late"\nclient = 0\nround = 1', r"`seconds` .*faults\[0\]"),
        ('[[faults]]\nkind = "late"\nclient = -1\nround = 1\nseconds = 1.0', r"faults\[0\].client"),
        ('[[faults]]\nkind = "crash"\nclient = 0\nround = 0', r"faults\[0\].round"),
        ('[[faults]]\nkind = "scale"\nclient = 0\nfactor = inf', r"faults.0.factor.* finite"),
        ('[[faults]]\nkind = "scale"\nclient = 0\nfactor = 2.0\nsize = 1', "unknown field `size`"),
        ("seed = ", "Invalid value"),
    ],
)
def test_a_plan_that_is_wrong_is_refused_with_file_and_field(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "faults.toml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=rf"faults\.toml: .*{message}"):
        read_plan(path)


def test_a_plan_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"faults\.toml"):
        read_plan(tmp_path / "faults.toml")
