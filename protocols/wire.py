"""Bytes of one adapter or delta (specification: docs/wire-format.md).

    offset  size  field
    0       4     magic  b"ABA1"
    4       4     N: length of the header, u32 little-endian, at most MAX_HEADER
    8       N     header, JSON
                  {"kind":"adapter","spec":AdapterSpec,"part":Part}
                  {"kind":"delta","spec":digest,"examples":n,"steps":n,"part":Part,"codec":name}
    8+N     V     values: the tensors of the part, in the spec's order, each in C order; float32
                  in an adapter, else one payload of the codec per tensor; nothing in between
    8+N+V   32    SHA-256 of everything before it

An adapter says what it is made of. A delta does not: its receiver knows the adapter it sent,
the part it asked for and the codec agreed on, and refuses every other delta.

A decoder accepts nothing that the encoder would not write. An adapter and its part have exactly
one encoding, and so has a delta in fp32, fp16 and top-k; int8 and int4 round at random. Decoding
needs memory in proportion to the bytes given (adapters) or to the expected spec (deltas),
whatever the header promises.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.adapter import WHOLE, Adapter, Delta, checked_shapes
from anabranch.protocols.codecs.choose import codec_for
from anabranch.protocols.codecs.codec import Codec, CodecName
from anabranch.protocols.codecs.floats import FP32
from anabranch.protocols.errors import ConfigError, IncompatibleAdapter, MalformedMessage
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec, Shape, require_same_spec, shown

MAGIC = b"ABA1"
MAX_HEADER = 1 << 20  # bytes: names and shapes of some 10,000 tensors
MAX_FRAME = 1 << 30  # bytes; rank 64 on every linear layer of a 7B decoder needs 640 MB
MAX_EXAMPLES = 2**53 - 1  # what every JSON reader holds exactly
MAX_SPREAD = 1024  # an adapter may have so many times the values of its part: rank 1 of 1024
DIGEST_BYTES = 32

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_EXAMPLES)]


class _AdapterHeader(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind",
    tag="adapter",
):  # fmt: skip
    spec: AdapterSpec
    part: Part  # whose values follow; the rest of the adapter is 0


class _DeltaHeader(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind",
    tag="delta",
):  # fmt: skip
    spec: Digest  # AdapterSpec.digest()
    examples: Number
    steps: Number  # 0: not said
    part: Part
    codec: CodecName
    keep: float | msgspec.UnsetType = msgspec.UNSET  # top-k, and only there


_Header = _AdapterHeader | _DeltaHeader


def encode(
    value: Adapter | Delta,
    *,
    codec: CodecName = "fp32",
    keep: float = 0.1,
    rng: np.random.Generator | None = None,
) -> bytes:
    """Return the frame of an adapter (always fp32) or of a delta in `codec`.

    `rng` decides the rounding of int8 and int4. Raises IncompatibleAdapter if arrays were
    changed into something a decoder refuses (NaN, another shape), ConfigError for a value that
    the codec cannot hold, and ValueError if the frame would be larger than the format allows.
    """
    if isinstance(value, Adapter):
        return encode_part(value, WHOLE)
    header = _delta_header(value, codec, keep, value.spec.digest())
    arrays = checked_shapes(value.part.shapes(value.spec), value.arrays)
    return _frame(header, arrays, codec_for(codec, keep), rng)


def size(delta: Delta) -> int:
    """Return the bytes of a delta's frame in full precision, without making it."""
    values = sum(array.size for array in delta.arrays.values())
    return (
        8
        + len(msgspec.json.encode(_delta_header(delta, "fp32", 0.0, "0" * 64)))
        + 4 * values
        + DIGEST_BYTES
    )


def _delta_header(delta: Delta, codec: CodecName, keep: float, spec_digest: str) -> _DeltaHeader:
    for name in ("num_examples", "steps"):
        if not 0 <= getattr(delta, name) <= MAX_EXAMPLES:
            raise ValueError(f"{name}: expected 0 to {MAX_EXAMPLES}, got {getattr(delta, name)}")
    return _DeltaHeader(
        spec=spec_digest,
        examples=int(delta.num_examples),
        steps=int(delta.steps),
        part=delta.part,
        codec=codec,
        keep=float(keep) if codec == "top-k" else msgspec.UNSET,
    )


def encode_part(adapter: Adapter, part: Part) -> bytes:
    """Return the frame of `adapter` with the values of `part` alone: `adapter.only(part)`.

    Raises as `encode`, and ValueError if the adapter has more than MAX_SPREAD times the values
    of the part, or would fill more than a frame.
    """
    shapes = part.shapes(adapter.spec)
    count = sum(math.prod(shape) for shape in shapes.values())
    problem = _too_small(count, adapter.spec.num_values)
    if problem is not None:
        raise ValueError(problem)
    checked_shapes(adapter.spec.shapes, adapter.arrays)
    arrays = part.take(adapter.spec, adapter.arrays) if part != WHOLE else adapter.arrays
    header = _AdapterHeader(spec=adapter.spec, part=part)
    return _frame(header, {name: arrays[name] for name in shapes}, FP32, None)


