"""An ONNX graph under construction: values with symbolic shapes, each computed once.

A value is a name. `emit` adds a node, or returns the value of an equal node that is already
there. Shapes are tuples of ints and sympy expressions over the free sizes (batch, tokens);
`shape_vector` makes the int64 vector that Reshape and Expand ask for.

Constants are initializers named by content, "w_" + the first 24 hex digits of
SHA-256(dtype, shape, bytes), so graphs over one base name equal weights alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from anabranch.protocols.errors import ModelError

OPSET = 18
IR_VERSION = 10
LARGEST = 2**31 - 2**26  # of a protobuf message, less 64 MiB for nodes

Size: TypeAlias = Any  # an int, or a sympy expression over the free sizes
Sizes = tuple[Size, ...]
Attributes = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Op:
    """A node: what computes one or more values."""

    kind: str
    inputs: tuple[str, ...]
    attributes: Attributes = ()

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or `default`."""
        return dict(self.attributes).get(name, default)


def content_name(array: NDArray[Any]) -> str:
    """Return the name of a constant: "w_" and 24 hex digits of its dtype, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype}\0{array.shape}\0".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return f"w_{digest.hexdigest()[:24]}"


class Graph:
    """Nodes, constants and inputs, in the order they came."""

    def __init__(self) -> None:
        self.shapes: dict[str, Sizes] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.constants: dict[str, NDArray[Any]] = {}
        self.inputs: list[str] = []
        self.producers: dict[str, Op] = {}  # of the first value of each node
        self._nodes: list[tuple[Op, tuple[str, ...]]] = []
        self._known: dict[Op, tuple[str, ...]] = {}
        self._sizes: dict[Size, str] = {}  # where a free size can be read

    def input(self, name: str, shape: Sizes, dtype: Any) -> str:
        """Declare an input; its free sizes can be read from it."""
        self.inputs.append(name)
        self.shapes[name], self.dtypes[name] = shape, np.dtype(dtype)
        for axis, size in enumerate(shape):
            if not isinstance(size, int) and size.is_Symbol and size not in self._sizes:
                whole = self.emit("Shape", (name,), (1,), np.int64, start=axis, end=axis + 1)
                self._sizes[size] = whole
        return name

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Return the constant with this content."""
        array = np.asarray(value, dtype=dtype)
        name = content_name(array)
        if name not in self.constants:
            self.constants[name] = array
            self.shapes[name], self.dtypes[name] = array.shape, array.dtype
        return name

    def emit(
        self, kind: str, inputs: Sequence[str], shape: Sizes, dtype: Any, **attributes: Any
    ) -> str:
        """Return the value of a node with one output."""
        return self.emit_all(kind, inputs, ((shape, dtype),), **attributes)[0]

    def emit_all(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[tuple[Sizes, Any]],
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Return the values of a node; an equal node is not computed twice."""
        frozen = tuple(sorted((k, v) for k, v in attributes.items() if v is not None))
        op = Op(kind, tuple(inputs), frozen)
        known = self._known.get(op)
        if known is not None:
            return known
        names = tuple(f"{kind}_{len(self._nodes)}_{i}" for i in range(len(outputs)))
        for name, (shape, dtype) in zip(names, outputs, strict=True):
            self.shapes[name], self.dtypes[name] = shape, np.dtype(dtype)
        self.producers[names[0]] = op
        self._nodes.append((op, names))
        self._known[op] = names
        return names

    def shape_vector(self, shape: Sizes, like: Sizes = (), *, infer: bool = False) -> str:
        """Return `shape` as an int64 vector.

        For Reshape (`infer`): 0 stands for the size `like` has there, -1 for the last unknown.
        """
        sizes: list[Size] = list(shape)
        if infer:
            for axis, size in enumerate(shape):
                if not isinstance(size, int) and axis < len(like) and like[axis] == size:
                    sizes[axis] = 0
            unknown = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
            if unknown:
                sizes[unknown[-1]] = -1
        if all(isinstance(size, int) for size in sizes):
            return self.constant(sizes, np.int64)
        parts = tuple(self._size(size) for size in sizes)
        return self.emit("Concat", parts, (len(sizes),), np.int64, axis=0)

    def _size(self, size: Size) -> str:
        """Return a size as an int64 vector of one element."""
        if isinstance(size, int) or size.is_Integer:
            return self.constant([int(size)], np.int64)
        if size in self._sizes:
            return self._sizes[size]
        if not (size.is_Mul or size.is_Add):
            raise ModelError(f"a size of the step is {size}, which cannot be written in ONNX")
        first, *rest = (self._size(part) for part in size.args)
        for part in rest:
            first = self.emit("Mul" if size.is_Mul else "Add", (first, part), (1,), np.int64)
        return first

    def model(self, outputs: Mapping[str, str], symbols: Mapping[Any, str]) -> onnx.ModelProto:
        """Return the model that computes `outputs` (name -> value) and nothing else.

        `symbols` names the free sizes in the declared shapes. Raises ModelError when the
        constants do not fit into one protobuf message (2 GiB).
        """
        size = sum(a.nbytes for a in self.constants.values())
        if size > LARGEST:
            raise ModelError(
                f"the base's weights take {size:,} bytes, an ONNX file holds at most {LARGEST:,}: "
                f"choose a smaller base for devices"
            )
        renamed = self._rename(outputs)
        needed = set(outputs.values())
        kept = []
        for op, names in reversed(self._nodes):
            if needed.intersection(names):
                needed.update(op.inputs)
                kept.append((op, names))
        nodes = [
            helper.make_node(
                op.kind,
                [renamed.get(i, i) for i in op.inputs],
                [renamed.get(n, n) for n in names],
                name=f"{op.kind}_{index}",
                **dict(op.attributes),
            )
            for index, (op, names) in enumerate(reversed(kept))
        ]
        made = {name for node in nodes for name in node.output}
        for name, value in outputs.items():
            if name not in made:
                source = renamed.get(value, value)
                nodes.append(helper.make_node("Identity", [source], [name], name=f"as_{name}"))
        graph = helper.make_graph(
            nodes,
            "step",
            [self._info(n, n, symbols) for n in self.inputs],
            [self._info(name, value, symbols) for name, value in outputs.items()],
            [
                numpy_helper.from_array(np.ascontiguousarray(a).reshape(a.shape), n)
                for n, a in self.constants.items()
                if n in needed
            ],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="anabranch",
        )
        return model

    def _rename(self, outputs: Mapping[str, str]) -> dict[str, str]:
        """Return value -> name of the output it becomes; others get an Identity."""
        computed = {name for _, names in self._nodes for name in names}
        renamed: dict[str, str] = {}
        for name, value in outputs.items():
            if value in computed:
                renamed.setdefault(value, name)
        return renamed

    def _info(self, name: str, value: str, symbols: Mapping[Any, str]) -> onnx.ValueInfoProto:
        shape = [s if isinstance(s, int) else symbols.get(s, str(s)) for s in self.shapes[value]]
        kind = helper.np_dtype_to_tensor_dtype(self.dtypes[value])
        return helper.make_tensor_value_info(name, kind, shape)
