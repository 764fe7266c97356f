from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.edge.gateway.aggregate import Total, constant_examples, require_linear, total_of
from anabranch.edge.gateway.config import ClientPrivacy
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter, PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.randomness import Randomness
from anabranch.protocols.tables import Federation, Personal, Uplink
from benchmarks.edge.gateway_load import config_of, delta_of, spec_of

SPEC = spec_of(64)
WHOLE = Part()
PLAN = ClientPrivacy(epsilon=8, noise_multiplier=2.0, clipping_norm=1.5, population=20)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.booleans())
def test_the_mean_is_numpys_weighted_mean(counts: list[int], by_examples: bool) -> None:
    deltas = [delta_of(SPEC, i, examples=n) for i, n in enumerate(counts)]
    mean = total_of(deltas, SPEC, WHOLE, by_examples=by_examples, norm=None).mean()
    weights = counts if by_examples else None
    for name in SPEC.shapes:
        stack = np.stack([d.arrays[name].astype(np.float64) for d in deltas])
        expected = np.average(stack, axis=0, weights=weights)
        np.testing.assert_allclose(mean.arrays[name], expected, rtol=1e-6, atol=1e-7)
    assert mean.num_examples == sum(counts)


def test_the_mean_of_means_is_the_mean_over_all_devices() -> None:
    counts = [3, 50, 7, 20, 1]
    deltas = [delta_of(SPEC, i, examples=n) for i, n in enumerate(counts)]
    whole = total_of(deltas, SPEC, WHOLE, by_examples=True, norm=None).mean()
    halves = [
        total_of(some, SPEC, WHOLE, by_examples=True, norm=None).mean()
        for some in (deltas[:2], deltas[2:])
    ]
    twice = total_of(halves, SPEC, WHOLE, by_examples=True, norm=None).mean()
    for name, array in whole.arrays.items():
        np.testing.assert_allclose(twice.arrays[name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factors", ["A", "B"])
def test_a_part_is_summed_as_a_part(factors: str) -> None:
    part = Part(factors=factors)  # type: ignore[arg-type]
    deltas = [delta_of(SPEC, i, part=part) for i in range(3)]
    mean = total_of(deltas, SPEC, part, by_examples=False, norm=None).mean()
    assert mean.part == part
    name = f"layer.lora_{factors}.weight"
    expected = np.mean([d.arrays[name] for d in deltas], axis=0, dtype=np.float64)
    np.testing.assert_allclose(mean.arrays[name], expected, rtol=1e-6, atol=1e-7)


@given(st.floats(1e-3, 1e30))
def test_clipping_bounds_what_one_device_can_do(size: float) -> None:
    """Adding a device moves a sum of clipped deltas by at most S, however huge its delta."""
    honest = [delta_of(SPEC, i) for i in range(3)]
    liar = delta_of(SPEC, 9).times(size)
    without = total_of(honest, SPEC, WHOLE, by_examples=False, norm=1.5)
    with_it = total_of([*honest, liar], SPEC, WHOLE, by_examples=False, norm=1.5)
    moved = sum(float(np.sum((with_it.arrays[n] - without.arrays[n]) ** 2)) for n in without.arrays)
    assert moved**0.5 <= 1.5 * (1 + 1e-9)


def _private(deltas: list[Delta], normal: object) -> Delta:
    total = total_of(deltas, SPEC, WHOLE, by_examples=False, norm=PLAN.clipping_norm)
    return total.private_mean(PLAN, normal, steps=0)  # type: ignore[arg-type]


def test_private_noise_has_the_planned_size_and_the_denominator_is_fixed() -> None:
    spec = spec_of(40_000)
    total = Total(spec, WHOLE, PLAN.clipping_norm)
    noise = total.private_mean(PLAN, Randomness(bytes(32)).normal, steps=0)
    values = np.concatenate([a.ravel() for a in noise.arrays.values()])
    planned = PLAN.noise_multiplier * PLAN.clipping_norm / PLAN.expected_cohort
    assert values.std() == pytest.approx(planned, rel=0.02)  # 5 standard errors: 0.018
    assert abs(values.mean()) < 5 * planned / len(values) ** 0.5


def test_private_examples_and_steps_do_not_tell_who_came() -> None:
    zero = Randomness(bytes(32)).normal
    counts = {_private([delta_of(SPEC, i) for i in range(n)], zero).num_examples for n in (0, 1, 5)}
    assert counts == {constant_examples(PLAN)} == {20}


def test_noise_that_is_none_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no standard Gaussians"):
        total_of([], spec_of(4000), WHOLE, by_examples=False, norm=1.5).private_mean(
            PLAN, np.zeros, steps=0
        )
    with pytest.raises(PrivacyError, match="clipped to"):
        Total(SPEC, WHOLE).private_mean(PLAN, np.zeros, steps=0)


def test_nothing_and_strangers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one delta"):
        Total(SPEC, WHOLE).mean()
    with pytest.raises(IncompatibleAdapter):
        Total(SPEC, WHOLE).add(delta_of(spec_of(128), 0), 1.0)
    with pytest.raises(IncompatibleAdapter, match="expected"):
        Total(SPEC, WHOLE).add(delta_of(SPEC, 0, part=Part(factors="B")), 1.0)


@pytest.mark.parametrize("method", ["fedavg", "ffa", "rolora", "altqr"])
def test_linear_rules_are_taken(method: str) -> None:
    require_linear(config_of(federation=Federation(rounds=1, method=method)))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["flora", "fedex", "flexlora", "hetlora"])
def test_other_rules_are_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="not linear"):
        require_linear(config_of(federation=Federation(rounds=1, method=method)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"federation": Federation(rounds=1, method="fedsa")}, "keep no tensors"),
        ({"personal": Personal(rank=2)}, "personal.rank"),
        ({"uplink": Uplink(codec="int8", error_feedback=True)}, "error_feedback"),
        ({"federation": Federation(rounds=1, method="ffa", normalize_steps=True)}, "normalize"),
    ],
)
def test_what_devices_do_not_do_is_refused(tables: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_linear(config_of(**tables))
