from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter
from anabranch.server.aggregation.gauge import (
    Gauge,
    orthonormal_columns,
    orthonormal_rows,
    regauged,
)
from tests.lowrank import dense_products, random_adapter, spec_of

GAUGES = [orthonormal_rows, orthonormal_columns]
SEEDS = st.integers(0, 2**32 - 1)
RANKS = st.integers(1, 9)  # layers are 7 × 5 and 4 × 9: some ranks are above a dimension


def frame(gauge: Gauge, adapter: Adapter, module: str) -> np.ndarray:
    """Return the frame as rows."""
    if gauge is orthonormal_rows:
        return adapter.arrays[f"{module}.lora_A.weight"].astype(np.float64)
    return adapter.arrays[f"{module}.lora_B.weight"].astype(np.float64).T


def assert_same_products(one: Adapter, other: Adapter) -> None:
    for name, wanted in dense_products(one).items():
        got = dense_products(other)[name]
        assert np.linalg.norm(got - wanted) <= 1e-6 * max(1e-3, float(np.linalg.norm(wanted)))


@pytest.mark.parametrize("gauge", GAUGES)
@given(rank=RANKS, seed=SEEDS)
def test_the_product_stays_and_a_frame_appears(gauge: Gauge, rank: int, seed: int) -> None:
    before = random_adapter(spec_of(rank), seed)

    after = regauged(before, gauge)

    assert_same_products(before, after)
    for module in before.spec.targets:
        rows = frame(gauge, after, module)
        possible = np.diag((np.arange(rank) < rows.shape[1]).astype(float))
        np.testing.assert_allclose(rows @ rows.T, possible, atol=1e-6)


@pytest.mark.parametrize("gauge", GAUGES)
@given(seed=SEEDS)
def test_a_frame_stays_as_it_is(gauge: Gauge, seed: int) -> None:
    once = regauged(random_adapter(spec_of(3), seed), gauge)

    twice = regauged(once, gauge)

    for name, array in once.arrays.items():
        np.testing.assert_allclose(twice.arrays[name], array, rtol=0, atol=2e-6)


@pytest.mark.parametrize("gauge", GAUGES)
@given(seed=SEEDS, dead=st.sets(st.integers(0, 2)), equal=st.booleans())
def test_factors_without_full_rank_get_a_frame_too(
    gauge: Gauge, seed: int, dead: set[int], equal: bool
) -> None:
    before = random_adapter(spec_of(3), seed)
    for _, a, b in before.spec.factors():
        before.arrays[b][:, sorted(dead)] = 0
        if equal:
            before.arrays[a][2] = before.arrays[a][0]

    after = regauged(before, gauge)

    assert_same_products(before, after)
    for module in before.spec.targets:
        rows = frame(gauge, after, module)
        np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-6)


def test_signs_do_not_depend_on_the_sign_lapack_chose() -> None:
    a = np.array([[3.0, 4.0, 0.0]], np.float32)
    b = np.array([[2.0], [1.0]], np.float32)

    left, right = orthonormal_rows(b, a)
    up, down = orthonormal_columns(b, a)

    np.testing.assert_allclose(right, [[0.6, 0.8, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(left, [[10.0], [5.0]], rtol=1e-6)
    np.testing.assert_allclose(up[:, 0], np.array([2.0, 1.0]) / np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(down, np.sqrt(5) * a, rtol=1e-6)


def test_dense_tensors_stay() -> None:
    before = random_adapter(spec_of(3), 1)

    after = regauged(before, orthonormal_rows)

    np.testing.assert_array_equal(after.arrays["head.weight"], before.arrays["head.weight"])
