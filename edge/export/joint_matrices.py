"""Rules for matrix products, embedding tables and convolutions."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from anabranch.edge.export.joint_graph import Sizes
from anabranch.edge.export.joint_lowering import (
    FLOAT,
    Lowering,
    Rules,
    Value,
    argument,
    sizes_of,
)
from anabranch.protocols.errors import ModelError

RULES = Rules()
rule = RULES.add


def _gemm(low: Lowering, a: str, b: str, shape: Sizes, added: str | None = None) -> str:
    """Return a b (+ added); transposes and factors of the operands become attributes."""
    flags = []
    operands = []
    for value in (a, b):
        op = low.producer(value, "Transpose")
        flags.append(int(op is not None))
        operands.append(value if op is None else op.inputs[0])
    inputs = [*operands] + ([] if added is None else [added])
    return low.graph.emit(
        "Gemm",
        inputs,
        shape,
        low.dtype(a),
        transA=flags[0] or None,
        transB=flags[1] or None,
    )


@rule("mm.default")
def _mm(low: Lowering, node: fx.Node) -> Value:
    return _gemm(low, low.value(node.args[0]), low.value(node.args[1]), sizes_of(node))


@rule("addmm.default")
def _addmm(low: Lowering, node: fx.Node) -> Value:
    bias, a, b = (low.value(x) for x in node.args[:3])
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        raise ModelError("the training step scales inside addmm: no form in ONNX here")
    return _gemm(low, a, b, sizes_of(node), bias)


@rule("bmm.default")
def _bmm(low: Lowering, node: fx.Node) -> Value:
    """Return a b per batch entry; heads that torch folded into the batch stay an own axis."""
    a, b = low.value(node.args[0]), low.value(node.args[1])
    left, right = low.producer(a, "Reshape"), low.producer(b, "Reshape")
    if left is not None and right is not None:
        p, q = left.inputs[0], right.inputs[0]
        one, other = low.shape(p), low.shape(q)
        if (
            len(one) == len(other) == 4
            and one[:2] == other[:2]
            and one[2:] == low.shape(a)[1:]
            and other[2:] == low.shape(b)[1:]
        ):
            shape = (*one[:2], one[2], other[3])
            both = low.graph.emit("MatMul", (p, q), shape, low.dtype(a))
            return low.reshape(both, sizes_of(node))
    return low.graph.emit("MatMul", (a, b), sizes_of(node), low.dtype(a))


@rule("embedding.default")
def _embedding(low: Lowering, node: fx.Node) -> Value:
    table, ids = low.value(node.args[0]), low.value(node.args[1])
    return low.graph.emit("Gather", (table, ids), sizes_of(node), low.dtype(table), axis=0)


@rule("embedding_dense_backward.default")
def _embedding_backward(low: Lowering, node: fx.Node) -> Value:
    """Return the rows' gradients added up per id; the padding id gets none."""
    grad, ids, _, padding = node.args[:4]
    g, index = low.value(grad), low.value(ids)
    shape = sizes_of(node)
    width = shape[1]
    if isinstance(padding, int) and padding >= 0:
        keep = low.same(
            "Not",
            low.graph.emit(
                "Equal",
                (index, low.graph.constant(padding, low.dtype(index))),
                low.shape(index),
                bool,
            ),
        )
        kept = low.reshape(low.cast(keep, FLOAT), (*low.shape(index), 1))
        g = low.elementwise("Mul", (g, kept), low.shape(g), FLOAT)
    total = math.prod(low.shape(index))
    flat = low.reshape(g, (total, width))
    column = low.reshape(index, (total, 1))
    zeros = low.expand(low.graph.constant(0.0, FLOAT), shape)
    return low.graph.emit("ScatterND", (zeros, column, flat), shape, FLOAT, reduction="add")


@rule("gather.default")
def _gather(low: Lowering, node: fx.Node) -> Value:
    value, index = low.value(node.args[0]), low.value(node.args[2])
    axis = int(node.args[1])  # type: ignore[arg-type]
    return low.graph.emit(
        "GatherElements", (value, index), sizes_of(node), low.dtype(value), axis=axis
    )


@rule("scatter_add.default")
def _scatter_add(low: Lowering, node: fx.Node) -> Value:
    into, axis, index, source = (argument(node, i, "") for i in range(4))
    base, places, added = (low.value(x) for x in (into, index, source))
    options: Any = {"axis": axis, "reduction": "add"}
    shape, dtype = sizes_of(node), low.dtype(base)
    return low.graph.emit("ScatterElements", (base, places, added), shape, dtype, **options)


@rule("convolution.default")
def _convolution(low: Lowering, node: fx.Node) -> Value:
    x, weight, bias, stride, padding, dilation, transposed, extra, groups = node.args
    inputs = [low.value(v) for v in (x, weight, bias) if v is not None]
    attributes: dict[str, Any] = {
        "strides": tuple(stride),  # type: ignore[arg-type]
        "pads": (*padding, *padding),  # type: ignore[misc]
        "dilations": tuple(dilation),  # type: ignore[arg-type]
        "group": groups,
    }
    if transposed:
        attributes["output_padding"] = tuple(extra)  # type: ignore[arg-type]
    kind = "ConvTranspose" if transposed else "Conv"
    return low.graph.emit(kind, inputs, sizes_of(node), low.dtype(inputs[0]), **attributes)
