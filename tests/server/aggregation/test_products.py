from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.server.aggregation.products import (
    Product,
    ProductSum,
    changed_products,
    difference,
    gram,
    held,
    norm,
    products_of,
    relative_error,
    stacked,
    trained_products,
    with_dense,
    with_products,
)
from tests.lowrank import client_products, dense_products, random_adapter, random_delta, spec_of

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 2**32 - 1)


def product(shape: tuple[int, int], columns: int, seed: int) -> Product:
    rng = np.random.default_rng(seed)
    return Product(
        rng.standard_normal((shape[0], columns)), rng.standard_normal((columns, shape[1]))
    )


def matrix(one: Product) -> np.ndarray:
    return one.b @ one.a


@given(shape=SHAPES, columns=st.integers(0, 25), seed=SEEDS)
def test_norm_and_singular_values_are_those_of_the_explicit_matrix(
    shape: tuple[int, int], columns: int, seed: int
) -> None:
    one = product(shape, columns, seed)
    u, s, vt = one.svd()

    assert one.norm() == pytest.approx(np.linalg.norm(matrix(one)), rel=1e-12)
    np.testing.assert_allclose((u * s) @ vt, matrix(one), atol=1e-11)
    expected = np.linalg.svd(matrix(one), compute_uv=False)
    np.testing.assert_allclose(s, expected[: s.size], atol=1e-11)


@given(shape=SHAPES, columns=st.integers(1, 25), rank=st.integers(1, 12), seed=SEEDS)
def test_split_gives_the_best_approximation_and_loses_nothing(
    shape: tuple[int, int], columns: int, rank: int, seed: int
) -> None:
    one = product(shape, columns, seed)
    kept, rest = one.split(rank)

    assert kept.b.shape == (shape[0], rank)
    np.testing.assert_allclose(matrix(kept) + matrix(rest), matrix(one), atol=1e-10)
    values = np.linalg.svd(matrix(one), compute_uv=False)
    assert rest.norm() == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-10)
    np.testing.assert_allclose(kept.b.T @ kept.b, kept.a @ kept.a.T, atol=1e-10)  # balanced


@given(shape=SHAPES, columns=st.integers(1, 25), seed=SEEDS)
def test_narrowing_keeps_the_matrix(shape: tuple[int, int], columns: int, seed: int) -> None:
    one = product(shape, columns, seed)
    narrow = one.narrowed()

    assert narrow.columns <= max(min(shape), 1)
    np.testing.assert_allclose(matrix(narrow), matrix(one), atol=1e-11)


@given(
    shape=SHAPES,
    clients=st.lists(st.tuples(st.integers(1, 6), st.floats(0.01, 100)), min_size=1, max_size=12),
    seed=SEEDS,
)
def test_the_sum_is_the_explicit_weighted_mean(
    shape: tuple[int, int], clients: list[tuple[int, float]], seed: int
) -> None:
    total, dense = ProductSum(), np.zeros(shape)
    for index, (columns, weight) in enumerate(clients):
        one = product(shape, columns, seed + index)
        total.add(weight, {"q": one})
        dense += weight * matrix(one)

    weights = sum(weight for _, weight in clients)
    np.testing.assert_allclose(matrix(total.mean()["q"]), dense / weights, atol=1e-9)


def test_memory_of_a_sum_is_flat_in_the_number_of_clients() -> None:
    total, widest = ProductSum(), 0
    for seed in range(200):
        total.add(1.0, {"q": product((7, 5), 3, seed)})
        widest = max(widest, total.columns())

    assert widest <= 2 * 5


def test_a_sum_of_nothing_or_of_zero_weight_is_zero() -> None:
    total = ProductSum()
    assert total.mean() == {}
    assert total.columns() == 0
    total.add(0.0, {"q": product((2, 3), 1, 0)})

    assert norm(total.mean()) == 0.0


