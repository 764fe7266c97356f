from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter, PrivacyError
from anabranch.protocols.part import Part
from anabranch.server.aggregation.altqr import altqr
from anabranch.server.aggregation.fedavg import fedavg
from anabranch.server.aggregation.ffa import ffa
from anabranch.server.aggregation.optimizers import adam, constant, with_optimizer
from anabranch.server.aggregation.private import (
    ClippedSum,
    with_client_privacy,
)
from anabranch.server.aggregation.rolora import rolora
from anabranch.server.aggregation.rule import Merged, Rule
from tests.lowrank import random_adapter, random_delta, spec_of
from tests.private_cases import PLAN, SPEC, filled, flat, gaussians, keeping, rounds, zeros

PARTS = [WHOLE, Part(factors="B"), Part(factors="A", dense=False), Part(factors="none")]
TINY = 1e-9  # noise multiplier: a round without noise, but for the check that there is some


def summed(deltas: Iterable[Delta], norm: float, part: Part, cap: int | None = None) -> ClippedSum:
    total = ClippedSum(SPEC, part, norm, cap)
    for delta in deltas:
        total.add(delta)
    return total


@st.composite
def cohorts(draw: st.DrawFn, part: Part = WHOLE) -> list[Delta]:
    sizes = draw(st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 500)), max_size=6))
    seed = draw(st.integers(0, 2**32 - 1))
    return [
        random_delta(SPEC, seed + i, part, n).times(scale) for i, (scale, n) in enumerate(sizes)
    ]


# Laws


@given(
    data=st.data(),
    part=st.sampled_from(PARTS),
    norm=st.floats(1e-3, 1e3),
    cap=st.none() | st.integers(1, 1000),
)
def test_one_client_more_changes_the_sum_by_at_most_the_clipping_norm(
    data: st.DataObject, part: Part, norm: float, cap: int | None
) -> None:
    others = data.draw(cohorts(part))
    scale = data.draw(st.floats(0, 1e6))
    client = random_delta(SPEC, 77, part, data.draw(st.integers(0, 10**6))).times(scale)
    at = data.draw(st.integers(0, len(others)))

    without = summed(others, norm, part, cap)
    with_it = summed([*others[:at], client, *others[at:]], norm, part, cap)

    change = np.linalg.norm(flat(with_it.arrays) - flat(without.arrays))
    assert change <= norm * (1 + 1e-9)
    assert abs(with_it.within - without.within) == 0.5


@given(data=st.data(), part=st.sampled_from(PARTS))
def test_the_order_of_clients_does_not_matter(data: st.DataObject, part: Part) -> None:
    cohort = data.draw(cohorts(part))
    other = data.draw(st.permutations(cohort))

    one, two = summed(cohort, 0.7, part, 100), summed(other, 0.7, part, 100)

    np.testing.assert_allclose(flat(one.arrays), flat(two.arrays), atol=1e-12)
    assert one.within == two.within


@given(data=st.data(), power=st.integers(-6, 6))
def test_updates_and_clipping_norm_in_other_units_give_the_sum_in_those(
    data: st.DataObject, power: int
) -> None:
    cohort, unit = data.draw(cohorts()), 2.0**power

    one = summed(cohort, 0.7, WHOLE)
    other = summed([delta.times(unit) for delta in cohort], 0.7 * unit, WHOLE)

    np.testing.assert_allclose(flat(other.arrays), unit * flat(one.arrays), rtol=1e-6, atol=1e-12)


@given(cohort=cohorts())
def test_an_update_within_the_norm_counts_as_it_is_and_any_other_at_the_norm(
    cohort: list[Delta],
) -> None:
    total = np.zeros(flat(dict(cohort[0].arrays)).size) if cohort else np.zeros(1)
    for delta in cohort:
        values = flat(dict(delta.arrays))
        norm = float(np.linalg.norm(values))
        total = total + (values if norm <= 2.0 else values * (2.0 / norm))

    got = flat(summed(cohort, 2.0, WHOLE).arrays) if cohort else total

    np.testing.assert_allclose(got, total, rtol=1e-9, atol=1e-12)


