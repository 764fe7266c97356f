"""What is in an ONNX model, read and checked without the onnx package and before onnxruntime.

`check_graph` walks the bytes of a ModelProto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto,
IR version 10) and refuses, with the rule named:

    operators   not on the list for this graph; functions and training info in the model
    versions    IR or operator set newer than onnxruntime 1.19 reads
    tensors     dims that do not fit the bytes, more bytes than allowed, sparse, of strings
    data        external data that is not in a file that the manifest names for this graph, or
                not wholly inside that file; and anywhere but in an initializer
    names       initializers, inputs or results that appear twice
    nesting     deeper than allowed
    blocks      4-bit codes of MatMulNBits that do not fit what its node says: onnxruntime 1.19
                reads beyond them

It takes time and memory in proportion to the file, whatever the file claims. onnxruntime checks
types and shapes when it loads the graph; a graph that passes here may still be refused there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from anabranch.edge.runtime import protobuf
from anabranch.edge.runtime.onnx_info import GraphInfo, GraphLimits, Tensor, Value
from anabranch.edge.runtime.onnx_schema import (
    ATTRIBUTE,
    BITS,
    DIMENSION,
    ENTRY,
    FLOAT,
    GRAPH,
    MODEL,
    NODE,
    OPSET,
    SEQUENCE,
    SHAPE,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    TYPED_DATA,
    UINT8,
    VALUE,
)
from anabranch.edge.runtime.operators import MICROSOFT, SEQUENCES, STEP, Operators
from anabranch.edge.runtime.protobuf import Data, Field, Message
from anabranch.protocols.errors import BundleError
from anabranch.protocols.spec import shown

MAX_IR = 10
MAX_OPSET = 21
MAX_DIMENSIONS = 8
MAX_SIZE = 2**31 - 1  # of one dimension
EXTERNAL = 1  # TensorProto.DataLocation
BLOCKS = (MICROSOFT, "MatMulNBits")
SIZES = (16, 32, 64, 128, 256)  # of a block, that onnxruntime has
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def check_graph(
    data: Data,
    allowed_data: Mapping[str, int],
    limits: GraphLimits | None = None,
    *,
    operators: Operators = STEP,
) -> GraphInfo:
    """Return what is in the ONNX model `data`, or raise BundleError naming the broken rule.

    `allowed_data` has the files that its external data may lie in, with their sizes in bytes.
    """
    walk = _Walk(data, allowed_data, limits or GraphLimits(), operators)
    return walk.model()


@dataclass
class _Walk:
    data: Data
    allowed: Mapping[str, int]
    limits: GraphLimits
    operators: Operators
    used: set[tuple[str, str]] = field(default_factory=set)
    nodes: int = 0

    def model(self) -> GraphInfo:
        model = protobuf.read(self.data, 0, len(self.data), MODEL, "model")
        for name in ("functions", "training_info", "configuration"):
            if name in model:
                raise BundleError(f"{name}: a model of a bundle has a graph and nothing else")
        if "graph" not in model:
            raise BundleError("graph: the model has none")
        ir_version = _number(model, "ir_version")
        if not 1 <= ir_version <= MAX_IR:
            raise BundleError(f"IR version {ir_version}: expected 1 to {MAX_IR}")
        opsets = self._opsets(model)
        at = model["graph"][0]
        inputs, outputs, tensors = self._graph(at, 0)
        return GraphInfo(
            ir_version=ir_version,
            opsets=opsets,
            operators=frozenset(self.used),
            nodes=self.nodes,
            inputs=inputs,
            outputs=outputs,
            initializers=tensors,
            span=(at.at, at.end),
            body=(at.start, at.end),
        )

    def _opsets(self, model: Message) -> dict[str, int]:
        result: dict[str, int] = {}
        for at in model.get("opset_import", []):
            one = self._read(at, OPSET, "opset")
            domain, version = self._text(one, "domain"), _number(one, "version")
            if domain in result:
                raise BundleError(f"operator set {shown(domain)} appears twice")
            if domain == "" and not 1 <= version <= MAX_OPSET:
                raise BundleError(f"operator set {version}: expected 1 to {MAX_OPSET}")
            result[domain] = version
        if "" not in result:
            raise BundleError("operator set: the model does not say which it uses")
        return result

    def _graph(
        self, at: Field, depth: int
    ) -> tuple[tuple[Value, ...], tuple[Value, ...], dict[str, Tensor]]:
        if depth > self.limits.depth:
            raise BundleError(f"nesting: graphs within graphs more than {self.limits.depth} deep")
        graph = self._read(at, GRAPH, "graph")
        if "sparse_initializer" in graph:
            raise BundleError("sparse tensors: a bundle has dense ones only")
        tensors: dict[str, Tensor] = {}
        for one in graph.get("initializer", []):
            tensor = self._tensor(one, external=True)
            if not tensor.name or tensor.name in tensors:
                raise BundleError(f"initializer {shown(tensor.name)} appears twice or has no name")
            tensors[tensor.name] = tensor
        inputs = tuple(self._value(one, "input") for one in graph.get("input", []))
        outputs = tuple(self._value(one, "output") for one in graph.get("output", []))
        for values, what in ((inputs, "input"), (outputs, "output")):
            _require_unique([value.name for value in values], what)
        self._nodes(graph, {value.name for value in inputs} | tensors.keys(), tensors, depth)
        return inputs, outputs, tensors

    def _nodes(
        self, graph: Message, known: set[str], tensors: Mapping[str, Tensor], depth: int
    ) -> None:
        found = graph.get("node", [])
        self.nodes += len(found)
        if self.nodes > self.limits.nodes:
            raise BundleError(f"nodes: more than {self.limits.nodes}")
        results = set(known)
        for at in found:
            for name in self._node(at, tensors, depth):
                if name in results:
                    raise BundleError(f"result {shown(name)} appears twice")
                results.add(name)

    def _node(self, at: Field, tensors: Mapping[str, Tensor], depth: int) -> list[str]:
        """Check one node; return the names of its results."""
        node = self._read(at, NODE, "node")
        which = (self._text(node, "domain"), self._text(node, "op_type"))
        if which not in self.operators or "overload" in node:
            raise BundleError(
                f"operator {shown(which[1])} of domain {shown(which[0] or 'ai.onnx')} is not one "
                "that this graph may use"
            )
        self.used.add(which)
        for one in node.get("attribute", []):
            self._attribute(one, depth)
        if which == BLOCKS:
            self._require_blocks(node, tensors)
        names = [protobuf.text(self.data, one, "result") for one in node.get("output", [])]
        return [name for name in names if name]  # "": an optional result that is not wanted

    def _require_blocks(self, node: Message, tensors: Mapping[str, Tensor]) -> None:
        """Refuse x · codes · scales whose constants are not (N, blocks, bytes) and (N · blocks)."""
        found = [self._read(one, ATTRIBUTE, "attribute") for one in node.get("attribute", [])]
        about = {self._text(one, "name"): _number(one, "i") for one in found}
        rows, columns, bits, block = (about.get(n, 0) for n in ("N", "K", "bits", "block_size"))
        operands = [protobuf.text(self.data, one, "input") for one in node.get("input", [])]
        if len(about) != len(found) or min(rows, columns) < 1 or bits != 4 or block not in SIZES:
            raise BundleError(f"MatMulNBits: N, K, bits, block_size: {rows, columns, bits, block}")
        count = -(-columns // block)
        expected = [(UINT8, (rows, count, block // 2)), (FLOAT, (rows * count,))]
        constants = [tensors.get(name) for name in operands[1:]]
        if [None if c is None else (c.type, c.dims) for c in constants] != expected:
            raise BundleError(
                f"MatMulNBits: expected x and constants of type and shape {expected}, for N, K, "
                f"bits, block_size = {rows, columns, bits, block}"
            )

    def _attribute(self, at: Field, depth: int) -> None:
        attribute = self._read(at, ATTRIBUTE, "attribute")
        name = shown(self._text(attribute, "name"))
        for kind in ("sparse_tensor", "sparse_tensors", "tp", "type_protos", "ref_attr_name"):
            if kind in attribute:
                raise BundleError(f"attribute {name}: {kind} is not allowed in a bundle")
        for kind in ("t", "tensors"):
            for one in attribute.get(kind, []):
                self._tensor(one, external=False)
        for kind in ("g", "graphs"):
            for one in attribute.get(kind, []):
                self._graph(one, depth + 1)

    def _tensor(self, at: Field, *, external: bool) -> Tensor:
        tensor = self._read(at, TENSOR, "tensor")
        name, kind = self._text(tensor, "name"), _number(tensor, "data_type")
        if kind not in BITS or "segment" in tensor or "string_data" in tensor:
            raise BundleError(f"tensor {shown(name)}: data type {kind} is not allowed in a bundle")
        dims = tuple(protobuf.integers(self.data, tensor.get("dims", []), "dims"))
        if len(dims) > MAX_DIMENSIONS or not all(0 <= size <= MAX_SIZE for size in dims):
            raise BundleError(
                f"tensor {shown(name)}: expected at most {MAX_DIMENSIONS} dimensions of 0 to "
                f"{MAX_SIZE}, got {shown(str(dims))}"
            )
        size = (math.prod(dims) * BITS[kind] + 7) // 8
        if size > self.limits.tensor_bytes:
            raise BundleError(
                f"tensor {shown(name)}: {size} bytes, at most {self.limits.tensor_bytes} are "
                "allowed"
            )
        file, offset = None, 0
        if _number(tensor, "data_location") == EXTERNAL or "external_data" in tensor:
            if not external:
                raise BundleError("external data: only an initializer may have it")
            file, offset = self._external(tensor, name, size)
        else:
            self._require_inline(tensor, name, kind, math.prod(dims), size)
        raw = tensor.get("raw_data")
        return Tensor(
            name, kind, dims, size, file, offset, (at.at, at.end),
            (raw[0].start, raw[0].end) if raw else None,
        )  # fmt: skip

    def _require_inline(self, tensor: Message, name: str, kind: int, count: int, size: int) -> None:
        """Refuse a tensor whose bytes in the model are not those of its dims."""
        have = [key for key in ("raw_data", *TYPED_DATA) if key in tensor]
        if len(have) > 1:
            raise BundleError(f"tensor {shown(name)}: has both {have[0]} and {have[1]}")
        got, expected, unit = 0, size, "bytes"
        if have == ["raw_data"]:
            at = tensor["raw_data"][0]
            got = at.end - at.start
        elif have:
            types, width = TYPED_DATA[have[0]]
            if kind not in types:
                raise BundleError(f"tensor {shown(name)}: {have[0]} in data type {kind}")
            got = protobuf.count(self.data, tensor[have[0]], width, have[0])
            expected, unit = (count + 1) // 2 if BITS[kind] == 4 else count, "values"
        if got != expected:
            raise BundleError(f"tensor {shown(name)}: its dims need {expected} {unit}, got {got}")

    def _external(self, tensor: Message, name: str, size: int) -> tuple[str, int]:
        """Return (file, offset) of external data that lies wholly in an allowed file."""
        if any(key in tensor for key in ("raw_data", *TYPED_DATA)):
            raise BundleError(f"tensor {shown(name)}: has data inside and outside the model")
        if _number(tensor, "data_location") != EXTERNAL:
            raise BundleError(f"tensor {shown(name)}: external data, but not said to be external")
        entries: dict[str, str] = {}
        for one in tensor.get("external_data", []):
            entry = self._read(one, ENTRY, "external data")
            key = self._text(entry, "key")
            if key in entries or key not in ("location", "offset", "length"):
                raise BundleError(f"external data of {shown(name)}: key {shown(key)}")
            entries[key] = self._text(entry, "value")
        location = entries.get("location", "")
        if not PLAIN.fullmatch(location):
            raise BundleError(
                f"external data of {shown(name)}: location {shown(location)} is no plain name of "
                "a file in the bundle's folder"
            )
        if location not in self.allowed:
            raise BundleError(
                f"external data of {shown(name)}: the manifest does not name {location} for this "
                "graph"
            )
        numbers = [entries.get("offset", "0"), entries.get("length", str(size))]
        if not all(NUMBER.fullmatch(text) for text in numbers):
            raise BundleError(f"external data of {shown(name)}: offset or length is no number")
        offset, length = map(int, numbers)
        if length != size:
            raise BundleError(
                f"external data of {shown(name)}: its dims need {size} bytes, got {length}"
            )
        if offset + length > self.allowed[location]:
            raise BundleError(
                f"external data of {shown(name)}: ends at byte {offset + length} of {location}, "
                f"which has {self.allowed[location]}"
            )
        return location, offset

    def _value(self, at: Field, what: str) -> Value:
        value = self._read(at, VALUE, what)
        name = self._text(value, "name")
        kind = self._read(value["type"][0], TYPE, "type") if "type" in value else {}
        sequences = not SEQUENCES.isdisjoint(self.operators)
        if sequences and set(kind) == {"sequence"}:
            return Value(name, SEQUENCE, None, (at.at, at.end))
        if not name or set(kind) - {"denotation"} != {"tensor"}:
            raise BundleError(f"{what} {shown(name)}: expected a named tensor")
        tensor = self._read(kind["tensor"][0], TENSOR_TYPE, "tensor type")
        dims: tuple[int | None, ...] | None = None
        if "shape" in tensor:
            shape = self._read(tensor["shape"][0], SHAPE, "shape")
            dims = tuple(self._dimension(one) for one in shape.get("dim", []))
        return Value(name, _number(tensor, "elem_type"), dims, (at.at, at.end))

    def _dimension(self, at: Field) -> int | None:
        """Return the size of a dimension, or None if it is free."""
        found = self._read(at, DIMENSION, "dimension")
        return _number(found, "dim_value") if "dim_value" in found else None

    def _read(self, at: Field, schema: protobuf.Schema, what: str) -> Message:
        return protobuf.read(self.data, at.start, at.end, schema, what)

    def _text(self, message: Message, name: str) -> str:
        found = message.get(name)
        return protobuf.text(self.data, found[0], name) if found else ""


def _number(message: Message, name: str) -> int:
    found = message.get(name)
    return protobuf.signed(found[0].value) if found else 0


def _require_unique(names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BundleError(f"{what} {shown(name)} appears twice")
        seen.add(name)
