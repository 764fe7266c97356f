from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.part import Part
from anabranch.server.aggregation.altqr import altqr
from anabranch.server.aggregation.buffered import buffered, staleness
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.ffa import ffa
from anabranch.server.aggregation.optimizers import constant, momentum, with_optimizer
from tests.lowrank import random_adapter, random_delta, spec_of

SPEC = spec_of(3)
AGED = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 20)), min_size=1, max_size=5)


@given(clients=AGED, uniform=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_late_deltas_are_shortened_and_the_weights_still_sum_to_one(
    clients: list[tuple[int, int]], uniform: bool, seed: int
) -> None:
    rule = ffa("uniform" if uniform else "examples")
    sent = random_adapter(SPEC, seed)
    part = Part(factors="B")
    aged = [(random_delta(SPEC, seed + i, part, n), age) for i, (n, age) in enumerate(clients)]

    merged = buffered(rule)(None, sent, aged)[1]

    weights = np.array([1 if uniform else n for n, _ in clients])
    for name, before in part.take(SPEC, sent.arrays).items():
        steps = [d.arrays[name] / np.sqrt(1 + age) for d, age in aged]
        wanted = before + np.tensordot(weights / weights.sum(), steps, 1)
        np.testing.assert_allclose(merged.adapter.arrays[name], wanted, atol=2e-5)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5))
def test_without_delay_it_is_the_rule_itself(seed: int, count: int) -> None:
    sent = random_adapter(SPEC, seed)
    cohort = [random_delta(SPEC, seed + i) for i in range(count)]

    late = buffered(fedavg())(None, sent, [(d, 0) for d in cohort])[1]
    plain = fedavg().merge(None, sent, cohort)[1]

    assert late.error == plain.error
    for name, array in plain.adapter.arrays.items():
        np.testing.assert_array_equal(late.adapter.arrays[name], array)


def test_a_buffer_of_old_deltas_makes_a_short_step() -> None:
    """Divided by K = 2, not by the sum of the staleness weights."""
    sent = random_adapter(SPEC, 0)
    delta = random_delta(SPEC, 1)

    merged = buffered(fedavg())(None, sent, [(delta, 3), (delta, 3)])[1]

    change = merged.adapter.arrays["head.bias"] - sent.arrays["head.bias"]
    np.testing.assert_allclose(change, delta.arrays["head.bias"] / 2, rtol=1e-5)


def test_a_server_optimiser_goes_with_it() -> None:
    rule = with_optimizer(fedavg(), momentum(constant(0.5, 0.5), beta=0.0))
    state, sent = rule.init(random_adapter(SPEC, 0))
    delta = random_delta(SPEC, 1)

    state, merged = buffered(rule)(state, sent, [(delta, 3)])

    change = merged.adapter.arrays["head.bias"] - sent.arrays["head.bias"]
    np.testing.assert_allclose(change, delta.arrays["head.bias"] / 4, rtol=1e-5)
    assert state.rounds == 1


def test_staleness_is_one_over_the_root() -> None:
    assert [staleness(age) for age in (0, 3, 8)] == pytest.approx([1.0, 0.5, 1 / 3])


def test_a_rule_that_re_gauges_is_refused() -> None:
    with pytest.raises(ValueError, match=r"late deltas do not fit altqr.*Take ffa"):
        buffered(altqr())


def test_an_age_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an age of 0 merges or more, got -1"):
        buffered(fedavg())(None, random_adapter(SPEC, 0), [(random_delta(SPEC, 1), -1)])
