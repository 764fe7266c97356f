from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator

import hypothesis.extra.numpy as hnp
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import IncompatibleAdapter
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from anabranch.server.aggregation.mean import FOLD, Sum, normalized_mean, weighted_mean
from tests.lowrank import random_delta, spec_of

RANK = 3
SPEC = spec_of(RANK)
TINY = float(np.finfo(np.float32).tiny)
Weighted = tuple[Delta, float]
Mean = Callable[[Iterable[Weighted]], Delta]
MEANS = [weighted_mean, normalized_mean]


def constant(value: float, num_examples: int = 1, steps: int = 1) -> Delta:
    arrays = {n: np.full(s, value, np.float32) for n, s in SPEC.tensors}
    return Delta(SPEC, arrays, num_examples, steps=steps)


PARTS = st.sets(st.integers(0, RANK - 1), min_size=1).map(lambda r: Part(ranks=tuple(sorted(r))))


@st.composite
def weighted(draw: st.DrawFn) -> Weighted:
    part = draw(PARTS)
    values = st.floats(-8, 8, width=32)
    arrays = {
        n: draw(hnp.arrays(np.float32, s, elements=values)) for n, s in part.shapes(SPEC).items()
    }
    delta = Delta(
        SPEC, arrays, draw(st.integers(1, 1000)), part=part, steps=draw(st.integers(1, 9))
    )
    return delta, draw(st.floats(1e-3, 1e9))


def mask(delta: Delta, name: str) -> np.ndarray:
    ones = {n: np.ones(s, np.float32) for n, s in delta.part.shapes(SPEC).items()}
    return delta.part.spread(SPEC, ones)[name].astype(np.float64)


def oracle(cohort: list[Weighted], scale: Callable[[Delta], float]) -> dict[str, np.ndarray]:
    """Return Σ w s d / Σ w per value over those that trained it, in dense float64."""
    mean = {}
    for name in SPEC.shapes:
        total = sum(w * scale(d) * d.full()[name].astype(np.float64) for d, w in cohort)
        weight = sum(w * mask(d, name) for d, w in cohort)
        mean[name] = np.divide(total, weight, out=np.zeros_like(weight), where=weight > 0)
    return mean


def bound(cohort: list[Weighted], scale: Callable[[Delta], float]) -> dict[str, np.ndarray]:
    """Return 1e-6 · Σ p |d| of every value, or the smallest normal float32 where that is more."""
    absolute = [(d.times(1.0), w) for d, w in cohort]
    for delta, _ in absolute:
        for array in delta.arrays.values():
            np.abs(array, out=array)
    return {n: np.maximum(1e-6 * value, TINY) for n, value in oracle(absolute, scale).items()}


def assert_within(got: Delta, wanted: dict[str, np.ndarray], limit: dict[str, np.ndarray]) -> None:
    for name, array in got.arrays.items():
        assert (np.abs(array - wanted[name]) <= limit[name]).all()


@given(cohort=st.lists(weighted(), min_size=1, max_size=6))
def test_every_rank_is_a_mean_over_those_that_trained_it(cohort: list[Weighted]) -> None:
    assert_within(
        weighted_mean(cohort), oracle(cohort, lambda d: 1.0), bound(cohort, lambda d: 1.0)
    )


@given(cohort=st.lists(weighted(), min_size=1, max_size=6))
def test_fednova_divides_by_steps_and_multiplies_by_their_mean(cohort: list[Weighted]) -> None:
    effective = sum(w * d.steps for d, w in cohort) / sum(w for _, w in cohort)

    def scale(delta: Delta) -> float:
        return effective / delta.steps

    assert_within(normalized_mean(cohort), oracle(cohort, scale), bound(cohort, scale))


@pytest.mark.parametrize("clients", [1, FOLD, FOLD + 1, FOLD**2, FOLD**2 + 1, 3 * FOLD**2 + 5])
@pytest.mark.parametrize("spread", [0.0, 12.0])
def test_the_error_does_not_grow_with_the_number_of_clients(clients: int, spread: float) -> None:
    weights = 10.0 ** np.random.default_rng(clients).uniform(9 - spread, 9, clients)
    cohort = [(random_delta(SPEC, i), float(w)) for i, w in enumerate(weights)]

    assert_within(
        weighted_mean(cohort), oracle(cohort, lambda d: 1.0), bound(cohort, lambda d: 1.0)
    )


