"""What typed decoders and the encoder refuse."""

import re

import msgspec
import numpy as np
import pytest

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import (
    ConfigError,
    IncompatibleAdapter,
    MalformedMessage,
)
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from tests.protocols.rig import ADAPTER, CODECS, DELTA, ONLY_B, SPEC, rng

# Refusals


def test_a_delta_is_not_taken_for_an_adapter_nor_an_adapter_for_a_delta() -> None:
    with pytest.raises(MalformedMessage, match="expected kind 'adapter', got 'delta'"):
        wire.decode_adapter(wire.encode(DELTA))
    with pytest.raises(MalformedMessage, match="expected kind 'delta', got 'adapter'"):
        wire.decode_delta(wire.encode(ADAPTER), SPEC)


def test_an_adapter_or_delta_for_another_base_is_refused() -> None:
    other = msgspec.structs.replace(SPEC, base="c" * 64)

    with pytest.raises(IncompatibleAdapter, match="base model bbbbbbbbbbbb…, expected cccccccc"):
        wire.decode_adapter(wire.encode(ADAPTER), other)
    says = f"delta is of adapter {SPEC.digest()[:12]}…, expected {other.digest()[:12]}…: load the"
    with pytest.raises(IncompatibleAdapter, match=says):
        wire.decode_delta(wire.encode(DELTA), other)


def test_a_delta_of_another_part_is_refused() -> None:
    with pytest.raises(IncompatibleAdapter, match=r"delta is of .*'both'.*, expected .*'B'"):
        wire.decode_delta(wire.encode(DELTA), SPEC, ONLY_B)


@pytest.mark.parametrize("codec", CODECS)
def test_a_delta_in_another_codec_is_refused(codec: CodecName) -> None:
    for other in CODECS:
        if other != codec:
            says = f"delta is in {other}.*, expected {codec}.*: \\[uplink\\] is the run's"
            with pytest.raises(MalformedMessage, match=says):
                wire.decode_delta(wire.encode(DELTA, codec=other, rng=rng()), SPEC, codec=codec)


def test_a_delta_with_another_share_of_values_is_refused() -> None:
    data = wire.encode(DELTA, codec="top-k", keep=0.9)
    with pytest.raises(
        MalformedMessage, match=r"top-k with keep 0\.9, expected top-k with keep 0\.8"
    ):
        wire.decode_delta(data, SPEC, codec="top-k", keep=0.8)  # both send 2 of 2, 3 of 3, 2 of 2


def test_the_encoder_refuses_values_that_became_infinite_after_they_were_checked() -> None:
    delta = wire.decode_delta(wire.encode(DELTA), SPEC)
    adapter = wire.decode_adapter(wire.encode(ADAPTER), SPEC)
    for value in (delta, adapter):
        value.arrays["head.bias"][1] = np.inf
        with pytest.raises(IncompatibleAdapter, match=r"head\.bias: 1 of 2 values are NaN"):
            wire.encode(value)
    with pytest.raises(IncompatibleAdapter, match=r"head\.bias: 1 of 2 values are NaN"):
        wire.encode_part(adapter, ONLY_B)


def test_the_encoder_names_the_tensor_that_a_codec_cannot_hold() -> None:
    large = Delta(SPEC, dict(DELTA.arrays) | {"head.bias": np.array([1, 7e4], np.float32)}, 1)
    with pytest.raises(ConfigError, match=r'head\.bias: uplink\.codec = "fp16" holds values up to'):
        wire.encode(large, codec="fp16")


@pytest.mark.parametrize("field", ["num_examples", "steps"])
def test_the_encoder_refuses_counts_that_json_does_not_hold_exactly(field: str) -> None:
    delta = Delta(SPEC, DELTA.arrays, **{"num_examples": 1, field: 2**53})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=re.escape(f"{field}: expected 0 to {wire.MAX_EXAMPLES}, got {2**53}")
    ):
        wire.encode(delta)


def test_the_encoder_refuses_what_does_not_fit_into_a_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 240)
    with pytest.raises(ValueError, match="frame: 248 bytes, at most 240"):
        wire.encode(DELTA)
    monkeypatch.setattr(wire, "MAX_HEADER", 150)
    with pytest.raises(ValueError, match="header: 180 bytes, at most 150"):
        wire.encode(DELTA)


def test_a_part_that_is_too_small_for_its_adapter_is_neither_written_nor_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = (("q.lora_A.weight", (300, 4)), ("q.lora_B.weight", (4, 300)))
    spec = AdapterSpec(
        base="b" * 64, tokenizer="", rank=300, alpha=1.0, targets=("q",), tensors=shapes
    )
    adapter = Adapter(spec, {name: np.ones(shape, np.float32) for name, shape in shapes})
    frame = wire.encode_part(adapter, Part(ranks=(7,)))
    assert wire.decode_adapter(frame).arrays["q.lora_A.weight"].sum() == 4

    for limit, value in (("MAX_SPREAD", 256), ("MAX_FRAME", 4 * 2399)):
        with monkeypatch.context() as changed:
            changed.setattr(wire, limit, value)
            says = "part of 8 values in an adapter of 2400: expected at most"
            with pytest.raises(ValueError, match=says):
                wire.encode_part(adapter, Part(ranks=(7,)))
            with pytest.raises(MalformedMessage, match=says):
                wire.decode_adapter(frame)
