"""ATen operators in ONNX: one short rule per operator.

A rule takes the `Lowering` and the traced node and returns the value that stands for it (or
one per output). What costs nothing in torch costs nothing here: views of views are one Reshape,
copies and expansions before an elementwise operator vanish, transposes become flags of Gemm.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from anabranch.edge.export.joint_graph import Graph, Sizes
from anabranch.protocols.errors import ModelError

Value = str | tuple[str, ...]
Rule = Callable[["Lowering", fx.Node], Value]
RULES: dict[str, Rule] = {}
FLOAT = np.float32


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the operators' names, without "aten."."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Lowering:
    """The walk over a traced graph: values of its nodes, and what rules share."""

    def __init__(self, graph: Graph, module: fx.GraphModule) -> None:
        self.graph = graph
        self.module = module
        self.values: dict[fx.Node, Value] = {}

    def run(self, node: fx.Node) -> None:
        """Write one node; raises ModelError for an operator without a rule."""
        if node.op == "get_attr":
            tensor = getattr(self.module, str(node.target))
            self.values[node] = self.graph.constant(tensor.detach().cpu().numpy())
            return
        if not _is_tensor(node) and node.target is not operator.getitem:
            return  # arithmetic on sizes: shapes are read off the results
        name = str(node.target).removeprefix("aten.")
        found = RULES.get("getitem" if node.target is operator.getitem else name)
        if found is None:
            raise ModelError(
                f"the training step uses {node.target}, which has no form in ONNX here; choose "
                f"another base model, or train on devices only what needs no such operator"
            )
        self.values[node] = found(self, node)

    def value(self, argument: Any, dtype: Any = FLOAT) -> str:
        """Return the value of a node or number."""
        if isinstance(argument, fx.Node):
            value = self.values[argument]
            return value if isinstance(value, str) else value[0]
        return self.graph.constant(argument, dtype)

    def shape(self, value: str) -> Sizes:
        """Return the shape of a value."""
        return self.graph.shapes[value]

    def dtype(self, value: str) -> np.dtype[Any]:
        """Return the type of a value's elements."""
        return self.graph.dtypes[value]

    def same(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Return an elementwise operator's result: shape and type of the largest first input."""
        shape = self.broadcast(*inputs)
        return self.graph.emit(kind, inputs, shape, self.dtype(inputs[0]), **attributes)

    def number(self, number: float, like: str) -> str:
        """Return a scalar constant of the type of `like`."""
        return self.graph.constant(number, self.dtype(like))

    def broadcast(self, *inputs: str) -> Sizes:
        """Return the shape to which the inputs broadcast."""
        shapes = [self.shape(i) for i in inputs]
        rank = max(map(len, shapes))
        padded = [(1,) * (rank - len(s)) + s for s in shapes]
        return tuple(
            next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True)
        )

    def producer(self, value: str, kind: str) -> Any:
        """Return the node that computes `value` if it is of this kind, else None."""
        op = self.graph.producers.get(value)
        return op if op is not None and op.kind == kind else None

    def reshape(self, value: str, shape: Sizes) -> str:
        """Return the value in another shape; a Reshape of a Reshape is one."""
        while (op := self.producer(value, "Reshape")) is not None:
            value = op.inputs[0]
        before = self.shape(value)
        if before == shape:
            return value
        vector = self.graph.shape_vector(shape, before, infer=True)
        return self.graph.emit("Reshape", (value, vector), shape, self.dtype(value))

    def transpose(self, value: str, order: Sequence[int]) -> str:
        """Return the value with its axes in `order`; nothing if only axes of size 1 move."""
        shape = self.shape(value)
        moved = tuple(shape[i] for i in order)
        if [i for i in order if shape[i] != 1] == [i for i, s in enumerate(shape) if s != 1]:
            return self.reshape(value, moved)
        op = self.producer(value, "Transpose")
        if op is not None:
            inner = op.attribute("perm")
            both = tuple(inner[i] for i in order)
            if both == tuple(range(len(both))):
                return str(op.inputs[0])
        return self.graph.emit("Transpose", (value,), moved, self.dtype(value), perm=tuple(order))

    def expand(self, value: str, shape: Sizes) -> str:
        """Return the value repeated to `shape`."""
        if self.shape(value) == shape:
            return value
        vector = self.graph.shape_vector(shape)
        return self.graph.emit("Expand", (value, vector), shape, self.dtype(value))

    def bare(self, value: str) -> str:
        """Return what an Expand repeats: enough where the other operands broadcast it."""
        op = self.producer(value, "Expand")
        return value if op is None else str(op.inputs[0])

    def elementwise(self, kind: str, inputs: Sequence[str], shape: Sizes, dtype: Any) -> str:
        """Return an elementwise result; expansions that broadcasting makes are left out."""
        slim = list(inputs)
        for index, value in enumerate(inputs):
            candidate = [*slim[:index], self.bare(value), *slim[index + 1 :]]
            if self.broadcast(*candidate) == shape:
                slim = candidate
        got = self.broadcast(*slim)
        return self.expand(self.graph.emit(kind, slim, got, dtype), shape)

    def cast(self, value: str, dtype: Any) -> str:
        """Return the value as another type."""
        kind = np.dtype(dtype)
        if self.dtype(value) == kind:
            return value
        import onnx

        to = onnx.helper.np_dtype_to_tensor_dtype(kind)
        return self.graph.emit("Cast", (value,), self.shape(value), kind, to=to)

    def reduce(self, kind: str, value: str, axes: Sequence[int], keep: bool) -> str:
        """Return a reduction over `axes`."""
        shape = self.shape(value)
        axes = sorted(a % len(shape) for a in axes) if shape else []
        left = tuple(
            1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes
        )
        if not axes:
            return value
        if all(shape[a] == 1 for a in axes):
            return self.reshape(value, left)
        chosen = (self.graph.constant(axes, np.int64),)
        attributes = {"keepdims": int(keep)}
        if kind in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"):
            return self.graph.emit(kind, (value, *chosen), left, self.dtype(value), **attributes)
        raise ModelError(f"no reduction {kind}")


