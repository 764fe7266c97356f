import hashlib
import json
import re
import runpy
import struct
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anabranch.protocols import errors, wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.errors import IncompatibleAdapter, MalformedMessage, ProtocolError
from anabranch.protocols.spec import AdapterSpec

HERE = Path(__file__).parent
ATTACKS = sorted((HERE / "attacks").glob("*.txt"))
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
)
ADAPTER = Adapter(SPEC, DELTA.arrays)


def fields(path: Path) -> tuple[dict[str, str], bytes]:
    """Read a vector or an attack: fields, a blank line, hex."""
    head, _, body = path.read_text().partition("\n\n")
    pairs = (line.partition(":") for line in head.splitlines())
    return {key: value.strip() for key, _, value in pairs}, bytes.fromhex(body)


def framed(head: bytes, body: bytes) -> bytes:
    """Return a frame whose length and checksum are right."""
    data = b"ABA1" + struct.pack("<I", len(head)) + head + body
    return data + hashlib.sha256(data).digest()


names = st.lists(
    st.from_regex(r"[a-z0-9_][A-Za-z0-9_.-]{0,12}", fullmatch=True), min_size=1, unique=True
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def values(draw: st.DrawFn) -> Adapter | Delta:
    """Any adapter or delta: 0 to 2 adapted layers, 1 to 3 dense tensors of any rank."""
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
    spec = AdapterSpec(
        base=draw(st.sampled_from(["0" * 64, "f" * 64])),
        tokenizer=draw(st.sampled_from(["", "1" * 64])),
        rank=rank,
        alpha=draw(st.floats(min_value=0, exclude_min=True, allow_infinity=False)),
        targets=tuple(targets),
        tensors=tuple(sorted(shapes.items())),
    )
    arrays = {
        name: draw(hnp.arrays(np.float32, shape, elements=finite)) for name, shape in spec.tensors
    }
    if draw(st.booleans()):
        return Adapter(spec, arrays)
    return Delta(spec, arrays, draw(st.integers(0, wire.MAX_EXAMPLES)))


# Laws


@given(value=values())
def test_decoding_what_was_encoded_returns_the_same_value_bit_for_bit(
    value: Adapter | Delta,
) -> None:
    again = wire.decode(wire.encode(value))

    assert type(again) is type(value)
    assert again.spec == value.spec
    assert getattr(again, "num_examples", None) == getattr(value, "num_examples", None)
    assert list(again.arrays) == [name for name, _ in value.spec.tensors]
    for name, array in value.arrays.items():
        assert again.arrays[name].shape == array.shape
        assert again.arrays[name].tobytes() == array.tobytes()


@given(value=values())
def test_encoding_what_was_decoded_returns_the_same_bytes(value: Adapter | Delta) -> None:
    data = wire.encode(value)

    assert wire.encode(wire.decode(data)) == data


@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_frame_with_one_changed_byte_is_refused(at: int, flip: int) -> None:
    data = bytearray(wire.encode(DELTA))
    data[at % len(data)] ^= flip

    with pytest.raises(MalformedMessage):
        wire.decode(bytes(data))


def test_a_frame_cut_anywhere_is_refused() -> None:
    data = wire.encode(DELTA)
    for end in range(len(data)):
        with pytest.raises(MalformedMessage):
            wire.decode(data[:end])


@given(tail=st.binary(min_size=1, max_size=40))
def test_a_frame_with_bytes_after_its_end_is_refused(tail: bytes) -> None:
    with pytest.raises(MalformedMessage):
        wire.decode(wire.encode(DELTA) + tail)


@given(data=st.binary(max_size=400))
@example(b"ABA1" + bytes(60))
def test_any_bytes_give_a_value_that_encodes_to_them_or_one_protocol_error(data: bytes) -> None:
    try:
        value = wire.decode(data)
    except ProtocolError:
        return
    assert wire.encode(value) == data


@settings(max_examples=400)
@given(at=st.integers(0, 10**6), piece=st.binary(max_size=3), cut=st.integers(0, 3), more=names)
def test_a_changed_header_with_a_right_checksum_is_canonical_or_refused(
    at: int, piece: bytes, cut: int, more: list[str]
) -> None:
    data = wire.encode(DELTA)
    size = int.from_bytes(data[4:8], "little")
    head, body = data[8 : 8 + size], data[8 + size : -32]
    at %= size
    forged = framed(head[:at] + piece + head[at + cut :], body)
    renamed = framed(head.replace(b"head.bias", more[0].encode()), body)

    for frame in (forged, renamed):
        said = ""
        try:
            assert wire.encode(wire.decode(frame)) == frame
        except ProtocolError as error:
            said = str(error)
        assert len(said) < 400
        assert said.isprintable()


# Golden bytes


@pytest.mark.parametrize(("kind", "value"), [("delta", DELTA), ("adapter", None)])
def test_golden_bytes_do_not_change(kind: str, value: Delta | None) -> None:
    head, data = fields(HERE / "vectors" / f"{kind}.txt")
    decoded = wire.decode(data)

    assert head["expect"] == kind == type(decoded).__name__.lower()
    assert wire.encode(decoded) == data
    assert wire.digest(data) == head["sha256"]
    if value is not None:
        assert wire.encode(value) == data


def test_the_golden_adapter_holds_its_values_in_the_order_of_its_names() -> None:
    _, data = fields(HERE / "vectors" / "adapter.txt")
    adapter = wire.decode_adapter(data)

    assert [a.shape for a in adapter.arrays.values()] == [
        (2, 3), (1, 2), (2, 3), (1, 2), (1,), (1, 1), (),
    ]  # fmt: skip
    flat = np.concatenate([a.ravel() for a in adapter.arrays.values()])
    assert flat.tolist() == list(range(19))
    assert adapter.spec.scaling == 0.25


def test_the_specification_shows_the_golden_delta() -> None:
    page = (HERE.parents[1] / "docs" / "wire-format.md").read_text()
    head, data = fields(HERE / "vectors" / "delta.txt")
    listing = page.partition("```hex\n")[2].partition("```")[0]
    shown = "".join(line.partition("  ")[0] for line in listing.splitlines())

    assert bytes.fromhex(shown) == data
    assert head["sha256"] in page


# Hostile frames


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_an_attack_gets_its_error(path: Path) -> None:
    head, data = fields(path)
    error = getattr(errors, head["expect"])

    with pytest.raises(error, match=head["match"]) as caught:
        wire.decode(data)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()  # no control character reaches a log


def test_the_attack_files_are_those_that_their_script_writes() -> None:
    script = runpy.run_path(str(HERE / "attacks" / "create.py"))
    expected = {f"{name}.txt": script["text"](a) for name, a in script["attacks"]().items()}

    assert {path.name: path.read_text() for path in ATTACKS} == expected
    assert wire.encode(wire.decode(script["frame"]())) == script["frame"]()


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_an_attack_costs_memory_in_proportion_to_its_length(path: Path) -> None:
    _, data = fields(path)

    assert peak_bytes(data) < 20 * len(data) + 50_000


def test_a_long_header_costs_memory_in_proportion_to_its_length() -> None:
    shapes = b",".join(b'["w%06d",[2147483647]]' % i for i in range(40_000))
    spec = b'{"base":"%s","tokenizer":"","rank":0,"alpha":1.0,"targets":[],"tensors":[%s]}'
    head = b'{"kind":"delta","spec":%s,"examples":0}' % (spec % (b"b" * 64, shapes))
    data = framed(head, b"")
    assert 900_000 < len(head) <= wire.MAX_HEADER

    assert peak_bytes(data) < 40 * len(data)


def test_an_honest_frame_costs_one_copy_of_its_values() -> None:
    spec = AdapterSpec(
        base="b" * 64, tokenizer="", rank=0, alpha=1.0, targets=(), tensors=(("w", (500, 2000)),)
    )
    data = wire.encode(Delta(spec, {"w": np.ones((500, 2000), np.float32)}, 1))

    assert peak_bytes(data) < 1.6 * len(data)  # values, and one mask of a byte per value


def peak_bytes(data: bytes) -> int:
    """Return the most memory that decoding allocated, refused or not."""
    tracemalloc.start()
    try:
        wire.decode(data)
    except ProtocolError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_a_frame_over_the_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 100)

    with pytest.raises(MalformedMessage, match="frame of 317 bytes, at most 100 allowed"):
        wire.decode(framed(b"{}", bytes(275)))


