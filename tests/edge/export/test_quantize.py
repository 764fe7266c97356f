import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter, trainable_parameters
from anabranch.client.tuning.text import TextClassifier
from anabranch.client.tuning.vision import ImageClassifier
from anabranch.edge.export.codes import (
    block_for,
    dequantize_blocks,
    dequantize_channels,
    quantize_blocks,
    quantize_channels,
)
from anabranch.edge.export.frozen import Weight, attributes, find_weights
from anabranch.edge.export.joint import step_graph
from anabranch.edge.export.quantize import oldest_onnxruntime, quantize_infer, quantize_step
from anabranch.edge.runtime.classify import load_session
from anabranch.protocols.errors import BundleError

Make = Callable[..., Classifier]
Arrays = dict[str, NDArray[Any]]
FLOAT = TensorProto.FLOAT
LOW = ["int8", "int4"]


def run(model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
    session = load_session(model.SerializeToString(), threads=1)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def off(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(got - expected).max() / max(1e-6, np.abs(expected).max()))


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def floats(model: onnx.ModelProto) -> set[tuple[int, ...]]:
    """Shapes of the float matrices that are left; scales have one row."""
    shapes = {tuple(t.dims) for t in model.graph.initializer if t.data_type == FLOAT}
    return {shape for shape in shapes if len(shape) == 2 and min(shape) > 1}


def dequantized(weight: Weight, precision: str, block: int = 128) -> NDArray[np.float32]:
    """What a weight's codes stand for, in its own layout."""
    turn = not weight.lookups and weight.transposed
    if precision == "int8":
        limit, axis = (127, 0) if weight.lookups else (63, 0 if turn else 1)
        return dequantize_channels(*quantize_channels(weight.values, axis, limit), axis)
    along = weight.values if weight.lookups or turn else weight.values.T
    rows = np.ascontiguousarray(along)
    packed, scales = quantize_blocks(rows, block_for(rows.shape[1], block))
    values = dequantize_blocks(packed, scales, rows.shape[1])
    return values if weight.lookups or turn else np.ascontiguousarray(values.T)


Step = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="module")
def step_of(make_classifier: Make) -> Step:
    """Return a function from a kind of task to the step of `make_classifier(kind)`."""
    return functools.cache(
        lambda kind, clipped=False: step_graph(make_classifier(kind), clipped=clipped)
    )


# A small step, y = x·W and dx = g·Wᵀ, written in every way


def small(
    weight: NDArray[np.float32], *, op: str, bias: bool = False, axes: int = 2
) -> onnx.ModelProto:
    """Forward and backward product by `weight` (inputs, outputs), written with `op`."""
    inputs, outputs = weight.shape
    batch: list[int | str] = ["batch", "tokens"][: axes - 1]  # type: ignore[assignment]
    constants = [numpy_helper.from_array(weight, "w")]
    if bias:
        constants.append(numpy_helper.from_array(np.arange(outputs, dtype=np.float32), "b"))
    extra = ["b"] if bias else []
    if op == "Gemm":
        nodes = [
            helper.make_node("Gemm", ["x", "w", *extra], ["y"]),
            helper.make_node("Gemm", ["g", "w"], ["dx"], transB=1),
        ]
    elif op == "Gemm transB":
        turned = np.ascontiguousarray(weight.T)
        constants[0] = numpy_helper.from_array(turned, "w")
        nodes = [
            helper.make_node("Gemm", ["x", "w", *extra], ["y"], transB=1),
            helper.make_node("Gemm", ["g", "w"], ["dx"]),
        ]
    else:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            helper.make_node("MatMul", ["g", "wt"], ["dx"]),
        ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, [*batch, inputs]),
            helper.make_tensor_value_info("g", FLOAT, [*batch, outputs]),
        ],
        [
            helper.make_tensor_value_info("y", FLOAT, [*batch, outputs]),
            helper.make_tensor_value_info("dx", FLOAT, [*batch, inputs]),
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (33, 47), (128, 128), (300, 9), (160, 20)])
@pytest.mark.parametrize(
    ("op", "bias", "axes"),
    [("Gemm", True, 2), ("Gemm transB", True, 2), ("MatMul", False, 2), ("MatMul", False, 3)],
)
def test_forward_and_backward_multiply_by_the_dequantized_weight(
    precision: str, shape: tuple[int, int], op: str, bias: bool, axes: int
) -> None:
    model = small(normal(*shape), op=op, bias=bias, axes=axes)
    step = quantize_step(model, precision, smallest=64)
    assert "DequantizeLinear" in kinds(step)
    assert not floats(step)
    (weight,) = find_weights(model.graph, 64, one_way=False)
    w = dequantized(weight, precision)
    w = w.T if op == "Gemm transB" else w
    lead = (5, 3)[: axes - 1]
    x, g = normal(*lead, shape[0], seed=1), normal(*lead, shape[1], seed=2)
    got = run(step, {"x": x, "g": g})
    b = np.arange(shape[1], dtype=np.float32) if bias else np.float32(0)
    assert off(got["y"], x @ w + b) < 1e-5
    assert off(got["dx"], g @ w.T) < 1e-5


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("shape", [(50, 24), (20, 130), (200, 128), (40, 9)])
def test_an_embedding_gives_dequantized_rows_for_indices_of_any_shape(
    precision: str, axes: int, shape: tuple[int, int]
) -> None:
    model = lookup(normal(*shape))
    (weight,) = find_weights(model.graph, 64, one_way=False)
    table = dequantized(weight, precision)
    indices = np.random.default_rng(1).integers(0, shape[0], (2, 3, 4)[:axes])
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for size in "abc"[:axes]:
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_param=size)
    for quantize in (quantize_step, quantize_infer):
        quantized = quantize(model, precision, smallest=64)
        assert shape not in floats(quantized)
        (got,) = run(quantized, {"i": indices}).values()
        assert got.shape == (*indices.shape, shape[1])
        np.testing.assert_allclose(got, table[indices], rtol=1e-6, atol=1e-7)


