"""Golden bytes, sizes and forms of frames."""

import json
from pathlib import Path

import numpy as np
import pytest

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.codecs.codec import CodecName
from anabranch.protocols.part import Part
from anabranch.protocols.spec import AdapterSpec
from tests.protocols.rig import ADAPTER, CODECS, DELTA, HERE, SPEC, assert_same, fields, rng

VECTORS = sorted((HERE / "vectors").glob("*.txt"))


# Golden bytes


def of_vector(name: str) -> tuple[dict[str, str], bytes]:
    return fields(HERE / "vectors" / f"{name}.txt")


def values_of(value: Adapter | Delta) -> list[float]:
    return [float(x) for array in value.arrays.values() for x in array.reshape(-1)]


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_identity_of_golden_bytes_does_not_change(path: Path) -> None:
    head, data = fields(path)

    assert wire.digest(data) == head["sha256"]


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("fp32", [1, -2, 0.5, 0.25, -0.125, 3, 0]),
        ("fp16", [1, -2, 0.5, 0.25, -0.125, 3, 0]),
        ("int8", [127, -127, 126, 0, 1, 0, 0]),
        ("int4", [7, -7, 6, 0, 1, 0, 0]),
        ("top-k", [0, -2, 0.5, 0, -0.25, 0, 0]),
    ],
)
def test_golden_deltas_are_read_and_where_nothing_is_random_written(
    codec: CodecName, expected: list[float]
) -> None:
    head, data = of_vector("delta" if codec == "fp32" else f"delta-{codec}")
    delta = wire.decode_delta(data, SPEC, codec=codec, keep=0.5)

    assert head["reader"] == f"delta {codec}"
    assert values_of(delta) == expected
    assert (delta.num_examples, delta.steps) == (7, 3)
    if codec in ("fp32", "fp16", "top-k"):
        assert wire.encode(delta, codec=codec, keep=0.5) == data
    if codec in ("fp32", "fp16"):
        assert wire.encode(DELTA, codec=codec) == data


def test_the_golden_adapter_holds_its_values_in_the_order_of_its_names() -> None:
    _, data = of_vector("adapter")
    adapter = wire.decode_adapter(data)

    assert [a.shape for a in adapter.arrays.values()] == [
        (2, 3), (1, 2), (2, 3), (1, 2), (1,), (1, 1), (),
    ]  # fmt: skip
    assert values_of(adapter) == list(range(19))
    assert adapter.spec.scaling == 0.25
    assert wire.encode(adapter) == data


def test_the_golden_part_is_one_column_of_every_b_of_the_golden_adapter() -> None:
    adapter = wire.decode_adapter(of_vector("adapter")[1])
    _, data = of_vector("adapter-part")
    part = Part(factors="B", ranks=(1,), dense=False)

    assert wire.encode_part(adapter, part) == data
    assert_same(wire.decode_adapter(data), adapter.only(part))
    assert [x for x in values_of(wire.decode_adapter(data)) if x] == [7, 15]


def test_the_specification_shows_the_golden_delta() -> None:
    page = (HERE.parents[1] / "docs" / "wire-format.md").read_text()
    head, data = of_vector("delta-int8")
    listing = page.partition("```hex\n")[2].partition("```")[0]
    shown = "".join(line.partition("  ")[0] for line in listing.splitlines())

    assert bytes.fromhex(shown) == data
    assert head["sha256"] in page
    assert SPEC.digest() in page


# Examples


def test_a_delta_does_not_repeat_the_spec() -> None:
    layers = [
        f"encoder.layer.{i}.attention.self.{m}" for i in range(12) for m in ("query", "value")
    ]
    shapes = {f"{m}.lora_A.weight": (8, 768) for m in layers}
    shapes |= {f"{m}.lora_B.weight": (768, 8) for m in layers}
    spec = AdapterSpec(
        base="b" * 64,
        tokenizer="c" * 64,
        rank=8,
        alpha=16.0,
        targets=tuple(sorted(layers)),
        tensors=tuple(sorted(shapes.items())),
    )
    part = Part(factors="B")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in part.shapes(spec).items()}
    delta = Delta(spec, zeros, 500, part=part, steps=16)
    sizes = {codec: len(wire.encode(delta, codec=codec, rng=rng())) for codec in CODECS}

    overhead = 4 + 4 + 180 + 32
    assert sizes["fp32"] == pytest.approx(4 * 147_456 + overhead, abs=10)  # 590 kB
    assert sizes["int8"] == pytest.approx(147_456 * 33 / 32 + overhead, abs=10)  # 152 kB
    assert sizes["int4"] == pytest.approx(147_456 * 17 / 32 + overhead, abs=10)  # 78 kB


def test_decoded_arrays_are_aligned_and_may_be_written() -> None:
    decoded: list[Adapter | Delta] = [wire.decode_adapter(wire.encode(ADAPTER), SPEC)]
    decoded += [
        wire.decode_delta(wire.encode(DELTA, codec=codec, rng=rng()), SPEC, codec=codec)
        for codec in CODECS
    ]
    for value in decoded:
        for array in value.arrays.values():
            assert array.flags.aligned
            assert array.flags.writeable
            assert array.flags.c_contiguous


def test_arrays_in_any_memory_order_have_one_encoding() -> None:
    fortran = {name: np.asfortranarray(array) for name, array in ADAPTER.arrays.items()}
    strided = {name: np.repeat(a, 2, axis=-1)[..., ::2] for name, a in ADAPTER.arrays.items()}

    for arrays in (fortran, strided, dict(reversed(list(ADAPTER.arrays.items())))):
        assert wire.encode(Adapter(SPEC, arrays)) == wire.encode(ADAPTER)
        assert wire.encode(Delta(SPEC, arrays, 7, steps=3)) == wire.encode(DELTA)


def test_the_header_is_json_that_any_reader_understands() -> None:
    data = wire.encode(DELTA, codec="top-k", keep=0.25)
    size = int.from_bytes(data[4:8], "little")

    assert json.loads(data[8 : 8 + size]) == {
        "kind": "delta",
        "spec": SPEC.digest(),
        "examples": 7,
        "steps": 3,
        "part": {"factors": "both", "ranks": None, "dense": True},
        "codec": "top-k",
        "keep": 0.25,
    }