# Refusals of the typed decoders and of the encoder


def test_a_delta_is_not_taken_for_an_adapter_nor_an_adapter_for_a_delta() -> None:
    with pytest.raises(MalformedMessage, match="expected kind 'adapter', got 'delta'"):
        wire.decode_adapter(wire.encode(DELTA))
    with pytest.raises(MalformedMessage, match="expected kind 'delta', got 'adapter'"):
        wire.decode_delta(wire.encode(ADAPTER), SPEC)


def test_an_adapter_for_another_base_is_refused() -> None:
    other = msgspec.structs.replace(SPEC, base="c" * 64)

    with pytest.raises(IncompatibleAdapter, match="base model bbbbbbbbbbbb…, expected cccccccc"):
        wire.decode_adapter(wire.encode(ADAPTER), other)
    with pytest.raises(IncompatibleAdapter, match="base model"):
        wire.decode_delta(wire.encode(DELTA), other)


def test_decoded_arrays_are_aligned_and_may_be_written() -> None:
    adapter = wire.decode_adapter(wire.encode(ADAPTER), SPEC)
    delta = wire.decode_delta(wire.encode(DELTA), SPEC)

    for array in (*adapter.arrays.values(), *delta.arrays.values()):
        assert array.flags.aligned
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_the_encoder_refuses_values_that_became_infinite_after_they_were_checked() -> None:
    delta = wire.decode_delta(wire.encode(DELTA), SPEC)
    delta.arrays["head.bias"][1] = np.inf

    with pytest.raises(IncompatibleAdapter, match=r"head\.bias: 1 of 2 values are NaN"):
        wire.encode(delta)