def sizes_of(node: fx.Node) -> Sizes:
    """Return the shape of a traced tensor."""
    return tuple(_size(s) for s in node.meta["val"].shape)


def _size(size: Any) -> Any:
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_Integer else expr


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return NumPy's name of a torch type."""
    return torch.empty(0, dtype=dtype).numpy().dtype


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor | tuple | list)


def _dtype(node: fx.Node) -> np.dtype[Any]:
    return numpy_dtype(node.meta["val"].dtype)


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


@rule("getitem")
def _getitem(low: Lowering, node: fx.Node) -> Value:
    source, index = node.args
    return low.values[source][index]  # type: ignore[index]


@rule("alias.default", "clone.default", "detach.default", "lift_fresh_copy.default", "contiguous.default")
def _same(low: Lowering, node: fx.Node) -> Value:
    return low.value(node.args[0])


@rule("_to_copy.default")
def _to_copy(low: Lowering, node: fx.Node) -> Value:
    return low.cast(low.value(node.args[0]), _dtype(node))


# -- shapes ---------------------------------------------------------------------------------


@rule("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default",
      "squeeze.dims", "squeeze.dim", "squeeze.default")
def _view(low: Lowering, node: fx.Node) -> Value:
    return low.reshape(low.value(node.args[0]), sizes_of(node))


@rule("permute.default")
def _permute(low: Lowering, node: fx.Node) -> Value:
    value = low.value(node.args[0])
    rank = len(low.shape(value))
    return low.transpose(value, [a % rank for a in node.args[1]])  # type: ignore[union-attr, operator]


@rule("expand.default")
def _expand(low: Lowering, node: fx.Node) -> Value:
    return low.expand(low.value(node.args[0]), sizes_of(node))


@rule("slice.Tensor")
def _slice(low: Lowering, node: fx.Node) -> Value:
    value, shape = low.value(node.args[0]), sizes_of(node)
    if low.shape(value) == shape:
        return value
    axis = _argument(node, 1, "dim", 0) % len(shape)
    start, step = _argument(node, 2, "start") or 0, _argument(node, 4, "step", 1)
    end = _argument(node, 3, "end")
    ends = _length(low, end, start, shape[axis], step)
    starts = _index(low, start)
    tail = (low.graph.constant([axis], np.int64), low.graph.constant([step], np.int64))
    return low.graph.emit("Slice", (value, starts, ends, *tail), shape, low.dtype(value))


def _index(low: Lowering, index: Any) -> str:
    """Return an index, a number or a traced size, as an int64 vector."""
    if isinstance(index, fx.Node):
        return low.graph.shape_vector((_size(index.meta["val"]),))
    return low.graph.constant([index], np.int64)


