from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter, RunError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Robust
from anabranch.server.aggregation.mean import weighted_mean
from anabranch.server.aggregation.robust import (
    coefficients_for,
    combine_for,
    inner_products,
)
from tests.lowrank import random_delta, spec_of
from tests.robust_cases import PART, SPEC, Values, cohort, filled, flat, krum_scores, merge, stack

BY_GRAM = [
    Robust(rule="norm-clipping"),
    Robust(rule="norm-clipping", clipping_norm=0.5),
    Robust(rule="krum", byzantine=1),
    Robust(rule="multi-krum", byzantine=1),
    Robust(rule="geometric-median"),
    Robust(rule="centred-clipping"),
    Robust(rule="centred-clipping", clipping_norm=0.5, iterations=3),
]
ALL = [*BY_GRAM, Robust(rule="median"), Robust(rule="trimmed-mean")]
SEEDS = st.integers(0, 2**32 - 1)


# Laws.


@pytest.mark.parametrize("robust", ALL, ids=lambda r: f"{r.rule}-{r.clipping_norm}")
@given(seed=SEEDS, data=st.data())
def test_order_of_clients_and_their_numbers_of_records_do_not_matter(
    robust: Robust, seed: int, data: st.DataObject
) -> None:
    deltas = cohort(6, seed)
    other = [
        Delta(SPEC, d.arrays, i + 5, part=PART)
        for i, d in enumerate(data.draw(st.permutations(deltas)))
    ]
    weights = iter((float(d.num_examples), d) for d in other)

    one = merge(robust, deltas)
    two = combine_for(robust)((d, w) for w, d in weights)

    np.testing.assert_allclose(flat(one), flat(two), atol=1e-5)


@pytest.mark.parametrize("robust", ALL, ids=lambda r: f"{r.rule}-{r.clipping_norm}")
@given(seed=SEEDS, count=st.integers(5, 8))
def test_equal_deltas_are_a_fixed_point(robust: Robust, seed: int, count: int) -> None:
    one = random_delta(SPEC, seed, PART).times(0.01)  # below every clipping norm

    merged = merge(robust, [one] * count)

    np.testing.assert_allclose(flat(merged), flat(one), atol=1e-7)
    assert merged.num_examples == count


@pytest.mark.parametrize(
    "robust", [r for r in ALL if r.clipping_norm is None], ids=lambda r: r.rule
)
@given(seed=SEEDS, factor=st.floats(1e-3, 1e3))
def test_scaling_all_deltas_scales_the_result(robust: Robust, seed: int, factor: float) -> None:
    deltas = cohort(6, seed)

    one = merge(robust, deltas)
    scaled = merge(robust, [d.times(factor) for d in deltas])

    np.testing.assert_allclose(flat(scaled), factor * flat(one), rtol=1e-3, atol=1e-4 * factor)


@pytest.mark.parametrize("robust", BY_GRAM, ids=lambda r: f"{r.rule}-{r.clipping_norm}")
@given(seed=SEEDS)
def test_coefficients_follow_from_the_gram_matrix_alone(robust: Robust, seed: int) -> None:
    """Turning all deltas by one rotation changes no coefficient: the gauge does not matter."""
    vectors = stack(cohort(6, seed))
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((vectors.shape[1],) * 2))[0]
    rule = coefficients_for(robust)

    one, other = rule(vectors @ vectors.T), rule((vectors @ turn) @ (vectors @ turn).T)

    np.testing.assert_allclose(one, other, atol=1e-6)
    merged = merge(robust, cohort(6, seed))
    np.testing.assert_allclose(flat(merged), one @ vectors, atol=1e-5)


