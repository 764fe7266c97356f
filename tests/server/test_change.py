from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter
from anabranch.server.change import update_norm
from tests.simulations.rig import SPEC, adapter


def drawn(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(SPEC, {name: rng.normal(size=s).astype(np.float32) for name, s in SPEC.tensors})


def factors(one: Adapter) -> tuple[np.ndarray, np.ndarray]:
    ((_, a, b),) = SPEC.factors()
    return one.arrays[b].astype(np.float64), one.arrays[a].astype(np.float64)


@given(st.integers(0, 2**32))
def test_the_norm_after_a_change_of_gauge_is_that_of_products_and_dense_tensors(seed: int) -> None:
    before, after = drawn(seed), drawn(seed + 1)
    (b, a), (b2, a2) = factors(before), factors(after)
    head = after.arrays["head.weight"].astype(np.float64) - before.arrays["head.weight"]

    got = update_norm(before, after, regauged=True)

    assert got == pytest.approx(np.sqrt(np.sum((b2 @ a2 - b @ a) ** 2) + np.sum(head**2)), rel=1e-5)


@given(st.integers(0, 2**32))
def test_another_gauge_alone_is_no_change(seed: int) -> None:
    before = drawn(seed)
    ((_, a, b),) = SPEC.factors()
    other = dict(before.arrays)
    other[a], other[b] = other[a] * np.float32(4), other[b] / np.float32(4)

    assert update_norm(before, Adapter(SPEC, other), regauged=True) < 1e-5


def test_without_a_change_of_gauge_it_is_the_norm_over_all_values() -> None:
    assert update_norm(adapter(1.0), adapter(3.0), regauged=False) == pytest.approx(
        2 * np.sqrt(SPEC.num_values)
    )
