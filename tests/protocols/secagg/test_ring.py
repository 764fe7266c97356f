"""The ring: sums mod 2^b, signed lifts and packed bytes agree with Python's integers."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import MalformedMessage
from anabranch.protocols.secagg.ring import RINGS, Ring, RingArray

rings = st.sampled_from([Ring(bits) for bits in RINGS])
vectors = st.lists(st.integers(-(2**70), 2**70), max_size=20)


def element(ring: Ring, values: list[int]) -> RingArray:
    """Return `values` mod 2^bits, with noise in the byte that a ring of 24 bits has to spare."""
    spare = 8 * ring.dtype.itemsize - ring.bits
    raw = [value % 2**ring.bits + (i % 2**spare << ring.bits) for i, value in enumerate(values)]
    return np.array(raw, ring.dtype)


def centred(ring: Ring, value: int) -> int:
    half = 1 << (ring.bits - 1)
    return (value + half) % (2 * half) - half


# Laws


@given(ring=rings, values=vectors)
def test_what_is_packed_is_unpacked_mod_2_to_the_bits(ring: Ring, values: list[int]) -> None:
    data = ring.pack(element(ring, values))

    assert len(data) == len(values) * ring.width
    assert data == b"".join((v % 2**ring.bits).to_bytes(ring.width, "little") for v in values)
    assert ring.unpack(data, len(values)).tolist() == [v % 2**ring.bits for v in values]


@given(ring=rings, data=st.binary(max_size=96))
def test_every_string_of_the_right_size_is_the_pack_of_what_it_unpacks_to(
    ring: Ring, data: bytes
) -> None:
    data = data[: len(data) // ring.width * ring.width]
    values = ring.unpack(data, len(data) // ring.width)

    assert values.dtype == ring.dtype
    assert ring.pack(values) == data


@given(ring=rings, rows=st.lists(vectors, min_size=1, max_size=6))
def test_a_sum_that_wraps_around_is_right_mod_2_to_the_bits(
    ring: Ring, rows: list[list[int]]
) -> None:
    count = min(map(len, rows))
    total = ring.zeros(count)
    for row in rows:
        total += element(ring, row[:count])
    expected = [sum(row[i] for row in rows) for i in range(count)]

    assert total.dtype == ring.dtype
    assert ring.signed(total).tolist() == [centred(ring, value) for value in expected]


@given(ring=rings, values=vectors)
def test_packing_leaves_the_vector_as_it_was_and_reads_any_stride(
    ring: Ring, values: list[int]
) -> None:
    vector = element(ring, values)
    before = vector.tolist()
    spread = np.repeat(vector, 3)[::3]

    assert ring.pack(spread) == ring.pack(vector)
    assert ring.signed(spread).tolist() == ring.signed(vector).tolist()
    assert vector.tolist() == before


# Examples


@pytest.mark.parametrize(
    ("bits", "width", "dtype"), [(16, 2, "<u2"), (24, 3, "<u4"), (32, 4, "<u4"), (64, 8, "<u8")]
)
def test_the_rings_have_the_bytes_and_dtypes_of_the_table(
    bits: int, width: int, dtype: str
) -> None:
    ring = Ring(bits)  # type: ignore[arg-type]

    assert (ring.width, ring.dtype) == (width, np.dtype(dtype))
    assert ring.zeros(3).tolist() == [0, 0, 0]
    assert ring.zeros(3).dtype == ring.dtype


def test_minus_two_and_the_extremes_of_24_bits() -> None:
    ring = Ring(24)
    values = np.array([-2, 2**23 - 1, -(2**23), 0]).astype(np.uint32)

    assert ring.pack(values).hex(" ", 3) == "feffff ffff7f 000080 000000"
    assert ring.signed(values).tolist() == [-2, 2**23 - 1, -(2**23), 0]


# Refusals


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_vector_of_another_size_is_refused(bits: int, extra: int) -> None:
    ring = Ring(bits)  # type: ignore[arg-type]
    size = 5 * ring.width

    message = f"expected a vector of 5 values of {ring.width} bytes, {size} bytes, got"
    with pytest.raises(MalformedMessage, match=f"{message} {size + extra}"):
        ring.unpack(bytes(size + extra), 5)


def test_another_dtype_or_a_matrix_is_refused() -> None:
    ring = Ring(32)
    for wrong in (np.zeros(3, np.uint16), np.zeros((2, 2), np.uint32)):
        for use in (ring.pack, ring.signed, ring.check):
            with pytest.raises(ValueError, match=f"got {wrong.dtype} of shape"):
                use(wrong)


def test_a_ring_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("16, 24, 32 or 64 bits, got 20")):
        Ring(20)  # type: ignore[arg-type]
