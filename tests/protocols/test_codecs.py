"""Laws of every codec; what int8 and int4 add is in test_codecs_blocks.py."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from anabranch.protocols.codecs.choose import codec_for
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.codecs.floats import FP16_MAX
from anabranch.protocols.errors import ConfigError, MalformedMessage

NAMES: list[CodecName] = ["fp32", "fp16", "int8", "int4", "top-k"]
Values = NDArray[np.float32]

rows = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-1000, 1000, width=32), fill=st.just(0)
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def row(*values: float) -> Values:
    return np.array(values, np.float32)


# Laws


@pytest.mark.parametrize("name", NAMES)
@given(values=rows)
def test_the_size_follows_from_the_number_of_values(name: CodecName, values: Values) -> None:
    codec = codec_for(name)
    data = codec.encode(values, rng())
    again = codec.decode(data, len(values))

    assert len(data) == codec.size(len(values))
    assert again.shape == values.shape
    assert again.dtype == np.float32
    assert again.flags.writeable
    assert np.isfinite(again).all()


@pytest.mark.parametrize("name", NAMES)
@given(values=rows, seed=st.integers(0, 2**32))
def test_one_seed_gives_one_payload(name: CodecName, values: Values, seed: int) -> None:
    codec, before = codec_for(name), values.copy()

    assert codec.encode(values, rng(seed)) == codec.encode(values, rng(seed))
    assert values.tobytes() == before.tobytes()


@given(values=rows)
def test_fp32_returns_the_same_values_bit_for_bit(values: Values) -> None:
    codec = codec_for("fp32")

    assert codec.decode(codec.encode(values, None), len(values)).tobytes() == values.tobytes()


@given(values=rows)
def test_fp16_is_off_by_at_most_half_an_ulp(values: Values) -> None:
    codec = codec_for("fp16")
    error = np.abs(codec.decode(codec.encode(values, None), len(values)) - values)

    assert (error <= np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)).all()


@given(values=rows, keep=st.floats(0.01, 1))
def test_top_k_sends_the_largest_and_of_equal_ones_the_first(values: Values, keep: float) -> None:
    codec, k = codec_for("top-k", keep), math.ceil(keep * len(values))
    expected = np.zeros_like(values)
    first = np.argsort(-np.abs(values), kind="stable")[:k]
    expected[first] = values[first]

    assert codec.decode(codec.encode(values, None), len(values)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["fp32", "fp16", "top-k"])
@given(values=rows, at=st.integers(0, 10**4), flip=st.integers(0, 255), cut=st.integers(-1, 1))
def test_a_changed_payload_is_refused_or_is_what_the_encoder_writes(
    name: CodecName, values: Values, at: int, flip: int, cut: int
) -> None:
    codec, count = codec_for(name), len(values)
    data = bytearray(codec.encode(values, None))
    data[at % len(data)] ^= flip
    changed = bytes(data) + b"\0" if cut == 1 else bytes(data)[: len(data) + cut]

    try:
        again = codec.decode(changed, count)
    except MalformedMessage:
        return
    assert codec.encode(again, None) == changed


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(max_size=64), count=st.integers(1, 40))
def test_any_bytes_give_values_or_one_error(name: CodecName, data: bytes, count: int) -> None:
    codec = codec_for(name, 0.3)
    for payload in (data, (data * 300)[: codec.size(count)]):
        said = ""
        try:
            assert np.isfinite(codec.decode(payload, count)).all()
        except MalformedMessage as error:
            said = str(error)
        assert len(said) < 100


# Examples


def test_sizes_of_a_factor_of_131072_values() -> None:
    sizes = {name: codec_for(name).size(131_072) for name in NAMES}

    assert sizes == {
        "fp32": 524_288,
        "fp16": 262_144,
        "int8": 135_168,  # 8.25 bits per value
        "int4": 69_632,  # 4.25
        "top-k": 104_864,  # 13,108 values of 8 bytes
    }


def test_the_literal_bytes_of_top_k() -> None:
    data = codec_for("top-k", 0.5).encode(row(0.5, -2, 0, 2), None)

    assert data.hex() == "0100000003000000000000c000000040"


def test_minus_zero_stays_what_it_is_where_values_are_exact() -> None:
    values = row(-0.0, 0.0)
    for name in ("fp32", "fp16", "top-k"):
        codec = codec_for(name, 1.0)
        assert codec.decode(codec.encode(values, None), 2).tobytes() == values.tobytes()


def test_fp16_loses_deltas_that_int8_carries() -> None:
    values = row(1e-9, -2e-9)
    half, int8 = codec_for("fp16"), codec_for("int8")

    assert half.decode(half.encode(values, None), 2).tolist() == [0, 0]
    np.testing.assert_allclose(int8.decode(int8.encode(values, rng()), 2), values, atol=2e-9 / 126)


@pytest.mark.parametrize(
    ("name", "nmse"), [("fp32", 0.0), ("fp16", 4.3e-8), ("int8", 7.2e-5), ("int4", 2.3e-2)]
)
def test_the_error_on_a_normal_vector(name: CodecName, nmse: float) -> None:
    values = rng(1).standard_normal(131_072).astype(np.float32)
    codec = codec_for(name)
    error = codec.decode(codec.encode(values, rng(2)), len(values)) - values.astype(np.float64)

    assert np.mean(error**2) / np.mean(values**2) == pytest.approx(nmse, rel=0.05)


# Refusals


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("values", "says"),
    [
        (row(1, math.nan), "values: expected finite ones, got NaN or infinity"),
        (row(1, -math.inf), "values: expected finite ones"),
        (row(), r"expected one row of float32, got float32 \(0,\)"),
        (np.zeros((2, 2), np.float32), r"got float32 \(2, 2\)"),
        (np.zeros(2), r"got float64 \(2,\)"),
    ],
)
def test_an_encoder_refuses_what_is_no_row_of_finite_values(
    name: CodecName, values: Values, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        codec_for(name).encode(values, rng())


@pytest.mark.parametrize("sign", [1, -1])
def test_fp16_refuses_a_value_that_it_cannot_hold(sign: int) -> None:
    codec = codec_for("fp16")
    largest = row(sign * FP16_MAX)

    assert codec.decode(codec.encode(largest, None), 1).tolist() == largest.tolist()
    with pytest.raises(ConfigError, match='"fp16" holds values up to 65504, got 65505: take "int8'):
        codec.encode(np.append(largest, row(sign * 65_505)), None)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, math.nan])
def test_a_share_of_the_values_is_above_0_and_at_most_1(keep: float) -> None:
    with pytest.raises(ValueError, match=f"keep: expected a share above 0, at most 1, got {keep}"):
        codec_for("top-k", keep)


@pytest.mark.parametrize("name", NAMES)
def test_a_payload_of_another_size_is_refused(name: CodecName) -> None:
    codec = codec_for(name)
    size = codec.size(100)
    for wrong in (b"", bytes(size - 1), bytes(size + 1)):
        with pytest.raises(MalformedMessage, match=f"expected {size} bytes, got {len(wrong)}"):
            codec.decode(wrong, 100)
