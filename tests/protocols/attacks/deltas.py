"""Attacks with deltas: what a hostile site could answer."""

from __future__ import annotations

import struct

from tests.protocols.attacks.frames import (
    BODIES,
    DIGEST,
    FP16,
    INCOMPATIBLE,
    INT4,
    INT8,
    MALFORMED,
    ONE,
    TOP_K,
    VALUES,
    WHOLE,
    Attack,
    block,
    coded,
    delta,
    frame,
    header,
    spec,
)


def hostile_deltas() -> dict[str, Attack]:
    """Answer with a delta that was not asked for. All but one are read as fp32."""
    other = "delta is in {}, expected fp32:"
    cases: dict[str, tuple[str, str, str, bytes]] = {
        "examples-negative": (MALFORMED, ">= 0", "", delta(examples=-1)),
        "examples-beyond-2-53": (MALFORMED, "<= ", "", delta(examples=2**53)),
        "examples-as-text": (MALFORMED, "Expected `int`", "", delta(examples="7")),
        "steps-negative": (MALFORMED, ">= 0", "a negative weight", delta(steps=-1)),
        "steps-beyond-2-53": (MALFORMED, "<= ", "", delta(steps=2**53)),
        "of-another-adapter": (
            INCOMPATIBLE, f"adapter cccccccccccc…, expected {DIGEST[:12]}…: load the same base",
            "", delta(spec="c" * 64),
        ),
        "digest-short": (MALFORMED, "matching regex", "", delta(spec=DIGEST[:-1])),
        "digest-upper-case": (MALFORMED, "matching regex", "one form", delta(spec="B" * 64)),
        "digest-with-newline": (MALFORMED, "matching regex", "", delta(spec=DIGEST + "\n")),
        "with-its-spec": (MALFORMED, "Expected `str`, got `object`", "", delta(spec=spec())),
        "of-another-part": (
            INCOMPATIBLE, "delta is of .*factors='B'.*, expected .*factors='both'",
            "A is not sent", delta(part=WHOLE | {"factors": "B"}),
        ),
        "of-ranks-out-of-range": (
            INCOMPATIBLE, "delta is of .*ranks=.9,.*, expected", "",
            delta(part=WHOLE | {"ranks": [9]}),
        ),
        "of-kilobytes-of-ranks": (
            INCOMPATIBLE, "^.{1,340}$", "the error stays short",
            delta(part=WHOLE | {"ranks": list(range(2000))}),
        ),
        "in-another-codec": (MALFORMED, other.format("int8"), "", delta(codec="int8")),
        "in-an-unknown-codec": (MALFORMED, "Invalid enum", "", delta(codec="zip")),
        "fp32-with-keep": (MALFORMED, other.format("fp32 with keep 0.5"), "", delta(keep=0.5)),
        "keep-as-null": (MALFORMED, "Expected `float`, got `null`", "", delta(keep=None)),
        "keep-infinite": (MALFORMED, "out of range", "", delta(keep=9).replace(b":9}", b":1e999}")),
        "sent-as-an-adapter": (MALFORMED, "expected kind 'delta', got 'adapter'", "", header()),
    }  # fmt: skip
    return {
        f"delta-{name}": Attack(error, match, comment, frame(head), "delta fp32")
        for name, (error, match, comment, head) in cases.items()
    } | {
        "delta-for-an-adapter": Attack(
            MALFORMED, "expected kind 'adapter', got 'delta'", "", frame(delta())
        )
    }


