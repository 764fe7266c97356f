"""int8 inference with a range of its own for every row of x."""

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anabranch.edge.export.codes import dequantize_channels, quantize_pairs
from anabranch.edge.export.quantize import oldest_onnxruntime, quantize_infer
from anabranch.edge.runtime.classify import load_session

Floats = NDArray[np.float32]
FLOAT = TensorProto.FLOAT
OPSETS = [17, 18]  # axes of ReduceMax: an attribute, an input


def layer(weight: Floats, *, op: str = "MatMul", opset: int = 18, axes: int = 2) -> onnx.ModelProto:
    """y = x·W, or x·W + (0, 1, 2 …) by a Gemm."""
    constants = [numpy_helper.from_array(weight, "w")]
    operands: list[str] = ["x", "w"]
    about: dict[str, Any] = {}
    if op != "MatMul":
        constants.append(numpy_helper.from_array(bias(weight), "b"))
        operands = ["x", "w", "b"]
    if op == "Gemm transB":
        constants[0] = numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")
        about["transB"] = 1
    sizes = ["batch", "tokens"][: axes - 1]
    graph = helper.make_graph(
        [helper.make_node(op.split()[0], operands, ["y"], **about)],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [*sizes, len(weight)])],
        [helper.make_tensor_value_info("y", FLOAT, [*sizes, weight.shape[1]])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def bias(weight: Floats) -> Floats:
    return np.arange(weight.shape[1], dtype=np.float32)


def run(model: onnx.ModelProto, x: Floats) -> Floats:
    session = load_session(model.SerializeToString(), threads=1)
    result: Floats = session.run(["y"], {"x": x})[0]
    return result


def by_row(model: onnx.ModelProto) -> onnx.ModelProto:
    return quantize_infer(model, "int8", smallest=1, narrowest=1, per_row=True)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bound(x: Floats, weight: Floats) -> NDArray[np.float64]:
    """|y - x·W'| is at most this: half a step of the row's codes, and float32's rounding."""
    span = x.max(-1, keepdims=True).astype(np.float64) - x.min(-1, keepdims=True)
    column = np.abs(weight).sum(0, dtype=np.float64)
    largest = np.abs(x).max(-1, keepdims=True).astype(np.float64)
    most: NDArray[np.float64] = (span / 510 + 4e-6 * largest) * column + 1e-30
    return most


rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.just(12)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@settings(max_examples=60, deadline=None)
@given(x=rows, seed=st.integers(0, 3), opset=st.sampled_from(OPSETS))
def test_every_row_is_within_half_a_step_of_its_own_range(x: Floats, seed: int, opset: int) -> None:
    weight = normal(12, 7, seed=seed)
    w = dequantize_channels(*quantize_pairs(weight), 1)

    got = run(by_row(layer(weight, opset=opset)), x)

    exact = x.astype(np.float64) @ w.astype(np.float64)
    assert (np.abs(got - exact) <= bound(x, w)).all()


@settings(max_examples=30, deadline=None)
@given(x=rows, others=rows)
def test_a_row_comes_out_bit_for_bit_the_same_whatever_the_other_rows(
    x: Floats, others: Floats
) -> None:
    model = by_row(layer(normal(12, 7)))
    together = run(model, np.concatenate([x, others]))
    alone = np.concatenate([run(model, row[None]) for row in x])

    np.testing.assert_array_equal(together[: len(x)], alone)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", [(24, 40), (33, 47), (300, 9), (3, 2)])
@pytest.mark.parametrize(
    ("op", "axes"), [("MatMul", 2), ("MatMul", 3), ("Gemm", 2), ("Gemm transB", 2)]
)
def test_layers_of_any_shape_and_spelling(
    op: str, axes: int, shape: tuple[int, int], opset: int
) -> None:
    weight = normal(*shape)
    w = dequantize_channels(*quantize_pairs(weight), 1)
    x = normal(*(5, 3)[: axes - 1], shape[0], seed=1)
    model = by_row(layer(weight, op=op, opset=opset, axes=axes))

    onnx.checker.check_model(model, full_check=True)
    assert oldest_onnxruntime(model) == "1.19"
    assert "MatMulInteger" in {node.op_type for node in model.graph.node}
    used = {name for node in model.graph.node for name in node.input}
    assert {constant.name for constant in model.graph.initializer} <= used
    exact = x @ w + (0 if op == "MatMul" else bias(weight))
    assert (np.abs(run(model, x) - exact) <= bound(x, w) + 1e-4).all()


def test_products_of_one_x_share_its_codes() -> None:
    model = layer(normal(12, 7))
    model.graph.node.append(helper.make_node("MatMul", ["x", "v"], ["z"]))
    model.graph.initializer.append(numpy_helper.from_array(normal(12, 5, seed=1), "v"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, ["batch", 5]))
    kinds = [node.op_type for node in by_row(model).graph.node]

    assert kinds.count("MatMulInteger") == 2
    assert kinds.count("QuantizeLinear") == 1


def test_a_row_of_outliers_takes_nothing_from_the_others() -> None:
    """With one range for all rows, what is a thousandth of the outlier is rounded away."""
    weight = np.eye(8, dtype=np.float32)
    x = np.tile(np.linspace(-1, 1, 8, dtype=np.float32), (4, 1))
    x[3] *= 1000
    together = quantize_infer(layer(weight), "int8", smallest=1)

    assert not run(together, x)[:3].any()
    np.testing.assert_allclose(run(by_row(layer(weight)), x)[:3], x[:3], atol=2 / 510 + 1e-6)


def test_a_one_sided_outlier_costs_one_range_not_two() -> None:
    """0 … 20 in 255 steps: symmetric codes would have spent half of them on -20 … 0."""
    weight = np.eye(8, dtype=np.float32)
    x = np.array([[20, 0, 0.12, 0.24, 0.31, 0.39, 0.47, 0.55]], np.float32)

    assert np.abs(run(by_row(layer(weight)), x) - x).max() <= 20 / 510 + 1e-5


def test_constant_rows_and_zeros_are_exact() -> None:
    weight = normal(12, 7)
    w = dequantize_channels(*quantize_pairs(weight), 1)
    x = np.repeat(np.array([0, 1, -3.5, 1e-40], np.float32)[:, None], 12, axis=1)
    got = run(by_row(layer(weight)), x)

    assert not got[0].any()
    np.testing.assert_allclose(got, x @ w, rtol=1e-5, atol=1e-6)


def test_large_sums_do_not_overflow() -> None:
    weight = np.tile(np.array([[1, -1]], np.float32), (4096, 1))
    x = np.ones((2, 4096), np.float32)
    x[:, 0] = 0  # a range of 0 … 1: every other code is 255
    w = dequantize_channels(*quantize_pairs(weight), 1)
    np.testing.assert_allclose(run(by_row(layer(weight)), x), x @ w, rtol=1e-5)


def test_narrow_matrices_are_quantized_on_demand() -> None:
    model = layer(normal(3, 2))
    assert "MatMul" in {n.op_type for n in quantize_infer(model, "int8", smallest=1).graph.node}
    assert "MatMul" not in {n.op_type for n in by_row(model).graph.node}


def test_rows_in_int4_are_refused() -> None:
    with pytest.raises(ValueError, match="per_row is for int8: in int4 every block"):
        quantize_infer(layer(normal(16, 16)), "int4", per_row=True)
