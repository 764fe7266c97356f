from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.server.aggregation.fedex import Carried
from anabranch.server.aggregation.flora import flora
from anabranch.server.aggregation.products import norm
from anabranch.server.aggregation.rule import Merged
from tests.lowrank import (
    dense_products,
    distance,
    mean_products,
    random_adapter,
    random_delta,
    spec_of,
)

RANK = 3
ENOUGH = 8  # five extra ranks hold any product of layers (7, 5) and (4, 9)
RANKS = st.lists(st.integers(1, RANK), min_size=1, max_size=5)  # of each client
SEEDS = st.integers(0, 2**32 - 1)


def fresh(rank: int, seed: int) -> Adapter:
    """Return an adapter as a round of FLoRA begins with: B = 0 in the trained ranks."""
    adapter = random_adapter(spec_of(rank), seed)
    arrays = {n: a.copy() for n, a in adapter.arrays.items()}
    for _, _, b in adapter.spec.factors():
        arrays[b][:, :RANK] = 0
    return Adapter(adapter.spec, arrays)


def cohort(sent: Adapter, ranks: list[int], seed: int) -> list[Delta]:
    return [
        random_delta(sent.spec, seed + i, Part(ranks=tuple(range(r))), num_examples=i + 1)
        for i, r in enumerate(ranks)
    ]


def examples(deltas: list[Delta]) -> list[float]:
    return [float(d.num_examples) for d in deltas]


def merge(sent: Adapter, deltas: list[Delta]) -> Merged:
    rule = flora(RANK, seed=1)
    return rule.merge(rule.init(sent)[0], sent, deltas)[1]


@given(ranks=RANKS, seed=SEEDS)
def test_exact_for_mixed_ranks_while_the_extra_ranks_suffice(ranks: list[int], seed: int) -> None:
    sent = fresh(ENOUGH, seed)
    deltas = cohort(sent, ranks, seed)

    merged = merge(sent, deltas)

    wanted = mean_products(sent, deltas, examples(deltas), cut=False)
    assert distance(wanted, dense_products(merged.adapter)) <= 1e-6
    assert merged.error is not None
    assert merged.error <= 1e-6
    for product in dense_products(merged.adapter, range(RANK)).values():
        assert (product == 0).all()


@given(seed=SEEDS)
def test_an_adapter_to_start_from_keeps_its_product(seed: int) -> None:
    sent = random_adapter(spec_of(ENOUGH), seed)
    rule = flora(RANK, seed=1)
    opened = rule.open(*rule.init(sent), 1)
    deltas = cohort(opened, [RANK, 1], seed)

    assert all((opened.arrays[n] == a).all() for n, a in sent.arrays.items())
    wanted = mean_products(opened, deltas, examples(deltas), cut=False)
    assert distance(wanted, dense_products(merge(opened, deltas).adapter)) <= 1e-6


@given(ranks=RANKS, seed=SEEDS, data=st.data())
def test_neither_order_nor_gauge_of_the_clients_matters(
    ranks: list[int], seed: int, data: st.DataObject
) -> None:
    sent = fresh(ENOUGH, seed)
    deltas = cohort(sent, ranks, seed)
    turned = [turn(sent, d, seed + i) for i, d in enumerate(deltas)]

    one = dense_products(merge(sent, deltas).adapter)
    other = dense_products(merge(sent, data.draw(st.permutations(turned))).adapter)

    assert distance(one, other) <= 1e-4


def turn(sent: Adapter, delta: Delta, seed: int) -> Delta:
    """Return the delta of the same product in another gauge: (B R)(R^−1 A)."""
    ranks = list(delta.part.ranks or range(sent.spec.rank))
    r = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(ranks),) * 2))[0]
    arrays = dict(delta.arrays)
    for _, name_a, name_b in sent.spec.factors():
        a, b = sent.arrays[name_a][ranks], sent.arrays[name_b][:, ranks]
        arrays[name_a] = (r.T @ (a + delta.arrays[name_a]) - a).astype(np.float32)
        arrays[name_b] = ((b + delta.arrays[name_b]) @ r - b).astype(np.float32)
    return Delta(delta.spec, arrays, delta.num_examples, part=delta.part)