@given(
    z=st.floats(0.3, 50),
    rate=st.floats(0.01, 1),
    population=st.integers(100, 10**5),
)
def test_share_and_update_together_cost_what_the_noise_multiplier_says(
    z: float, rate: float, population: int
) -> None:
    plan = replace(PLAN, adaptive=True, noise_multiplier=z, sample_rate=rate, population=population)

    assert plan.share_noise == pytest.approx(max(rate * population / 20, z))
    # Two Gaussian mechanisms on one data set: sensitivities S and 1/2, so 1/z² adds up.
    both = plan.update_noise**-2 + (0.5 / (plan.share_noise or math.inf)) ** 2
    assert both**-0.5 == pytest.approx(z, rel=1e-12)
    assert plan.update_noise > z


@settings(max_examples=20)
@given(data=st.data(), adaptive=st.booleans())
def test_the_rule_inside_sees_constants_in_place_of_counts(
    data: st.DataObject, adaptive: bool
) -> None:
    seen: list[tuple[int, int]] = []
    inner = fedavg()

    def merge(state: None, adapter: Adapter, deltas: Iterable[Delta]) -> tuple[None, Merged]:
        held = list(deltas)
        seen.extend((delta.num_examples, delta.steps) for delta in held)
        return inner.merge(state, adapter, held)

    rule = with_client_privacy(
        replace(inner, merge=merge), replace(PLAN, adaptive=adaptive), gaussians(1)
    )

    ((_, merged),) = rounds(rule, [data.draw(cohorts())])

    assert seen == [(1, 0)]
    assert (merged.num_examples, merged.clients, merged.error) == (0, 0, None)


# Noise


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_noise_covers_every_coordinate_of_the_part_and_no_other(part: Part, adaptive: bool) -> None:
    plan = replace(PLAN, adaptive=adaptive, rounds=600)
    held: list[Delta] = []
    rule = with_client_privacy(keeping(part, held), plan, gaussians(5))

    history = rounds(rule, [[]] * plan.rounds)

    # A state's norm is what it will clip at: that of round t is in the state before it.
    norms = [state.clipped_at for state, _ in history]
    units = np.stack([flat(dict(d.arrays)) / n for d, n in zip(held, norms, strict=True)])  # type: ignore[operator]
    expected = plan.update_noise / (0.1 * 200)  # z_Δ / (q N), times S
    assert {d.part for d in held} == {part}
    np.testing.assert_allclose(units.std(axis=0) / expected, 1, atol=0.17)  # 6 standard errors
    assert units.std() / expected == pytest.approx(1, abs=0.02)
    assert abs(units.mean()) < 5 * expected / math.sqrt(units.size)
    outside = set(SPEC.shapes) - set(part.names(SPEC))
    last = history[-1][1].adapter
    assert all(not last.arrays[name].any() for name in outside)


def test_noise_of_different_coordinates_and_rounds_is_independent() -> None:
    held: list[Delta] = []
    rule = with_client_privacy(keeping(WHOLE, held), replace(PLAN, rounds=600), gaussians(6))
    rounds(rule, [[]] * 600)

    noise = np.stack([flat(dict(d.arrays)) for d in held])
    between = np.corrcoef(noise.T) - np.eye(noise.shape[1])
    over_time = np.mean(noise[1:] * noise[:-1]) / noise.var()

    assert np.abs(between).max() < 6 / math.sqrt(600)
    assert abs(over_time) < 6 / math.sqrt(noise.size)


# Literal examples


def test_a_mean_by_hand() -> None:
    plan = replace(PLAN, noise_multiplier=TINY, clipping_norm=1.0)
    rule = with_client_privacy(fedavg(), plan, gaussians(0))
    values = len(flat(dict(zeros().arrays)))
    one = filled(3.0)  # norm 3 √d: clipped to 1
    half = filled(0.5 / math.sqrt(values))  # norm 1/2: stays

    ((_, merged),) = rounds(rule, [[one, half]])

    expected = (1 + 0.5) / math.sqrt(values) / (0.1 * 200)  # over q N = 20, not over 2
    np.testing.assert_allclose(flat(dict(merged.adapter.arrays)), expected, rtol=1e-6)


def test_a_weight_is_capped_and_the_denominator_is_not_the_sum_of_weights() -> None:
    plan = replace(PLAN, noise_multiplier=TINY, clipping_norm=1e6, max_examples=100)
    rule = with_client_privacy(fedavg(), plan, gaussians(0))

    ((_, merged),) = rounds(rule, [[filled(1.0, 25), filled(1.0, 100), filled(1.0, 10**6)]])

    got = flat(dict(merged.adapter.arrays))
    np.testing.assert_allclose(got, (0.25 + 1 + 1) / 20, atol=10 * 1e6 * TINY / 20)


