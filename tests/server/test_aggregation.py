from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import hypothesis.extra.numpy as hnp
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.fedavg import fedavg, weighted_mean
from anabranch.server.aggregation.rule import Aggregator

SPEC = AdapterSpec(
    base="0" * 64,
    tokenizer="",
    rank=2,
    alpha=4.0,
    targets=("l",),
    tensors=(("head.weight", (3, 5)), ("l.lora_A.weight", (2, 4)), ("l.lora_B.weight", (3, 2))),
)
RULES = [fedavg("examples"), fedavg("uniform")]


def delta(value: float, num_examples: int = 1) -> Delta:
    return Delta(SPEC, {n: np.full(s, value, np.float32) for n, s in SPEC.tensors}, num_examples)


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    values = st.floats(-8, 8, width=32)
    arrays = {n: draw(hnp.arrays(np.float32, s, elements=values)) for n, s in SPEC.tensors}
    return Delta(SPEC, arrays, draw(st.integers(1, 100_000)))


cohorts = st.lists(deltas(), min_size=1, max_size=5)


def merge(rule: Aggregator[Any], cohort: list[Delta]) -> Delta:
    return rule.apply(rule.init(), cohort)[1]


def assert_close(a: Delta, b: Delta, atol: float = 1e-6) -> None:
    assert a.spec == b.spec
    for name, array in a.arrays.items():
        np.testing.assert_allclose(array, b.arrays[name], rtol=0, atol=atol)


@pytest.mark.parametrize("rule", RULES)
@given(cohort=cohorts, data=st.data())
def test_order_of_clients_does_not_matter(
    rule: Aggregator[Any], cohort: list[Delta], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(cohort))

    assert_close(merge(rule, cohort), merge(rule, shuffled))


@pytest.mark.parametrize("rule", RULES)
@given(one=deltas(), count=st.integers(1, 9))
def test_equal_deltas_give_that_delta_back(rule: Aggregator[Any], one: Delta, count: int) -> None:
    assert_close(merge(rule, [one] * count), one, atol=0)


@pytest.mark.parametrize("rule", RULES)
@given(cohort=cohorts)
def test_every_value_lies_between_the_smallest_and_the_largest(
    rule: Aggregator[Any], cohort: list[Delta]
) -> None:
    mean = merge(rule, cohort)

    for name, array in mean.arrays.items():
        stack = np.stack([d.arrays[name] for d in cohort])
        assert (array >= stack.min(axis=0)).all()
        assert (array <= stack.max(axis=0)).all()


@pytest.mark.parametrize("rule", RULES)
@given(cohort=cohorts)
def test_examples_add_up(rule: Aggregator[Any], cohort: list[Delta]) -> None:
    assert merge(rule, cohort).num_examples == sum(d.num_examples for d in cohort)


@given(cohort=cohorts, factor=st.sampled_from([0.5, 2.0, 4.0]))
def test_only_the_ratio_of_weights_counts(cohort: list[Delta], factor: float) -> None:
    once = weighted_mean((d, d.num_examples) for d in cohort)
    scaled = weighted_mean((d, factor * d.num_examples) for d in cohort)

    assert_close(once, scaled, atol=0)


def test_fedavg_weighs_by_examples_and_uniform_does_not() -> None:
    cohort = [delta(1.0, 30), delta(5.0, 10)]

    assert merge(fedavg("examples"), cohort).arrays["head.weight"][2, 4] == 2.0
    assert merge(fedavg("uniform"), cohort).arrays["head.weight"][2, 4] == 3.0


def test_a_thousand_equal_deltas_lose_nothing_to_rounding() -> None:
    assert_close(merge(fedavg(), [delta(0.1, 7)] * 1000), delta(0.1), atol=0)


def test_no_more_than_two_deltas_are_held_at_a_time() -> None:
    alive: weakref.WeakSet[Delta] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[tuple[Delta, float]]:
        nonlocal most
        for i in range(6):
            one = delta(float(i))
            alive.add(one)
            most = max(most, len(alive))
            yield one, 1.0

    assert weighted_mean(stream()).arrays["head.weight"][0, 0] == 2.5
    assert most == 2


@pytest.mark.parametrize("weight", [1e12, -3.0, 0.0, float("nan"), float("inf")])
def test_a_weight_that_no_site_can_have_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"expected a weight in \(0, 1e\+09\], got"):
        weighted_mean([(delta(1.0), weight)])


def test_no_delta_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one delta, got none"):
        merge(fedavg(), [])


def test_deltas_of_two_base_models_are_refused() -> None:
    other = dataclasses.replace(delta(1.0), spec=msgspec.structs.replace(SPEC, base="1" * 64))

    with pytest.raises(IncompatibleAdapter, match="adapter is for base model 1111"):
        merge(fedavg(), [delta(1.0), other])
