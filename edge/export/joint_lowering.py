"""The walk over a traced graph: every ATen operator becomes ONNX nodes by a short rule.

A rule takes the `Lowering` and the traced node and returns the value that stands for it (or
one per output). What costs nothing in torch costs nothing here: views of views are one Reshape,
copies and expansions before an elementwise operator vanish, transposes become flags of Gemm.
Rules are in joint_shapes (shapes, constants), joint_math (elementwise, reductions, norms) and
joint_matrices (products, tables, convolutions).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from anabranch.edge.export.joint_graph import Graph, Size, Sizes
from anabranch.protocols.errors import ModelError

Value = str | tuple[str, ...]
Rule = Callable[["Lowering", fx.Node], Value]
FLOAT = np.float32
VIEWS = frozenset(
    f"{name}.{form}"
    for name in ("view", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "alias")
    for form in ("default", "Tensor", "int", "dim", "dims")
)


class Rules(dict[str, Rule]):
    """Rules by operator name, without "aten."."""

    def add(self, *names: str) -> Callable[[Rule], Rule]:
        """Return a decorator that puts a rule under the names."""

        def register(function: Rule) -> Rule:
            self.update(dict.fromkeys(names, function))
            return function

        return register


class Lowering:
    """The walk over a traced graph: values of its nodes, and what rules share."""

    def __init__(self, graph: Graph, module: fx.GraphModule, rules: Mapping[str, Rule]) -> None:
        self.graph = graph
        self.module = module
        self.rules = rules
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
        if name.partition(".")[0].endswith("_"):
            _require_own_memory(node)
            name = name.replace("_.", ".", 1)
        found = self.rules.get("getitem" if node.target is operator.getitem else name)
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
        to = onnx.helper.np_dtype_to_tensor_dtype(kind)
        return self.graph.emit("Cast", (value,), self.shape(value), kind, to=to)

    def reduce(self, kind: str, value: str, axes: Sequence[int], keep: bool) -> str:
        """Return a reduction over `axes`."""
        shape = self.shape(value)
        axes = sorted(a % len(shape) for a in axes) if shape else []
        left = tuple(1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes)
        if not axes:
            return value
        if all(shape[a] == 1 for a in axes):
            return self.reshape(value, left)
        chosen = (self.graph.constant(axes, np.int64),)
        attributes = {"keepdims": int(keep)}
        if kind in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"):
            return self.graph.emit(kind, (value, *chosen), left, self.dtype(value), **attributes)
        raise ModelError(f"no reduction {kind}")


def _require_own_memory(node: fx.Node) -> None:
    """Raise ModelError unless writing in place is the same as computing a new value.

    After the write, tracing itself refers to the result; only views would still see the old.
    """
    target = node.args[0]
    if isinstance(target, fx.Node):
        shared = [str(other.target).removeprefix("aten.") for other in (target, *target.users)]
        if not VIEWS.intersection(shared):
            return
    raise ModelError(
        f"the training step writes in place ({node.target}) into memory that others read: it has "
        f"no form in ONNX here; choose another base model"
    )


def sizes_of(node: fx.Node) -> Sizes:
    """Return the shape of a traced tensor."""
    return tuple(size_of(s) for s in node.meta["val"].shape)


def size_of(size: Any) -> Size:
    """Return a traced size as an int, or as an expression over the free sizes."""
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


def dtype_of(node: fx.Node) -> np.dtype[Any]:
    """Return the type of a traced tensor's elements."""
    return numpy_dtype(node.meta["val"].dtype)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument of a traced call, by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