def test_signs_of_singular_vectors_are_canonical() -> None:
    one = product((7, 5), 3, seed=1)
    flipped = Product(-one.b, -one.a)

    for a, b in zip(one.svd(), flipped.svd(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    vt = one.svd()[2]
    assert (vt[np.arange(3), np.abs(vt).argmax(axis=1)] > 0).all()


def test_a_difference_below_the_reach_of_a_gram_matrix_is_seen() -> None:
    one = product((40, 30), 4, seed=2)
    change = product((40, 30), 1, seed=3).times(1e-11)
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((4, 4)))[0]
    other = stacked([Product(one.b @ turn, turn.T @ one.a), change])

    by_gram = gram([{"q": difference(one, other)}])[0, 0]
    error = relative_error({"q": one}, {"q": other})

    assert error == pytest.approx(change.norm() / one.norm(), rel=1e-4)
    assert abs(math.sqrt(abs(by_gram)) / change.norm() - 1) > 0.01  # what a Gram would say


def test_relative_error_of_zero_products() -> None:
    zero, one = Product(np.zeros((3, 1)), np.zeros((1, 2))), product((3, 2), 1, 0)

    assert relative_error({"q": zero}, {"q": zero}) == 0.0
    assert relative_error({"q": zero}, {"q": one}) == math.inf
    assert relative_error({"q": one}, {"q": zero}) == pytest.approx(1.0)


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=SEEDS)
def test_gram_is_that_of_explicit_matrices(ranks: list[int], seed: int) -> None:
    shapes = {"k": (7, 5), "q": (4, 9)}
    clients = [
        {
            name: product(shape, rank, seed + 10 * i + j)
            for j, (name, shape) in enumerate(shapes.items())
        }
        for i, rank in enumerate(ranks)
    ]
    flat = np.stack([np.concatenate([matrix(c[n]).ravel() for n in shapes]) for c in clients])

    found = gram(clients)

    np.testing.assert_allclose(found, flat @ flat.T, atol=1e-9)
    assert (found == found.T).all()


@given(seed=SEEDS, ranks=st.sampled_from([None, (0,), (0, 2), (1, 2, 3)]), cut=st.booleans())
def test_a_client_s_products_and_what_it_changed(
    seed: int, ranks: tuple[int, ...] | None, cut: bool
) -> None:
    spec = spec_of(4)
    sent = random_adapter(spec, seed)
    delta = random_delta(spec, seed, Part(ranks=ranks))
    has = held(delta) if cut else slice(None)

    trained = trained_products(sent, delta, has)
    changed = changed_products(sent, delta, has)

    expected, before = client_products(sent, delta, cut=cut), dense_products(sent, has)
    for module in spec.targets:
        np.testing.assert_allclose(matrix(trained[module]), expected[module], atol=1e-12)
        difference_ = expected[module] - before[module]
        np.testing.assert_allclose(matrix(changed[module]), difference_, atol=1e-12)


def test_products_and_dense_tensors_are_put_back_where_they_belong() -> None:
    spec = spec_of(3)
    adapter, other = random_adapter(spec, 0), random_adapter(spec, 1)
    delta = random_delta(spec, 2)

    written = with_products(adapter, products_of(other, [1, 2]), [1, 2])
    moved = with_dense(adapter, delta)

    for module, a, b in spec.factors():
        assert (written.arrays[a][0] == adapter.arrays[a][0]).all()
        assert (written.arrays[b][:, 1:] == other.arrays[b][:, 1:]).all(), module
        assert (moved.arrays[b] == adapter.arrays[b]).all()
    head = "head.weight"
    assert (written.arrays[head] == adapter.arrays[head]).all()
    assert (moved.arrays[head] == adapter.arrays[head] + delta.arrays[head]).all()


def test_what_does_not_fit_float32_is_refused() -> None:
    spec = spec_of(1)
    huge = {m: Product(p.b * 1e39, p.a) for m, p in products_of(random_adapter(spec, 0)).items()}

    with pytest.raises(IncompatibleAdapter, match="NaN or infinite"):
        with_products(random_adapter(spec, 0), huge)


def test_a_delta_of_another_adapter_is_refused() -> None:
    with pytest.raises(IncompatibleAdapter, match="rank"):
        trained_products(random_adapter(spec_of(2), 0), random_delta(spec_of(3), 0))
