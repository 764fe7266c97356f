from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter, RunError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Robust
from anabranch.server.aggregation.flexlora import flexlora, refilled
from anabranch.server.aggregation.products import Product
from anabranch.server.aggregation.robust import coefficients_for
from anabranch.server.aggregation.rule import Merged
from tests.lowrank import (
    Dense,
    client_products,
    dense_products,
    distance,
    mean_products,
    random_adapter,
    random_delta,
    spec_of,
)

RANK = 5
SPEC = spec_of(RANK)
RANKS = st.lists(st.integers(1, 3), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)
Array = np.ndarray


def cohort(ranks: list[int], seed: int) -> list[Delta]:
    return [
        random_delta(SPEC, seed + i, Part(ranks=tuple(range(r))), num_examples=i + 1)
        for i, r in enumerate(ranks)
    ]


def examples(deltas: list[Delta]) -> list[float]:
    return [float(d.num_examples) for d in deltas]


def merge(sent: Adapter, deltas: list[Delta], **options: object) -> Merged:
    rule = flexlora(**options)  # type: ignore[arg-type]
    return rule.merge(rule.init(sent)[0], sent, deltas)[1]


def truncated(products: Dense, rank: int) -> Dense:
    result = {}
    for name, matrix in products.items():
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        result[name] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return result


@given(ranks=RANKS, seed=SEEDS)
def test_exact_where_the_sum_has_no_higher_rank(ranks: list[int], seed: int) -> None:
    sent, deltas = random_adapter(SPEC, seed), cohort(ranks, seed)
    # Rank 5 holds any product of layers (7, 5) and (4, 9).
    merged = merge(sent, deltas)

    wanted = mean_products(sent, deltas, examples(deltas), cut=True)
    assert distance(wanted, dense_products(merged.adapter)) <= 1e-6
    assert merged.error is not None
    assert merged.error <= 1e-6


@given(seed=SEEDS)
def test_otherwise_the_best_approximation_of_the_adapter_s_rank(seed: int) -> None:
    spec = spec_of(2)
    sent, deltas = random_adapter(spec, seed), [random_delta(spec, seed + i) for i in range(3)]

    merged = merge(sent, deltas)

    wanted = mean_products(sent, deltas, [1, 1, 1], cut=True)
    best = truncated(wanted, 2)
    assert distance(best, dense_products(merged.adapter)) <= 1e-5
    assert merged.error == pytest.approx(distance(wanted, best), rel=1e-4)


@given(ranks=RANKS, seed=SEEDS, data=st.data())
def test_neither_order_nor_gauge_of_the_clients_matters(
    ranks: list[int], seed: int, data: st.DataObject
) -> None:
    sent, deltas = random_adapter(SPEC, seed), cohort(ranks, seed)
    turned = [turn(sent, d, seed + i) for i, d in enumerate(deltas)]

    one = merge(sent, deltas).adapter
    other = merge(sent, data.draw(st.permutations(turned))).adapter

    assert distance(dense_products(one), dense_products(other)) <= 1e-4


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


@given(count=st.integers(1, 4), seed=SEEDS)
def test_equal_deltas_are_a_fixed_point_and_weights_scale_out(count: int, seed: int) -> None:
    sent, one = random_adapter(SPEC, seed), random_delta(SPEC, seed, num_examples=3)

    merged = merge(sent, [one] * count).adapter

    assert distance(dense_products(sent.plus(one)), dense_products(merged)) <= 1e-5
    name = "head.weight"
    np.testing.assert_allclose(merged.arrays[name], sent.arrays[name] + one.arrays[name], atol=1e-5)


@given(seed=SEEDS)
def test_the_first_ranks_are_the_best_approximation_of_that_rank(seed: int) -> None:
    sent, deltas = random_adapter(SPEC, seed), cohort([3, 3], seed)

    merged = merge(sent, deltas).adapter

    best = truncated(mean_products(sent, deltas, [1, 2], cut=True), 2)
    assert distance(best, dense_products(merged, range(2))) <= 1e-4
    assert flexlora().truncates


@given(seed=SEEDS, used=st.integers(0, 3))
def test_every_rank_can_train_after_a_sum_of_low_rank(seed: int, used: int) -> None:
    sent = random_adapter(SPEC, seed)
    ranks = tuple(range(used)) or (0,)
    if used:
        delta = random_delta(SPEC, seed, Part(ranks=ranks))
    else:  # B = 0: a round in which nothing was learned
        zero = {n: np.zeros(s, np.float32) for n, s in Part(ranks=ranks).shapes(SPEC).items()}
        for _, _, b in SPEC.factors():
            zero[b] = -sent.arrays[b][:, :1]
        delta = Delta(SPEC, zero, 1, part=Part(ranks=ranks))

    adapter = merge(sent, [delta]).adapter

    for _, name_a, name_b in SPEC.factors():
        a, right = adapter.arrays[name_a].astype(np.float64), adapter.arrays[name_b]
        assert (right[:, used:] == 0).all()
        np.testing.assert_allclose(a[used:] @ a[used:].T, np.eye(RANK - used), atol=1e-5)
        np.testing.assert_allclose(a[used:] @ a[:used].T, 0, atol=1e-4)


