"""Hostile frames: each gets exactly its error, and costs memory in proportion to its bytes."""

import tracemalloc
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from anabranch.protocols import errors, wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import IncompatibleAdapter, MalformedMessage, ProtocolError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from tests.protocols.attacks import create, frames
from tests.protocols.rig import HERE, SPEC, fields, framed

ATTACKS = sorted((HERE / "attacks").glob("*.txt"))


def read(reader: str, data: bytes) -> Adapter | Delta:
    """Decode as the reader that an attack names."""
    kind, _, codec = reader.partition(" ")
    if kind == "adapter":
        return wire.decode_adapter(data)
    return wire.decode_delta(data, SPEC, codec=cast(CodecName, codec), keep=frames.KEEP)


def peak_bytes(reader: str, data: bytes) -> int:
    """Return the most memory that decoding allocated, refused or not."""
    tracemalloc.start()
    try:
        read(reader, data)
    except ProtocolError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_an_attack_gets_its_error(path: Path) -> None:
    head, data = fields(path)
    error = getattr(errors, head["expect"])

    with pytest.raises(error, match=head["match"]) as caught:
        read(head["reader"], data)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)  # no control character reaches a log
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_an_attack_costs_memory_in_proportion_to_its_length(path: Path) -> None:
    head, data = fields(path)

    assert peak_bytes(head["reader"], data) < 20 * len(data) + 50_000


def test_the_attack_files_are_those_that_their_script_writes() -> None:
    expected = {f"{name}.txt": create.text(one) for name, one in create.attacks().items()}

    assert {path.name: path.read_text() for path in ATTACKS} == expected


def test_the_frames_that_attacks_are_made_from_are_honest() -> None:
    assert wire.encode(wire.decode_adapter(frames.frame())) == frames.frame()
    for codec in frames.BODIES:
        assert read(f"delta {codec}", frames.coded(codec)).spec == SPEC


def test_a_long_header_costs_memory_in_proportion_to_its_length() -> None:
    shapes = b",".join(b'["w%06d",[2147483647]]' % i for i in range(40_000))
    spec = b'{"base":"%s","tokenizer":"","rank":0,"alpha":1.0,"targets":[],"tensors":[%s]}'
    part = b'{"factors":"both","ranks":null,"dense":true}'
    head = b'{"kind":"adapter","spec":%s,"part":%s}' % (spec % (b"b" * 64, shapes), part)
    data = framed(head, b"")
    assert 900_000 < len(head) <= wire.MAX_HEADER

    assert peak_bytes("adapter", data) < 40 * len(data)


@pytest.mark.parametrize("reader", ["adapter", "delta fp32"])
def test_a_megabyte_of_rank_indices_costs_memory_in_proportion_and_a_short_error(
    reader: str,
) -> None:
    part = frames.WHOLE | {"ranks": list(range(150_000))}
    head = frames.header(part=part) if reader == "adapter" else frames.delta(part=part)
    data = framed(head, frames.VALUES)
    assert 900_000 < len(head) <= wire.MAX_HEADER

    with pytest.raises(IncompatibleAdapter) as caught:
        read(reader, data)
    assert len(str(caught.value)) < 400
    assert peak_bytes(reader, data) < 40 * len(data)


def test_an_honest_frame_costs_one_copy_of_its_values() -> None:
    spec = AdapterSpec(
        base="b" * 64, tokenizer="", rank=0, alpha=1.0, targets=(), tensors=(("w", (500, 2000)),)
    )
    data = wire.encode(Adapter(spec, {"w": np.ones((500, 2000), np.float32)}))

    assert peak_bytes("adapter", data) < 1.6 * len(data)  # values, and a mask of a byte per value


def test_a_part_costs_memory_in_proportion_to_its_length() -> None:
    shapes = (("q.lora_A.weight", (100, 400)), ("q.lora_B.weight", (400, 100)))
    spec = AdapterSpec(
        base="b" * 64, tokenizer="", rank=100, alpha=1.0, targets=("q",), tensors=shapes
    )
    adapter = Adapter(spec, {name: np.ones(shape, np.float32) for name, shape in shapes})
    data = wire.encode_part(adapter, Part(ranks=(1,)))

    assert peak_bytes("adapter", data) < 1.5 * wire.MAX_SPREAD * len(data)
    assert peak_bytes("adapter", data) < 1.5 * 4 * spec.num_values + 50_000


def test_a_frame_over_the_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 100)

    with pytest.raises(MalformedMessage, match="frame of 317 bytes, at most 100 allowed"):
        wire.decode_adapter(framed(b"{}", bytes(275)))
