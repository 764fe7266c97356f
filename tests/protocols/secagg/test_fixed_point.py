"""The grid and the counters: sums that come back, rounding without bias, no overflow at all."""

import math
import re
import secrets
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError, DataError
from anabranch.protocols.secagg.fixed_point import (
    CHUNK,
    COUNTER_BITS,
    MAX_LEVELS,
    Grid,
    OutOfRange,
    digits,
    read_counters,
    ring_for,
    slots,
    write_counters,
)
from anabranch.protocols.secagg.masks import cipher
from anabranch.protocols.secagg.ring import RINGS, Ring

rings = st.sampled_from([Ring(bits) for bits in RINGS])
members_of_a_round = st.integers(1, 1000)
limits = st.floats(1e-6, 1e6)


def keyed(i: int) -> Callable[[int], bytes]:
    """Return a source of fixed bytes: the same rounding every time."""
    return lambda count: i.to_bytes(count, "big")


# Laws of the grid


@settings(max_examples=60)
@given(
    ring=rings,
    members=members_of_a_round,
    limit=limits,
    parts=st.lists(st.floats(-1, 1), max_size=20),
    factor=st.floats(0.001, 1),
    key=st.integers(0, 2**64),
)
def test_one_member_s_values_come_back_within_one_step(
    ring: Ring, members: int, limit: float, parts: list[float], factor: float, key: int
) -> None:
    grid = Grid(ring, members, limit)
    values = np.array([part * limit for part in parts], np.float64)
    error = grid.decode(grid.encode(values, factor, keyed(key))) - factor * values

    assert np.all(np.abs(error) <= grid.step * (1 + 2.0**-19))


@settings(max_examples=40)
@given(
    ring=rings,
    members=st.integers(1, 40),
    limit=limits,
    seed=st.integers(0, 2**32),
    single=st.booleans(),
)
def test_the_sum_of_all_members_decodes_within_a_step_of_each(
    ring: Ring, members: int, limit: float, seed: int, single: bool
) -> None:
    grid = Grid(ring, members, limit)
    rng = np.random.default_rng(seed)
    exact, total = np.zeros(9), ring.zeros(9)
    for member in range(members):
        values = rng.uniform(-0.999, 0.999, 9) * limit
        factor = float(rng.uniform(0.1, 1))
        if single:
            values = values.astype(np.float32).astype(np.float64)  # what was encoded
        exact += factor * values
        given_values = values.astype(np.float32) if single else values
        total += grid.encode(given_values, factor, keyed(seed + member))

    assert np.all(np.abs(grid.decode(total) - exact) <= members * grid.step * (1 + 2.0**-19))


@settings(max_examples=60)
@given(ring=rings, members=members_of_a_round, limit=limits)
@example(ring=Ring(16), members=1, limit=1.0)
@example(ring=Ring(16), members=1000, limit=1.0)
@example(ring=Ring(24), members=1000, limit=0.1)
@example(ring=Ring(32), members=1000, limit=0.3)
@example(ring=Ring(64), members=1000, limit=1 / 3)
def test_no_sum_overflows_with_every_member_at_the_limit(
    ring: Ring, members: int, limit: float
) -> None:
    grid = Grid(ring, members, limit)
    for sign in (1, -1):
        values = np.full(64, sign * limit)
        one = ring.signed(grid.encode(values, 1.0, keyed(members)))
        assert np.all(np.abs(one) <= grid.levels + 1)
        total = ring.zeros(64)
        for _ in range(members):
            total += grid.encode(values, 1.0, keyed(members))
        assert ring.signed(total).tolist() == (members * one).tolist()
    assert members * (grid.levels + 1) <= 2 ** (ring.bits - 1) - 1


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_the_mean_of_what_comes_back_is_the_value(bits: int, factor: float) -> None:
    """The mean of 2²⁰ roundings, each within one step: off by more than 6.5/2 · 2⁻¹⁰ steps
    with a chance below 10⁻¹⁰ (a Bernoulli's standard deviation is at most 1/2)."""
    grid = Grid(Ring(bits), 10, 1.0)  # type: ignore[arg-type]
    for i, place in enumerate((0.0, 0.001, 0.25, 0.5, 0.999, -0.3)):
        value = (7 + place) * grid.step / factor
        back = grid.decode(grid.encode(np.full(1 << 20, value), factor, keyed(i)))
        off = float(np.mean(back / grid.step - (7 + place)))
        assert abs(off) < 3.25 * 2.0**-10, place


