"""int8 and int4: unbiased, bounded, and nothing is decoded that no encoder writes."""

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from anabranch.protocols.codecs.blocks import BLOCK
from anabranch.protocols.codecs.choose import codec_for
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import ConfigError, MalformedMessage

Values = NDArray[np.float32]
LEVELS: dict[CodecName, int] = {"int8": 127, "int4": 7}
CODECS = pytest.mark.parametrize(("name", "levels"), LEVELS.items())
SMALLEST = 2.0**-133  # the least bfloat16 above 0

# Any exponent, so that scales from the smallest to the largest occur.
rows = hnp.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(-7 * 2.0**120, 7 * 2.0**120, width=32),
    fill=st.just(0),
)


class TowardsZero:
    """A generator whose draws round every one of these values towards zero."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def random(self, shape: tuple[int, ...], dtype: Any) -> Values:
        draws = np.zeros(shape, dtype)  # u = 0: up, unless the value is on the grid
        draws.reshape(-1)[: len(self.values)][self.values > 0] = 1 - 2.0**-24  # down
        return draws


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def round_trip(name: CodecName, values: Values, seed: int = 0) -> Values:
    codec = codec_for(name)
    return codec.decode(codec.encode(values, rng(seed)), len(values))


def written_towards_zero(name: CodecName, values: Values) -> bytes:
    return codec_for(name).encode(values, cast(np.random.Generator, TowardsZero(values)))


def scales_in(data: bytes, count: int) -> NDArray[np.float64]:
    """Return the scale of every value of a payload."""
    bits = np.frombuffer(data, "<u2", -(-count // BLOCK)).astype(np.uint32) << 16
    return np.repeat(bits.view(np.float32).astype(np.float64), BLOCK)[:count]


# Laws


@CODECS
@given(values=rows)
def test_the_error_is_below_the_scale_of_the_block(
    name: CodecName, levels: int, values: Values
) -> None:
    codec, exact = codec_for(name), values.astype(np.float64)
    data = codec.encode(values, rng())
    scales = scales_in(data, len(values))
    error = np.abs(codec.decode(data, len(values)) - exact)
    largest = np.repeat(np.maximum.reduceat(np.abs(exact), range(0, len(values), BLOCK)), BLOCK)[
        : len(values)
    ]

    assert ((error < scales) | (error == 0)).all()
    assert (levels * scales >= largest).all()  # no code is cut off
    needed = largest / levels
    assert (scales <= needed + np.maximum(needed * 2.0**-7, SMALLEST)).all()  # one step up


@CODECS
def test_the_mean_of_many_decoded_values_is_the_value(name: CodecName, levels: int) -> None:
    draws = 20_000
    block = np.linspace(-1, 1, BLOCK, dtype=np.float32) ** 3 * np.float32(1e-7)
    decoded = round_trip(name, np.tile(block, draws)).reshape(draws, BLOCK)
    scale = scales_in(codec_for(name).encode(block, rng()), BLOCK)[0]
    off = np.abs(decoded.mean(axis=0, dtype=np.float64) - block) / scale
    nearest = np.abs(np.round(block / scale) - block / scale)
    lower = np.abs(np.floor(block / scale) - block / scale)

    bound = 5 * 0.5 / np.sqrt(draws)  # five standard errors: one rounding has at most 0.5
    assert off.max() < bound
    assert nearest.max() > 10 * bound  # what a biased rounding would get
    assert lower.max() > 10 * bound


@CODECS
@given(values=rows, at=st.integers(0, 10**4), flip=st.integers(0, 255))
@example(values=np.zeros(65, np.float32), at=3, flip=1)
@example(values=np.full(65, 1e-44, np.float32), at=0, flip=3)
def test_a_changed_payload_is_refused_or_some_values_are_written_so(
    name: CodecName, levels: int, values: Values, at: int, flip: int
) -> None:
    codec, count = codec_for(name), len(values)
    changed = bytearray(codec.encode(values, rng()))
    changed[at % len(changed)] ^= flip
    data = bytes(changed)

    try:
        decoded = codec.decode(data, count)
    except MalformedMessage:
        return
    assert written_towards_zero(name, origin(decoded, data, levels)) == data


@CODECS
@given(values=rows, seed=st.integers(0, 100))
def test_what_the_encoder_writes_has_the_origin_that_the_test_above_asks_for(
    name: CodecName, levels: int, values: Values, seed: int
) -> None:
    codec = codec_for(name)
    data = codec.encode(values, rng(seed))
    decoded = codec.decode(data, len(values))

    assert written_towards_zero(name, origin(decoded, data, levels)) == data


def origin(decoded: Values, data: bytes, levels: int) -> Values:
    """Return values that, all rounded towards zero, are written as `data`.

    Every value lies on the grid, but the largest of a block: above `levels` times the next
    smaller scale, which would have been taken otherwise.
    """
    count = len(decoded)
    values = decoded.copy()
    bits = np.frombuffer(data, "<u2", -(-count // BLOCK)).astype(np.uint32)
    for block, scale in enumerate(bits):
        inside = values[block * BLOCK : (block + 1) * BLOCK]
        if scale == 0:
            continue
        smaller = np.array([(scale - 1) << 16], np.uint32).view(np.float32)[0]
        least = np.nextafter(np.float32(levels * np.float64(smaller)), np.float32(np.inf))
        at = np.argmax(np.abs(inside))
        if abs(inside[at]) < least:
            inside[at] = least if inside[at] >= 0 else -least
    return values


@CODECS
def test_blocks_do_not_touch_each_other(name: CodecName, levels: int) -> None:
    small = rng(1).standard_normal(BLOCK).astype(np.float32)
    both = np.concatenate([np.full(BLOCK, 1e6, np.float32), small])

    assert np.abs(round_trip(name, both)[BLOCK:] - small).max() < 4 / levels


# Examples


def test_the_literal_bytes_of_int8() -> None:
    values = np.array([127, -127, 1, 0], np.float32)

    assert codec_for("int8").encode(values, rng()).hex() == "803f7f810100"


def test_the_literal_bytes_of_int4() -> None:
    values = np.array([7, -7, 1], np.float32)

    assert codec_for("int4").encode(values, rng()).hex() == "803f9701"


@CODECS
def test_values_on_the_grid_are_not_changed(name: CodecName, levels: int) -> None:
    values = np.resize(np.arange(-levels, levels + 1), 300).astype(np.float32)
    values[::BLOCK] = levels

    assert np.array_equal(round_trip(name, values), values)


@CODECS
@pytest.mark.parametrize("size", [2.0**-149, 1e-40, 1e-9, 1.0, 7 * 2.0**120])
def test_any_magnitude_is_carried(name: CodecName, levels: int, size: float) -> None:
    values = np.full(BLOCK * 200, size, np.float32)
    mean = float(round_trip(name, values).mean(dtype=np.float64))

    tolerance = SMALLEST / np.sqrt(len(values)) + size * 2.0**-7 / levels
    assert abs(mean - size) < 3 * tolerance


@CODECS
def test_the_last_block_may_be_short(name: CodecName, levels: int) -> None:
    for count in (1, 2, 63, 64, 65, 129):
        values = rng(count).standard_normal(count).astype(np.float32)
        assert np.abs(round_trip(name, values) - values).max() < 4.5 / levels


# Refusals


@CODECS
def test_an_encoder_needs_its_randomness(name: CodecName, levels: int) -> None:
    with pytest.raises(ValueError, match=f"{name} rounds at random: give it an rng"):
        codec_for(name).encode(np.ones(3, np.float32), None)


@CODECS
def test_values_whose_scale_would_overflow_are_refused(name: CodecName, levels: int) -> None:
    largest = np.array([1, -levels * 2.0**120], np.float32)

    assert round_trip(name, largest)[1] == largest[1]
    with pytest.raises(ConfigError, match=f'"{name}" holds values up to .*: take "fp32", and a'):
        codec_for(name).encode(np.nextafter(largest, np.float32(-np.inf)), rng())
