import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anabranch.edge.export.codes import (
    block_for,
    dequantize_blocks,
    dequantize_channels,
    pack,
    quantize_blocks,
    quantize_channels,
    quantize_pairs,
    unpack,
)

values = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
matrices = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70), elements=values
)
codes = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 6), st.integers(1, 6).map(lambda n: 2 * n)),
    elements=st.integers(0, 15),
)


@given(codes)
def test_unpack_undoes_pack(array: np.ndarray) -> None:
    packed = pack(array)
    assert packed.shape == (array.shape[0], array.shape[1] // 2)
    assert np.array_equal(unpack(packed), array)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_every_byte_is_two_codes(array: np.ndarray) -> None:
    assert np.array_equal(pack(unpack(array)), array)


def test_the_first_code_is_in_the_low_half_of_a_byte() -> None:
    assert pack(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("bad", [[[1, 2, 3]], [[1, 16]]])
def test_odd_numbers_of_codes_and_larger_ones_are_refused(bad: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="even number of codes 0 to 15"):
        pack(np.array(bad, np.uint8))


@given(matrices, st.sampled_from([0, 1]), st.sampled_from([63, 127]))
def test_channels_are_off_by_half_a_step_at_most(
    weights: np.ndarray, axis: int, limit: int
) -> None:
    q, scales = quantize_channels(weights, axis, limit)
    assert q.dtype == np.int8
    assert np.abs(q.astype(int)).max() <= limit
    assert scales.shape == (weights.shape[axis],)
    assert (scales > 0).all()
    off = np.abs(dequantize_channels(q, scales, axis) - weights)
    assert (off <= np.expand_dims(scales, 1 - axis) * 0.5001).all()


@given(matrices, st.sampled_from([16, 32, 128]))
def test_blocks_are_no_worse_than_rounding_to_the_largest_value(
    weights: np.ndarray, block: int
) -> None:
    packed, scales = quantize_blocks(weights, block)
    rows, columns = weights.shape
    count = -(-columns // block)
    assert packed.shape == (rows, count * block // 2)
    assert scales.shape == (rows, count)
    got = dequantize_blocks(packed, scales, columns)
    assert got.shape == weights.shape
    for b in range(count):
        part = weights[:, b * block : (b + 1) * block]
        off = got[:, b * block : (b + 1) * block] - part
        largest = np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1)
        step = np.where(largest, largest / np.float32(-8), 1)
        plain = np.rint(part / step).clip(-8, 7) * step - part
        assert (np.square(off).sum(1) <= np.square(plain).sum(1) * 1.0001 + 1e-9).all()


def test_shrinking_the_scale_pays_off_for_a_block_with_one_outlier() -> None:
    weights = np.full((1, 32), 0.45, np.float32)
    weights[0, 0] = 5.0
    got = dequantize_blocks(*quantize_blocks(weights, 32), 32)
    step = np.float32(5.0) / 8
    plain = np.rint(weights / -step).clip(-8, 7) * -step
    assert np.square(got - weights).sum() < np.square(plain - weights).sum()


def test_the_largest_value_of_a_lone_block_is_exact_and_zeros_stay_zero() -> None:
    weights = np.zeros((3, 20), np.float32)
    weights[1, 3], weights[2, 19] = -2.5, 3.25
    packed, scales = quantize_blocks(weights, 16)
    assert np.array_equal(dequantize_blocks(packed, scales, 20), weights)
    assert scales[0].tolist() == [1, 1]
    assert unpack(packed)[:, 20:].tolist() == [[8] * 12] * 3  # what fills a block up is zero


def test_rows_beyond_one_slice_are_coded_alike() -> None:
    rng = np.random.default_rng(0)
    weights = np.tile(rng.normal(size=(10, 16)).astype(np.float32), (500, 1))  # 5000 rows
    packed, scales = quantize_blocks(weights, 16)
    assert np.array_equal(packed, np.tile(packed[:10], (500, 1)))
    assert np.array_equal(scales, np.tile(scales[:10], (500, 1)))


@pytest.mark.parametrize(
    ("columns", "block"), [(1, 16), (16, 16), (17, 32), (24, 32), (100, 128), (384, 128)]
)
def test_block_is_a_power_of_two_that_covers_short_rows(columns: int, block: int) -> None:
    assert block_for(columns, 128) == block


TINY = np.float32(1e-44)  # below the least normal number: a scale of it would be 0


@pytest.mark.parametrize("limit", [63, 127])
def test_a_channel_too_small_for_a_scale_decodes_to_zeros(limit: int) -> None:
    weights = np.array([[TINY, -TINY], [1.0, 0.5]], np.float32)
    q, scales = quantize_channels(weights, 0, limit)
    assert scales[0] == 1
    assert not q[0].any()
    assert np.abs(dequantize_channels(q, scales, 0)[0] - weights[0]).max() <= scales[0] / 2


def test_a_block_too_small_for_a_scale_decodes_to_zeros() -> None:
    weights = np.zeros((1, 32), np.float32)
    weights[0, 3], weights[0, 16:] = TINY, 0.5
    packed, scales = quantize_blocks(weights, 16)
    assert scales[0, 0] == 1
    got = dequantize_blocks(packed, scales, 32)
    assert not got[0, :16].any()
    assert np.abs(got[0, 16:] - 0.5).max() < 1e-6


@pytest.mark.parametrize("factor", [1e-25, 1e25, 4e37])
def test_blocks_of_any_magnitude_are_coded_alike(factor: float) -> None:
    weights = np.random.default_rng(0).uniform(-1, 1, (4, 64)).astype(np.float32)
    expected = dequantize_blocks(*quantize_blocks(weights, 16), 64)
    packed, scales = quantize_blocks(weights * np.float32(factor), 16)
    got = dequantize_blocks(packed, scales, 64) / np.float32(factor)
    assert np.abs(got - expected).max() < 1e-5


def worst_pair(codes: np.ndarray) -> int:
    """The largest sum of two neighbours' products with bytes 0 … 255, of either sign."""
    padded = np.zeros((len(codes) + len(codes) % 2, codes.shape[1]), np.int64)
    padded[: len(codes)] = codes
    pairs = padded.reshape(-1, 2, codes.shape[1])
    sums = [np.maximum(sign * pairs, 0).sum(axis=1) for sign in (1, -1)]
    return 255 * int(np.maximum(*sums).max())


@given(matrices)
def test_pairs_of_products_fit_into_16_bits_and_codes_are_within_half_a_step(
    array: np.ndarray,
) -> None:
    codes, scales = quantize_pairs(array)

    assert codes.dtype == np.int8
    assert worst_pair(codes) <= 255 * 128 < 2**15
    error = np.abs(array.astype(np.float64) - codes.astype(np.float64) * scales)
    assert (error <= scales * np.float64(0.50001)).all()
    seven = quantize_channels(array, 1, 63)[1]
    assert ((scales <= 1.01 * seven) | (seven < 1e-30)).all()  # never coarser than 7 bits


def test_neighbours_of_one_sign_share_the_128_and_others_do_not() -> None:
    weights = np.array([[1, 1, 1, 0], [1, -1, 0, 0], [0, 0, 0, 0]], np.float32)
    codes, scales = quantize_pairs(weights)

    assert codes.T.tolist() == [[64, 64, 0], [127, -127, 0], [127, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(scales, [2 / 127, 1 / 127, 1 / 127, 1], rtol=1e-6)