def hostile_codes() -> dict[str, Attack]:
    """Write payloads as no codec of ours would."""
    first8, second8, _ = INT8
    first4, second4, _ = INT4
    k1, k2, k3 = TOP_K
    scale = "head.bias: a scale is negative, NaN, infinite"
    order = "q.lora_A.weight: indices: expected ascending ones below 3"
    cases: dict[str, tuple[str, str, str, bytes | tuple[bytes, ...]]] = {
        "fp16-nan": ("fp16", "head.bias: 1 of 2 values are NaN", "", b"\x01\x7e" + FP16[2:]),
        "fp16-infinite": ("fp16", "head.bias: 1 of 2 values are NaN", "", b"\0\x7c" + FP16[2:]),
        "fp16-as-fp32": ("fp16", "promises", "", VALUES),
        "int8-too-short": ("int8", "promises", "a code is missing", BODIES["int8"][:-1]),
        "int8-too-long": ("int8", "promises", "", BODIES["int8"] + b"\0"),
        "int8-code-128": (
            "int8", "head.bias: a code is below -127", "-128", (block(ONE, b"\x7f\x80"), *INT8[1:]),
        ),
        "int8-scale-negative": ("int8", scale, "", (block(0xBF80, b"\x7f\0"), *INT8[1:])),
        "int8-scale-minus-0": ("int8", scale, "", (block(0x8000, b"\0\0"), *INT8[1:])),
        "int8-scale-nan": ("int8", scale, "", (block(0x7FC0, b"\x7f\0"), *INT8[1:])),
        "int8-scale-infinite": ("int8", scale, "", (block(0x7F80, b"\x7f\0"), *INT8[1:])),
        "int8-scale-of-infinity": (
            "int8", scale, "127 times it overflows", (block(0x7E00, b"\x7f\0"), *INT8[1:]),
        ),
        "int8-codes-without-scale": (
            "int8", "q.lora_B.weight: a block of scale 0", "hidden bytes",
            (first8, second8, block(0, b"\1\0")),
        ),
        "int8-scale-without-codes": (
            "int8", "q.lora_B.weight: the scale of a block is larger", "zeros in a second form",
            (first8, second8, block(ONE, b"\0\0")),
        ),
        "int8-scale-too-large": (
            "int8", "q.lora_B.weight: the scale of a block is larger", "2 as 4 times 0.5",
            (first8, second8, block(ONE, b"\x7d\0")),
        ),
        "int4-too-short": ("int4", "promises", "", BODIES["int4"][:-1]),
        "int4-code-8": (
            "int4", "head.bias: a code is below -7", "-8", (block(ONE, b"\x87"), *INT4[1:]),
        ),
        "int4-padding": (
            "int4", "q.lora_A.weight: the four bits after the last code", "hidden bits",
            (first4, block(ONE, b"\x06\x11"), INT4[2]),
        ),
        "int4-codes-without-scale": (
            "int4", "q.lora_B.weight: a block of scale 0", "", (first4, second4, block(0, b"\1")),
        ),
        "int4-scale-too-large": (
            "int4", "q.lora_B.weight: the scale of a block is larger", "",
            (first4, second4, block(ONE, b"\x55")),
        ),
        "top-k-too-short": ("top-k", "promises", "", BODIES["top-k"][:-8]),
        "top-k-index-out-of-range": (
            "top-k", order, "", (k1, struct.pack("<IIff", 0, 3, 1, 1), k3),
        ),
        "top-k-index-of-4-gib": (
            "top-k", order, "", (k1, struct.pack("<IIff", 0, 2**32 - 1, 1, 1), k3),
        ),
        "top-k-index-twice": ("top-k", order, "", (k1, struct.pack("<IIff", 1, 1, 1, 1), k3)),
        "top-k-index-descending": ("top-k", order, "", (k1, struct.pack("<IIff", 2, 0, 1, 1), k3)),
        "top-k-nan": (
            "top-k", "head.bias: 1 of 1 values are NaN", "",
            (struct.pack("<If", 1, float("nan")), k2, k3),
        ),
        "top-k-zero-elsewhere": (
            "top-k", "q.lora_B.weight: a zero is sent that is not among the first",
            "zeros in a second form", (k1, k2, struct.pack("<If", 1, 0.0)),
        ),
    }  # fmt: skip
    attacks = {
        name: Attack(MALFORMED, match, comment, coded(codec, body), f"delta {codec}")
        for name, (codec, match, comment, body) in cases.items()
    }
    for name, keep, says in (
        ("other", 1.0, "1"),
        ("above-1", 7.5, "7.5"),
        ("negative", -0.5, "-0.5"),
    ):
        attacks[f"top-k-keep-{name}"] = Attack(
            MALFORMED,
            f"keep {says}, expected top-k with keep 0.5",
            "",
            coded("top-k", keep=keep),
            "delta top-k",
        )
    return attacks
