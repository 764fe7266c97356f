"""The wire format of Protocol Buffers, read without a library and without trust.

    message   a sequence of fields
    field     varint (number << 3 | wire type), then its payload
    wire type 0  varint: 7 bits a byte, least significant first, the top bit says "more"
              1  8 bytes      2  varint length, then so many bytes      5  4 bytes

(https://protobuf.dev/programming-guides/encoding/.) Stricter than a library, so that two readers
cannot understand one file in two ways: fields that the schema does not name, other wire types
(groups among them), a singular field that comes twice and numbers with superfluous bytes are
refused. A payload is a span of the data and is never copied: memory does not grow with lengths
that a file only claims.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from anabranch.protocols.errors import BundleError

Data = bytes | mmap.mmap

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELD = (1 << 29) - 1
CHUNK = 1 << 20  # bytes looked at together
_SIZES = {FIXED64: 8, FIXED32: 4}


class Field(NamedTuple):
    """One field of a message; its payload is data[start:end], and `value` if it is a varint."""

    number: int
    wire: int
    at: int  # of its first byte, the tag
    start: int
    end: int
    value: int = 0  # unsigned, < 2⁶⁴


class Kind(NamedTuple):
    """What a schema says about a field. A repeated number may come packed, in one BYTES field."""

    name: str
    wire: int
    repeated: bool = False


Schema = Mapping[int, Kind]
Message = dict[str, list[Field]]


def read(data: Data, start: int, end: int, schema: Schema, what: str) -> Message:
    """Return the fields of the message `what` in data[start:end] by name, in the file's order.

    Raises BundleError when the bytes break the wire format or the schema.
    """
    found: Message = {}
    for field in fields(data, start, end, what):
        kind = schema.get(field.number)
        if kind is None:
            raise BundleError(f"protobuf: field {field.number} of {what} is unknown")
        packed = kind.repeated and kind.wire != BYTES and field.wire == BYTES
        if field.wire != kind.wire and not packed:
            raise BundleError(
                f"protobuf: {what}.{kind.name} has wire type {field.wire}, expected {kind.wire}"
            )
        already = found.setdefault(kind.name, [])
        if already and not kind.repeated:
            raise BundleError(f"protobuf: {what}.{kind.name} appears twice")
        already.append(field)
    return found


def fields(data: Data, start: int, end: int, what: str) -> Iterator[Field]:
    """Yield the fields in data[start:end], or raise BundleError where they break the format."""
    at = start
    while at < end:
        tag, payload = varint(data, at, end, what)
        number, wire = tag >> 3, tag & 7
        if not 1 <= number <= MAX_FIELD:
            raise BundleError(f"protobuf: {what} has a field with number {number}")
        value = 0
        if wire == VARINT:
            value, stop = varint(data, payload, end, what)
        elif wire == BYTES:
            length, payload = varint(data, payload, end, what)
            stop = payload + length
        elif wire in _SIZES:
            stop = payload + _SIZES[wire]
        else:
            raise BundleError(f"protobuf: {what} has a field of wire type {wire}")
        if stop > end:
            raise BundleError(
                f"protobuf: field {number} of {what} ends {stop - end} bytes too late"
            )
        yield Field(number, wire, at, payload, stop, value)
        at = stop


def varint(data: Data, at: int, end: int, what: str) -> tuple[int, int]:
    """Return the number at `at` and where it ends, or raise BundleError."""
    result = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise BundleError(f"protobuf: {what} ends within a number")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            if result >= 1 << 64 or (byte == 0 and shift):
                raise BundleError(f"protobuf: {what} has a number in no canonical form")
            return result, at
    raise BundleError(f"protobuf: {what} has a number of more than 10 bytes")


def signed(value: int) -> int:
    """Return a varint as int64: two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value


def text(data: Data, field: Field, what: str) -> str:
    """Return a string field, or raise BundleError if it is no UTF-8."""
    try:
        return data[field.start : field.end].decode()
    except UnicodeDecodeError:
        raise BundleError(f"protobuf: {what} is no UTF-8 text") from None


def integers(data: Data, found: list[Field], what: str) -> list[int]:
    """Return a repeated varint field, packed or not, as int64."""
    result = []
    for field in found:
        if field.wire == VARINT:
            result.append(signed(field.value))
            continue
        at = field.start
        while at < field.end:
            value, at = varint(data, at, field.end, what)
            result.append(signed(value))
    return result


def count(data: Data, found: list[Field], size: int | None, what: str) -> int:
    """Return how many numbers a repeated field holds, of `size` bytes each or varints (None).

    Memory does not grow with their number.
    """
    total = 0
    for field in found:
        length = field.end - field.start
        if field.wire != BYTES:
            total += 1
        elif size is not None:
            if length % size:
                raise BundleError(f"protobuf: {what} has {length} bytes, no multiple of {size}")
            total += length // size
        elif length:
            if data[field.end - 1] >= 0x80:
                raise BundleError(f"protobuf: {what} ends within a number")
            total += _ends(data, field.start, field.end)
    return total


def tag(number: int, wire: int) -> bytes:
    """Return the tag of a field."""
    return encode_varint(number << 3 | wire)


def encode_varint(value: int) -> bytes:
    """Return an unsigned number in its one canonical form."""
    if not 0 <= value < 1 << 64:
        raise ValueError(f"expected 0 to 2⁶⁴ − 1, got {value}")
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def encode_bytes(number: int, payload: bytes) -> bytes:
    """Return a field of wire type 2."""
    return tag(number, BYTES) + encode_varint(len(payload)) + payload


def _ends(data: Data, start: int, end: int) -> int:
    """Return how many bytes of data[start:end] end a varint."""
    parts = (data[at : min(at + CHUNK, end)] for at in range(start, end, CHUNK))
    return sum(int(np.count_nonzero(np.frombuffer(part, np.uint8) < 0x80)) for part in parts)