def lookup(table: NDArray[np.float32]) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["e", "i"], ["rows"])],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("rows", FLOAT, None)],
        [numpy_helper.from_array(table, "e")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


# Whole steps, against torch


def records(classifier: Classifier, rows: int = 3) -> Arrays:
    rng = np.random.default_rng(rows)
    if isinstance(classifier, TextClassifier):
        ids = rng.integers(5, 90, (rows, 7))
        mask = np.ones_like(ids)
        mask[0, 4:] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}
    if isinstance(classifier, ImageClassifier):
        return {"pixels": rng.random((rows, *classifier.image_shape), dtype=np.float32)}
    return {"features": normal(rows, 5)}


def batch_for(classifier: Classifier) -> Arrays:
    return {
        **records(classifier),
        "labels": np.array([0, 2, 1]),
        "weights": np.array([0.5, 1, 0], np.float32),
        **read_adapter(classifier).arrays,
    }


def torch_step(classifier: Classifier, batch: Arrays) -> Arrays:
    first, *rest = (torch.tensor(a) for a in records(classifier).values())
    logits = classifier.logits(first, rest[0].bool() if rest else None)
    labels, weights = torch.tensor(batch["labels"]), torch.tensor(batch["weights"])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = (losses * weights).sum()
    parameters = trainable_parameters(classifier)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    named = {f"{n}.grad": g for n, g in zip(parameters, gradients, strict=True)}
    results = {"loss": loss, "losses": losses, "logits": logits} | named
    return {name: value.detach().numpy() for name, value in results.items()}


