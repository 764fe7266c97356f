"""The wire format of Protocol Buffers: one form for each value, and nothing else is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.edge.runtime import protobuf
from anabranch.protocols.errors import BundleError


@given(value=st.integers(0, 2**64 - 1), tail=st.binary(max_size=3))
def test_a_number_has_one_form(value: int, tail: bytes) -> None:
    data = protobuf.encode_varint(value)
    assert protobuf.varint(data + tail, 0, len(data) + len(tail), "x") == (value, len(data))
    padded = data[:-1] + bytes([data[-1] | 0x80, 0])
    with pytest.raises(BundleError, match=r"canonical|more than 10"):
        protobuf.varint(padded, 0, len(padded), "x")


def test_numbers_beyond_64_bits_are_refused() -> None:
    data = b"\xff" * 9 + b"\x02"
    with pytest.raises(BundleError, match="canonical"):
        protobuf.varint(data, 0, len(data), "x")


@given(data=st.binary(max_size=60))
def test_fields_are_read_or_refused_and_never_overlap(data: bytes) -> None:
    at = 0
    try:
        for field in protobuf.fields(data, 0, len(data), "x"):
            assert field.at == at
            assert field.at < field.start <= field.end <= len(data)
            at = field.end
    except BundleError:
        return
    assert at == len(data)


@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_packed_numbers_are_read_and_counted(values: list[int]) -> None:
    payload = b"".join(protobuf.encode_varint(value % 2**64) for value in values)
    data = protobuf.encode_bytes(1, payload)
    schema = {1: protobuf.Kind("n", protobuf.VARINT, repeated=True)}
    found = protobuf.read(data, 0, len(data), schema, "x")["n"]
    assert protobuf.integers(data, found, "n") == values
    assert protobuf.count(data, found, None, "n") == len(values)