def test_roundings_of_neighbouring_values_are_independent() -> None:
    grid = Grid(Ring(32), 10, 1.0)
    back = grid.encode(np.full(1 << 20, 0.5 * grid.step), 1.0, keyed(3)).astype(np.float64) - 0.5

    for lag in (1, 2, 4, 16, CHUNK):
        assert abs(float(np.mean(back[lag:] * back[:-lag]))) < 0.25 * 6.5 / 1000


@given(ring=rings, members=members_of_a_round, limit=limits, key=st.integers(0, 2**64))
def test_points_of_the_grid_that_float64_can_hold_are_not_rounded(
    ring: Ring, members: int, limit: float, key: int
) -> None:
    limit = 2.0 ** math.floor(math.log2(limit))
    grid = Grid(ring, members, limit * Grid(ring, members, 1.0).levels)
    top = min(grid.levels, 2**20)
    integers = np.array([0, 1, -1, top, -top])

    encoded = grid.encode(integers * grid.step, 1.0, keyed(key))
    assert ring.signed(encoded).tolist() == integers.tolist()


def test_values_follow_the_docstring_s_formula_across_chunks() -> None:
    grid, count = Grid(Ring(32), 7, 2.5), 2 * CHUNK + 77
    values = np.random.default_rng(0).uniform(-2.5, 2.5, count).astype(np.float32)
    key = b"k" * 32
    r = np.frombuffer(cipher("chacha20", key).encryptor().update(bytes(4 * count)), "<u4") / 2**32
    expected = np.floor(values.astype(np.float64) * (0.25 / grid.step) + r)

    encoded = grid.encode(values, 0.25, lambda _: key)
    assert grid.ring.signed(encoded).tolist() == expected.tolist()


def test_the_rounding_takes_one_fresh_key_of_32_bytes() -> None:
    asked: list[int] = []

    def random(count: int) -> bytes:
        asked.append(count)
        return secrets.token_bytes(count)

    grid = Grid(Ring(32), 3, 1.0)
    values = np.linspace(-1, 1, 1000)
    one, other = (grid.encode(values, 0.5, random) for _ in range(2))

    assert asked == [32, 32]
    assert not np.array_equal(one, other)


def test_an_empty_vector_stays_empty_and_the_values_stay_as_they_were() -> None:
    grid = Grid(Ring(24), 3, 1.0)
    values = np.array([0.25, -0.5], np.float32)
    grid.encode(values, 0.5, keyed(0))

    assert values.tolist() == [0.25, -0.5]
    assert grid.decode(grid.encode(np.zeros(0, np.float32), 1.0, keyed(0))).shape == (0,)


# Examples


@pytest.mark.parametrize(
    ("bits", "members", "levels"),
    [
        (16, 1, 32_766),
        (16, 100, 326),
        (24, 100, 83_885),
        (32, 100, 21_474_835),
        (32, 1000, 2_147_482),
        (64, 1000, MAX_LEVELS),
    ],
)
def test_levels_of_a_ring(bits: int, members: int, levels: int) -> None:
    grid = Grid(Ring(bits), members, 3.0)  # type: ignore[arg-type]

    assert (grid.levels, grid.step) == (levels, 3.0 / levels)


@pytest.mark.parametrize(
    ("members", "value_bits", "bits"),
    [
        (1, 15, 16), (1, 16, 24), (3, 14, 16), (4, 14, 24), (100, 16, 24), (100, 20, 32),
        (1000, 22, 32), (1024, 22, 64), (1000, 32, 64),
    ],
)  # fmt: skip
def test_the_narrowest_ring_that_holds_the_sum(members: int, value_bits: int, bits: int) -> None:
    assert ring_for(members, value_bits, None) == Ring(bits)  # type: ignore[arg-type]
    for wider in RINGS:
        if wider >= bits:
            assert ring_for(members, value_bits, wider) == Ring(wider)
        else:
            with pytest.raises(ConfigError, match=f"overflow a ring of {wider} bits; lower"):
                ring_for(members, value_bits, wider)


@given(members=members_of_a_round, value_bits=st.integers(2, 32))
def test_a_grid_on_that_ring_has_the_levels_that_value_bits_promise(
    members: int, value_bits: int
) -> None:
    grid = Grid(ring_for(members, value_bits), members, 1.0)

    assert grid.levels >= 2 ** (value_bits - 1) - 1


