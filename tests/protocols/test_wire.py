"""Laws of the frame: one value, one encoding; what is changed is refused."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anabranch.protocols import wire
from anabranch.protocols.adapter import WHOLE, Adapter, Delta
from anabranch.protocols.codecs.choose import codec_for
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.errors import (
    IncompatibleAdapter,
    MalformedMessage,
    ProtocolError,
)
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from tests.protocols.rig import ADAPTER, CODECS, DELTA, ONLY_B, SPEC, assert_same, framed, rng

names = st.lists(
    st.from_regex(r"[a-z0-9_][A-Za-z0-9_.-]{0,12}", fullmatch=True), min_size=1, unique=True
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def specs(draw: st.DrawFn) -> AdapterSpec:
    """Any spec: 0 to 2 adapted layers, 1 to 3 dense tensors of any rank."""
    rank = draw(st.integers(1, 3))
    shapes: dict[str, tuple[int, ...]] = {}
    targets = sorted(draw(st.lists(st.sampled_from(["a.q", "a.v"]), unique=True)))
    for module in targets:
        shapes[f"{module}.lora_A.weight"] = (rank, draw(st.integers(1, 4)))
        shapes[f"{module}.lora_B.weight"] = (draw(st.integers(1, 4)), rank)
    for name in draw(
        st.lists(st.sampled_from(["head", "zz", "a", "A-1"]), min_size=1, unique=True)
    ):
        shapes[name] = draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3))
    return AdapterSpec(
        base=draw(st.sampled_from(["0" * 64, "f" * 64])),
        tokenizer=draw(st.sampled_from(["", "1" * 64])),
        rank=rank,
        alpha=draw(st.floats(min_value=0, exclude_min=True, allow_infinity=False)),
        targets=tuple(targets),
        tensors=tuple(sorted(shapes.items())),
    )


@st.composite
def parts(draw: st.DrawFn, spec: AdapterSpec) -> Part:
    """Any part of a spec that is not empty."""
    chosen = st.lists(st.integers(0, spec.rank - 1), min_size=1, unique=True).map(sorted)
    ranks = draw(st.none() | chosen)
    return Part(
        factors=draw(st.sampled_from(["A", "B", "both", "none"])),
        ranks=None if ranks is None else tuple(ranks),
        dense=True if not spec.targets else draw(st.booleans()),
    )


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    spec = draw(specs())
    return Adapter(
        spec,
        {n: draw(hnp.arrays(np.float32, shape, elements=finite)) for n, shape in spec.tensors},
    )


@st.composite
def partly(draw: st.DrawFn) -> tuple[Adapter, Part]:
    adapter = draw(adapters())
    part = draw(parts(adapter.spec))
    try:
        part.shapes(adapter.spec)
    except IncompatibleAdapter:  # no factors and no dense tensors
        part = WHOLE
    return adapter, part


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    adapter, part = draw(partly())
    counts = st.integers(0, wire.MAX_EXAMPLES)
    arrays = part.take(adapter.spec, adapter.arrays)
    return Delta(adapter.spec, arrays, draw(counts), part=part, steps=draw(counts))


# Laws


@given(adapter=adapters())
def test_an_adapter_comes_back_bit_for_bit_and_is_written_again_as_it_was(
    adapter: Adapter,
) -> None:
    data = wire.encode(adapter)

    assert_same(wire.decode_adapter(data), adapter)
    assert_same(wire.decode_adapter(data, adapter.spec), adapter)
    assert wire.encode(wire.decode_adapter(data)) == data


@given(delta=deltas())
def test_a_delta_in_fp32_comes_back_bit_for_bit_and_is_written_again_as_it_was(
    delta: Delta,
) -> None:
    data = wire.encode(delta)
    again = wire.decode_delta(data, delta.spec, delta.part)

    assert_same(again, delta)
    assert (again.num_examples, again.steps) == (delta.num_examples, delta.steps)
    assert again.part == delta.part
    assert wire.encode(again) == data


@given(drawn=partly())
def test_a_part_of_an_adapter_comes_back_with_zeros_elsewhere(drawn: tuple[Adapter, Part]) -> None:
    adapter, part = drawn
    data = wire.encode_part(adapter, part)
    again = wire.decode_adapter(data, adapter.spec)

    assert_same(again, adapter.only(part))
    assert wire.encode_part(again, part) == data
    assert len(data) <= len(wire.encode(adapter)) + 40  # the header names the part


@pytest.mark.parametrize("codec", CODECS)
@given(part=st.sampled_from([WHOLE, ONLY_B, Part(factors="none"), Part(ranks=(0,))]))
def test_a_delta_in_any_codec_is_what_the_codec_makes_of_each_tensor(
    codec: CodecName, part: Part
) -> None:
    delta = Delta(SPEC, part.take(SPEC, DELTA.arrays), 7, part=part, steps=3)
    data = wire.encode(delta, codec=codec, keep=0.5, rng=rng())
    again = wire.decode_delta(data, SPEC, part, codec=codec, keep=0.5)
    same_draws, chosen = rng(), codec_for(codec, 0.5)

    for name, array in delta.arrays.items():
        payload = chosen.encode(array.reshape(-1), same_draws)
        assert payload in data
        expected = chosen.decode(payload, array.size).reshape(array.shape)
        assert again.arrays[name].tobytes() == expected.tobytes()
    assert (again.num_examples, again.steps, again.part) == (7, 3, part)


@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_frame_with_one_changed_byte_is_refused(at: int, flip: int) -> None:
    for codec in CODECS:
        data = bytearray(wire.encode(DELTA, codec=codec, rng=rng()))
        data[at % len(data)] ^= flip
        with pytest.raises(MalformedMessage):
            wire.decode_delta(bytes(data), SPEC, codec=codec)


def test_a_frame_cut_anywhere_is_refused() -> None:
    data = wire.encode(ADAPTER)
    for end in range(len(data)):
        with pytest.raises(MalformedMessage):
            wire.decode_adapter(data[:end])


@given(tail=st.binary(min_size=1, max_size=40))
def test_a_frame_with_bytes_after_its_end_is_refused(tail: bytes) -> None:
    with pytest.raises(MalformedMessage):
        wire.decode_adapter(wire.encode(ADAPTER) + tail)


@given(data=st.binary(max_size=400))
@example(b"ABA1" + bytes(60))
def test_any_bytes_give_a_value_that_encodes_to_them_or_one_protocol_error(data: bytes) -> None:
    try:
        value = wire.decode_adapter(data)
    except ProtocolError:
        return
    assert wire.encode(value) == data


@settings(max_examples=400)
@given(at=st.integers(0, 10**6), piece=st.binary(max_size=3), cut=st.integers(0, 3), more=names)
def test_a_changed_header_with_a_right_checksum_is_canonical_or_refused(
    at: int, piece: bytes, cut: int, more: list[str]
) -> None:
    for value in (ADAPTER, DELTA):
        data = wire.encode(value)
        size = int.from_bytes(data[4:8], "little")
        head, body = data[8 : 8 + size], data[8 + size : -32]
        place = at % size
        forged = framed(head[:place] + piece + head[place + cut :], body)
        renamed = framed(head.replace(b"head.bias", more[0].encode()), body)
        for frame in (forged, renamed):
            said = ""
            try:
                if value is ADAPTER:
                    again: Adapter | Delta = wire.decode_adapter(frame)
                else:
                    again = wire.decode_delta(frame, SPEC)
                assert wire.encode(again) == frame
            except ProtocolError as error:
                said = str(error)
            assert len(said) < 400
            assert said.isprintable()
