"""Values and helpers that the tests of the wire format share."""

import hashlib
import struct
from pathlib import Path

import numpy as np

from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec

HERE = Path(__file__).parent
CODECS: list[CodecName] = ["fp32", "fp16", "int8", "int4", "top-k"]
SPEC = AdapterSpec(
    base="b" * 64,
    tokenizer="",
    rank=1,
    alpha=2.0,
    targets=("q",),
    tensors=(("head.bias", (2,)), ("q.lora_A.weight", (1, 3)), ("q.lora_B.weight", (2, 1))),
)
DELTA = Delta(
    SPEC,
    {
        "head.bias": np.array([1.0, -2.0], np.float32),
        "q.lora_A.weight": np.array([[0.5, 0.25, -0.125]], np.float32),
        "q.lora_B.weight": np.array([[3.0], [0.0]], np.float32),
    },
    7,
    steps=3,
)
ADAPTER = Adapter(SPEC, DELTA.arrays)
ONLY_B = Part(factors="B", dense=False)


def fields(path: Path) -> tuple[dict[str, str], bytes]:
    """Read a vector: fields, a blank line, hex."""
    head, _, body = path.read_text().partition("\n\n")
    pairs = (line.partition(":") for line in head.splitlines())
    return {key: value.strip() for key, _, value in pairs}, bytes.fromhex(body)


def framed(head: bytes, body: bytes) -> bytes:
    """Return a frame whose length and checksum are right."""
    data = b"ABA1" + struct.pack("<I", len(head)) + head + body
    return data + hashlib.sha256(data).digest()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_same(left: Adapter | Delta, right: Adapter | Delta) -> None:
    """Equal bit for bit, and in the same order."""
    assert left.spec == right.spec
    assert list(left.arrays) == list(right.arrays)
    for name, array in left.arrays.items():
        assert right.arrays[name].shape == array.shape
        assert right.arrays[name].tobytes() == array.tobytes()