def test_a_clipped_update_keeps_its_weight() -> None:
    for n, weight in ((30, 0.3), (100, 1.0), (500, 1.0)):
        total = flat(summed([filled(7.0, n)], 0.5, WHOLE, cap=100).arrays)

        assert np.linalg.norm(total) == pytest.approx(0.5 * weight)


def test_an_update_of_exactly_the_clipping_norm_is_within_it() -> None:
    delta = filled(0.25)

    assert summed([delta], delta.norm(), WHOLE).within == 0.5
    assert summed([delta], delta.norm() * (1 - 1e-12), WHOLE).within == -0.5


def test_an_update_of_zeros_and_an_empty_cohort_are_rounds_of_noise() -> None:
    rule = with_client_privacy(fedavg(), PLAN, gaussians(3))
    again = with_client_privacy(fedavg(), PLAN, gaussians(3))

    silent = rounds(rule, [[filled(0.0)], [filled(0.0)] * 3])
    empty = rounds(again, [[], []])

    for (_, one), (_, other) in zip(silent, empty, strict=True):
        np.testing.assert_array_equal(
            flat(dict(one.adapter.arrays)), flat(dict(other.adapter.arrays))
        )
        assert np.all(flat(dict(one.adapter.arrays)) != 0)


@pytest.mark.parametrize(
    "rule", [fedavg(), fedavg("uniform"), ffa(), rolora(), altqr()], ids=lambda rule: rule.name
)
def test_rules_of_one_update_per_client_work_inside(rule: Rule[Any]) -> None:
    plan = replace(PLAN, noise_multiplier=TINY, clipping_norm=1e3)
    wrapped = with_client_privacy(rule, plan, gaussians(2))
    first = random_adapter(SPEC, 1)
    state, start = wrapped.init(first)
    plain_state, plain_start = rule.init(first)
    for number in (1, 2):
        sent = wrapped.open(state, start, number)
        part = wrapped.part(SPEC, number, "a", 3)
        cohort = [random_delta(SPEC, i, part).times(0.1) for i in range(20)]  # 20 = q N

        state, merged = wrapped.merge(state, sent, cohort)
        plain_state, plain = rule.merge(
            plain_state, rule.open(plain_state, plain_start, number), cohort
        )

        for name, array in plain.adapter.arrays.items():
            np.testing.assert_allclose(merged.adapter.arrays[name], array, atol=1e-5)
        start, plain_start = merged.adapter, plain.adapter
    assert wrapped.name == f"{rule.name}+client-privacy"
    assert (wrapped.regauges, wrapped.truncates) == (rule.regauges, rule.truncates)


def test_a_server_optimiser_goes_inside_the_privacy() -> None:
    inner = with_optimizer(fedavg(), adam(constant(0.1, 0.1)))
    rule = with_client_privacy(inner, PLAN, gaussians(4))

    (_, first), (state, second) = rounds(rule, [[filled(0.1)] * 20, []])

    assert state.inner.rounds == 2
    moved = flat(dict(second.adapter.arrays)) - flat(dict(first.adapter.arrays))
    assert np.all(moved != 0)  # noise alone, and momentum


# Refusals


def test_a_delta_of_another_part_or_spec_is_refused() -> None:
    rule = with_client_privacy(ffa(), PLAN, gaussians(0))
    state, adapter = rule.init(random_adapter(SPEC, 0))

    with pytest.raises(IncompatibleAdapter, match="delta is of Part"):
        rule.merge(state, adapter, [random_delta(SPEC, 0, WHOLE)])
    with pytest.raises(IncompatibleAdapter):
        rule.merge(state, adapter, [random_delta(spec_of(2), 0, Part(factors="B"))])


@pytest.mark.parametrize("rule", [fedavg(), altqr()], ids=lambda rule: rule.name)
def test_a_site_of_lower_rank_is_refused(rule: Rule[Any]) -> None:
    wrapped = with_client_privacy(rule, PLAN, gaussians(0))

    assert wrapped.part(SPEC, 1, "a", 8) == rule.part(SPEC, 1, "a", 8)
    with pytest.raises(PrivacyError, match=r"trains ranks up to 2 of 3: lower lora.rank to 2"):
        wrapped.part(SPEC, 1, "a", 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_multiplier", 0.0), ("clipping_norm", math.inf), ("sample_rate", 1.1), ("rounds", 0)],
)
def test_an_impossible_plan_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"expected {field}"):
        replace(PLAN, **{field: value})  # type: ignore[arg-type]
