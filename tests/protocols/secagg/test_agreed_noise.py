"""The noise of a run is agreed on by its configuration, and terms of another one are refused."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ConfigError, PrivacyError, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.rdp import epsilon_of
from anabranch.protocols.secagg.agreed_noise import (
    contribute_noised,
    least_records,
    noise_of,
    values_of,
)
from anabranch.protocols.secagg.contribution import mean_of
from anabranch.protocols.secagg.noise import MARGIN
from anabranch.protocols.secagg.plan import length
from tests.noise_cases import CLIENT, RECORD, config, noise, terms
from tests.simulations.rig import SPEC


def delta(fill: float = 0.0, examples: int = 7, steps: int = 3) -> Delta:
    arrays = {n: np.full(shape, fill, np.float32) for n, shape in SPEC.tensors}
    return Delta(SPEC, arrays, examples, steps=steps)


def test_a_record_is_bounded_by_one_step_of_sgd() -> None:
    run = config(RECORD, training__head_learning_rate=2.0, privacy__clipping_norm=0.3)
    found = noise(run)
    assert found.unit == "record"
    assert found.bound == pytest.approx(2.0 * 0.3 / 20 * (1 + MARGIN))
    assert found.sample_rate == 20 / 200
    assert found.epsilon <= 4.0
    assert 0 < 10 * found.slack < 1e-5 / 100
    assert values_of(SPEC) == 29 == found.values


def test_a_client_is_bounded_by_its_clipping_and_sampling_amplifies_nothing() -> None:
    cohorts = config(CLIENT, federation__cohort=50)
    found, all_asked = noise(cohorts), noise(config(CLIENT))
    assert found == all_asked
    assert (found.unit, found.bound, found.sample_rate, found.slack) == ("client", 0.8, 1.0, 0.0)
    assert found.delta == 1 / 5000
    assert epsilon_of([found.spend(10)], 1 / 5000) == found.epsilon <= 6.0


def test_without_a_table_there_is_no_noise() -> None:
    assert noise_of(config(RECORD, privacy__noise="local"), 29) is None
    assert noise_of(config(RECORD, privacy=None), 29) is None
    assert noise_of(config(CLIENT, secure_aggregation=None), 29) is None


@given(st.integers(1, 10_000), st.floats(0, 0.9))
def test_a_site_with_the_least_rows_has_as_many_training_records(rows: int, holdout: float) -> None:
    least = least_records(config(RECORD, data__min_rows=rows, training__holdout=holdout))
    held_out = round(holdout * rows)  # what a split takes at most (client/data/records.py)
    assert 1 <= least <= max(1, rows - held_out)


@pytest.mark.parametrize(
    ("base", "changes", "match"),
    [
        (RECORD, {"privacy__delta": 0.01}, r"privacy.delta = 0.01: expected one below 1/n = 0.005"),
        (CLIENT, {"client_privacy__delta": 0.01}, "client_privacy.delta = 0.01 is not below"),
        (CLIENT, {"client_privacy__population": 20}, r"population = 20: too few .* at least 100"),
        (RECORD, {"privacy__epsilon": 1e-4}, "cannot be reached|nothing can be learned"),
    ],
)
def test_noise_that_would_protect_nobody_is_refused(
    base: dict[str, Any], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(PrivacyError, match=match):
        noise(config(base, **changes))


@pytest.mark.parametrize("base", [RECORD, CLIENT])
def test_the_mean_of_noised_contributions_is_the_mean_of_updates_and_noise(
    base: dict[str, Any],
) -> None:
    run = config(base)
    found, members = noise(run), 60
    agreed = terms(run, members)
    secure = run.secure_aggregation
    assert secure is not None
    total: Any = 0
    for number in range(members):
        vector = contribute_noised(
            delta(0.05 * (number % 2)),
            agreed,
            found,
            secure,
            advertised=members,
            random=secrets.token_bytes,
        )
        total = vector if number == 0 else total + vector
    mean = mean_of(total, agreed, SPEC, Part(), normalize_steps=False, by_rank=False)
    values = np.concatenate([a.reshape(-1) for a in mean.arrays.values()])
    spread = np.sqrt(2 * found.variance) * found.step / members
    assert np.all(np.abs(values - 0.025) < 7 * spread)
    assert (mean.num_examples, mean.steps) == (members, 1)  # no count of a member is in it


@pytest.mark.parametrize(
    "changes",
    [{"limit": 4.0}, {"weight": 5}, {"values": 28}, {"ring": 64}, {"counters": 4}, {"group": 2}],
)
def test_terms_that_the_noise_is_not_made_for_are_refused(changes: dict[str, Any]) -> None:
    run = config(RECORD)
    secure = run.secure_aggregation
    assert secure is not None
    with pytest.raises(ProtocolError, match="the noise of this run is made for"):
        contribute_noised(
            delta(),
            terms(run, **changes),
            noise(run),
            secure,
            advertised=5,
            random=secrets.token_bytes,
        )


def test_a_sum_that_colluders_could_fill_is_refused() -> None:
    run = config(RECORD, secure_aggregation__colluding=0.3)
    secure = run.secure_aggregation
    assert secure is not None
    agreed = terms(run, 20)
    for advertised in (6, 7):
        with pytest.raises(ConfigError, match="6 of the 20 invited may collude: 8 are needed"):
            contribute_noised(
                delta(),
                agreed,
                noise(run),
                secure,
                advertised=advertised,
                random=secrets.token_bytes,
            )


def test_whose_sum_has_a_plan_makes_noise_for_it() -> None:
    """Of 20 invited, 6 of whom may collude, 8 come: a sum of all 8 has two honest ones' noise."""
    run = config(RECORD, secure_aggregation__colluding=0.3)
    secure = run.secure_aggregation
    assert secure is not None
    agreed = terms(run, 20)
    vector = contribute_noised(
        delta(), agreed, noise(run), secure, advertised=8, random=secrets.token_bytes
    )
    assert vector.shape == (length(agreed),)
