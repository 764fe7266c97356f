"""Rules for elementwise operators, reductions and normalisation, with their gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from anabranch.edge.export.joint_lowering import (
    FLOAT,
    Lowering,
    Rule,
    Rules,
    Value,
    argument,
    dtype_of,
    numpy_dtype,
    sizes_of,
)

RULES = Rules()
rule = RULES.add


def _binary(kind: str) -> Rule:
    def write(low: Lowering, node: fx.Node) -> Value:
        a, b = node.args[:2]
        dtype = _common(node)
        left, right = (low.cast(low.value(x, dtype), dtype) for x in (a, b))
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = low.same("Mul", right, low.number(alpha, right))  # type: ignore[arg-type]
        if kind in ("Mul", "Div") and b == 1:
            return low.expand(left, sizes_of(node))
        return low.elementwise(kind, (left, right), sizes_of(node), dtype_of(node))

    return write


def _common(node: fx.Node) -> np.dtype[Any]:
    """Return the type in which a binary operator computes."""
    operands = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args[:2]]
    dtype = torch.result_type(*operands)  # type: ignore[arg-type]
    return numpy_dtype(dtype)


for _names, _kind in (
    (("add.Tensor", "add.Scalar"), "Add"),
    (("sub.Tensor", "sub.Scalar"), "Sub"),
    (("mul.Tensor", "mul.Scalar"), "Mul"),
    (("div.Tensor", "div.Scalar"), "Div"),
    (("eq.Tensor", "eq.Scalar"), "Equal"),
    (("gt.Tensor", "gt.Scalar"), "Greater"),
    (("ge.Tensor", "ge.Scalar"), "GreaterOrEqual"),
    (("lt.Tensor", "lt.Scalar"), "Less"),
    (("le.Tensor", "le.Scalar"), "LessOrEqual"),
    (("maximum.default",), "Max"),
    (("minimum.default",), "Min"),
    (("logical_and.default", "bitwise_and.Tensor"), "And"),
    (("logical_or.default", "bitwise_or.Tensor"), "Or"),
):
    rule(*_names)(_binary(_kind))


@rule("ne.Tensor", "ne.Scalar")
def _ne(low: Lowering, node: fx.Node) -> Value:
    equal = _binary("Equal")(low, node)
    return low.same("Not", str(equal))


@rule("pow.Tensor_Scalar")
def _pow(low: Lowering, node: fx.Node) -> Value:
    x, power = low.value(node.args[0]), node.args[1]
    if power == 2:
        return low.same("Mul", x, x)
    if power == 3:
        return low.same("Mul", low.same("Mul", x, x), x)
    if power == 0.5:
        return low.same("Sqrt", x)
    return low.same("Pow", x, low.number(power, x))  # type: ignore[arg-type]


def _unary(kind: str) -> Rule:
    return lambda low, node: low.same(kind, low.value(node.args[0]))


for _name, _kind in (
    ("neg", "Neg"),
    ("exp", "Exp"),
    ("log", "Log"),
    ("erf", "Erf"),
    ("sqrt", "Sqrt"),
    ("tanh", "Tanh"),
    ("sigmoid", "Sigmoid"),
    ("relu", "Relu"),
    ("abs", "Abs"),
    ("sign", "Sign"),
    ("reciprocal", "Reciprocal"),
    ("cos", "Cos"),
    ("sin", "Sin"),
    ("floor", "Floor"),
    ("bitwise_not", "Not"),
    ("logical_not", "Not"),
):
    rule(f"{_name}.default")(_unary(_kind))


@rule("rsqrt.default")
def _rsqrt(low: Lowering, node: fx.Node) -> Value:
    return low.same("Reciprocal", low.same("Sqrt", low.value(node.args[0])))


@rule("clamp.default", "clamp_min.default")
def _clamp(low: Lowering, node: fx.Node) -> Value:
    value = low.value(node.args[0])
    bounds = (argument(node, 1, "min"), argument(node, 2, "max"))
    for bound, kind in zip(bounds, ("Max", "Min"), strict=True):
        if bound is not None:
            value = low.same(kind, value, low.number(bound, value))
    return value


@rule("where.self")
def _where(low: Lowering, node: fx.Node) -> Value:
    dtype = dtype_of(node)
    test = low.value(node.args[0])
    a, b = (low.cast(low.value(x, dtype), dtype) for x in node.args[1:3])
    return low.elementwise("Where", (test, a, b), sizes_of(node), dtype)


def _reduction(kind: str) -> Rule:
    def write(low: Lowering, node: fx.Node) -> Value:
        value = low.value(node.args[0])
        value = low.cast(value, dtype_of(node)) if kind == "ReduceSum" else value
        axes = argument(node, 1, "dim") or range(len(low.shape(value)))
        return low.reduce(kind, value, axes, bool(argument(node, 2, "keepdim", False)))

    return write


rule("sum.dim_IntList", "sum.default")(_reduction("ReduceSum"))
rule("mean.dim", "mean.default")(_reduction("ReduceMean"))
rule("amax.default")(_reduction("ReduceMax"))
rule("amin.default")(_reduction("ReduceMin"))


@rule("cumsum.default")
def _cumsum(low: Lowering, node: fx.Node) -> Value:
    value = low.cast(low.value(node.args[0]), dtype_of(node))
    axis = low.graph.constant(node.args[1], np.int64)
    return low.same("CumSum", value, axis)


@rule("_softmax.default")
def _softmax(low: Lowering, node: fx.Node) -> Value:
    return low.same("Softmax", low.value(node.args[0]), axis=node.args[1])


@rule("_softmax_backward_data.default")
def _softmax_backward(low: Lowering, node: fx.Node) -> Value:
    """Return p (g − Σ g p)."""
    g, p = low.value(node.args[0]), low.value(node.args[1])
    total = low.reduce("ReduceSum", low.same("Mul", g, p), [int(node.args[2])], True)  # type: ignore[arg-type]
    return low.same("Mul", p, low.same("Sub", g, total))


@rule("native_layer_norm.default")
def _layer_norm(low: Lowering, node: fx.Node) -> Value:
    x, shape, weight, bias, eps = (*node.args,)
    value = low.value(x)
    sizes = low.shape(value)
    count = len(shape)  # type: ignore[arg-type]
    fixed = tuple(int(s) for s in shape)  # type: ignore[union-attr, arg-type]
    scale = low.graph.constant(np.ones(fixed), FLOAT) if weight is None else low.value(weight)
    inputs = [value, scale] + ([] if bias is None else [low.value(bias)])
    small = (*sizes[: len(sizes) - count], *([1] * count))
    return low.graph.emit_all(
        "LayerNormalization",
        inputs,
        ((sizes, FLOAT), (small, FLOAT), (small, FLOAT)),
        axis=-count,
        epsilon=float(eps),  # type: ignore[arg-type]
    )


@rule("native_layer_norm_backward.default")
def _layer_norm_backward(low: Lowering, node: fx.Node) -> Value:
    """Return the gradients of x, weight w and bias.

    With x̂ = (x − mean) r and h = w g:  dx = r (h − mean h − x̂ mean(h x̂)).
    """
    grad, x, shape, mean, rstd, weight, _, wanted = (*node.args,)
    g, value = low.value(grad), low.value(x)
    centre, inverse = low.value(mean), low.value(rstd)
    normed = low.same("Mul", low.same("Sub", value, centre), inverse)
    axes = list(range(-len(shape), 0))  # type: ignore[arg-type]
    h = g if weight is None else low.same("Mul", g, low.value(weight))
    inner = low.reduce("ReduceMean", low.same("Mul", h, normed), axes, True)
    outer = low.reduce("ReduceMean", h, axes, True)
    rest = low.same("Sub", low.same("Sub", h, outer), low.same("Mul", normed, inner))
    dx = low.same("Mul", rest, inverse)
    ahead = list(range(len(low.shape(value)) - len(axes)))
    results = [dx, "", ""]
    if wanted[1]:  # type: ignore[index]
        results[1] = low.reduce("ReduceSum", low.same("Mul", g, normed), ahead, False)
    if wanted[2]:  # type: ignore[index]
        results[2] = low.reduce("ReduceSum", g, ahead, False)
    return tuple(results)


def _normal_cdf(low: Lowering, x: str) -> tuple[str, str]:
    """Return (x / √2, Φ(x)): shared by GELU and its gradient."""
    scaled = low.same("Mul", x, low.number(math.sqrt(0.5), x))
    one = low.same("Add", low.same("Erf", scaled), low.number(1.0, x))
    return scaled, low.same("Mul", one, low.number(0.5, x))


@rule("gelu.default")
def _gelu(low: Lowering, node: fx.Node) -> Value:
    """Return x Φ(x), or its tanh form."""
    x = low.value(node.args[0])
    if node.kwargs.get("approximate", "none") == "tanh":
        return low.same("Mul", x, low.same("Mul", _tanh_form(low, x)[1], low.number(0.5, x)))
    return low.same("Mul", x, _normal_cdf(low, x)[1])


def _tanh_form(low: Lowering, x: str) -> tuple[str, str]:
    """Return (t, 1 + t) for t = tanh(√(2/π) (x + 0.044715 x³))."""
    cube = low.same("Mul", low.same("Mul", x, x), x)
    inner = low.same("Add", x, low.same("Mul", cube, low.number(0.044715, x)))
    t = low.same("Tanh", low.same("Mul", inner, low.number(math.sqrt(2 / math.pi), x)))
    return t, low.same("Add", t, low.number(1.0, x))


@rule("gelu_backward.default")
def _gelu_backward(low: Lowering, node: fx.Node) -> Value:
    """Return g (Φ(x) + x φ(x)); with u = x / √2, x φ(x) = u exp(−u²) / √π."""
    g, x = low.value(node.args[0]), low.value(node.args[1])
    if node.kwargs.get("approximate", "none") == "tanh":
        return low.same("Mul", g, _tanh_slope(low, x))
    u, cdf = _normal_cdf(low, x)
    bell = low.same("Exp", low.same("Neg", low.same("Mul", u, u)))
    tail = low.same("Mul", low.same("Mul", u, bell), low.number(1 / math.sqrt(math.pi), x))
    return low.same("Mul", g, low.same("Add", cdf, tail))


def _tanh_slope(low: Lowering, x: str) -> str:
    """Return ½ (1 + t) + ½ x (1 − t²) √(2/π) (1 + 3 · 0.044715 x²)."""
    t, one_more = _tanh_form(low, x)
    left = low.same("Mul", one_more, low.number(0.5, x))
    rest = low.same("Sub", low.number(1.0, x), low.same("Mul", t, t))
    factor = math.sqrt(2 / math.pi) / 2
    square = low.same("Mul", low.same("Mul", x, x), low.number(3 * 0.044715 * factor, x))
    inner = low.same("Add", square, low.number(factor, x))
    return low.same("Add", left, low.same("Mul", low.same("Mul", x, rest), inner))
