from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.server.aggregation.fedex import Carried, fedex
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

RANK = 2
PART = Part(ranks=(0, 1))
ENOUGH = 9  # min(out, in) is 5 and 4: any residual fits into 7 extra ranks
COHORTS = st.lists(st.integers(1, 1000), min_size=1, max_size=5)  # records of each client
SEEDS = st.integers(0, 2**32 - 1)


def cohort(sent: Adapter, examples: list[int], seed: int) -> list[Delta]:
    return [random_delta(sent.spec, seed + i, PART, num_examples=n) for i, n in enumerate(examples)]


def merge(sent: Adapter, deltas: list[Delta]) -> Merged:
    rule = fedex(RANK)
    return rule.merge(rule.init(sent)[0], sent, deltas)[1]


@given(examples=COHORTS, seed=SEEDS)
def test_exact_while_the_extra_ranks_suffice(examples: list[int], seed: int) -> None:
    sent = random_adapter(spec_of(ENOUGH), seed)
    deltas = cohort(sent, examples, seed)

    merged = merge(sent, deltas)

    wanted = mean_products(sent, deltas, examples, cut=False)
    assert distance(wanted, dense_products(merged.adapter)) <= 1e-6
    assert merged.error == pytest.approx(distance(wanted, dense_products(merged.adapter)), abs=1e-9)
    assert (merged.num_examples, merged.clients) == (sum(examples), len(examples))


@given(examples=COHORTS, seed=SEEDS)
def test_trained_ranks_and_dense_tensors_are_plain_means(examples: list[int], seed: int) -> None:
    sent = random_adapter(spec_of(4), seed)
    deltas = cohort(sent, examples, seed)

    merged = merge(sent, deltas).adapter

    for name, array in merged.arrays.items():
        change = sum(
            n * d.full()[name].astype(np.float64) for d, n in zip(deltas, examples, strict=True)
        ) / sum(examples)
        expected = sent.arrays[name] + change
        at = (slice(RANK),) if "lora_A" in name else (slice(None), slice(RANK))
        index = at if "lora" in name else ()
        np.testing.assert_allclose(array[index], expected[index], atol=1e-5)


@given(examples=COHORTS, seed=SEEDS, data=st.data())
def test_order_of_clients_does_not_matter_and_weights_scale_out(
    examples: list[int], seed: int, data: st.DataObject
) -> None:
    sent = random_adapter(spec_of(4), seed)
    deltas = cohort(sent, examples, seed)
    more = [Delta(d.spec, d.arrays, 7 * d.num_examples, part=d.part) for d in deltas]

    one = dense_products(merge(sent, deltas).adapter)
    shuffled = dense_products(merge(sent, data.draw(st.permutations(deltas))).adapter)

    assert distance(one, shuffled) <= 1e-5
    assert distance(one, dense_products(merge(sent, more).adapter)) <= 1e-5


@given(count=st.integers(1, 5), seed=SEEDS)
def test_equal_deltas_are_a_fixed_point(count: int, seed: int) -> None:
    sent = random_adapter(spec_of(4), seed)
    one = random_delta(sent.spec, seed, PART)

    merged = merge(sent, [one] * count)

    assert (
        distance(mean_products(sent, [one], [1], cut=False), dense_products(merged.adapter)) <= 1e-6
    )


def test_what_does_not_fit_is_carried_and_offered_again() -> None:
    rule, spec = fedex(RANK), spec_of(3)  # one extra rank
    sent = random_adapter(spec, 0)
    carried, merged = rule.merge(Carried(), sent, cohort(sent, [1, 2, 3], 0))
    lost = norm(carried.products)
    wanted = mean_products(sent, cohort(sent, [1, 2, 3], 0), [1, 2, 3], cut=False)

    missed = {m: a - dense_products(merged.adapter)[m] for m, a in wanted.items()}
    for module, product in carried.products.items():
        np.testing.assert_allclose(product.b @ product.a, missed[module], atol=1e-5)
    assert merged.error == pytest.approx(
        lost / np.sqrt(sum(np.sum(a**2) for a in wanted.values())), rel=1e-4
    )

    # A round that changes nothing: extra + carried is still what it was, at the same split.
    still = Delta(
        spec, {n: np.zeros(s, np.float32) for n, s in PART.shapes(spec).items()}, 1, part=PART
    )
    again, after = rule.merge(carried, merged.adapter, [still])
    for module, product in again.products.items():
        whole = dense_products(after.adapter)[module] + product.b @ product.a
        np.testing.assert_allclose(whole, wanted[module], atol=1e-5)


def test_over_many_rounds_only_a_narrow_extra_adapter_carries() -> None:
    rule, wide, narrow = fedex(RANK), spec_of(ENOUGH), spec_of(3)
    one, other = random_adapter(wide, 1), random_adapter(narrow, 1)
    states = [Carried(), Carried()]
    for number in range(12):
        for index, sent in enumerate((one, other)):
            deltas = cohort(sent, [3, 1, 4], 100 * number)
            states[index], merged = rule.merge(states[index], sent, deltas)
            if index == 0:
                one = merged.adapter
                assert merged.error is not None
                assert merged.error <= 1e-6
            else:
                other = merged.adapter
    assert norm(states[0].products) == 0.0
    assert norm(states[1].products) > 0.1


def test_every_client_trains_the_same_ranks_and_gets_all() -> None:
    rule, spec = fedex(RANK), spec_of(4)

    assert rule.part(spec, 3, "a", 4) == rule.part(spec, 1, "b", RANK) == PART
    assert not rule.truncates
    assert rule.regauges


def test_a_client_of_lower_rank_is_refused_with_what_can_be_done() -> None:
    with pytest.raises(ConfigError, match=r'ward-3: trains ranks up to 1, .*"altqr", "flexlora"'):
        fedex(RANK).part(spec_of(4), 1, "ward-3", 1)


def test_an_adapter_without_extra_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the 2 ranks that are trained, got rank 2"):
        fedex(RANK).init(random_adapter(spec_of(2), 0))
    with pytest.raises(ValueError, match="rank >= 1, got 0"):
        fedex(0)


@pytest.mark.parametrize("part", [Part(), Part(ranks=(0,)), Part(factors="B", ranks=(0, 1))])
def test_a_delta_of_another_part_is_refused(part: Part) -> None:
    sent = random_adapter(spec_of(4), 0)

    with pytest.raises(IncompatibleAdapter, match="expected both factors of ranks 0 to 1"):
        merge(sent, [random_delta(sent.spec, 0, part)])


def test_no_delta_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one delta"):
        merge(random_adapter(spec_of(4), 0), [])


def test_heads_that_stay_at_the_sites_are_left_alone() -> None:
    sent = random_adapter(spec_of(4), 0)
    delta = random_delta(sent.spec, 1, Part(ranks=(0, 1), dense=False))

    merged = merge(sent, [delta]).adapter

    assert (merged.arrays["head.weight"] == sent.arrays["head.weight"]).all()