@pytest.mark.parametrize("robust", ALL, ids=lambda r: f"{r.rule}-{r.clipping_norm}")
def test_twenty_percent_of_flipped_clients_move_the_mean_and_not_the_rule(robust: Robust) -> None:
    """Ten clients, two of which send −10 times what they should."""
    honest = cohort(8, seed=3, spread=0.1)
    liars = [d.times(-10) for d in cohort(2, seed=3, spread=0.1)]
    centre = stack(honest).mean(axis=0)
    scale = np.linalg.norm(centre)
    if robust.clipping_norm is not None:  # of the size of an honest delta
        robust = Robust(rule=robust.rule, clipping_norm=float(scale), iterations=robust.iterations)

    mean = weighted_mean((d, 1.0) for d in [*honest, *liars])
    merged = merge(robust, [*honest, *liars])

    assert np.linalg.norm(flat(mean) - centre) > 2 * scale
    limit = {"norm-clipping": 0.5, "centred-clipping": 0.3}.get(robust.rule, 0.15)
    assert np.linalg.norm(flat(merged) - centre) < limit * scale


@pytest.mark.parametrize("robust", ALL, ids=lambda r: f"{r.rule}-{r.clipping_norm}")
def test_values_near_the_end_of_float32_neither_overflow_nor_win(robust: Robust) -> None:
    honest = cohort(5, seed=1)
    far = Delta(
        SPEC,
        {n: np.full_like(a, 3e38) for n, a in honest[0].arrays.items()},
        1,
        part=PART,
    )

    merged = merge(robust, [*honest, far])

    largest = max(np.linalg.norm(flat(d)) for d in honest)
    assert np.linalg.norm(flat(merged)) < 2 * largest


# Definitions.


@given(seed=SEEDS, count=st.integers(5, 9), f=st.integers(0, 1))
def test_krum_and_multi_krum_follow_the_definition(seed: int, count: int, f: int) -> None:
    deltas = cohort(count, seed)
    order = np.argsort(krum_scores(stack(deltas), f))

    krum = merge(Robust(rule="krum", byzantine=f), deltas)
    multi = merge(Robust(rule="multi-krum", byzantine=f), deltas)

    np.testing.assert_allclose(flat(krum), stack(deltas)[order[0]], atol=1e-6)
    best = stack(deltas)[order[: count - f - 2]].mean(axis=0)
    np.testing.assert_allclose(flat(multi), best, atol=1e-6)


@given(seed=SEEDS, count=st.integers(3, 9))
def test_the_geometric_median_is_a_minimum(seed: int, count: int) -> None:
    deltas = cohort(count, seed)
    vectors = stack(deltas)

    found = flat(merge(Robust(rule="geometric-median", iterations=300), deltas))

    def total(v: Values) -> float:
        return float(np.linalg.norm(vectors - v, axis=1).sum())

    rng = np.random.default_rng(seed)
    for step in (1e-2, 1e-1, 1.0):
        for _ in range(5):
            assert total(found) <= total(found + step * rng.standard_normal(found.size)) + 1e-5
    assert total(found) <= min(total(v) for v in [*vectors, vectors.mean(axis=0)]) + 1e-4


@given(seed=SEEDS, iterations=st.integers(1, 5), radius=st.floats(0.1, 10))
def test_clippings_follow_their_definitions(seed: int, iterations: int, radius: float) -> None:
    deltas = cohort(5, seed)
    vectors = stack(deltas)

    def clipped(v: Values) -> Values:
        return v * min(1.0, radius / float(np.linalg.norm(v)))

    plain = merge(Robust(rule="norm-clipping", clipping_norm=radius), deltas)
    np.testing.assert_allclose(
        flat(plain), np.mean([clipped(v) for v in vectors], axis=0), atol=1e-5
    )
    centre = np.zeros(vectors.shape[1])
    for _ in range(iterations):
        centre = centre + np.mean([clipped(v - centre) for v in vectors], axis=0)
    centred = merge(
        Robust(rule="centred-clipping", clipping_norm=radius, iterations=iterations), deltas
    )
    np.testing.assert_allclose(flat(centred), centre, atol=1e-5)


def test_a_majority_that_sends_nothing_wins() -> None:
    nothing = [random_delta(SPEC, 0, PART).times(0.0)] * 3
    one = random_delta(SPEC, 1, PART)

    for name in ("geometric-median", "norm-clipping", "centred-clipping", "median"):
        merged = merge(Robust(rule=name), [*nothing, one])
        assert (flat(merged) == 0).all()


