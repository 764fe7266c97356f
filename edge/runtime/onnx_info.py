"""What was found in an ONNX model: names, shapes, and where the bytes are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """What a graph may contain."""

    tensor_bytes: int = 1 << 31
    nodes: int = 100_000
    depth: int = 8  # of graphs within nodes


@dataclass(frozen=True)
class Value:
    """A graph's input or output."""

    name: str
    type: int  # TensorProto.DataType; 0: a sequence of tensors
    dims: tuple[int | None, ...] | None  # None: a dimension, or all of them, not said
    span: tuple[int, int]  # of the ValueInfoProto's field in the file, tag included


@dataclass(frozen=True)
class Tensor:
    """An initializer: where its bytes are."""

    name: str
    type: int
    dims: tuple[int, ...]
    bytes: int
    file: str | None  # None: within the model
    offset: int  # in `file`
    span: tuple[int, int]  # of the TensorProto's field in the model, tag included
    raw: tuple[int, int] | None  # of raw_data in the model


@dataclass(frozen=True)
class GraphInfo:
    """What `check_graph` found. Spans are offsets in the data given to it."""

    ir_version: int
    opsets: dict[str, int]
    operators: frozenset[tuple[str, str]]
    nodes: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    initializers: dict[str, Tensor]
    span: tuple[int, int]  # of the GraphProto's field, tag included
    body: tuple[int, int]  # of the GraphProto

    def feeds(self) -> tuple[Value, ...]:
        """Return the inputs that have no initializer: they must be fed."""
        return tuple(value for value in self.inputs if value.name not in self.initializers)