# Refusals


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_not_finite_are_refused_before_a_key_is_drawn(
    wrong: float, dtype: type[np.float32]
) -> None:
    values = np.zeros(10, dtype)
    values[[3, 7]] = wrong

    def never(count: int) -> bytes:
        raise AssertionError(count)

    with pytest.raises(OutOfRange, match=r"not finite, .*; lower the learning rate$") as refused:
        Grid(Ring(32), 3, 4.0).encode(values, 1.0, never)

    assert refused.value.detail == f"2 of 10 values; number 3 is {wrong}, training diverged"


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_beyond_the_limit_is_refused_with_the_next_step(sign: int) -> None:
    values = np.array([0.0, sign * 4.25, 1.0, sign * 8.5], np.float32)

    message = (
        "the update has values beyond secure_aggregation.range = ±4, and is not sent: raise "
        "secure_aggregation.range, or lower the learning rate"
    )
    with pytest.raises(OutOfRange) as refused:
        Grid(Ring(32), 3, 4.0).encode(values, 0.1, keyed(0))

    assert str(refused.value) == message
    assert refused.value.detail == f"2 of 4 values; number 1 is {sign * 4.25}, the largest 8.5"


def test_a_float32_that_rounds_to_the_limit_from_above_is_beyond_it() -> None:
    values = np.array([1.1], np.float32)  # 1.10000002…

    with pytest.raises(OutOfRange) as refused:
        Grid(Ring(32), 3, 1.1).encode(values, 1.0, keyed(0))

    assert refused.value.detail.startswith("1 of 1 values; number 0 is 1.1")


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.0001, math.nan])
def test_a_factor_outside_0_to_1_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"factor in (0, 1], got {factor}")):
        Grid(Ring(32), 3, 4.0).encode(np.zeros(3), factor, keyed(0))


def test_integers_or_a_matrix_are_no_values() -> None:
    for wrong in (np.zeros(3, np.int64), np.zeros((2, 2)), np.zeros(3, np.float16)):
        with pytest.raises(ValueError, match=f"float32 or float64, got {wrong.dtype}"):
            Grid(Ring(32), 3, 4.0).encode(wrong, 1.0, keyed(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf, 1e31, 1e-31])
def test_a_limit_that_is_no_range_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"range between 1e-30 and 1e30, got {limit}")):
        Grid(Ring(32), 3, limit)


def test_more_members_than_a_ring_has_room_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 bits has no room for the sum of 20000 members"):
        Grid(Ring(16), 20_000, 1.0)
    with pytest.raises(ConfigError, match="16 bits has no room for the counters of 65536 members"):
        digits(65_536, Ring(16))
    for use in (
        lambda: Grid(Ring(16), 0, 1.0),
        lambda: digits(0, Ring(16)),
        lambda: ring_for(0, 8),
    ):
        with pytest.raises(ConfigError, match="expected 1 member or more"):
            use()
    with pytest.raises(ConfigError, match="overflow a ring of 64 bits; lower"):
        ring_for(1000, 60)


# Counters


@given(
    ring=rings,
    rows=st.lists(
        st.lists(st.integers(0, 2**COUNTER_BITS - 1), min_size=3, max_size=3),
        min_size=1,
        max_size=30,
    ),
    spare=st.integers(0, 970),
)
@example(ring=Ring(16), rows=[[2**COUNTER_BITS - 1] * 3] * 30, spare=0)
def test_sums_of_counters_are_exact(ring: Ring, rows: list[list[int]], spare: int) -> None:
    members = len(rows) + spare
    total = ring.zeros(3 * slots(ring, members))
    for row in rows:
        total += write_counters(row, ring, members)

    assert read_counters(total, ring, members) == [sum(row[i] for row in rows) for i in range(3)]


def test_the_spare_byte_of_a_ring_of_24_bits_does_not_count() -> None:
    ring = Ring(24)
    masked = write_counters([5, 2**40], ring, 3) + np.uint32(0xAB000000)

    assert read_counters(masked, ring, 3) == [5, 2**40]


@given(ring=rings, members=st.integers(1, 30_000))
def test_a_digit_is_as_wide_as_the_sum_allows(ring: Ring, members: int) -> None:
    d = digits(members, ring)

    assert members * (2**d - 1) < 2**ring.bits <= members * (2 ** (d + 1) - 1)
    assert (slots(ring, members) - 1) * d < COUNTER_BITS <= slots(ring, members) * d


@pytest.mark.parametrize("value", [-1, 2**COUNTER_BITS])
def test_a_counter_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(DataError, match=re.escape("0 … 2^48 − 1, and one is not")):
        write_counters([1, value], Ring(32), 3)


def test_a_part_of_a_counter_is_refused() -> None:
    with pytest.raises(ValueError, match="a multiple of 6 ring values, got 7"):
        read_counters(Ring(16).zeros(7), Ring(16), 100)