def test_a_literal_trimmed_mean_and_median() -> None:
    deltas = [filled(v) for v in (1.0, 2.0, 3.0, 4.0, 100.0)]

    assert set(flat(merge(Robust(rule="trimmed-mean", trim=0.2), deltas))) == {3.0}
    assert set(flat(merge(Robust(rule="median"), deltas))) == {3.0}
    assert set(flat(merge(Robust(rule="median"), deltas[:4]))) == {2.5}


def test_a_common_subset_of_ranks_is_spread_to_all_of_them() -> None:
    part = Part(factors="A", ranks=(1,), dense=False)
    deltas = [random_delta(SPEC, i, part) for i in range(3)]

    merged = merge(Robust(rule="median"), deltas)

    assert merged.part == Part(factors="A", dense=False)
    name = "q.lora_A.weight"
    assert (merged.arrays[name][0] == 0).all()
    np.testing.assert_allclose(
        merged.arrays[name][1:], np.median([d.arrays[name] for d in deltas], axis=0)
    )


# Refusals.


@pytest.mark.parametrize("name", ["median", "geometric-median", "norm-clipping"])
def test_half_of_the_clients_cannot_be_outvoted(name: Any) -> None:
    with pytest.raises(RunError, match=r"needs 5 deltas for robust\.byzantine = 2, got 4"):
        merge(Robust(rule=name, byzantine=2), cohort(4, seed=0))


def test_a_trimmed_mean_that_cuts_all_or_too_little_is_refused() -> None:
    with pytest.raises(RunError, match="cuts 1 of 2 deltas at each end and leaves none"):
        merge(Robust(rule="trimmed-mean", trim=0.4), cohort(2, seed=0))
    with pytest.raises(RunError, match=r"cuts 1 of 9 .* raise robust\.trim to 0\.222"):
        merge(Robust(rule="trimmed-mean", trim=0.1, byzantine=2), cohort(9, seed=0))


def test_rules_without_coefficients_or_without_f_are_refused() -> None:
    with pytest.raises(ConfigError, match='"median" works on coordinates'):
        coefficients_for(Robust(rule="median"))
    with pytest.raises(ConfigError, match=r"robust\.byzantine is required"):
        combine_for(Robust(rule="krum"))


def test_mixed_parts_and_specs_are_refused() -> None:
    parts = [Part(factors="B", ranks=(0,)), Part(factors="B", ranks=(1,))]
    mixed = [random_delta(SPEC, i, part) for i, part in enumerate(parts)]
    for robust in (Robust(rule="median"), Robust(rule="geometric-median")):
        with pytest.raises(RunError, match=r"let every site train the whole lora\.rank"):
            merge(robust, mixed)
        with pytest.raises(IncompatibleAdapter, match="rank"):
            merge(robust, [random_delta(SPEC, 0), random_delta(spec_of(3), 0)])
        with pytest.raises(ValueError, match="at least one delta"):
            merge(robust, [])


def test_inner_products_are_taken_in_float64() -> None:
    deltas = [filled(1e30), filled(-1e30)]

    found = inner_products(deltas)

    size = flat(deltas[0]).size
    np.testing.assert_allclose(found, size * 1e60 * np.array([[1, -1], [-1, 1]]), rtol=1e-6)


def test_a_rank_zero_adapter_has_dense_deltas_only() -> None:
    spec = type(SPEC)(
        base="0" * 64,
        tokenizer="",
        rank=0,
        alpha=1.0,
        targets=(),
        tensors=(("head.weight", (2, 3)),),
    )
    zero = Adapter(spec, {"head.weight": np.zeros((2, 3), np.float32)})
    deltas = [random_delta(spec, i) for i in range(3)]

    merged = merge(Robust(rule="median"), deltas)

    expected = np.median([d.arrays["head.weight"] for d in deltas], axis=0)
    np.testing.assert_allclose(zero.plus(merged).arrays["head.weight"], expected)
