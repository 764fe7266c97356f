from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.rule import Merged, Rule
from tests.lowrank import (
    dense_products,
    distance,
    mean_products,
    random_adapter,
    random_delta,
    spec_of,
)

RANK = 3
SPEC = spec_of(RANK)
SEEDS = st.integers(0, 2**32 - 1)
LIMITS = st.lists(st.integers(1, RANK), min_size=1, max_size=5)
RULES = [fedavg("examples"), fedavg("uniform"), fedavg(absent="skip")]


def cohort(rule: Rule[None], limits: list[int], seed: int) -> list[Delta]:
    return [
        random_delta(SPEC, seed + i, rule.part(SPEC, 1, f"site-{i}", limit), i + 1)
        for i, limit in enumerate(limits)
    ]


def merge(rule: Rule[Any], sent: Adapter, deltas: list[Delta]) -> Merged:
    return rule.merge(rule.init(sent)[0], sent, deltas)[1]


def padded(sent: Adapter, delta: Delta) -> dict[str, np.ndarray]:
    """Return a client's values after training, with 0 for the ranks that it does not have."""
    cut = sent.only(delta.part).arrays
    return {name: cut[name].astype(np.float64) + change for name, change in delta.full().items()}


@given(limits=LIMITS, seed=SEEDS)
def test_zero_averages_the_padded_values(limits: list[int], seed: int) -> None:
    rule, sent = fedavg(), random_adapter(SPEC, seed)
    deltas = cohort(rule, [RANK, *limits], seed)

    merged = merge(rule, sent, deltas)

    weights = [d.num_examples for d in deltas]
    for name, array in merged.adapter.arrays.items():
        values = [padded(sent, d)[name] for d in deltas]
        np.testing.assert_allclose(array, np.average(values, axis=0, weights=weights), atol=1e-5)


@given(limits=LIMITS, seed=SEEDS)
def test_skip_averages_every_rank_over_those_that_have_it(limits: list[int], seed: int) -> None:
    rule, sent = fedavg("uniform", "skip"), random_adapter(SPEC, seed)
    deltas = cohort(rule, limits, seed)

    merged = merge(rule, sent, deltas)

    for _, a, b in SPEC.factors():
        for j in range(RANK):
            holders = [
                padded(sent, d) for d, limit in zip(deltas, limits, strict=True) if j < limit
            ]
            row = np.mean([h[a][j] for h in holders], axis=0) if holders else sent.arrays[a][j]
            column = np.mean([h[b][:, j] for h in holders], axis=0) if holders else None
            np.testing.assert_allclose(merged.adapter.arrays[a][j], row, atol=1e-5)
            if column is not None:
                np.testing.assert_allclose(merged.adapter.arrays[b][:, j], column, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@given(limits=LIMITS, seed=SEEDS)
def test_the_error_is_that_of_the_products(rule: Rule[None], limits: list[int], seed: int) -> None:
    sent = random_adapter(SPEC, seed)
    deltas = cohort(rule, limits, seed)

    merged = merge(rule, sent, deltas)

    weights = [1.0 if rule is RULES[1] else float(d.num_examples) for d in deltas]
    wanted = mean_products(sent, deltas, weights, cut=True)
    assert merged.error == pytest.approx(
        distance(wanted, dense_products(merged.adapter)), rel=1e-6, abs=1e-7
    )


@pytest.mark.parametrize("rule", RULES)
@given(limits=LIMITS, seed=SEEDS, data=st.data())
def test_order_of_clients_does_not_matter(
    rule: Rule[None], limits: list[int], seed: int, data: st.DataObject
) -> None:
    sent = random_adapter(SPEC, seed)
    deltas = cohort(rule, limits, seed)

    one, other = (merge(rule, sent, d) for d in (deltas, data.draw(st.permutations(deltas))))

    for name, array in one.adapter.arrays.items():
        np.testing.assert_allclose(other.adapter.arrays[name], array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@given(seed=SEEDS, count=st.integers(1, 9))
def test_equal_clients_make_no_error(rule: Rule[None], seed: int, count: int) -> None:
    sent, delta = random_adapter(SPEC, seed), random_delta(SPEC, seed)

    merged = merge(rule, sent, [delta] * count)

    assert merged.error is not None
    assert merged.error < 1e-6
    assert merged.clients == merged.num_examples == count
    for name, array in sent.plus(delta).arrays.items():
        np.testing.assert_allclose(merged.adapter.arrays[name], array, rtol=0, atol=2e-6)


def test_the_error_of_averaging_factors_apart() -> None:
    """b_1 a_1 = 1 and b_2 a_2 = 1, but their averages are (0, 0): all of it is lost."""
    spec = AdapterSpec(
        base="0" * 64,
        tokenizer="",
        rank=1,
        alpha=1.0,
        targets=("l",),
        tensors=(("l.lora_A.weight", (1, 1)), ("l.lora_B.weight", (1, 1))),
    )
    zero = Adapter(spec, {n: np.zeros(s, np.float32) for n, s in spec.tensors})
    deltas = [
        Delta(spec, {n: np.full(s, v, np.float32) for n, s in spec.tensors}, 1) for v in (1, -1)
    ]

    assert merge(fedavg(), zero, deltas).error == 1.0


def test_a_rank_that_nobody_has_stays() -> None:
    sent = random_adapter(SPEC, 0)

    merged = merge(fedavg(), sent, cohort(fedavg(), [1, 2], 5))

    for _, a, b in SPEC.factors():
        np.testing.assert_array_equal(merged.adapter.arrays[a][2], sent.arrays[a][2])
        np.testing.assert_array_equal(merged.adapter.arrays[b][:, 2], sent.arrays[b][:, 2])


def test_weak_clients_get_the_first_ranks_of_an_adapter_cut_down_to_them() -> None:
    assert fedavg().truncates
    assert fedavg().part(SPEC, 1, "site", 2) == Part(ranks=(0, 1))
    assert fedavg().part(SPEC, 1, "site", 3) == Part()


def test_without_factors_there_is_no_error_to_measure() -> None:
    spec = AdapterSpec(
        base="0" * 64, tokenizer="", rank=0, alpha=1.0, targets=(), tensors=(("head.bias", (2,)),)
    )
    sent = Adapter(spec, {"head.bias": np.zeros(2, np.float32)})
    deltas = [
        Delta(spec, {"head.bias": np.full(2, v, np.float32)}, n) for v, n in ((1, 30), (5, 10))
    ]

    merged = merge(fedavg(), sent, deltas)

    assert merged.error is None
    assert merged.adapter.arrays["head.bias"].tolist() == [2.0, 2.0]
    assert merge(fedavg("uniform"), sent, deltas).adapter.arrays["head.bias"].tolist() == [3.0, 3.0]


def test_no_delta_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one delta, got none"):
        merge(fedavg(), random_adapter(SPEC, 0), [])