def _length(low: Lowering, end: Any, start: Any, size: Any, step: int) -> str:
    if end is None:
        return low.graph.constant([np.iinfo(np.int64).max], np.int64)
    return _index(low, end)


@rule("select.int")
def _select(low: Lowering, node: fx.Node) -> Value:
    value = low.value(node.args[0])
    axis = int(node.args[1]) % len(low.shape(value))  # type: ignore[arg-type]
    index = _index(low, node.args[2])
    kept = tuple(1 if i == axis else s for i, s in enumerate(low.shape(value)))
    one = low.graph.emit("Gather", (value, index), kept, low.dtype(value), axis=axis)
    return low.reshape(one, sizes_of(node))


@rule("cat.default")
def _cat(low: Lowering, node: fx.Node) -> Value:
    parts = [low.value(part) for part in node.args[0]]  # type: ignore[union-attr]
    shape = sizes_of(node)
    axis = _argument(node, 1, "dim", 0) % len(shape)
    return low.graph.emit("Concat", parts, shape, low.dtype(parts[0]), axis=axis)


@rule("slice_scatter.default")
def _slice_scatter(low: Lowering, node: fx.Node) -> Value:
    base, part = low.value(node.args[0]), low.value(node.args[1])
    shape = low.shape(base)
    axis = _argument(node, 2, "dim", 0) % len(shape)
    start, end = _argument(node, 3, "start") or 0, _argument(node, 4, "end")
    if _argument(node, 5, "step", 1) != 1:
        raise ModelError("the training step writes every other element: no form in ONNX here")
    if low.shape(part) == shape:
        return low.expand(part, shape)
    largest = np.iinfo(np.int64).max
    axes, ones = low.graph.constant([axis], np.int64), low.graph.constant([1], np.int64)
    dtype = low.dtype(base)
    inputs = [part]
    if start != 0:
        first = (base, low.graph.constant([0], np.int64), _index(low, start), axes, ones)
        before = _resized(shape, axis, start)
        inputs.insert(0, low.graph.emit("Slice", first, before, dtype))
    if end is not None and end != largest:
        last = (base, _index(low, end), low.graph.constant([largest], np.int64), axes, ones)
        inputs.append(low.graph.emit("Slice", last, _resized(shape, axis, -1), dtype))
    return low.graph.emit("Concat", inputs, shape, dtype, axis=axis)


def _resized(shape: Sizes, axis: int, size: Any) -> Sizes:
    return tuple(size if i == axis else s for i, s in enumerate(shape))


@rule("select_scatter.default")
def _select_scatter(low: Lowering, node: fx.Node) -> Value:
    base, part = low.value(node.args[0]), low.value(node.args[1])
    shape = low.shape(base)
    axis, index = int(node.args[2]) % len(shape), int(node.args[3])  # type: ignore[arg-type]
    size = shape[axis]
    if not isinstance(size, int) and index < 0:
        raise ModelError("the training step picks from the end of a free axis: no form in ONNX here")
    place = index % size if isinstance(size, int) else index
    kept = _resized(shape, axis, 1)
    row = low.expand(low.reshape(part, kept), kept)
    axes, ones = low.graph.constant([axis], np.int64), low.graph.constant([1], np.int64)
    inputs, dtype = [row], low.dtype(base)
    if place:
        first = (base, low.graph.constant([0], np.int64), low.graph.constant([place], np.int64), axes, ones)
        inputs.insert(0, low.graph.emit("Slice", first, _resized(shape, axis, place), dtype))
    if not isinstance(size, int) or place + 1 < size:
        end = low.graph.constant([np.iinfo(np.int64).max], np.int64)
        last = (base, low.graph.constant([place + 1], np.int64), end, axes, ones)
        inputs.append(low.graph.emit("Slice", last, _resized(shape, axis, -1), dtype))
    return low.graph.emit("Concat", inputs, shape, dtype, axis=axis)


# -- constants ------------------------------------------------------------------------------


@rule("full.default", "full_like.default", "zeros.default", "ones.default", "new_zeros.default",
      "zeros_like.default", "ones_like.default", "scalar_tensor.default", "empty_like.default")
def _full(low: Lowering, node: fx.Node) -> Value:
    name = str(node.target)
    fill: Any = 0
    if "full" in name:
        fill = node.args[1]
    elif "scalar_tensor" in name:
        fill = node.args[0]
    elif "ones" in name:
        fill = 1
    return low.expand(low.graph.constant(fill, _dtype(node)), sizes_of(node))


