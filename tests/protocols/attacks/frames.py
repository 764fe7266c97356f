"""Frames built with json, struct and hashlib alone: from docs/wire-format.md, not our encoder."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any, NamedTuple

BASE = "b" * 64
MALFORMED, INCOMPATIBLE = "MalformedMessage", "IncompatibleAdapter"
WHOLE = {"factors": "both", "ranks": None, "dense": True}
KEEP = 0.5  # of top-k


class Attack(NamedTuple):
    """One hostile frame, who reads it, and the answer it deserves."""

    error: str
    match: str  # regular expression, found in the message
    comment: str
    data: bytes
    reader: str = "adapter"  # or "delta" and the codec that is expected


def spec(**changes: Any) -> dict[str, Any]:
    """Return the spec of an honest adapter, with some fields replaced."""
    honest = {
        "base": BASE,
        "tokenizer": "",
        "rank": 1,
        "alpha": 2.0,
        "targets": ["q"],
        "tensors": [["head.bias", [2]], ["q.lora_A.weight", [1, 3]], ["q.lora_B.weight", [2, 1]]],
    }
    return honest | changes


def compact(fields: Any) -> bytes:
    """Return JSON without blanks."""
    return json.dumps(fields, separators=(",", ":")).encode()


DIGEST = hashlib.sha256(compact(spec())).hexdigest()


def header(*, kind: str = "adapter", part: Any = WHOLE, **changes: Any) -> bytes:
    """Return the header of an honest adapter, with some fields of its spec replaced."""
    return compact({"kind": kind, "spec": spec(**changes), "part": part})


def part(**changes: Any) -> bytes:
    """Return the header of an honest adapter, with some fields of its part replaced."""
    return header(part=WHOLE | changes)


def delta(**changes: Any) -> bytes:
    """Return the header of an honest delta, with some fields replaced or added."""
    honest = {
        "kind": "delta", "spec": DIGEST, "examples": 7, "steps": 3, "part": WHOLE, "codec": "fp32",
    }  # fmt: skip
    return compact(honest | changes)


VALUES = struct.pack("<7f", 1.0, -2.0, 0.5, 0.25, -0.125, 3.0, 0.0)


def frame(
    head: bytes | None = None, body: bytes = VALUES, *, magic: bytes = b"ABA1", tail: bytes = b""
) -> bytes:
    """Return a frame with a right length and a right checksum, whatever is in it."""
    head = header() if head is None else head
    data = magic + struct.pack("<I", len(head)) + head + body + tail
    return data + hashlib.sha256(data).digest()


def block(scale: int, codes: bytes) -> bytes:
    """Return one block: the bits of its scale (0x3f80 is 1.0), its codes as bytes."""
    return struct.pack("<H", scale) + codes


ONE = 0x3F80
FP16 = struct.pack("<7e", 1.0, -2.0, 0.5, 0.25, -0.125, 3.0, 0.0)
INT8 = (block(ONE, b"\x7f\x81"), block(ONE, b"\x7e\x00\x01"), block(0, b"\0\0"))
INT4 = (block(ONE, b"\x97"), block(ONE, b"\x06\x01"), block(0, b"\0"))
TOP_K = (
    struct.pack("<If", 1, -2.0),
    struct.pack("<IIff", 0, 2, 0.5, -0.25),
    struct.pack("<If", 0, 0.0),
)
BODIES = {"fp32": VALUES, "fp16": FP16} | {
    name: b"".join(body) for name, body in (("int8", INT8), ("int4", INT4), ("top-k", TOP_K))
}


def coded(codec: str, body: bytes | tuple[bytes, ...] | None = None, **changes: Any) -> bytes:
    """Return an honest delta in a codec, with another body or other header fields."""
    more = {"keep": KEEP} if codec == "top-k" else {}
    body = BODIES[codec] if body is None else body
    body = body if isinstance(body, bytes) else b"".join(body)
    return frame(delta(**({"codec": codec} | more | changes)), body)