def test_every_round_starts_from_new_random_rows_and_the_same_product() -> None:
    rule, sent = flora(RANK, seed=5), fresh(ENOUGH, 0)
    first, second = rule.open(Carried(), sent, 1), rule.open(Carried(), sent, 2)

    for module, name_a, name_b in sent.spec.factors():
        a, bound = first.arrays[name_a][:RANK], 1 / math.sqrt(sent.arrays[name_a].shape[1])
        assert np.abs(a).max() <= bound
        assert np.abs(a).max() > bound / 2
        assert not (a == second.arrays[name_a][:RANK]).any()
        assert (first.arrays[name_a][RANK:] == sent.arrays[name_a][RANK:]).all(), module
        assert (first.arrays[name_b] == sent.arrays[name_b]).all()
    again = flora(RANK, seed=5).open(Carried(), sent, 1)
    assert all((again.arrays[n] == a).all() for n, a in first.arrays.items())
    other = flora(RANK, seed=6).open(Carried(), sent, 1)
    assert not (
        other.arrays["q.lora_A.weight"][:RANK] == first.arrays["q.lora_A.weight"][:RANK]
    ).any()


def test_many_rounds_add_up() -> None:
    rule, sent = flora(RANK, seed=0), fresh(ENOUGH, 3)
    state, sent = rule.init(sent)
    wanted = dense_products(sent)
    for number in range(1, 11):
        sent = rule.open(state, sent, number)
        deltas = cohort(sent, [3, 1, 2], 10 * number)
        wanted = mean_products(sent, deltas, examples(deltas), cut=False)
        state, merged = rule.merge(state, sent, deltas)
        sent = merged.adapter
        assert distance(wanted, dense_products(sent)) <= 1e-6
    assert norm(state.products) == 0.0


def test_what_does_not_fit_is_carried() -> None:
    rule, sent = flora(RANK, seed=0), fresh(RANK + 1, 3)
    deltas = cohort(sent, [3, 2], 4)

    carried, merged = rule.merge(Carried(), sent, deltas)

    wanted = mean_products(sent, deltas, examples(deltas), cut=False)
    for module, product in carried.products.items():
        whole = dense_products(merged.adapter)[module] + product.b @ product.a
        np.testing.assert_allclose(whole, wanted[module], atol=1e-5)
    assert merged.error is not None
    assert merged.error > 0.01


def test_a_client_trains_the_first_of_the_trained_ranks() -> None:
    rule, spec = flora(RANK, seed=0), spec_of(ENOUGH)

    assert rule.part(spec, 1, "a", ENOUGH) == Part(ranks=(0, 1, 2))
    assert rule.part(spec, 1, "b", 2) == Part(ranks=(0, 1))
    assert not rule.truncates
    with pytest.raises(ConfigError, match="site-b: trains no rank"):
        rule.part(spec, 1, "site-b", 0)


def test_refusals() -> None:
    sent = fresh(ENOUGH, 0)
    for part in (Part(), Part(ranks=(0, 3)), Part(factors="A", ranks=(0,))):
        with pytest.raises(IncompatibleAdapter, match="expected both factors of ranks below 3"):
            merge(sent, [random_delta(sent.spec, 0, part)])
    with pytest.raises(ValueError, match="at least one delta"):
        merge(sent, [])
    with pytest.raises(ValueError, match="more than the 3 ranks"):
        flora(RANK, seed=0).init(random_adapter(spec_of(3), 0))


def test_dense_tensors_are_plain_means() -> None:
    sent = fresh(ENOUGH, 0)
    deltas = cohort(sent, [1, 3], 0)

    merged = merge(sent, deltas).adapter

    name = "head.weight"
    change = (deltas[0].arrays[name] + 2 * deltas[1].arrays[name]) / 3
    np.testing.assert_allclose(merged.arrays[name], sent.arrays[name] + change, atol=1e-6)