@rule("arange.start_step", "arange.default", "arange.start")
def _arange(low: Lowering, node: fx.Node) -> Value:
    shape, dtype = sizes_of(node), _dtype(node)
    start, step = 0, 1
    if "start" in str(node.target):
        start, step = node.args[0], _argument(node, 2, "step", 1)  # type: ignore[assignment]
    if not all(isinstance(x, int) for x in (start, step)):
        raise ModelError("the training step counts from a free size: no form in ONNX here")
    (size,) = shape
    if isinstance(size, int):
        return low.graph.constant(np.arange(size) * step + start, dtype)
    count = low.graph.emit("Squeeze", (low.graph.shape_vector(shape),), (), np.int64)
    zero, one = low.graph.constant(0, np.int64), low.graph.constant(1, np.int64)
    numbers = low.graph.emit("Range", (zero, count, one), shape, np.int64)
    if step != 1:
        numbers = low.same("Mul", numbers, low.number(step, numbers))
    if start != 0:
        numbers = low.same("Add", numbers, low.number(start, numbers))
    return low.cast(numbers, dtype)


# -- elementwise ----------------------------------------------------------------------------


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
        return low.elementwise(kind, (left, right), sizes_of(node), _dtype(node))

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
    ("neg", "Neg"), ("exp", "Exp"), ("log", "Log"), ("erf", "Erf"), ("sqrt", "Sqrt"),
    ("tanh", "Tanh"), ("sigmoid", "Sigmoid"), ("relu", "Relu"), ("abs", "Abs"), ("sign", "Sign"),
    ("reciprocal", "Reciprocal"), ("cos", "Cos"), ("sin", "Sin"), ("floor", "Floor"),
    ("bitwise_not", "Not"), ("logical_not", "Not"),
):
    rule(f"{_name}.default")(_unary(_kind))


@rule("rsqrt.default")
def _rsqrt(low: Lowering, node: fx.Node) -> Value:
    return low.same("Reciprocal", low.same("Sqrt", low.value(node.args[0])))


@rule("clamp.default", "clamp_min.default")
def _clamp(low: Lowering, node: fx.Node) -> Value:
    value = low.value(node.args[0])
    bounds = (_argument(node, 1, "min"), _argument(node, 2, "max"))
    for bound, kind in zip(bounds, ("Max", "Min"), strict=True):
        if bound is not None:
            value = low.same(kind, value, low.number(bound, value))
    return value


@rule("where.self")
def _where(low: Lowering, node: fx.Node) -> Value:
    dtype = _dtype(node)
    test = low.value(node.args[0])
    a, b = (low.cast(low.value(x, dtype), dtype) for x in node.args[1:3])
    return low.elementwise("Where", (test, a, b), sizes_of(node), dtype)


# -- reductions and normalisation -------------------------------------------------------------


def _reduction(kind: str) -> Rule:
    def write(low: Lowering, node: fx.Node) -> Value:
        value = low.value(node.args[0])
        value = low.cast(value, _dtype(node)) if kind == "ReduceSum" else value
        axes = _argument(node, 1, "dim") or range(len(low.shape(value)))
        return low.reduce(kind, value, axes, bool(_argument(node, 2, "keepdim", False)))

    return write


rule("sum.dim_IntList", "sum.default")(_reduction("ReduceSum"))
rule("mean.dim", "mean.default")(_reduction("ReduceMean"))
rule("amax.default")(_reduction("ReduceMax"))
rule("amin.default")(_reduction("ReduceMin"))


@rule("cumsum.default")
def _cumsum(low: Lowering, node: fx.Node) -> Value:
    value = low.cast(low.value(node.args[0]), _dtype(node))
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
    """Return (dx, dγ, dβ): with x̂ = (x − μ) r and h = γ g, dx = r (h − mean h − x̂ mean(h x̂))."""
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


# -- matrices, tables, convolutions ---------------------------------------------------------


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
        "Gemm", inputs, shape, low.dtype(a),
        transA=flags[0] or None, transB=flags[1] or None,
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
    grad, ids, rows, padding = node.args[:4]
    g, index = low.value(grad), low.value(ids)
    shape = sizes_of(node)
    width = shape[1]
    if isinstance(padding, int) and padding >= 0:
        keep = low.same("Not", low.graph.emit(
            "Equal", (index, low.graph.constant(padding, low.dtype(index))), low.shape(index), bool))
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
    return low.graph.emit("GatherElements", (value, index), sizes_of(node), low.dtype(value), axis=axis)


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