def test_the_encoder_refuses_what_does_not_fit_into_a_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"0 to {wire.MAX_EXAMPLES}, got {2**53}")):
        wire.encode(Delta(SPEC, DELTA.arrays, 2**53))
    monkeypatch.setattr(wire, "MAX_FRAME", 300)
    with pytest.raises(ValueError, match="frame: 314 bytes, at most 300"):
        wire.encode(DELTA)
    monkeypatch.setattr(wire, "MAX_HEADER", 200)
    with pytest.raises(ValueError, match="header: 246 bytes, at most 200"):
        wire.encode(DELTA)


def test_arrays_in_any_memory_order_have_one_encoding() -> None:
    fortran = {name: np.asfortranarray(array) for name, array in ADAPTER.arrays.items()}
    strided = {name: np.repeat(a, 2, axis=-1)[..., ::2] for name, a in ADAPTER.arrays.items()}

    for arrays in (fortran, strided, dict(reversed(list(ADAPTER.arrays.items())))):
        assert wire.encode(Adapter(SPEC, arrays)) == wire.encode(ADAPTER)


def test_the_header_is_json_that_any_reader_understands() -> None:
    data = wire.encode(DELTA)
    size = int.from_bytes(data[4:8], "little")
    header = json.loads(data[8 : 8 + size])

    assert header["kind"] == "delta"
    assert header["examples"] == 7
    assert header["spec"]["tensors"][1] == ["q.lora_A.weight", [1, 3]]