def test_rows_beyond_the_width_of_a_layer_stay_zero() -> None:
    filled = refilled("q", Product(np.zeros((4, 6)), np.zeros((6, 3))))

    np.testing.assert_allclose(filled.a[:3] @ filled.a[:3].T, np.eye(3), atol=1e-12)
    assert (filled.a[3:] == 0).all()
    assert (filled.b == 0).all()


def flat(sent: Adapter, delta: Delta) -> Array:
    """Return what a client changes of the model, as one vector."""
    after, before = client_products(sent, delta, cut=True), dense_products(sent)
    parts = [sent.spec.scaling * (after[m] - before[m]).ravel() for m in sent.spec.targets]
    dense = [delta.arrays[n].ravel() for n in ("head.bias", "head.weight")]
    return np.concatenate([*parts, *dense])


@given(seed=SEEDS)
def test_reweight_sees_the_gram_matrix_of_the_model_s_changes(seed: int) -> None:
    sent, deltas = random_adapter(SPEC, seed), [random_delta(SPEC, seed + i) for i in range(3)]
    seen: list[Array] = []

    def reweight(gram: Array) -> Array:
        seen.append(gram)
        return np.array([0.5, 0.0, 0.25])

    merged = merge(sent, deltas, reweight=reweight).adapter

    vectors = np.stack([flat(sent, d) for d in deltas])
    np.testing.assert_allclose(seen[0], vectors @ vectors.T, rtol=1e-9, atol=1e-9)
    before = dense_products(sent)
    wanted = {
        m: before[m]
        + 0.5 * (client_products(sent, deltas[0], cut=True)[m] - before[m])
        + 0.25 * (client_products(sent, deltas[2], cut=True)[m] - before[m])
        for m in before
    }
    assert distance(wanted, dense_products(merged)) <= 1e-6
    name = "head.bias"
    change = 0.5 * deltas[0].arrays[name] + 0.25 * deltas[2].arrays[name]
    np.testing.assert_allclose(merged.arrays[name], sent.arrays[name] + change, atol=1e-5)


@given(seed=SEEDS)
def test_uniform_coefficients_are_the_plain_rule(seed: int) -> None:
    sent, deltas = random_adapter(SPEC, seed), [random_delta(SPEC, seed + i) for i in range(3)]

    plain = merge(sent, deltas, weighting="uniform").adapter
    other = merge(sent, deltas, reweight=lambda gram: np.full(3, 1 / 3)).adapter

    assert distance(dense_products(plain), dense_products(other)) <= 1e-5


def test_krum_in_product_space_takes_an_honest_client() -> None:
    sent = random_adapter(SPEC, 0)
    honest = [random_delta(SPEC, 7).times(1 + 0.01 * i) for i in range(4)]
    krum = coefficients_for(Robust(rule="krum", byzantine=1))

    merged = merge(sent, [*honest, random_delta(SPEC, 8).times(-10)], reweight=krum).adapter

    distances = [
        distance(client_products(sent, d, cut=True), dense_products(merged)) for d in honest
    ]
    assert min(distances) <= 1e-5


def test_ranks_that_no_client_was_sent_stay_with_reweight() -> None:
    sent = random_adapter(SPEC, 0)
    part = Part(ranks=(0, 1))
    still = Delta(
        SPEC, {n: np.zeros(s, np.float32) for n, s in part.shapes(SPEC).items()}, 1, part=part
    )

    merged = merge(sent, [still, still], reweight=lambda gram: np.full(2, 0.5)).adapter

    assert distance(dense_products(sent), dense_products(merged)) <= 1e-6


def test_refusals() -> None:
    sent = random_adapter(SPEC, 0)
    with pytest.raises(IncompatibleAdapter, match="expected both factors"):
        merge(sent, [random_delta(SPEC, 0, Part(factors="B"))])
    for options in ({}, {"reweight": lambda gram: np.zeros(0)}):
        with pytest.raises(ValueError, match="at least one delta"):
            merge(sent, [], **options)
    mixed = [random_delta(SPEC, 0), random_delta(SPEC, 1, Part(ranks=(0,)))]
    with pytest.raises(RunError, match=r"let every site train the whole lora\.rank"):
        merge(sent, mixed, reweight=lambda gram: np.zeros(2))
