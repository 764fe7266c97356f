"""Rules for what moves values about: views, slices, joins, constants, counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from anabranch.edge.export.joint_graph import Sizes
from anabranch.edge.export.joint_lowering import (
    Lowering,
    Rules,
    Value,
    argument,
    dtype_of,
    size_of,
    sizes_of,
)
from anabranch.protocols.errors import ModelError

RULES = Rules()
rule = RULES.add


@rule("getitem")
def _getitem(low: Lowering, node: fx.Node) -> Value:
    source, index = node.args
    return low.values[source][index]  # type: ignore[index]


@rule(
    "alias.default",
    "clone.default",
    "detach.default",
    "lift_fresh_copy.default",
    "contiguous.default",
)
def _same(low: Lowering, node: fx.Node) -> Value:
    return low.value(node.args[0])


@rule("_to_copy.default")
def _to_copy(low: Lowering, node: fx.Node) -> Value:
    return low.cast(low.value(node.args[0]), dtype_of(node))


@rule(
    "view.default",
    "_unsafe_view.default",
    "reshape.default",
    "unsqueeze.default",
    "squeeze.dims",
    "squeeze.dim",
    "squeeze.default",
)
def _view(low: Lowering, node: fx.Node) -> Value:
    return low.reshape(low.value(node.args[0]), sizes_of(node))


@rule("permute.default")
def _permute(low: Lowering, node: fx.Node) -> Value:
    value = low.value(node.args[0])
    order: Any = node.args[1]
    return low.transpose(value, [axis % len(order) for axis in order])


@rule("expand.default")
def _expand(low: Lowering, node: fx.Node) -> Value:
    return low.expand(low.value(node.args[0]), sizes_of(node))


@rule("slice.Tensor")
def _slice(low: Lowering, node: fx.Node) -> Value:
    value, shape = low.value(node.args[0]), sizes_of(node)
    if low.shape(value) == shape:
        return value
    axis = argument(node, 1, "dim", 0) % len(shape)
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    end = argument(node, 3, "end")
    ends = _end(low, end)
    starts = _index(low, start)
    tail = (low.graph.constant([axis], np.int64), low.graph.constant([step], np.int64))
    return low.graph.emit("Slice", (value, starts, ends, *tail), shape, low.dtype(value))


def _index(low: Lowering, index: Any) -> str:
    """Return an index, a number or a traced size, as an int64 vector."""
    if isinstance(index, fx.Node):
        return low.graph.shape_vector((size_of(index.meta["val"]),))
    return low.graph.constant([index], np.int64)


def _end(low: Lowering, end: Any) -> str:
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


@rule("index.Tensor")
def _pick(low: Lowering, node: fx.Node) -> Value:
    """Return x[i, j, …] for index tensors on the leading axes."""
    value = low.value(node.args[0])
    given: Any = node.args[1]
    if any(i is None or i.meta["val"].dtype == torch.bool for i in given):
        raise ModelError("the training step picks by a mask or along an inner axis: no form here")
    places = [low.cast(low.value(i), np.int64) for i in given]
    common = low.broadcast(*places)
    columns = [low.reshape(low.expand(p, common), (*common, 1)) for p in places]
    shape = (*common, len(columns))
    index = low.graph.emit("Concat", columns, shape, np.int64, axis=-1)
    return low.graph.emit("GatherND", (value, index), sizes_of(node), low.dtype(value))


@rule("repeat.default")
def _repeat(low: Lowering, node: fx.Node) -> Value:
    value, shape = low.value(node.args[0]), sizes_of(node)
    before = low.shape(value)
    value = low.reshape(value, (*([1] * (len(shape) - len(before))), *before))
    given: Any = node.args[1]
    if low.shape(value) == shape:
        return value
    sizes = tuple(size_of(n.meta["val"]) if isinstance(n, fx.Node) else n for n in given)
    times = low.graph.shape_vector(sizes)
    return low.graph.emit("Tile", (value, times), shape, low.dtype(value))


@rule("cat.default")
def _cat(low: Lowering, node: fx.Node) -> Value:
    parts = [low.value(part) for part in node.args[0]]  # type: ignore[union-attr]
    shape = sizes_of(node)
    axis = argument(node, 1, "dim", 0) % len(shape)
    return low.graph.emit("Concat", parts, shape, low.dtype(parts[0]), axis=axis)


@rule("split_with_sizes.default")
def _split(low: Lowering, node: fx.Node) -> Value:
    value, sizes = low.value(node.args[0]), argument(node, 1, "split_sizes")
    shape = low.shape(value)
    axis = argument(node, 2, "dim", 0) % len(shape)
    outputs = [(_resized(shape, axis, size), low.dtype(value)) for size in sizes]
    lengths = low.graph.constant(sizes, np.int64)
    return low.graph.emit_all("Split", (value, lengths), outputs, axis=axis)


@rule("slice_scatter.default")
def _slice_scatter(low: Lowering, node: fx.Node) -> Value:
    base, part = low.value(node.args[0]), low.value(node.args[1])
    shape = low.shape(base)
    axis = argument(node, 2, "dim", 0) % len(shape)
    start, end = argument(node, 3, "start") or 0, argument(node, 4, "end")
    if argument(node, 5, "step", 1) != 1:
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
        raise ModelError(
            "the training step picks from the end of a free axis: no form in ONNX here"
        )
    place = index % size if isinstance(size, int) else index
    kept = _resized(shape, axis, 1)
    row = low.expand(low.reshape(part, kept), kept)
    axes, ones = low.graph.constant([axis], np.int64), low.graph.constant([1], np.int64)
    inputs, dtype = [row], low.dtype(base)
    if place:
        first = (
            base,
            low.graph.constant([0], np.int64),
            low.graph.constant([place], np.int64),
            axes,
            ones,
        )
        inputs.insert(0, low.graph.emit("Slice", first, _resized(shape, axis, place), dtype))
    if not isinstance(size, int) or place + 1 < size:
        end = low.graph.constant([np.iinfo(np.int64).max], np.int64)
        last = (base, low.graph.constant([place + 1], np.int64), end, axes, ones)
        inputs.append(low.graph.emit("Slice", last, _resized(shape, axis, -1), dtype))
    return low.graph.emit("Concat", inputs, shape, dtype, axis=axis)


@rule(
    "full.default",
    "full_like.default",
    "zeros.default",
    "ones.default",
    "new_zeros.default",
    "zeros_like.default",
    "ones_like.default",
    "scalar_tensor.default",
    "empty_like.default",
)
def _full(low: Lowering, node: fx.Node) -> Value:
    name = str(node.target)
    fill: Any = 0
    if "full" in name:
        fill = node.args[1]
    elif "scalar_tensor" in name:
        fill = node.args[0]
    elif "ones" in name:
        fill = 1
    return low.expand(low.graph.constant(fill, dtype_of(node)), sizes_of(node))


@rule("arange.start_step", "arange.default", "arange.start")
def _arange(low: Lowering, node: fx.Node) -> Value:
    shape, dtype = sizes_of(node), dtype_of(node)
    start, step = 0, 1
    if "start" in str(node.target):
        start, step = node.args[0], argument(node, 2, "step", 1)  # type: ignore[assignment]
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
