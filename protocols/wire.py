"""Bytes of one adapter or delta (specification: docs/wire-format.md).

    offset  size  field
    0       4     magic  b"ABA1"
    4       4     N: length of the header, u32 little-endian, at most MAX_HEADER
    8       N     header, JSON: {"kind": "adapter" | "delta", "spec": AdapterSpec, "examples": n}
    8+N     4·V   V values, float32 little-endian: the spec's tensors, in its order, C order
    8+N+4V  32    SHA-256 of everything before it

One value has exactly one encoding, so the SHA-256 of a frame is its identity. The decoder
needs memory in proportion to the bytes it was given, whatever the header promises, and
accepts nothing that the encoder would not write.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import Adapter, Delta, checked
from anabranch.protocols.errors import MalformedMessage
from anabranch.protocols.spec import AdapterSpec, require_same_spec, shown

MAGIC = b"ABA1"
MAX_HEADER = 1 << 20  # bytes: names and shapes of some 10,000 tensors
MAX_FRAME = 1 << 30  # bytes; rank 64 on every linear layer of a 7B decoder needs 640 MB
MAX_EXAMPLES = 2**53 - 1  # what every JSON reader holds exactly
DIGEST_BYTES = 32


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: Literal["adapter", "delta"]
    spec: AdapterSpec
    examples: Annotated[int, msgspec.Meta(ge=0, le=MAX_EXAMPLES)]  # 0 for an adapter


def encode(value: Adapter | Delta) -> bytes:
    """Return the only encoding of `value`.

    Raises IncompatibleAdapter if its arrays were changed into something a decoder refuses
    (NaN, another shape), and ValueError if the frame would be larger than the format allows.
    """
    head = msgspec.json.encode(_header_of(value))
    if len(head) > MAX_HEADER:
        raise ValueError(f"header: {len(head)} bytes, at most {MAX_HEADER} fit into a frame")
    size = 8 + len(head) + 4 * value.spec.num_values + DIGEST_BYTES
    if size > MAX_FRAME:
        raise ValueError(f"frame: {size} bytes, at most {MAX_FRAME} can be sent")
    arrays = checked(value.spec, value.arrays)
    frame = bytearray(MAGIC + len(head).to_bytes(4, "little") + head)
    for array in arrays.values():
        frame += array.astype("<f4", copy=False).tobytes()
    frame += hashlib.sha256(frame).digest()
    return bytes(frame)


def decode(data: bytes) -> Adapter | Delta:
    """Return the adapter or delta in one frame.

    Raises:
        MalformedMessage: the bytes break a rule of the format; the message says which.
        IncompatibleAdapter: the format is kept, but the spec contradicts itself or a value is
            NaN or infinite.
    """
    header, start = _read_header(data)
    return _value(header, data, start)


def decode_adapter(data: bytes, expected: AdapterSpec | None = None) -> Adapter:
    """Return the adapter in a frame; IncompatibleAdapter if its spec is not `expected`."""
    header, start = _read_header(data)
    _require_kind("adapter", header, expected)
    value = _value(header, data, start)
    assert isinstance(value, Adapter)  # for the type checker: _require_kind has decided it
    return value


def decode_delta(data: bytes, expected: AdapterSpec) -> Delta:
    """Return the delta in a frame; IncompatibleAdapter if its spec is not `expected`."""
    header, start = _read_header(data)
    _require_kind("delta", header, expected)
    value = _value(header, data, start)
    assert isinstance(value, Delta)
    return value


def digest(data: bytes) -> str:
    """Return the SHA-256 of a frame in hex: the identity of what is in it."""
    return hashlib.sha256(data).hexdigest()


def _header_of(value: Adapter | Delta) -> _Header:
    if isinstance(value, Adapter):
        return _Header(kind="adapter", spec=value.spec, examples=0)
    examples = int(value.num_examples)
    if not 0 <= examples <= MAX_EXAMPLES:
        raise ValueError(f"num_examples: expected 0 to {MAX_EXAMPLES}, got {examples}")
    return _Header(kind="delta", spec=value.spec, examples=examples)


def _read_header(data: bytes) -> tuple[_Header, int]:
    """Check all that can be checked without reading a tensor; return the header and its end."""
    if len(data) > MAX_FRAME:
        raise MalformedMessage(f"frame of {len(data)} bytes, at most {MAX_FRAME} allowed")
    if data[:4] != MAGIC:
        raise MalformedMessage(f"expected magic {MAGIC!r}, got {data[:4]!r}")
    size = int.from_bytes(data[4:8], "little")
    if size > MAX_HEADER:
        raise MalformedMessage(f"header of {size} bytes, at most {MAX_HEADER} allowed")
    start = 8 + size
    if start + DIGEST_BYTES > len(data):
        raise MalformedMessage(f"header of {size} bytes in a frame of {len(data)}: truncated")
    body = memoryview(data)[:-DIGEST_BYTES]
    if hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        raise MalformedMessage(
            "SHA-256 does not match: the frame was damaged or cut, send it again"
        )
    header = _parse(data[8:start])
    end = start + 4 * header.spec.num_values + DIGEST_BYTES
    if end != len(data):
        raise MalformedMessage(f"header promises {end} bytes, the frame has {len(data)}")
    return header, start


def _parse(head: bytes) -> _Header:
    try:
        header = msgspec.json.decode(head, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"header: {shown(str(error), 200)}") from None
    if header.kind == "adapter" and header.examples:
        raise MalformedMessage(f"header: an adapter has examples 0, got {header.examples}")
    if msgspec.json.encode(header) != head:
        raise MalformedMessage("header is not canonical: key order, blanks, or number format")
    return header


def _require_kind(
    kind: Literal["adapter", "delta"], header: _Header, expected: AdapterSpec | None
) -> None:
    if header.kind != kind:
        raise MalformedMessage(f"expected kind {kind!r}, got {header.kind!r}")
    if expected is not None:
        require_same_spec(expected, header.spec)


def _value(header: _Header, data: bytes, start: int) -> Adapter | Delta:
    """Copy the values once, aligned and writable; each tensor is a view of that copy."""
    count = header.spec.num_values
    flat = np.frombuffer(data, "<f4", count, start).astype(np.float32)
    arrays: dict[str, NDArray[np.float32]] = {}
    at = 0
    for name, shape in header.spec.tensors:
        size = math.prod(shape)
        arrays[name] = flat[at : at + size].reshape(shape)
        at += size
    if header.kind == "adapter":
        return Adapter(header.spec, arrays)
    return Delta(header.spec, arrays, header.examples)