def use_dequantized(
    classifier: Classifier, weights: list[Weight], precision: str, patch: pytest.MonkeyPatch
) -> int:
    """Put the dequantized weights in the place of the frozen ones; return how many there were."""
    new = {}
    for weight in weights:
        values = dequantized(weight, precision)
        new[weight.values.shape, weight.values.tobytes()] = values
        turned = weight.values.T
        new.setdefault((turned.shape, turned.tobytes()), np.ascontiguousarray(values.T))
    changed = 0
    for module in classifier.base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            old = parameter.detach().numpy()
            values = new.get((old.shape, old.tobytes()), old)
            frozen = torch.nn.Parameter(torch.tensor(values), requires_grad=False)
            if values is not old and not parameter.requires_grad:
                patch.setitem(module._parameters, name, frozen)  # others share the parameter
                changed += 1
    return changed


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_step_over_a_quantized_base_is_torchs_over_the_dequantized_one(
    make_classifier: Make,
    step_of: Step,
    kind: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = make_classifier(kind)
    batch = batch_for(classifier)
    model = step_of(kind)
    step = quantize_step(model, precision, smallest=50)
    weights = find_weights(model.graph, 50, one_way=False)
    changed = use_dequantized(classifier, weights, precision, monkeypatch)
    assert changed >= {"text": 13, "image": 8}[kind]
    expected, got = torch_step(classifier, batch), run(step, batch)
    assert got.keys() == expected.keys()
    assert [o.name for o in step.graph.output] == [o.name for o in model.graph.output]
    for name, value in expected.items():
        assert np.linalg.norm(got[name] - value) < 2e-5 * np.linalg.norm(value), name
    assert off(run(model, batch)["logits"], expected["logits"]) > 1e-4  # fp32 is something else


@pytest.mark.parametrize("precision", LOW)
def test_the_clipped_step_is_quantized_too(
    make_classifier: Make, step_of: Step, precision: str
) -> None:
    classifier = make_classifier("text")
    batch = batch_for(classifier)
    plain, clipped = step_of("text"), step_of("text", clipped=True)
    plain = quantize_step(plain, precision, smallest=50)
    clipped = quantize_step(clipped, precision, smallest=50)
    one = run(plain, batch)
    other = run(clipped, batch | {"clipping_norm": np.array(1e9, np.float32)})
    for name in other.keys() & one.keys():
        assert off(other[name], one[name]) < 1e-4, name
    shared = {t.name for t in plain.graph.initializer if len(t.raw_data) > 500}
    assert shared <= {t.name for t in clipped.graph.initializer}


# Inference


def infer_of(model: onnx.ModelProto, classifier: Classifier) -> onnx.ModelProto:
    """The part of a step that computes logits, with the adapter as overridable defaults."""
    adapter = read_adapter(classifier).arrays
    inputs = [*records(classifier), *adapter]
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    made = onnx.utils.Extractor(whole).extract_model(inputs, ["logits"])
    kept = {v.name for v in made.graph.input}
    for name, array in adapter.items():
        if name in kept:
            made.graph.initializer.append(numpy_helper.from_array(array, name))
    made.ir_version = model.ir_version
    return made


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_quantized_inference_is_near_the_float_graph(
    make_classifier: Make, step_of: Step, kind: str, precision: str
) -> None:
    classifier = make_classifier(kind)
    model = infer_of(step_of(kind), classifier)
    quantized = quantize_infer(model, precision, smallest=50)
    assert {"int8": "MatMulInteger", "int4": "MatMulNBits"}[precision] in kinds(quantized)
    expected = run(model, records(classifier))["logits"]
    got = run(quantized, records(classifier))["logits"]
    assert off(got, expected) < {"int8": 0.15, "int4": 0.6}[precision]
    assert not np.array_equal(got, expected)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("shape", [(24, 40), (33, 47), (300, 9)])
@pytest.mark.parametrize(
    ("op", "bias", "axes"),
    [("Gemm", True, 2), ("Gemm transB", True, 2), ("Gemm", False, 2), ("MatMul", False, 3)],
)
def test_products_in_low_precision_are_near_those_by_the_dequantized_weight(
    precision: str, shape: tuple[int, int], op: str, bias: bool, axes: int
) -> None:
    model = small(normal(*shape), op=op, bias=bias, axes=axes)
    (weight,) = find_weights(model.graph, 64, one_way=False)
    del model.graph.output[1], model.graph.input[1]
    del model.graph.node[1:]
    quantized = quantize_infer(model, precision, smallest=64)
    w = dequantized(weight, precision)
    w = w.T if op == "Gemm transB" else w
    x = normal(*(5, 3)[: axes - 1], shape[0], seed=1)
    b = np.arange(shape[1], dtype=np.float32) if bias else np.float32(0)
    # x has 8 bits: off by range/510 at most per value, at random.
    assert off(run(quantized, {"x": x})["y"], x @ w + b) < 0.02


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("shape", [(48, 40), (64, 128), (128, 64)])
def test_every_product_has_its_own_weight_that_waits_for_the_other_factor(
    precision: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    import onnxruntime

    model = small(normal(*shape), op="Gemm", bias=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    step = quantize_step(model, precision, smallest=64).SerializeToString()
    onnxruntime.InferenceSession(step, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    made = {name: node for node in graph.node for name in node.output}
    waited = []
    for product in (node for node in graph.node if node.op_type == "Gemm"):
        weight = made[product.input[1]]
        weight = made[weight.input[0]] if weight.op_type == "Slice" else weight
        assert weight.op_type == "DequantizeLinear"
        assert attributes(weight)["axis"] == -1
        ancestors = [weight.input[1]]
        for name in ancestors:
            ancestors += made[name].input if name in made else []
        assert product.input[0] in ancestors
        waited.append(weight.output[0])
    assert len(set(waited)) == 2


def test_codes_of_linear_layers_use_seven_bits() -> None:
    model = quantize_infer(small_forward(), "int8", smallest=64)
    (codes,) = (t for t in model.graph.initializer if t.data_type == TensorProto.INT8)
    assert np.abs(numpy_helper.to_array(codes)).max() == 63


def small_forward() -> onnx.ModelProto:
    model = small(normal(48, 40), op="Gemm", bias=True)
    del model.graph.output[1], model.graph.input[1], model.graph.node[1]
    return model


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("kind", ["text", "image", "tabular", "logistic"])
def test_the_adapter_stays_float_and_overridable(
    make_classifier: Make, step_of: Step, kind: str, precision: str
) -> None:
    classifier = make_classifier(kind)
    model = infer_of(step_of(kind), classifier)
    quantized = quantize_infer(model, precision, smallest=1)
    assert list(quantized.graph.input) == list(model.graph.input)
    have = {t.name: t for t in quantized.graph.initializer}
    for name, array in read_adapter(classifier).arrays.items():
        assert np.array_equal(numpy_helper.to_array(have[name]), array)


@pytest.mark.parametrize("precision", LOW)
def test_switching_adapters_changes_no_other_output_bit(
    make_classifier: Make, step_of: Step, precision: str
) -> None:
    classifier = make_classifier("text")
    model = quantize_infer(infer_of(step_of("text"), classifier), precision, smallest=50)
    session = load_session(model.SerializeToString(), threads=1)
    first = dict(read_adapter(classifier).arrays)
    second = {name: array + np.float32(0.1) for name, array in first.items()}
    texts = records(classifier)
    default, a, b, again = (
        session.run(["logits"], {**texts, **fed})[0] for fed in ({}, first, second, first)
    )
    assert np.array_equal(default, a)
    assert np.array_equal(a, again)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("precision", LOW)
def test_step_and_inference_share_the_bytes_of_their_weights(
    make_classifier: Make, step_of: Step, precision: str
) -> None:
    classifier = make_classifier("text")
    model = step_of("text")
    step = quantize_step(model, precision, smallest=50)
    infer = quantize_infer(infer_of(model, classifier), precision, smallest=50)
    stored = {t.raw_data for t in step.graph.initializer}
    large = [t for t in infer.graph.initializer if t.data_type != FLOAT and len(t.raw_data) > 99]
    assert len(large) >= 13
    assert all(t.raw_data in stored for t in large)


# Laws


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("quantize", [quantize_step, quantize_infer])
def test_quantizing_twice_changes_nothing_and_the_argument_never_changes(
    make_classifier: Make, step_of: Step, quantize: Step, precision: str
) -> None:
    classifier = make_classifier("text")
    model = infer_of(step_of("text"), classifier)
    before = model.SerializeToString(deterministic=True)
    once = quantize(model, precision, smallest=50)
    assert model.SerializeToString(deterministic=True) == before
    same = quantize(model, precision, smallest=50).SerializeToString(deterministic=True)
    assert once.SerializeToString(deterministic=True) == same  # equal graphs, equal bytes
    twice = quantize(once, precision, smallest=1)
    assert twice.SerializeToString(deterministic=True) == same
    assert twice is not once


@pytest.mark.parametrize("precision", LOW)
def test_quantized_graphs_are_valid_and_run_in_the_oldest_onnxruntime(
    make_classifier: Make, step_of: Step, precision: str
) -> None:
    classifier = make_classifier("text")
    model = step_of("text")
    infer = infer_of(model, classifier)
    for made in (
        quantize_step(model, precision, smallest=50),
        quantize_infer(infer, precision, smallest=50),
    ):
        onnx.checker.check_model(made, full_check="MatMulNBits" not in kinds(made))
        assert made.ir_version == 10
        assert oldest_onnxruntime(made) == "1.19"
    assert oldest_onnxruntime(model) == "1.19"


def test_a_model_without_large_matrices_stays_as_it_is(step_of: Step) -> None:
    model = step_of("logistic")
    step = quantize_step(model, "int8")
    assert list(step.graph.node) == list(model.graph.node)
    assert list(step.graph.initializer) == list(model.graph.initializer)


# What is left alone


def alone(*nodes: onnx.NodeProto, output: str = "y", extra: tuple[str, ...] = ()) -> None:
    """Check that a weight `w` (16, 16) in these nodes stays float in every graph."""
    made = [helper.make_tensor_value_info(n, FLOAT, ["a", "b"]) for n in (output, *extra)]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, [16, 16]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [3]),
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
        ],
        made,
        [numpy_helper.from_array(normal(16, 16), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    for quantize in (quantize_step, quantize_infer):
        for precision in LOW:
            same = quantize(model, precision, smallest=1)
            assert list(same.graph.node) == list(model.graph.node)
            assert list(same.graph.initializer) == list(model.graph.initializer)


def test_other_uses_keep_a_weight_float() -> None:
    node = helper.make_node
    product = node("MatMul", ["x", "w"], ["y"])
    alone(product, node("Add", ["x", "w"], ["z"]), extra=("z",))
    alone(node("MatMul", ["w", "x"], ["y"]))  # the left factor
    alone(node("Gemm", ["x", "x", "w"], ["y"]))  # the third operand
    alone(node("Gemm", ["x", "w"], ["y"], alpha=2.0))
    alone(node("Gemm", ["x", "w"], ["y"], transA=1))
    alone(node("Gather", ["w", "i"], ["y"], axis=1))
    alone(product, node("Gather", ["w", "i"], ["z"]), extra=("z",))  # tied
    alone(node("Transpose", ["w"], ["t"], perm=[0, 1]), node("MatMul", ["x", "t"], ["y"]))
    turned = node("Transpose", ["w"], ["t"])
    alone(turned, node("MatMul", ["x", "t"], ["y"]), node("Neg", ["t"], ["z"]), extra=("z",))
    alone(turned, node("MatMul", ["x", "t"], ["y"]), extra=("t",))  # an output
    alone(product, extra=("w",))


def test_a_weight_inside_a_sub_graph_stays_float() -> None:
    y = helper.make_tensor_value_info("inner", FLOAT, ["a", "b"])
    branches = [
        helper.make_graph([helper.make_node(op, ["x", "w"], ["inner"])], op, [], [y])
        for op in ("MatMul", "Add")
    ]
    fork = helper.make_node("If", ["yes"], ["z"], then_branch=branches[0], else_branch=branches[1])
    alone(helper.make_node("MatMul", ["x", "w"], ["y"]), fork, extra=("z",))


def test_inference_leaves_a_weight_float_that_is_multiplied_by_both_ways_round() -> None:
    model = small(normal(16, 16), op="Gemm")
    infer = quantize_infer(model, "int8", smallest=1)
    assert floats(infer) == {(16, 16)}
    assert floats(quantize_step(model, "int8", smallest=1)) == set()


def test_small_narrow_and_other_tensors_stay_float() -> None:
    for shape in [(31, 32), (7, 500)]:
        assert floats(quantize_step(small(normal(*shape), op="MatMul"), "int8")) == {shape}
    model = small(normal(32, 32), op="MatMul")
    assert floats(quantize_step(model, "int8")) == set()
    model.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [32, 32]))
    assert floats(quantize_step(model, "int8")) == {(32, 32)}  # a default of an input


# Refusals


def test_a_graph_of_another_precision_is_refused() -> None:
    model = quantize_step(small(normal(32, 32), op="Gemm"), "int8")
    with pytest.raises(BundleError, match="are int8 already; make int4 from the fp32 graph"):
        quantize_step(model, "int4")


@pytest.mark.parametrize("precision", ["fp32", "int7", ""])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(ValueError, match='expected precision "int8" or "int4"'):
        quantize_infer(small_forward(), precision)


@pytest.mark.parametrize("block", [0, 8, 24, -32])
def test_blocks_that_no_runtime_has_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match="expected a block of 16"):
        quantize_step(small_forward(), "int4", block=block)


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = normal(32, 32)
    weight[3, 4] = np.nan
    with pytest.raises(BundleError, match="w: weights that are not finite"):
        quantize_step(small(weight, op="Gemm"), "int8")


def test_weights_in_other_files_are_refused() -> None:
    model = small(normal(32, 32), op="Gemm")
    (weight,) = (t for t in model.graph.initializer if t.name == "w")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="base.bin")
    with pytest.raises(BundleError, match="bytes of w lie in another file"):
        quantize_step(model, "int8")


def test_operators_that_opset_21_changed_are_refused_in_int4_alone() -> None:
    model = small(normal(32, 32), op="MatMul")
    norm = helper.make_node(
        "GroupNormalization", ["x3", "one", "one"], ["norm"], num_groups=2, epsilon=1e-5
    )
    model.graph.node.append(norm)
    model.graph.input.append(helper.make_tensor_value_info("x3", FLOAT, [1, 4, 4]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "one"))
    assert quantize_step(model, "int8").opset_import[0].version == 18
    with pytest.raises(BundleError, match="GroupNormalization means something else in opset 21"):
        quantize_step(model, "int4")


def test_graphs_for_newer_runtimes_are_refused() -> None:
    model = small_forward()
    model.opset_import[0].version = 22
    with pytest.raises(BundleError, match=r"opset 22: onnxruntime 1\.19 reads"):
        oldest_onnxruntime(model)
    model = small_forward()
    model.ir_version = 11
    with pytest.raises(BundleError, match="graph in IR 11"):
        oldest_onnxruntime(model)
    model = small_forward()
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(BundleError, match=r"operators com\.microsoft\.Gemm"):
        oldest_onnxruntime(model)