@pytest.mark.parametrize("mean", MEANS)
@given(cohort=st.lists(weighted(), min_size=1, max_size=6), data=st.data())
def test_order_of_clients_does_not_matter(
    mean: Mean, cohort: list[Weighted], data: st.DataObject
) -> None:
    effective = sum(w * d.steps for d, w in cohort) / sum(w for _, w in cohort)
    largest = 2 * max(1.0, effective)
    limit = {n: 2 * largest * v for n, v in bound(cohort, lambda d: 1.0).items()}

    shuffled = mean(data.draw(st.permutations(cohort)))

    assert_within(
        shuffled, {n: a.astype(np.float64) for n, a in mean(cohort).arrays.items()}, limit
    )


@pytest.mark.parametrize("mean", MEANS)
@given(one=weighted(), weights=st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=20))
def test_equal_deltas_give_that_delta_back(mean: Mean, one: Weighted, weights: list[float]) -> None:
    delta, _ = one

    merged = mean((delta, w) for w in weights)

    for name, array in delta.full().items():
        np.testing.assert_allclose(merged.arrays[name], array, rtol=1e-6, atol=TINY)


@given(cohort=st.lists(weighted(), min_size=1, max_size=6), factor=st.sampled_from([0.5, 0.25]))
def test_only_the_ratio_of_weights_counts(cohort: list[Weighted], factor: float) -> None:
    once, scaled = weighted_mean(cohort), weighted_mean((d, factor * w) for d, w in cohort)

    for name, array in once.arrays.items():
        np.testing.assert_array_equal(array, scaled.arrays[name])


@given(cohort=st.lists(weighted(), min_size=1, max_size=6))
def test_examples_add_up_and_the_mean_is_of_all_ranks(cohort: list[Weighted]) -> None:
    mean = weighted_mean(cohort)

    assert mean.num_examples == sum(d.num_examples for d, _ in cohort)
    assert mean.part == Part()


def test_a_heavier_client_counts_for_more() -> None:
    mean = weighted_mean([(constant(1.0), 30.0), (constant(5.0), 10.0)])

    assert mean.arrays["head.weight"][2, 3] == 2.0


def test_a_rank_nobody_trained_is_zero() -> None:
    mean = weighted_mean([(random_delta(SPEC, 0, Part(factors="B", ranks=(0, 2))), 1.0)])

    assert mean.part == Part(factors="B")
    assert not mean.arrays["k.lora_B.weight"][:, 1].any()
    assert mean.arrays["k.lora_B.weight"][:, [0, 2]].all()


def test_fednova_makes_unequal_work_count_the_same() -> None:
    slow, fast = constant(1.0, steps=1), constant(9.0, steps=9)

    mean = normalized_mean([(slow, 1.0), (fast, 1.0)])

    np.testing.assert_allclose(mean.arrays["head.bias"], 5.0, rtol=1e-6)  # 5 steps of 1 each


@pytest.mark.parametrize("weights", [(1.0, 1e9), (1e9, 1.0), (1e9, 1e9)])
def test_sums_of_huge_values_do_not_overflow(weights: tuple[float, float]) -> None:
    mean = weighted_mean((constant(3e38), w) for w in weights * 40)

    np.testing.assert_allclose(mean.arrays["head.weight"], 3e38, rtol=1e-6)


def test_a_mean_that_float32_cannot_hold_is_refused_by_name() -> None:
    huge = [(constant(3e38, steps=1), 1.0), (constant(0.0, steps=99), 1.0)]

    with pytest.raises(IncompatibleAdapter, match=r"head\.bias: 3 of 3 values are NaN or infinite"):
        normalized_mean(huge)


def test_no_more_than_two_deltas_are_held_at_a_time() -> None:
    alive: weakref.WeakSet[Delta] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[Weighted]:
        nonlocal most
        for i in range(60):
            one = constant(float(i))
            alive.add(one)
            most = max(most, len(alive))
            yield one, 1.0

    assert weighted_mean(stream()).arrays["head.weight"][0, 0] == pytest.approx(29.5)
    assert most == 2


