"""Write one file per attack on the wire format: what is sent, which error it must get.

Built with json, struct and hashlib alone, from docs/wire-format.md and not from our encoder.
Run it after adding an attack:  python tests/protocols/attacks/create.py
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
BASE = "b" * 64
MALFORMED, INCOMPATIBLE = "MalformedMessage", "IncompatibleAdapter"


class Attack(NamedTuple):
    """One hostile frame and the answer it deserves."""

    error: str
    match: str  # regular expression, found in the message
    comment: str
    data: bytes


def spec(**changes: Any) -> dict[str, Any]:
    """Return the spec of an honest frame, with some fields replaced."""
    honest = {
        "base": BASE,
        "tokenizer": "",
        "rank": 1,
        "alpha": 2.0,
        "targets": ["q"],
        "tensors": [["head.bias", [2]], ["q.lora_A.weight", [1, 3]], ["q.lora_B.weight", [2, 1]]],
    }
    return honest | changes


def header(*, kind: str = "delta", examples: Any = 7, **changes: Any) -> bytes:
    """Return the header of an honest frame, with some fields replaced."""
    fields = {"kind": kind, "spec": spec(**changes), "examples": examples}
    return json.dumps(fields, separators=(",", ":")).encode()


VALUES = struct.pack("<7f", 1.0, -2.0, 0.5, 0.25, -0.125, 3.0, 0.0)


def frame(
    head: bytes | None = None, body: bytes = VALUES, *, magic: bytes = b"ABA1", tail: bytes = b""
) -> bytes:
    """Return a frame with a right length and a right checksum, whatever is in it."""
    head = header() if head is None else head
    data = magic + struct.pack("<I", len(head)) + head + body + tail
    return data + hashlib.sha256(data).digest()


def tensors(*entries: list[Any]) -> bytes:
    """Return a header without factors, with these tensors."""
    return header(rank=0, targets=[], tensors=list(entries))


def framing() -> dict[str, Attack]:
    """Lie about magic, lengths and the checksum."""
    honest = frame()
    return {
        "empty": Attack(MALFORMED, "expected magic", "no bytes at all", b""),
        "magic-only": Attack(MALFORMED, "truncated", "cut after the magic", b"ABA1"),
        "other-magic": Attack(MALFORMED, "expected magic b'ABA1'", "", frame(magic=b"PK\3\4")),
        "pickle": Attack(MALFORMED, "expected magic", "a pickle", b"\x80\x04cos\nsystem\n."),
        "header-of-4-gib": Attack(
            MALFORMED, "at most 1048576", "length field 0xffffffff", b"ABA1" + b"\xff" * 60
        ),
        "header-beyond-the-end": Attack(
            MALFORMED, "truncated", "header longer than the frame", b"ABA1\x00\x10\0\0" + b"{" * 64
        ),
        "truncated": Attack(MALFORMED, "damaged or cut", "last 5 bytes missing", honest[:-5]),
        "extended": Attack(MALFORMED, "damaged or cut", "bytes after the checksum", honest + b"\0"),
        "damaged": Attack(
            MALFORMED, "damaged or cut", "one bit of one value", _flip(honest, len(honest) - 40)
        ),
        "body-too-short": Attack(
            MALFORMED, "promises", "one value missing, checksum right", frame(body=VALUES[:-4])
        ),
        "body-too-long": Attack(
            MALFORMED, "promises", "smuggled bytes, checksum right", frame(tail=b"hidden")
        ),
        "float64": Attack(
            MALFORMED, "promises", "wrong dtype", frame(body=struct.pack("<7d", *range(7)))
        ),
        "float16": Attack(
            MALFORMED, "promises", "wrong dtype", frame(body=struct.pack("<7e", *range(7)))
        ),
        "terabytes": Attack(
            MALFORMED,
            "promises",
            "6 TB in a frame of 300 bytes",
            frame(tensors(["w", [1_000_000, 1_500_000]])),
        ),
        "shape-overflow": Attack(
            MALFORMED,
            "promises",
            "product of the shape is 0 modulo 2^64: eight times 2^30, and 4 bytes each",
            frame(tensors(["w", [2**30] * 8]), b""),
        ),
    }


def json_tricks() -> dict[str, Attack]:
    """Write the header as no encoder of ours would."""
    honest = header()
    canonical = "not canonical"
    return {
        "no-json": Attack(MALFORMED, "header: ", "", frame(b"\x00\x01\x02")),
        "empty-header": Attack(MALFORMED, "header: ", "", frame(b"")),
        "list": Attack(MALFORMED, "Expected `object`", "", frame(b"[]")),
        "deep-nesting": Attack(MALFORMED, "header: ", "300 arrays", frame(b"[" * 300)),
        "deep-nesting-in-a-field": Attack(
            MALFORMED, "header: ", "", frame(b'{"kind":"delta","spec":{"tensors":' + b"[" * 300)
        ),
        "bad-utf-8": Attack(
            MALFORMED, "utf-8", "", frame(honest.replace(b"head.bias", b"head\xff\xfe.b"))
        ),
        "lone-surrogate": Attack(
            MALFORMED, "header: ", "", frame(honest.replace(b"head.bias", b"head\\ud800"))
        ),
        "blank": Attack(MALFORMED, canonical, "", frame(honest.replace(b":7}", b": 7}"))),
        "tail-of-blanks": Attack(MALFORMED, canonical, "", frame(honest + b" ")),
        "escape": Attack(
            MALFORMED, canonical, "h as an escape", frame(honest.replace(b"head", b"\\u0068ead"))
        ),
        "alpha-as-integer": Attack(
            MALFORMED, canonical, "2 for 2.0", frame(honest.replace(b":2.0", b":2"))
        ),
        "alpha-with-exponent": Attack(
            MALFORMED, canonical, "", frame(honest.replace(b":2.0", b":0.2e1"))
        ),
        "key-order": Attack(
            MALFORMED,
            canonical,
            "",
            frame(json.dumps(json.loads(honest), sort_keys=True, separators=(",", ":")).encode()),
        ),
        "duplicate-key": Attack(
            MALFORMED, canonical, "last one wins", frame(b'{"examples":3,' + honest[1:])
        ),
        "dimension-as-float": Attack(
            MALFORMED, "Expected `int`", "2.0 for 2", frame(honest.replace(b"[2]", b"[2.0]"))
        ),
        "dimension-as-text": Attack(
            MALFORMED, "Expected `int`", "", frame(honest.replace(b"[2]", b'["2"]'))
        ),
        "unknown-field": Attack(
            MALFORMED, "unknown field", "", frame(honest[:-1] + b',"note":"hi"}')
        ),
        "missing-field": Attack(
            MALFORMED, "missing required field", "", frame(honest.replace(b',"examples":7', b""))
        ),
        "unknown-kind": Attack(MALFORMED, "Invalid enum", "", frame(header(kind="model"))),
        "control-characters": Attack(
            MALFORMED,
            r"unknown field `\\x1b",
            "terminal escapes must not reach a log",
            frame(honest[:-1] + b',"\\u001b[2J":1}'),
        ),
        "megabyte-of-name": Attack(
            MALFORMED,
            "^.{1,240}$",
            "the error stays short",
            frame(honest[:-1] + b',"' + b"x" * 2000 + b'":1}'),
        ),
        "nan-as-alpha": Attack(MALFORMED, "header: ", "", frame(honest.replace(b":2.0", b":NaN"))),
        "infinite-alpha": Attack(
            MALFORMED, "header: ", "1e999", frame(honest.replace(b":2.0", b":1e999"))
        ),
        "adapter-with-examples": Attack(
            MALFORMED, "examples 0, got 7", "", frame(header(kind="adapter"))
        ),
        "negative-examples": Attack(MALFORMED, ">= 0", "", frame(header(examples=-1))),
        "examples-beyond-2-53": Attack(MALFORMED, "<= ", "", frame(header(examples=2**53))),
        "examples-as-text": Attack(MALFORMED, "Expected `int`", "", frame(header(examples="7"))),
    }


def hostile_specs() -> dict[str, Attack]:
    """Describe adapters that cannot exist."""
    a, b, bias = ["q.lora_A.weight", [1, 3]], ["q.lora_B.weight", [2, 1]], ["head.bias", [2]]
    cases: dict[str, tuple[str, str, bytes]] = {
        "zero-dimension": ("expected at most 8 dimensions", "", tensors(["w", [7, 0]])),
        "negative-dimension": ("expected at most 8 dimensions", "", tensors(["w", [-1, -7]])),
        "huge-dimension": ("expected at most 8 dimensions", "2^31", tensors(["w", [2**31]])),
        "nine-dimensions": ("expected at most 8 dimensions", "", tensors(["w", [1] * 9])),
        "no-tensors": ("at least one", "", tensors()),
        "duplicate-tensor": ("'w' appears twice", "", tensors(["w", [3]], ["w", [4]])),
        "unsorted-tensors": ("'a' must come before 'b'", "", tensors(["b", [3]], ["a", [4]])),
        "empty-name": ("'' is no name", "", tensors(["", [7]])),
        "long-name": ("is no name", "257 characters", tensors(["w" * 257, [7]])),
        "name-with-newline": (r"'w\\n' is no name", "$ would match it", tensors(["w\n", [7]])),
        "name-as-path": ("is no name", "becomes a key of a file", tensors(["../../w", [7]])),
        "missing-factor": ("q.lora_B.weight: missing", "", header(tensors=[bias, a])),
        "orphan-factor": ("is not a target", "", header(targets=[], tensors=[bias, a, b])),
        "missing-target": ("k.lora_A.weight: missing", "", header(targets=["k", "q"])),
        "target-twice": ("'q' appears twice", "", header(targets=["q", "q"])),
        "unsorted-targets": ("must come before", "", header(targets=["q", "k"])),
        "other-rank": ("rank 2, got", "factors of rank 1", header(rank=2)),
        "factor-of-three-dimensions": (
            r"\(rank, in\)",
            "",
            header(tensors=[bias, ["q.lora_A.weight", [1, 3, 1]], b]),
        ),
        "rank-0-with-target": ("rank 0", "", header(rank=0)),
        "negative-rank": ("rank: expected 0", "", header(rank=-1)),
        "alpha-0": ("alpha: expected a number > 0", "", header(alpha=0.0)),
        "negative-alpha": ("alpha: expected a number > 0", "", header(alpha=-2.0)),
        "short-base": ("base: expected 64 hex digits", "", header(base="abc")),
        "upper-case-base": ("base: expected 64 hex digits", "one form", header(base="B" * 64)),
        "odd-tokenizer": ("tokenizer: expected 64", "", header(tokenizer="\x1b[31m")),
    }
    return {
        name: Attack(INCOMPATIBLE, match, comment, frame(head))
        for name, (match, comment, head) in cases.items()
    }


def hostile_values() -> dict[str, Attack]:
    """Send values that would poison a sum."""
    bad = {"nan": "nan", "infinite": "inf", "minus-infinite": "-inf"}
    return {
        name: Attack(
            INCOMPATIBLE,
            "head.bias: 1 of 2 values are NaN or infinite",
            "",
            frame(body=struct.pack("<f", float(value)) + VALUES[4:]),
        )
        for name, value in bad.items()
    } | {
        "nan-with-payload": Attack(
            INCOMPATIBLE,
            "q.lora_B.weight: 1 of 2 values",
            "a signalling NaN in the last value",
            frame(body=VALUES[:-4] + b"\x01\x00\x80\x7f"),
        )
    }


def attacks() -> dict[str, Attack]:
    """Return every attack by name."""
    return framing() | json_tricks() | hostile_specs() | hostile_values()


def text(attack: Attack) -> str:
    """Return the content of an attack's file: three fields, a blank line, hex."""
    fields = f"expect: {attack.error}\nmatch: {attack.match}\ncomment: {attack.comment}".rstrip()
    lines = attack.data.hex("\n", -32)  # 32 bytes to a line
    return f"{fields}\n\n{lines}\n"


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def main() -> None:
    """Write every attack into its file."""
    for name, attack in attacks().items():
        (FOLDER / f"{name}.txt").write_text(text(attack))


if __name__ == "__main__":
    main()
