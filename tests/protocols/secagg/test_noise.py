"""What members put into a noised sum: bounded, noised by enough, in a ring that holds it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anabranch.protocols import rdp
from anabranch.protocols.errors import ConfigError, PrivacyError
from anabranch.protocols.secagg.fixed_point import Grid
from anabranch.protocols.secagg.graph import COMPLETE_UP_TO, shape_of
from anabranch.protocols.secagg.noise import (
    BETA,
    DistributedNoise,
    dithered,
    honest_members,
    in_ring,
    noised,
    plan_noise,
    ring_limit,
    rounded_within,
    squared_bound,
)
from anabranch.protocols.secagg.ring import RINGS, Ring
from anabranch.protocols.secagg.skellam import MOST_VARIANCE
from anabranch.protocols.spend import PRECISION, Spend, Unit
from anabranch.protocols.tables import SecureAggregation

SECURE = SecureAggregation(threshold=0.66, colluding=0.1)


def keyed(seed: int) -> Callable[[int], bytes]:
    """Return a source of keys for tests: anybody can draw them again."""
    state = [0]

    def random(size: int) -> bytes:
        state[0] += 1
        return hashlib.shake_256(f"noise {seed} {state[0]}".encode()).digest(size)

    return random


def plan(unit: Unit = "client", values: int = 2000, **changes: float) -> DistributedNoise:
    given: dict[str, float] = {"bound": 1.0, "reach": 1.0, "epsilon": 4.0, "delta": 1e-5}
    given |= changes
    rounds = int(given.pop("rounds", 20))
    return plan_noise(unit, values=values, rounds=rounds, **given)


vectors = arrays(np.float64, st.integers(1, 300), elements=st.floats(-40, 40))

# Laws: rounding


@given(vectors, st.integers(0, 1000))
def test_a_rounded_client_is_within_its_sensitivity(values: np.ndarray, seed: int) -> None:
    norm = float(np.linalg.norm(values))
    most = squared_bound(max(1, math.ceil(norm)), len(values), BETA)
    rounded = rounded_within(values, most, keyed(seed))
    assert int(rounded @ rounded) <= most
    assert np.all(np.abs(rounded - values) < 1)


@given(vectors, st.data())
def test_one_record_moves_a_rounded_sum_like_its_own_rounding(
    values: np.ndarray, data: st.DataObject
) -> None:
    """⌊x + g + u⌋ − ⌊x + u⌋ is g rounded at random, whatever x is."""
    shape = st.just(values.shape)
    change = data.draw(arrays(np.float64, shape, elements=st.floats(-6, 6, width=32)))
    key = data.draw(st.integers(0, 1000))
    moved = dithered(values + change, keyed(key)) - dithered(values, keyed(key))
    assert np.all(moved >= np.floor(change - 1e-6))
    assert np.all(moved <= np.ceil(change + 1e-6))
    size = math.ceil(float(np.linalg.norm(change))) or 1
    assert int(moved @ moved) <= squared_bound(size, len(values), 1e-12)


def test_rounding_has_no_bias_and_the_bound_is_seldom_exceeded() -> None:
    values = np.full(2000, 0.5)  # the worst: all variance
    most = squared_bound(math.ceil(math.sqrt(500)), 2000, BETA)
    random, total, beyond = keyed(1), np.zeros(2000), 0
    for _ in range(300):
        rounded = dithered(values, random)
        total += rounded
        beyond += int(rounded @ rounded) > most
    assert abs(total.mean() / 300 - 0.5) < 0.004
    assert beyond / 300 < BETA


def test_a_coarser_bound_follows_a_smaller_chance() -> None:
    assert squared_bound(100, 10_000, 1e-9) > squared_bound(100, 10_000, BETA) > 100**2
    assert squared_bound(2, 4, 1e-300) == (2 + 2) ** 2
    assert squared_bound(1000, 4, BETA) - (1000**2 + 4 / 4 + 1000 + 2 / 2) in (0, 1)  # rounded up


def test_a_vector_that_rounds_badly_for_ever_is_rounded_to_zero() -> None:
    values = np.full(100, 0.999)
    assert np.array_equal(rounded_within(values, 0, keyed(0)), np.zeros(100))


def test_a_vector_that_was_not_clipped_is_refused() -> None:
    with pytest.raises(PrivacyError, match="it was not clipped"):
        rounded_within(np.full(4, 10.0), 399, keyed(0))


# Laws: the plan


@pytest.mark.parametrize("unit", ["client", "record"])
@pytest.mark.parametrize("values", [1, 300, 60_000, 2_000_000])
@pytest.mark.parametrize(("epsilon", "rate"), [(1.0, 1.0), (8.0, 1.0), (2.0, 0.05)])
def test_the_plan_is_the_least_noise_within_the_budget(
    unit: Unit, values: int, epsilon: float, rate: float
) -> None:
    found = plan(unit, values, epsilon=epsilon, sample_rate=rate)
    assert found.epsilon == rdp.epsilon_of([found.spend(20)], 1e-5) <= epsilon
    less = Spend(
        noise_multiplier=found.noise_multiplier - PRECISION,
        sample_rate=rate,
        steps=20,
        skellam=found.sensitivities,
    )
    assert rdp.epsilon_of([less], 1e-5) > epsilon
    assert found.variance <= MOST_VARIANCE
    assert found.variance >= found.noise_multiplier**2 * found.squared
    assert found.sensitivities.l1 <= math.sqrt(values) * found.sensitivities.l2 * (1 + 1e-12)
    assert found.sensitivities.l1 <= found.squared * (1 + 1e-12)


@pytest.mark.parametrize("values", [1000, 100_000, 1_000_000])
def test_the_price_of_the_grid_is_some_percent_of_the_gaussians_noise(values: int) -> None:
    found = plan("client", values)
    gaussian = rdp.least_noise(4.0, 1e-5, 1.0, 20)
    in_bounds = math.sqrt(found.variance) / found.resolution  # noise over S, as the Gaussian's
    assert gaussian < in_bounds < 1.02 * gaussian


def test_a_plan_beyond_all_noise_is_refused() -> None:
    with pytest.raises(PrivacyError, match="nothing can be learned from that"):
        plan("client", 1000, epsilon=0.01, rounds=100)


# Laws: more survivors, more noise


@given(st.integers(4, 127), st.integers(0, 126))
def test_every_opened_sum_has_enough_noise_and_each_survivor_adds_some(
    members: int, missing: int
) -> None:
    found = plan()
    here = max(members - missing, SECURE.minimum + 1)
    try:
        honest = honest_members(min(here, members), members, SECURE)
    except ConfigError:
        return
    local = found.local_variance(honest)
    noise = [local * survivors for survivors in range(honest, members + 1)]
    assert noise[0] >= found.variance
    assert noise == sorted(set(noise))


def test_the_noise_of_a_sum_is_measured_to_be_what_it_must_be() -> None:
    found, honest = plan(values=40_000), 4
    zeros, random = np.zeros(40_000, np.float32), keyed(3)
    shares = [noised(zeros, found, honest, random) for _ in range(8)]
    error = 5 * math.sqrt(2 / 40_000)
    for survivors in (4, 6, 8):
        total = np.sum(shares[:survivors], axis=0)
        measured = float(total.var()) / found.variance
        assert measured == pytest.approx(survivors / honest, rel=error)
    three = float(np.sum(shares[:3], axis=0).var()) / found.variance
    assert three < 1 - error  # with fewer honest members than h the guarantee would not hold


def test_noise_of_members_is_independent_and_of_one_member_new_each_time() -> None:
    found, zeros, random = plan(values=30_000), np.zeros(30_000, np.float32), keyed(4)
    first, second = (noised(zeros, found, 1, random) for _ in range(2))
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 0.03
    assert not np.array_equal(first, second)


def test_honest_members() -> None:
    assert honest_members(10, 10, SECURE) == 7 - 1
    assert honest_members(7, 10, SECURE) == 5 - 1  # three never sent keys
    assert honest_members(100, 100, SECURE) == 67 - 10
    third = SecureAggregation(threshold=2 / 3, colluding=0.0)
    assert honest_members(3, 3, third) == 3
    many = COMPLETE_UP_TO + 400
    shape = shape_of(many, SECURE.threshold, SECURE.colluding)
    assert not shape.complete
    assert honest_members(many, many, SECURE) == shape.holders + 1 - shape.threshold
    colluding = SecureAggregation(threshold=0.9, colluding=0.4)
    with pytest.raises(ConfigError, match="12 of the 30 invited may collude: 14 are needed"):
        honest_members(10, 30, colluding)


@pytest.mark.parametrize(("colluding", "invited"), [(0.3, 20), (0.1, 100), (0.0, 12), (0.25, 60)])
def test_noise_is_made_for_the_fewest_honest_ones_of_a_sum_that_a_plan_lets_open(
    colluding: float, invited: int
) -> None:
    """However few of the invited send keys: no more noise than that, no less, and no refusal."""
    secure, c = SecureAggregation(minimum=3, colluding=colluding), int(colluding * invited)
    found = plan()
    for n in range(max(3, c + 2), invited + 1):
        signers = max(3, min(n, max(int(Fraction(2, 3) * n), (n + c) // 2) + 1))
        honest = honest_members(n, invited, secure)
        assert honest == signers - c
        assert found.local_variance(honest) * (signers - c) >= found.variance
    with pytest.raises(ConfigError):
        honest_members(c + 1, invited, secure)


# Laws: the ring


@given(
    members=st.integers(3, 120),
    values=st.sampled_from([100, 50_000]),
    reach=st.floats(0.01, 5),
    epsilon=st.sampled_from([1.0, 8.0]),
)
def test_the_ring_holds_the_sum_and_the_grid_has_the_step(
    members: int, values: int, reach: float, epsilon: float
) -> None:
    found = plan(values=values, reach=reach, epsilon=epsilon)
    ring, limit = ring_limit(found, members, SECURE)
    assert Grid(ring, members, limit).step == pytest.approx(found.step, rel=1e-12)
    local = found.local_variance(honest_members(members, members, SECURE))
    largest = members * (found.reach / found.step + 1) + 8 * math.sqrt(members * local)
    assert largest < 2 ** (ring.bits - 1)


def test_a_ring_that_is_too_narrow_is_refused_with_one_that_is_not() -> None:
    found = plan(values=100_000, epsilon=1.0)
    narrow = SecureAggregation(threshold=0.66, colluding=0.1, ring=16)
    with pytest.raises(ConfigError, match=r"ring = 16: .* Set it to 24"):
        ring_limit(found, 50, narrow)


@given(arrays(np.int64, 5, elements=st.integers(-(2**15), 2**15 - 1)), st.sampled_from(RINGS))
def test_whole_numbers_come_back_from_the_ring(values: np.ndarray, bits: int) -> None:
    ring = Ring(bits)  # type: ignore[arg-type]
    packed = ring.pack(in_ring(values, ring))
    assert np.array_equal(ring.signed(ring.unpack(packed, 5)), values)


# One member


def test_a_sum_of_members_is_the_sum_of_their_clipped_updates_and_noise() -> None:
    found, members = plan(values=5000, epsilon=40.0, rounds=1), 6
    honest = honest_members(members, members, SECURE)
    ring, limit = ring_limit(found, members, SECURE)
    rng, random = np.random.default_rng(0), keyed(5)
    updates = [rng.normal(size=5000) * scale for scale in (1e-3, 5e-3, 1e-2, 0.1, 1.0, 1e3)]
    total = ring.zeros(5000)
    for update in updates:
        total += in_ring(noised(update.astype(np.float32), found, honest, random), ring)
    decoded = Grid(ring, members, limit).decode(total)
    clipped = [u * min(1.0, 1 / float(np.linalg.norm(u))) for u in updates]
    noise = (decoded - np.sum(clipped, axis=0)) / found.step
    expected = found.local_variance(honest) * members
    assert noise.var() == pytest.approx(expected, rel=0.1)
    assert abs(noise.mean()) < 5 * math.sqrt(expected / 5000)


def rounded(values: np.ndarray, noise: DistributedNoise) -> np.ndarray:
    """Return what is noised, by taking the noise of the same keys away."""
    zeros = noised(np.zeros_like(values), noise, 1, lambda size: bytes(size))
    found: np.ndarray = noised(values, noise, 1, lambda size: bytes(size)) - zeros
    return found


@given(arrays(np.float32, 50, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_whatever_a_client_has_learned_its_part_is_within_the_sensitivity(
    values: np.ndarray,
) -> None:
    found = plan(values=50)
    part = rounded(values, found)
    assert int(part @ part) <= found.squared


@given(
    arrays(np.float32, 40, elements=st.floats(-3, 3, width=32)),
    arrays(np.float32, 40, elements=st.floats(-3, 3, width=32)),
)
def test_one_record_moves_a_sites_part_by_no_more_than_the_sensitivity(
    values: np.ndarray, change: np.ndarray
) -> None:
    found = plan("record", 40, reach=2.0)
    change = change / max(1.0, float(np.linalg.norm(change)) * 1.0001)
    moved = rounded(values + change, found) - rounded(values, found)
    assert int(moved @ moved) <= found.squared


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("unit", ["client", "record"])
def test_an_update_that_is_not_finite_counts_as_zeros(unit: Unit, bad: float) -> None:
    values = np.array([1.0, bad, 2.0], np.float32)
    assert np.array_equal(rounded(values, plan(unit, 3)), np.zeros(3))


def test_values_beyond_the_reach_are_cut_and_not_refused() -> None:
    found = plan("record", 3, reach=0.5)
    part = rounded(np.array([9.0, -9.0, 0.25], np.float32), found)
    most = math.floor(0.5 / found.step) + 1
    assert part[0] in (most, most - 1)
    assert part[1] in (-most, -most + 1)


@pytest.mark.parametrize("shape", [(11,), (2, 5)])
def test_an_update_that_was_not_planned_for_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PrivacyError, match="planned for a vector of at most 10 values"):
        noised(np.zeros(shape, np.float32), plan(values=10), 1, keyed(0))
