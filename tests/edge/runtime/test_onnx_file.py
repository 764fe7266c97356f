"""ONNX models read without the onnx package: what is found, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from anabranch.edge.runtime import protobuf
from anabranch.edge.runtime.onnx_file import check_graph
from anabranch.edge.runtime.onnx_info import GraphLimits
from anabranch.edge.runtime.operators import INFER, STEP, TRAINING
from anabranch.protocols.errors import BundleError

FILES = {"base.bin": 4096}
OPSETS = [helper.make_opsetid("", 18)]
Change = Callable[[onnx.ModelProto], None]


def model() -> onnx.ModelProto:
    """Return y = W x + b with W outside and b inside."""
    weight = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[4, 3])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "base.bin"), ("offset", "64"), ("length", "48")):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["z"]),
            helper.make_node("Add", ["z", "b"], ["y"], name="last"),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weight, numpy_helper.from_array(np.arange(3, dtype=np.float32), "b")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=OPSETS)


def changed(*changes: Change) -> bytes:
    made = model()
    for change in changes:
        change(made)
    data: bytes = made.SerializeToString()
    return data


def test_what_the_onnx_package_writes_is_found() -> None:
    data = changed()
    info = check_graph(data, FILES)
    assert (info.ir_version, info.opsets, info.nodes) == (10, {"": 18}, 2)
    assert info.operators == {("", "MatMul"), ("", "Add")}
    assert [(v.name, v.type, v.dims) for v in info.inputs] == [("x", 1, (None, 4))]
    assert [(v.name, v.type, v.dims) for v in info.outputs] == [("y", 1, (None, 3))]
    weight, bias = info.initializers["W"], info.initializers["b"]
    assert (weight.dims, weight.bytes, weight.file, weight.offset) == ((4, 3), 48, "base.bin", 64)
    assert bias.file is None
    assert bias.raw is not None
    assert data[slice(*bias.raw)] == np.arange(3, dtype=np.float32).tobytes()
    graph = onnx.GraphProto.FromString(data[slice(*info.body)])
    assert graph.name == "tiny"
    assert [value.name for value in info.feeds()] == ["x"]


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9),
    kind=st.sampled_from([TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL]),
    raw=st.booleans(),
)
def test_tensors_are_counted_as_onnx_counts_them(values: list[int], kind: int, raw: bool) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    array = np.array(values, np.int64).astype(dtype)
    if raw:
        tensor = numpy_helper.from_array(array, "t")
    else:
        tensor = helper.make_tensor("t", kind, array.shape, array.tolist())
    data = changed(lambda m: m.graph.initializer.append(tensor))
    found = check_graph(data, FILES).initializers["t"]
    assert (found.type, found.dims, found.bytes) == (kind, array.shape, array.nbytes)


def test_four_bit_tensors_have_half_the_bytes() -> None:
    tensor = helper.make_tensor("t", TensorProto.UINT4, (3, 3), bytes(5), raw=True)
    data = changed(lambda m: m.graph.initializer.append(tensor))
    assert check_graph(data, FILES).initializers["t"].bytes == 5


def test_subgraphs_are_walked() -> None:
    assert ("", "Erf") in check_graph(changed(branch("Erf")), FILES).operators


# --- refusals ------------------------------------------------------------------------------------


def branch(operator: str, depth: int = 1) -> Change:
    """Return a change that adds If nodes within each other, with `operator` in the innermost."""

    def graph(level: int) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
        if level == 0:
            return helper.make_graph([helper.make_node(operator, ["z"], ["o"])], "g", [], [out])
        return helper.make_graph([choice(level, "o")], "g", [], [out])

    def choice(level: int, name: str) -> onnx.NodeProto:
        inner = graph(level - 1)
        return helper.make_node("If", ["b"], [name], then_branch=inner, else_branch=inner)

    return lambda m: m.graph.node.append(choice(depth, "chosen"))


def node(operator: str, domain: str = "", **attributes: Any) -> Change:
    return lambda m: m.graph.node.append(
        helper.make_node(operator, ["z"], ["more"], domain=domain, **attributes)
    )


def weight(field: str, value: Any) -> Change:
    def change(m: onnx.ModelProto) -> None:
        tensor = m.graph.initializer[0]
        if field == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        else:
            setattr(tensor, field, value)

    return change


def external(key: str, value: str | None) -> Change:
    def change(m: onnx.ModelProto) -> None:
        entries = m.graph.initializer[0].external_data
        kept = [(e.key, e.value) for e in entries if e.key != key]
        del entries[:]
        for name, text in [*kept, *([] if value is None else [(key, value)])]:
            entries.add(key=name, value=text)

    return change


def add_external_twice(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].external_data.add(key="location", value="base.bin")


def bias(field: str, value: Any) -> Change:
    return lambda m: setattr(m.graph.initializer[1], field, value)


def sparse(m: onnx.ModelProto) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, (1,), [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, (1,), [1])
    m.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, (3,)))


def sparse_constant(m: onnx.ModelProto) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, (1,), [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, (1,), [1])
    tensor = helper.make_sparse_tensor(values, indices, (3,))
    m.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=tensor))


def external_constant(m: onnx.ModelProto) -> None:
    tensor = TensorProto()
    tensor.CopyFrom(m.graph.initializer[0])
    m.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def function(m: onnx.ModelProto) -> None:
    body = [helper.make_node("Erf", ["a"], ["r"])]
    m.functions.append(helper.make_function("", "Twice", ["a"], ["r"], body, OPSETS))


def sequence_input(m: onnx.ModelProto) -> None:
    m.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))


def set_opset(domain: str, version: int) -> Change:
    def change(m: onnx.ModelProto) -> None:
        del m.opset_import[:]
        m.opset_import.append(helper.make_opsetid(domain, version))

    return change


def text_tensor(m: onnx.ModelProto) -> None:
    m.graph.initializer.append(TensorProto(name="t", data_type=8, dims=[1], string_data=[b"x"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (node("Evil", "my.domain"), r"operator 'Evil' of domain 'my\.domain'"),
        (node("MatMulNBits", "com.microsoft"), "operator 'MatMulNBits'"),
        (node("PythonOp", "com.microsoft"), "operator 'PythonOp'"),
        (node("Erf", "ai.onnx"), "operator 'Erf' of domain 'ai.onnx'"),
        (node("Loop"), "operator 'Loop'"),
        (node("RandomNormalLike"), "operator 'RandomNormalLike'"),
        (node("NoSuchOperator"), "operator 'NoSuchOperator'"),
        (branch("Evil"), "operator 'Evil'"),
        (branch("Loop", 3), "operator 'Loop'"),
        (branch("Erf", 9), "nesting: "),
        (function, "functions: "),
        (lambda m: m.training_info.add(), "training_info: "),
        (lambda m: m.ClearField("graph"), "graph: the model has none"),
        (lambda m: setattr(m, "ir_version", 11), "IR version 11"),
        (lambda m: m.ClearField("ir_version"), "IR version 0"),
        (lambda m: setattr(m, "ir_version", -1), "IR version -1"),
        (set_opset("", 22), "operator set 22"),
        (set_opset("", 0), "operator set 0"),
        (set_opset("com.microsoft", 1), "does not say which it uses"),
        (lambda m: m.opset_import.extend(OPSETS), "operator set '' appears twice"),
        (external("location", "other.bin"), r"does not name other\.bin"),
        (external("location", "../base.bin"), "no plain name"),
        (external("location", "/etc/passwd"), "no plain name"),
        (external("location", "sub/base.bin"), "no plain name"),
        (external("location", "..\\base.bin"), "no plain name"),
        (external("location", "*/_ORT_MEM_ADDR_/*"), "no plain name"),
        (external("location", None), "no plain name"),
        (external("offset", "4080"), r"ends at byte 4128 of base\.bin"),
        (external("offset", "-64"), "no number"),
        (external("offset", "0x40"), "no number"),
        (external("offset", "064"), "no number"),
        (external("offset", str(2**64)), "no number"),
        (external("offset", str(2**63 - 1)), "no number"),
        (external("length", "47"), "dims need 48 bytes, got 47"),
        (external("length", "4096"), "dims need 48 bytes, got 4096"),
        (external("checksum", "00"), "key 'checksum'"),
        (add_external_twice, "key 'location'"),
        (weight("data_location", TensorProto.DEFAULT), "not said to be external"),
        (weight("raw_data", bytes(48)), "inside and outside"),
        (weight("dims", [4, 4]), "dims need 64 bytes, got 48"),
        (weight("dims", [2**31, 1]), "dimensions of 0 to"),
        (weight("dims", [-1, 3]), "dimensions of 0 to"),
        (weight("dims", [2**31 - 1] * 8), "at most 2147483648 are"),
        (weight("dims", [2**31 - 1] * 7 + [0]), "dims need 0 bytes"),
        (weight("dims", [1] * 9), "at most 8 dimensions"),
        (weight("data_type", 8), "data type 8"),
        (weight("data_type", 99), "data type 99"),
        (text_tensor, "data type 8"),
        (external_constant, "only an initializer may have it"),
        (bias("raw_data", bytes(11)), "dims need 12 bytes, got 11"),
        (lambda m: m.graph.initializer[1].ClearField("raw_data"), "dims need 12 bytes, got 0"),
        (lambda m: m.graph.initializer[1].float_data.append(1), "has both raw_data and float_data"),
        (bias("name", "W"), "initializer 'W' appears twice"),
        (bias("name", ""), "has no name"),
        (sparse, "sparse tensors"),
        (sparse_constant, "sparse_tensor is not allowed"),
        (lambda m: m.graph.input.append(m.graph.input[0]), "input 'x' appears twice"),
        (lambda m: m.graph.output.append(m.graph.output[0]), "output 'y' appears twice"),
        (lambda m: m.graph.node.append(m.graph.node[1]), "result 'y' appears twice"),
        (lambda m: m.graph.node[1].output.append("x"), "result 'x' appears twice"),
        (sequence_input, "expected a named tensor"),
    ],
)
def test_a_broken_rule_is_named(change: Change, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_graph(changed(change), FILES)


ABOUT: dict[str, Any] = {"N": 5, "K": 20, "bits": 4, "block_size": 16}
CODES, SCALES = np.zeros((5, 2, 8), np.uint8), np.zeros(10, np.float32)


def blocks(
    codes: Any = CODES, scales: Any = SCALES, more: tuple[str, ...] = (), **about: Any
) -> Change:
    def change(m: onnx.ModelProto) -> None:
        found = {"codes": codes, "scales": scales}
        for name, array in found.items():
            if array is not None:
                m.graph.initializer.append(numpy_helper.from_array(array, name))
        operands = ["z", "codes", "scales", *more]
        m.graph.node.append(
            helper.make_node(
                "MatMulNBits", operands, ["more"], domain="com.microsoft", **(ABOUT | about)
            )
        )

    return change


@pytest.mark.parametrize(
    "change",
    [
        blocks(codes=CODES[:4]),
        blocks(codes=CODES[:, :1]),
        blocks(codes=CODES.reshape(10, 8)),
        blocks(codes=CODES.astype(np.int8)),
        blocks(codes=None),
        blocks(scales=SCALES[:9]),
        blocks(scales=SCALES.astype(np.float16)),
        blocks(more=("", "scales")),
        blocks(N=6),
        blocks(K=33),
        blocks(K=-20),
        blocks(bits=8),
        blocks(block_size=0),
        blocks(block_size=8),
        node("MatMulNBits", "com.microsoft"),
    ],
)
def test_codes_that_onnxruntime_would_read_beyond_are_refused(change: Change) -> None:
    check_graph(changed(blocks()), FILES, operators=INFER)
    with pytest.raises(BundleError, match="MatMulNBits: "):
        check_graph(changed(change), FILES, operators=INFER)


def test_each_kind_of_graph_has_its_own_operators() -> None:
    quantized = changed(blocks())
    gradient = changed(node("LayerNormalizationGrad", "com.microsoft"))
    check_graph(quantized, FILES, operators=INFER)
    check_graph(gradient, FILES, operators=TRAINING)
    for data, operators in ((quantized, TRAINING), (gradient, INFER), (gradient, STEP)):
        with pytest.raises(BundleError, match="is not one that this graph may use"):
            check_graph(data, FILES, operators=operators)


def test_nothing_that_runs_foreign_code_is_in_any_list() -> None:
    names = {name for _, name in STEP | INFER | TRAINING}
    assert not names & {"PythonOp", "PythonOpGrad", "ATen", "Loop", "Scan", "ImageDecoder"}


def test_limits_of_the_caller_hold() -> None:
    with pytest.raises(BundleError, match="'W': 48 bytes, at most 47 are allowed"):
        check_graph(changed(), FILES, GraphLimits(tensor_bytes=47))
    with pytest.raises(BundleError, match="nodes: more than 1"):
        check_graph(changed(), FILES, GraphLimits(nodes=1))


# --- bytes ---------------------------------------------------------------------------------------


@given(data=st.binary(max_size=400))
def test_any_bytes_are_a_model_or_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"[a-z]"):
        check_graph(data, FILES)


@given(data=st.data())
def test_a_damaged_model_is_read_or_refused(data: st.DataObject) -> None:
    good = changed(branch("Erf", 2))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    for one in (bytes(damaged), bytes(damaged[:cut]), bytes(damaged) + good[:cut]):
        only_refused(one)


def only_refused(data: bytes) -> None:
    try:
        check_graph(data, FILES)
    except BundleError:
        return


def test_trailing_bytes_are_refused() -> None:
    good = changed()
    for tail, message in (
        (b"\x00", "field with number 0"),
        (b"\xff" * 11, "more than 10 bytes"),
        (good, "appears twice"),
        (b"\x7b", "wire type 3"),
        (b"\x98\x06\x01", "field 99 of model is unknown"),
        (b"\x0a\x01x", "has wire type 2, expected 0"),
        (b"\x08", "ends within a number"),
        (b"\x12\x05abc", "ends 2 bytes too late"),
    ):
        with pytest.raises(BundleError, match=message):
            check_graph(good + tail, FILES)


def test_a_length_that_is_only_claimed_allocates_nothing() -> None:
    import tracemalloc

    claim = protobuf.tag(7, protobuf.BYTES) + protobuf.encode_varint(1 << 62)
    tracemalloc.start()
    with pytest.raises(BundleError, match="too late"):
        check_graph(changed() + claim, FILES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_recursion_bomb_is_refused() -> None:
    graph = b""
    for _ in range(2000):
        attribute = protobuf.encode_bytes(1, b"then_branch") + protobuf.encode_bytes(6, graph)
        one = protobuf.encode_bytes(4, b"If") + protobuf.encode_bytes(5, attribute)
        graph = protobuf.encode_bytes(1, one)
    data = b"\x08\x0a" + protobuf.encode_bytes(8, b"\x10\x12") + protobuf.encode_bytes(7, graph)
    with pytest.raises(BundleError, match="nesting: "):
        check_graph(data, FILES)