def decode_adapter(data: bytes, expected: AdapterSpec | None = None) -> Adapter:
    """Return the adapter in a frame, with zeros in what is not in the frame's part.

    Raises:
        MalformedMessage: the bytes break a rule of the format; the message says which.
        IncompatibleAdapter: the format is kept, but the spec contradicts itself, has no such
            part, or is not the `expected` one.
    """
    header, start = _read_header(data)
    if not isinstance(header, _AdapterHeader):
        raise MalformedMessage("expected kind 'adapter', got 'delta'")
    spec, part = header.spec, header.part
    if expected is not None:
        require_same_spec(expected, spec)
    shapes = part.shapes(spec)
    count = sum(math.prod(shape) for shape in shapes.values())
    _require_length(len(data), start + 4 * count + DIGEST_BYTES)
    if part == WHOLE:
        row = np.frombuffer(data, "<f4", count, start).astype(np.float32)
        (adapter,) = Adapter.of_rows(spec, row[None])
        if isinstance(adapter, Adapter):
            return adapter
        return Adapter(spec, _arrays(shapes, FP32, data, start))  # says what is wrong
    problem = _too_small(count, spec.num_values)
    if problem is not None:
        raise MalformedMessage(problem)
    return Adapter(spec, part.spread(spec, _arrays(shapes, FP32, data, start)))


def decode_delta(
    data: bytes,
    spec: AdapterSpec,
    part: Part = WHOLE,
    *,
    codec: CodecName = "fp32",
    keep: float = 0.1,
) -> Delta:
    """Return the delta in a frame: of `spec` and `part`, in `codec`.

    Raises:
        MalformedMessage: the bytes break a rule of the format, or are in another codec.
        IncompatibleAdapter: the delta is of another adapter or part.
    """
    header, start = _read_header(data)
    if not isinstance(header, _DeltaHeader):
        raise MalformedMessage("expected kind 'delta', got 'adapter'")
    if header.spec != spec.digest():
        raise IncompatibleAdapter(
            f"delta is of adapter {header.spec[:12]}…, expected {spec.digest()[:12]}…: load the "
            "same base and [lora] on both sides"
        )
    if header.part != part:
        raise IncompatibleAdapter(
            f"delta is of {shown(str(header.part), 120)}, expected {shown(str(part), 120)}"
        )
    share = keep if codec == "top-k" else msgspec.UNSET
    if header.codec != codec or header.keep != share:
        raise MalformedMessage(
            f"delta is in {_named(header.codec, header.keep)}, expected {_named(codec, share)}: "
            "[uplink] is the run's, on every side"
        )
    shapes, chosen = part.shapes(spec), codec_for(codec, keep)
    size = sum(chosen.size(math.prod(shape)) for shape in shapes.values())
    _require_length(len(data), start + size + DIGEST_BYTES)
    arrays = _arrays(shapes, chosen, data, start)
    return Delta(spec, arrays, header.examples, part=part, steps=header.steps)


def digest(data: bytes) -> str:
    """Return the SHA-256 of a frame in hex: the identity of what is in it."""
    return hashlib.sha256(data).hexdigest()


def _frame(
    header: _Header,
    arrays: Mapping[str, NDArray[np.float32]],
    codec: Codec,
    rng: np.random.Generator | None,
) -> bytes:
    """Return magic, header, one payload per array, checksum."""
    head = msgspec.json.encode(header)
    if len(head) > MAX_HEADER:
        raise ValueError(f"header: {len(head)} bytes, at most {MAX_HEADER} fit into a frame")
    size = 8 + len(head) + sum(codec.size(a.size) for a in arrays.values()) + DIGEST_BYTES
    if size > MAX_FRAME:
        raise ValueError(f"frame: {size} bytes, at most {MAX_FRAME} can be sent")
    frame = bytearray(MAGIC + len(head).to_bytes(4, "little") + head)
    for name, array in arrays.items():
        try:
            frame += codec.encode(array.reshape(-1), rng)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    frame += hashlib.sha256(frame).digest()
    return bytes(frame)


def _arrays(
    shapes: Mapping[str, Shape], codec: Codec, data: bytes, start: int
) -> dict[str, NDArray[np.float32]]:
    """Return the arrays whose payloads begin at `start`; the length was checked before."""
    arrays, view = {}, memoryview(data)
    for name, shape in shapes.items():
        count = math.prod(shape)
        end = start + codec.size(count)
        try:
            arrays[name] = codec.decode(view[start:end], count).reshape(shape)
        except MalformedMessage as error:
            raise MalformedMessage(f"{name}: {error}") from None
        start = end
    return arrays


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
    return _parse(data[8:start]), start


def _parse(head: bytes) -> _Header:
    try:
        header: _Header = msgspec.json.decode(head, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"header: {shown(str(error), 200)}") from None
    if msgspec.json.encode(header) != head:
        raise MalformedMessage("header is not canonical: key order, blanks, or number format")
    return header


def _require_length(got: int, promised: int) -> None:
    if got != promised:
        raise MalformedMessage(f"header promises {promised} bytes, the frame has {got}")


def _named(codec: CodecName, keep: float | msgspec.UnsetType) -> str:
    return codec if isinstance(keep, msgspec.UnsetType) else f"{codec} with keep {keep:g}"


def _too_small(count: int, values: int) -> str | None:
    """Return why a part of `count` values is not spread over an adapter of `values`, or None."""
    if values <= MAX_SPREAD * count and 4 * values <= MAX_FRAME:
        return None
    return (
        f"part of {count} values in an adapter of {values}: expected at most {MAX_SPREAD} times "
        f"as many and {MAX_FRAME} bytes, send a larger part"
    )
