"""Attacks on the frame itself, and on adapters: what a hostile coordinator could send."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.protocols.attacks.frames import (
    INCOMPATIBLE,
    MALFORMED,
    VALUES,
    WHOLE,
    Attack,
    compact,
    frame,
    header,
    part,
)


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
        "blank": Attack(MALFORMED, canonical, "", frame(honest.replace(b":true}", b": true}"))),
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
            frame(compact(dict(sorted(json.loads(honest).items())))),
        ),
        "duplicate-key": Attack(
            MALFORMED, canonical, "last one wins", frame(b'{"part":{},' + honest[1:])
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
            MALFORMED,
            "missing required field `part`",
            "",
            frame(compact(json.loads(honest) | {"part": 0}).replace(b',"part":0', b"")),
        ),
        "unknown-kind": Attack(MALFORMED, "Invalid value 'model'", "", frame(header(kind="model"))),
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
            MALFORMED, "unknown field `examples`", "", frame(honest[:-1] + b',"examples":7}')
        ),
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
            MALFORMED,
            "head.bias: 1 of 2 values are NaN or infinite",
            "",
            frame(body=struct.pack("<f", float(value)) + VALUES[4:]),
        )
        for name, value in bad.items()
    } | {
        "nan-with-payload": Attack(
            MALFORMED,
            "q.lora_B.weight: 1 of 2 values",
            "a signalling NaN in the last value",
            frame(body=VALUES[:-4] + b"\x01\x00\x80\x7f"),
        )
    }


def hostile_parts() -> dict[str, Attack]:
    """Send a part of an adapter that is no part of it."""
    ranks = "ranks: expected different indices from 0 to 0"
    huge = [["q.lora_A.weight", [1, 2**31 - 1]], ["q.lora_B.weight", [2, 1]]]
    only_b = WHOLE | {"factors": "B", "dense": False}
    cases: dict[str, tuple[str, str, str, bytes]] = {
        "rank-out-of-range": (INCOMPATIBLE, ranks, "", part(ranks=[1])),
        "rank-negative": (MALFORMED, ">= 0", "the last one in NumPy", part(ranks=[-1])),
        "rank-twice": (INCOMPATIBLE, ranks, "", part(ranks=[0, 0])),
        "ranks-empty": (INCOMPATIBLE, ranks, "", part(ranks=[])),
        "ranks-of-kilobytes": (INCOMPATIBLE, "^.{1,240}$", "", part(ranks=list(range(2000)))),
        "rank-as-float": (MALFORMED, "Expected `int`", "", part(ranks=[0.0])),
        "rank-of-4000-digits": (
            MALFORMED, "<= 2147483647", "cannot be written again", part(ranks=[10**4000]),
        ),
        "rank-of-5000-digits": (
            MALFORMED, "out of range", "str() of it raises ValueError",
            header().replace(b"null", b"[" + b"7" * 5000 + b"]"),
        ),
        "ranks-of-an-adapter-without-factors": (
            INCOMPATIBLE,
            "ranks: expected",
            "",
            header(part=WHOLE | {"ranks": [0]}, rank=0, targets=[], tensors=[["w", [7]]]),
        ),
        "part-of-nothing": (
            INCOMPATIBLE, "nothing of this adapter", "", part(factors="none", dense=False),
        ),
        "part-of-an-unknown-factor": (MALFORMED, "Invalid enum", "", part(factors="C")),
        "part-with-a-default-left-out": (
            MALFORMED, "not canonical", "", header(part={"factors": "both", "ranks": None}),
        ),
        "part-with-other-values": (
            MALFORMED, "promises", "7 values, but B has 2", part(factors="B", dense=False),
        ),
    }  # fmt: skip
    return {
        name: Attack(error, match, comment, frame(head))
        for name, (error, match, comment, head) in cases.items()
    } | {
        "part-of-gigabytes": Attack(
            MALFORMED,
            "part of 2 values in an adapter of 2147483649: expected at most 1024 times",
            "8 GB of zeros beside two values",
            frame(header(part=only_b, tensors=huge), VALUES[:8]),
        )
    }


def tensors(*entries: list[Any]) -> bytes:
    """Return a header without factors, with these tensors."""
    return header(rank=0, targets=[], tensors=list(entries))


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
