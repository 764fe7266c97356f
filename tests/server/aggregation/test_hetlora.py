from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.server.aggregation.hetlora import hetlora
from anabranch.server.aggregation.rule import Merged
from tests.lowrank import (
    client_products,
    dense_products,
    distance,
    mean_products,
    random_adapter,
    random_delta,
    spec_of,
)

SPEC = spec_of(4)
RANKS = st.lists(st.integers(1, 4), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)


def cohort(ranks: list[int], seed: int) -> list[Delta]:
    return [
        random_delta(SPEC, seed + i, Part(ranks=tuple(range(r))), num_examples=i + 1)
        for i, r in enumerate(ranks)
    ]


def merge(sent: Adapter, deltas: list[Delta]) -> Merged:
    rule = hetlora()
    return rule.merge(rule.init(sent)[0], sent, deltas)[1]


def norms(sent: Adapter, deltas: list[Delta]) -> list[float]:
    products = [client_products(sent, delta, cut=True) for delta in deltas]
    return [float(np.sqrt(sum(np.sum(a**2) for a in one.values()))) for one in products]


@given(ranks=RANKS, seed=SEEDS)
def test_factors_are_padded_means_with_the_norms_as_weights(ranks: list[int], seed: int) -> None:
    sent, deltas = random_adapter(SPEC, seed), cohort(ranks, seed)
    shares = norms(sent, deltas)

    merged = merge(sent, deltas)

    for module, a, b in SPEC.factors():
        padded_a, padded_b = np.zeros(SPEC.shapes[a]), np.zeros(SPEC.shapes[b])
        for delta, r, share in zip(deltas, ranks, shares, strict=True):
            padded_a[:r] += share * (sent.arrays[a][:r] + delta.arrays[a])
            padded_b[:, :r] += share * (sent.arrays[b][:, :r] + delta.arrays[b])
        np.testing.assert_allclose(
            merged.adapter.arrays[a], padded_a / sum(shares), atol=1e-5, err_msg=module
        )
        np.testing.assert_allclose(merged.adapter.arrays[b], padded_b / sum(shares), atol=1e-5)


@given(ranks=RANKS, seed=SEEDS)
def test_the_error_is_measured_with_the_norms_as_weights(ranks: list[int], seed: int) -> None:
    sent, deltas = random_adapter(SPEC, seed), cohort(ranks, seed)
    wanted = mean_products(sent, deltas, norms(sent, deltas), cut=True)

    merged = merge(sent, deltas)

    assert merged.error == pytest.approx(
        distance(wanted, dense_products(merged.adapter)), abs=1e-7, rel=1e-6
    )


@given(ranks=RANKS, seed=SEEDS, data=st.data())
def test_order_and_number_of_records_do_not_matter_to_the_factors(
    ranks: list[int], seed: int, data: st.DataObject
) -> None:
    sent, deltas = random_adapter(SPEC, seed), cohort(ranks, seed)
    more = [Delta(SPEC, d.arrays, 10 - d.num_examples, part=d.part) for d in deltas]

    one = merge(sent, deltas).adapter
    other = merge(sent, data.draw(st.permutations(more))).adapter

    for _, a, b in SPEC.factors():
        np.testing.assert_allclose(one.arrays[a], other.arrays[a], atol=1e-5)
        np.testing.assert_allclose(one.arrays[b], other.arrays[b], atol=1e-5)


@given(count=st.integers(1, 4), seed=SEEDS)
def test_equal_deltas_are_a_fixed_point(count: int, seed: int) -> None:
    sent, one = random_adapter(SPEC, seed), random_delta(SPEC, seed)

    merged = merge(sent, [one] * count)

    expected = sent.plus(one)
    for name, array in merged.adapter.arrays.items():
        np.testing.assert_allclose(array, expected.arrays[name], atol=1e-5)
    assert merged.error is not None
    assert merged.error <= 1e-6


def test_clients_whose_products_are_zero_count_the_same() -> None:
    zeros = Adapter(SPEC, {n: np.zeros(s, np.float32) for n, s in SPEC.tensors})
    deltas = [random_delta(SPEC, i, Part(factors="both")) for i in range(2)]
    only_a = [
        Delta(SPEC, {n: a if "lora_B" not in n else 0 * a for n, a in d.arrays.items()}, 1)
        for d in deltas
    ]

    merged = merge(zeros, only_a)

    name = "q.lora_A.weight"
    mean = (deltas[0].arrays[name] + deltas[1].arrays[name]) / 2
    np.testing.assert_allclose(merged.adapter.arrays[name], mean, atol=1e-6)
    assert merged.error == 0.0


def test_dense_tensors_are_weighted_by_records_and_clients_get_their_ranks() -> None:
    sent, deltas = random_adapter(SPEC, 0), cohort([1, 4], 0)
    rule = hetlora()

    merged = merge(sent, deltas).adapter

    name = "head.bias"
    change = (deltas[0].arrays[name] + 2 * deltas[1].arrays[name]) / 3
    np.testing.assert_allclose(merged.arrays[name], sent.arrays[name] + change, atol=1e-6)
    assert rule.truncates
    assert rule.part(SPEC, 1, "a", 2) == Part(ranks=(0, 1))


def test_refusals() -> None:
    sent = random_adapter(SPEC, 0)
    with pytest.raises(IncompatibleAdapter, match="expected both factors"):
        merge(sent, [random_delta(SPEC, 0, Part(factors="A"))])
    with pytest.raises(ValueError, match="at least one delta"):
        merge(sent, [])