@pytest.mark.parametrize("shape", [(), (3,), (70_000,), (2, 70_000), (70_000, 2), (3, 2, 50_000)])
def test_tensors_of_any_shape_are_summed_in_blocks(shape: tuple[int, ...]) -> None:
    spec = AdapterSpec(
        base="0" * 64, tokenizer="", rank=0, alpha=1.0, targets=(), tensors=(("bias", shape),)
    )
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype(np.float32) for _ in range(10)]

    mean = weighted_mean((Delta(spec, {"bias": np.asarray(v)}, 1), 3.0) for v in values)

    wanted = np.mean(np.stack(values).astype(np.float64), axis=0)
    np.testing.assert_allclose(mean.arrays["bias"], wanted, atol=4e-6)


def test_exact_sums_are_those_of_float64() -> None:
    cohort = [(random_delta(SPEC, i), float(i + 1)) for i in range(100)]
    total = Sum(exact=True)
    for delta, weight in cohort:
        total.add(delta, weight)

    mean = dict(total.mean())
    for name, wanted in oracle(cohort, lambda d: 1.0).items():
        np.testing.assert_allclose(mean[name], wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weight", [1e12, -3.0, 0.0, float("nan"), float("inf")])
def test_a_weight_that_no_site_can_have_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"expected a weight in \(0, 1e\+09\], got"):
        weighted_mean([(constant(1.0), weight)])


@pytest.mark.parametrize("mean", MEANS)
def test_no_delta_is_refused(mean: Mean) -> None:
    with pytest.raises(ValueError, match="expected at least one delta, got none"):
        mean([])


def test_deltas_of_two_base_models_are_refused() -> None:
    other = msgspec.structs.replace(SPEC, base="1" * 64)

    with pytest.raises(IncompatibleAdapter, match="adapter is for base model 1111"):
        weighted_mean([(constant(1.0), 1.0), (random_delta(other, 0), 1.0)])


def test_deltas_of_two_factors_are_refused() -> None:
    parts = [Part(factors="A"), Part(factors="B")]

    with pytest.raises(IncompatibleAdapter, match=r"factors='B'.*expected.*factors='A'"):
        weighted_mean((random_delta(SPEC, 0, part), 1.0) for part in parts)


def test_a_delta_without_its_steps_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match="does not say how many steps it took"):
        normalized_mean([(constant(1.0, steps=0), 1.0)])


def of_b(ranks: tuple[int, ...] | None, num_examples: int, value: float) -> Delta:
    part = Part(factors="B", ranks=ranks)
    arrays = {n: np.full(s, value, np.float32) for n, s in part.shapes(SPEC).items()}
    return Delta(SPEC, arrays, num_examples, part=part)


@given(
    sizes=st.lists(st.integers(1, RANK), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.5, 50), min_size=3, max_size=3),
)
def test_over_all_choices_of_ranks_a_client_weighs_the_same_whatever_its_rank(
    sizes: list[int], weights: list[float]
) -> None:
    every = [
        (of_b(tuple(ranks), 1, float(k)), weights[k] / math.comb(RANK, size))
        for k, size in enumerate(sizes)
        for ranks in itertools.combinations(range(RANK), size)
    ]

    mean = weighted_mean(every)

    expected = np.average(range(len(sizes)), weights=weights[: len(sizes)])
    for array in mean.arrays.values():
        np.testing.assert_allclose(array, expected, atol=1e-5)


def test_the_head_is_weighed_by_records_alone() -> None:
    rare, full = of_b((1,), 1, 0.0), of_b(None, 1, 1.0)

    mean = weighted_mean([(rare, 1.0), (full, 1.0)])

    (_, _, b), *_ = SPEC.factors()
    assert mean.arrays[b][0, 1] == pytest.approx(1 / (1 + RANK))
    assert mean.arrays[b][0, 0] == pytest.approx(1.0)
    dense = [n for n in mean.arrays if "lora" not in n]
    assert all((mean.arrays[n] == 0.5).all() for n in dense)
    assert dense
