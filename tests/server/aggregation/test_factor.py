"""The rules in which all clients of a round train the same factor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Robust
from anabranch.server.aggregation.altqr import altqr
from anabranch.server.aggregation.factor import drawn_ranks
from anabranch.server.aggregation.fedsa import fedsa
from anabranch.server.aggregation.ffa import ffa
from anabranch.server.aggregation.robust import combine_for
from anabranch.server.aggregation.rolora import rolora
from anabranch.server.aggregation.rule import Rule
from tests.lowrank import (
    client_products,
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
ALTERNATING = [rolora, altqr]
Method = Callable[..., Rule[None]]


def opened(rule: Rule[None], seed: int, number: int) -> Adapter:
    state, adapter = rule.init(random_adapter(SPEC, seed))
    return rule.open(state, adapter, number)


def cohort(rule: Rule[None], number: int, limits: list[int], seed: int) -> list[Delta]:
    return [
        random_delta(SPEC, seed + i, rule.part(SPEC, number, f"site-{i}", limit), i + 1)
        for i, limit in enumerate(limits)
    ]


@pytest.mark.parametrize("method", [ffa, rolora, altqr])
@given(seed=SEEDS, clients=st.integers(1, 6), round_pair=st.integers(1, 5))
def test_the_merged_product_is_the_mean_of_the_clients_products(
    method: Method, seed: int, clients: int, round_pair: int
) -> None:
    for number in (2 * round_pair - 1, 2 * round_pair):
        rule = method(seed=seed)
        sent = opened(rule, seed, number)
        deltas = cohort(rule, number, [RANK] * clients, seed)

        merged = rule.merge(None, sent, deltas)[1]

        weights = [float(d.num_examples) for d in deltas]
        wanted = mean_products(sent, deltas, weights, cut=False)
        error = distance(wanted, dense_products(merged.adapter))
        assert error < 1e-6
        assert merged.error == pytest.approx(error, rel=1e-3, abs=1e-12)
        assert merged.clients == clients
        assert merged.num_examples == sum(d.num_examples for d in deltas)


@pytest.mark.parametrize("method", [ffa, rolora, altqr])
@given(seed=SEEDS, limits=st.lists(st.integers(1, RANK), min_size=1, max_size=6))
def test_with_mixed_ranks_a_rank_is_a_mean_over_its_trainers_by_how_rarely_they_train_it(
    method: Method, seed: int, limits: list[int]
) -> None:
    rule = method("uniform", seed=seed)
    sent = opened(rule, seed, 1)
    deltas = cohort(rule, 1, limits, seed)

    merged = rule.merge(None, sent, deltas)[1]

    for module, _, b in SPEC.factors():
        for j in range(RANK):
            those = [d for d in deltas if d.part.ranks is None or j in d.part.ranks]
            columns = [d.full()[b][:, j] for d in those]
            rarity = [RANK / len(d.part.ranks or range(RANK)) for d in those]
            change = np.average(columns, axis=0, weights=rarity) if those else 0.0
            np.testing.assert_allclose(
                merged.adapter.arrays[b][:, j], sent.arrays[b][:, j] + change, atol=1e-5
            )
        np.testing.assert_array_equal(
            merged.adapter.arrays[f"{module}.lora_A.weight"],
            sent.arrays[f"{module}.lora_A.weight"],
        )
    assert merged.error is not None
    assert merged.error < 1e-6


@pytest.mark.parametrize("number", [1, 2])
@given(seed=SEEDS)
def test_altqr_opens_a_round_with_a_frame_and_the_same_product(number: int, seed: int) -> None:
    before = random_adapter(SPEC, seed)

    sent = altqr().open(None, before, number)

    assert distance(dense_products(before), dense_products(sent)) < 1e-6
    for _, a, b in SPEC.factors():
        rows = sent.arrays[a] if number == 1 else sent.arrays[b].T
        np.testing.assert_allclose(rows @ rows.T, np.eye(RANK), atol=1e-5)


@given(seed=SEEDS)
def test_what_altqr_learns_does_not_depend_on_the_gauge_it_starts_from(seed: int) -> None:
    """Clients that move the product by the same gradient end at the same product."""
    rng = np.random.default_rng(seed)
    one = random_adapter(SPEC, seed)
    arrays = dict(one.arrays)
    for _, a, b in SPEC.factors():
        turn = np.linalg.qr(rng.standard_normal((RANK, RANK)))[0] * 3.0
        arrays[b] = (one.arrays[b] @ turn).astype(np.float32)
        arrays[a] = (np.linalg.inv(turn) @ one.arrays[a]).astype(np.float32)
    other = Adapter(SPEC, arrays)
    gradients = {
        m: rng.standard_normal((len(one.arrays[b]), one.arrays[a].shape[1]))
        for m, a, b in SPEC.factors()
    }

    ends = []
    for start in (one, other):
        rule, adapter = altqr(), start
        for number in (1, 2, 3):
            sent = rule.open(None, adapter, number)
            part = rule.part(SPEC, number, "site", RANK)
            moved = part.take(SPEC, sent.arrays)
            for m, a, b in SPEC.factors():
                if b in moved:
                    moved[b] = 0.1 * (gradients[m] @ sent.arrays[a].T).astype(np.float32)
                if a in moved:
                    moved[a] = 0.1 * (sent.arrays[b].T @ gradients[m]).astype(np.float32)
            adapter = rule.merge(None, sent, [Delta(SPEC, moved, 1, part=part)])[1].adapter
        ends.append(dense_products(adapter))

    assert distance(ends[0], ends[1]) < 1e-4


@pytest.mark.parametrize("method", ALTERNATING)
def test_rounds_alternate_and_begin_with_b(method: Method) -> None:
    parts = [method().part(SPEC, number, "site", RANK).factors for number in (1, 2, 3, 4)]

    assert parts == ["B", "A", "B", "A"]


def test_ffa_freezes_orthonormal_rows_from_the_beginning() -> None:
    first = random_adapter(SPEC, 4)

    _, adapter = ffa().init(first)

    assert distance(dense_products(first), dense_products(adapter)) < 1e-6
    for _, a, _ in SPEC.factors():
        np.testing.assert_allclose(adapter.arrays[a] @ adapter.arrays[a].T, np.eye(3), atol=1e-5)
    assert {ffa().part(SPEC, number, "site", RANK) for number in (1, 2)} == {Part(factors="B")}


def test_fedsa_shares_a_alone_and_measures_nothing() -> None:
    rule = fedsa()
    part = rule.part(SPEC, 1, "site", RANK)
    sent = random_adapter(SPEC, 0)

    merged = rule.merge(None, sent, [random_delta(SPEC, 1, part, 5)])[1]

    assert part == Part(factors="A", dense=False)
    assert merged.error is None
    for _, a, b in SPEC.factors():
        assert not np.array_equal(merged.adapter.arrays[a], sent.arrays[a])
        np.testing.assert_array_equal(merged.adapter.arrays[b], sent.arrays[b])
    np.testing.assert_array_equal(merged.adapter.arrays["head.bias"], sent.arrays["head.bias"])


@given(seed=SEEDS, number=st.integers(1, 100), limit=st.integers(1, 8))
def test_drawn_ranks_are_a_choice_that_everybody_can_repeat(
    seed: int, number: int, limit: int
) -> None:
    part = drawn_ranks(seed, number, "site", limit, 6)

    assert part == drawn_ranks(seed, number, "site", limit, 6)
    if limit >= 6:
        assert part.ranks is None
    else:
        assert part.ranks is not None
        assert len(set(part.ranks)) == limit
        assert list(part.ranks) == sorted(part.ranks)
        assert set(part.ranks) <= set(range(6))


def test_every_rank_has_its_turn_with_every_client() -> None:
    drawn = Counter(
        index
        for number in range(600)
        for name in ("a", "b")
        for index in drawn_ranks(7, number, name, 2, 6).ranks or ()
    )

    assert all(330 < drawn[index] < 470 for index in range(6))  # 400 ± 4 standard deviations
    assert drawn_ranks(7, 1, "a", 2, 6) != drawn_ranks(7, 1, "b", 2, 6)


def test_the_choice_of_ranks_is_part_of_the_agreement() -> None:
    assert drawn_ranks(3, 1, "site-1", 2, 8).ranks == (3, 6)


def test_a_robust_combination_takes_the_place_of_the_mean() -> None:
    rule = ffa(combine=combine_for(Robust(rule="median")))
    sent = opened(rule, 0, 1)
    deltas = cohort(rule, 1, [RANK] * 5, 0)

    merged = rule.merge(None, sent, deltas)[1]

    wanted = np.median([d.arrays["k.lora_B.weight"] for d in deltas], axis=0)
    change = merged.adapter.arrays["k.lora_B.weight"] - sent.arrays["k.lora_B.weight"]
    np.testing.assert_allclose(change, wanted, atol=1e-6)
    assert merged.error is None
    assert merged.clients == 5


def test_nothing_is_lost_where_the_product_is_zero() -> None:
    zero = Adapter(SPEC, {n: np.zeros(s, np.float32) for n, s in SPEC.tensors})
    rule = rolora()

    merged = rule.merge(None, zero, [random_delta(SPEC, 0, Part(factors="B"))])[1]

    assert merged.error == 0.0


@pytest.mark.parametrize(
    ("rule", "part", "says"),
    [
        (ffa(), Part(factors="A"), "expected factors B"),
        (fedsa(), Part(factors="B", dense=False), "expected factors A"),
        (rolora(), Part(), "expected factors A or B"),
    ],
)
def test_a_delta_of_the_wrong_factor_is_refused(rule: Rule[None], part: Part, says: str) -> None:
    with pytest.raises(IncompatibleAdapter, match=says):
        rule.merge(None, random_adapter(SPEC, 0), [random_delta(SPEC, 0, part)])


def test_values_that_float32_cannot_hold_are_refused_by_name() -> None:
    huge = {n: np.full(s, 3e38, np.float32) for n, s in SPEC.tensors}
    part = Part(factors="B")

    with pytest.raises(IncompatibleAdapter, match=r"head\.bias: 3 of 3 values"):
        rolora().merge(
            None, Adapter(SPEC, huge), [Delta(SPEC, part.take(SPEC, huge), 1, part=part)]
        )


def test_client_products_of_the_oracle_use_the_common_factor() -> None:
    sent, delta = random_adapter(SPEC, 0), random_delta(SPEC, 1, Part(factors="B"))

    product = client_products(sent, delta, cut=False)["k"]

    left = sent.arrays["k.lora_B.weight"] + delta.arrays["k.lora_B.weight"]
    np.testing.assert_allclose(product, left @ sent.arrays["k.lora_A.weight"], rtol=1e-4, atol=1e-5)
