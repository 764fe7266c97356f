"""The nodes that stand for a linear layer or an embedding once its weights are codes.

One `Writer` per graph: it makes constants and appends nodes in the order of the graph it rewrites.
`transposed` says that a product is by the transposed matrix; `Codes.turned` that the codes are laid
out as the transposed matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anabranch.edge.export.codes import (
    LEAST,
    ZERO,
    block_for,
    pack,
    quantize_blocks,
    quantize_channels,
    quantize_pairs,
)
from anabranch.edge.export.frozen import Weight
from anabranch.edge.export.weights import packed_tensor, tensor

EMBEDDING_LIMIT, PRODUCT_LIMIT = 127, 63  # largest 8-bit code, see quantize.py
MICROSOFT = "com.microsoft"
FLOAT = np.float32
LEVELS = 255  # 8-bit codes of a row of x: 0 … 255
AXES_AS_INPUT = 18  # opset: before, the axes of ReduceMin and ReduceMax are an attribute
INT8_PRODUCT = 4  # MatMulNBits' accuracy_level: x in 8 bits per block, sums in 32


@dataclass(frozen=True)
class Codes:
    """A weight's constants, by name. `rows` and `columns` are those of the codes' layout."""

    rows: int
    columns: int
    turned: bool
    codes: str
    scales: str
    zeros: str = ""
    block: int = 0  # 0: 8-bit codes, a scale per channel


class Writer:
    """Nodes and constants of a graph that is being rewritten."""

    def __init__(self, graph: onnx.GraphProto, *, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._taken = {name for node in graph.node for name in (*node.input, *node.output)}
        self._minus: dict[str, str] = {}  # x -> (-1), computed from its shape
        self._waiting: dict[tuple[str, tuple[int, ...]], str] = {}  # x, shape -> that shape
        self._eight: dict[str, tuple[str, str, str]] = {}  # x -> its codes, scale and zero point
        self._rows: dict[str, tuple[str, str, str]] = {}  # x -> its codes; of rows: step, least

    # Weights

    def channels(self, weight: Weight, *, step: bool, pairs: bool = False) -> Codes:
        """Store 8-bit codes: per row of an embedding; (inputs, outputs), per output, of a layer.

        With `pairs` those of a layer take as much of the 8 bits as pairs of products allow.
        """
        if weight.lookups:
            codes, scales = quantize_channels(weight.values, 0, EMBEDDING_LIMIT)
            names = self._array(codes), self._array(scales[:, None])
            return Codes(len(codes), codes.shape[1], False, *names)
        turned = weight.transposed
        values = np.ascontiguousarray(weight.values.T if turned else weight.values)
        codes, scales = (
            quantize_pairs(values) if pairs else quantize_channels(values, 1, PRODUCT_LIMIT)
        )
        zeros = self._array(np.zeros(len(scales), np.int8)) if step else ""
        names = self._array(codes), self._array(scales[None] if step else scales)
        return Codes(len(codes), codes.shape[1], turned, *names, zeros=zeros)

    def blocks(self, weight: Weight, block: int, *, step: bool) -> Codes:
        """Store 4-bit codes in blocks: along an embedding's row; (outputs, inputs) of a layer."""
        turned = not weight.lookups and not weight.transposed
        values = np.ascontiguousarray(weight.values.T if turned else weight.values)
        rows, columns = values.shape
        block = block_for(columns, block)
        packed, scales = quantize_blocks(values, block)
        count = scales.shape[1]
        if weight.lookups:
            names = self._array(packed), self._array(scales)
            return Codes(rows, columns, False, *names, block=block)
        scale = self._array(scales.reshape(-1))
        if not step:
            code = self._array(packed.reshape(rows, count, block // 2))
            return Codes(rows, columns, turned, code, scale, block=block)
        zeros = np.full((rows * count + 1) // 2 * 2, ZERO, np.uint8)
        zeros[rows * count :] = 0
        zero = self._add(packed_tensor(pack(zeros), (rows, count)))
        code = self._add(packed_tensor(packed, (rows, count * block)))
        return Codes(rows, columns, turned, code, scale, zeros=zero, block=block)

    # Products

    def dequantized(self, node: onnx.NodeProto, codes: Codes, *, transposed: bool) -> None:
        """Multiply by weights that are dequantized for this node alone, in float32.

        onnxruntime runs nodes without inputs long before they are needed, which would keep the
        float copies of all weights, and turns constants behind a DequantizeLinear into
        MatMulNBits (since 1.31, where it knows the shapes), which quantizes x. So the scales are
        made to wait for x.
        """
        at, x = node.output[0], node.input[0]
        columns = codes.columns
        grid = (codes.rows, -(-columns // codes.block)) if codes.block else (columns,)
        scales = self._once_there_is(x, codes.scales, grid)
        about: dict[str, Any] = {"axis": -1}
        if codes.block:
            about["block_size"] = codes.block
        operands = [codes.codes, scales, codes.zeros]
        weight = self._node(at, "DequantizeLinear", operands, **about)
        if codes.block and codes.columns % codes.block:
            ends = [self._ints(0), self._ints(codes.columns), self._ints(1)]
            weight = self._node(at, "Slice", [weight, *ends])
        turn = transposed != codes.turned
        if node.op_type == "Gemm":
            operands = [x, weight, *node.input[2:]]
            self._node(at, "Gemm", operands, out=at, transB=int(turn))
        elif not turn:
            self._node(at, "MatMul", [x, weight], out=at)
        else:  # Gemm reads the weight as it lies, where Transpose would make a copy
            outputs, inputs = codes.rows, codes.columns
            rows = self._node(at, "Reshape", [x, self._ints(-1, inputs)])
            rows = self._node(at, "Gemm", [rows, weight], transB=1)
            batch = self._node(at, "Shape", [x], end=-1)
            shape = self._node(at, "Concat", [batch, self._ints(outputs)], axis=0)
            self._node(at, "Reshape", [rows, shape], out=at)

    def _once_there_is(self, x: str, scales: str, shape: tuple[int, ...]) -> str:
        """Return scales that cannot be there before x is: reshaped to max(shape, min(B, -1)).

        B is the first axis of x. Constants have another number of axes than `shape`, and the
        shape is no Concat: else onnxruntime's optimizer would see through it.
        """
        if (x, shape) not in self._waiting:
            if x not in self._minus:
                first = self._node(x, "Shape", [x], start=0, end=1)
                self._minus[x] = self._node(x, "Min", [first, self._ints(-1)])
            operands = [self._minus[x], self._ints(*shape)]
            self._waiting[x, shape] = self._node(x, "Max", operands)
        return self._node(x, "Reshape", [scales, self._waiting[x, shape]])

    def integer(self, node: onnx.NodeProto, codes: Codes) -> None:
        """Multiply 8-bit codes of x, from its own range, by the weight's."""
        at = node.output[0]
        x, scale, zero = self._as_eight(node.input[0])
        sums = self._node(at, "MatMulInteger", [x, codes.codes, zero])
        sums = self._node(at, "Cast", [sums], to=TensorProto.FLOAT)
        scale = self._node(at, "Mul", [scale, codes.scales])
        self._plus(node, "Mul", [sums, scale])

    def by_row(self, node: onnx.NodeProto, codes: Codes) -> None:
        """Multiply 8-bit codes of x, from the range of each row, by the weight's.

        With x ≈ l + d · q for a row of least value l and step d, and W = s · c:

            x·W = d · s · (q·c) + l · (s · Σ c down each column)
        """
        at = node.output[0]
        x, step, least = self._as_rows(node.input[0])
        matrix, scales = (
            numpy_helper.to_array(self.constants[n]) for n in (codes.codes, codes.scales)
        )
        columns = (matrix.sum(axis=0, dtype=np.int64) * scales.astype(np.float64)).astype(FLOAT)
        sums = self._node(at, "MatMulInteger", [x, codes.codes])
        sums = self._node(at, "Cast", [sums], to=TensorProto.FLOAT)
        sums = self._node(at, "Mul", [sums, codes.scales])
        sums = self._node(at, "Mul", [sums, step])
        self._plus(node, "Add", [sums, self._node(at, "Mul", [least, self._array(columns)])])

    def _as_rows(self, x: str) -> tuple[str, str, str]:
        """Return x's codes 0 … 255, and the step and the least value of its rows (…, 1)."""
        if x not in self._rows:
            least, most = (self._along_rows(x, op) for op in ("ReduceMin", "ReduceMax"))
            step = self._node(x, "Sub", [most, least])
            step = self._node(x, "Mul", [step, self._array(np.array(1 / LEVELS, FLOAT))])
            step = self._node(x, "Max", [step, self._array(np.array(LEAST, FLOAT))])
            part = self._node(x, "Sub", [x, least])
            part = self._node(x, "Div", [part, step])
            rounding = [self._array(np.array(1, FLOAT)), self._array(np.array(0, np.uint8))]
            self._rows[x] = self._node(x, "QuantizeLinear", [part, *rounding]), step, least
        return self._rows[x]

    def _along_rows(self, x: str, op: str) -> str:
        if self.opset < AXES_AS_INPUT:
            return self._node(x, op, [x], axes=[-1], keepdims=1)
        return self._node(x, op, [x, self._ints(-1)], keepdims=1)

    def nbits(self, node: onnx.NodeProto, codes: Codes) -> None:
        """Multiply x, in 8 bits per block, by 4-bit codes."""
        about = {
            "K": codes.columns,
            "N": codes.rows,
            "bits": 4,
            "block_size": codes.block,
            "accuracy_level": INT8_PRODUCT,
        }
        operands = [node.input[0], codes.codes, codes.scales]
        self._plus(node, "MatMulNBits", operands, domain=MICROSOFT, **about)

    def _plus(self, node: onnx.NodeProto, op: str, operands: list[str], **about: Any) -> None:
        """Write the last operation of a product, and add a Gemm's third operand."""
        at = node.output[0]
        bias = [name for name in node.input[2:] if name]
        product = self._node(at, op, operands, out="" if bias else at, **about)
        if bias:
            self._node(at, "Add", [product, *bias], out=at)

    def _as_eight(self, x: str) -> tuple[str, str, str]:
        if x not in self._eight:
            codes, scale, zero = (self._fresh(x, word) for word in ("codes", "scale", "zero"))
            names = [codes, scale, zero]
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], names, name=codes))
            self._eight[x] = codes, scale, zero
        return self._eight[x]

    # Embeddings

    def rows8(self, node: onnx.NodeProto, codes: Codes) -> None:
        """Look up 8-bit rows and their scales."""
        at, index = node.output[0], node.input[1]
        row = self._node(at, "Gather", [codes.codes, index], axis=0)
        row = self._node(at, "Cast", [row], to=TensorProto.FLOAT)
        scale = self._node(at, "Gather", [codes.scales, index], axis=0)
        self._node(at, "Mul", [row, scale], out=at)

    def rows4(self, node: onnx.NodeProto, codes: Codes) -> None:
        """Look up packed rows and their scales, and unpack what was looked up."""
        at, index = node.output[0], node.input[1]
        packed = self._node(at, "Gather", [codes.codes, index], axis=0)
        low = self._node(at, "BitwiseAnd", [packed, self._array(np.array(15, np.uint8))])
        four = self._array(np.array(4, np.uint8))
        high = self._node(at, "BitShift", [packed, four], direction="RIGHT")
        last = self._ints(-1)
        halves = [self._node(at, "Unsqueeze", [half, last]) for half in (low, high)]
        pairs = self._node(at, "Concat", halves, axis=-1)
        padded = -(-codes.columns // codes.block) * codes.block
        row = self._node(at, "Reshape", [pairs, self._ints(-1, padded // codes.block, codes.block)])
        row = self._node(at, "Cast", [row], to=TensorProto.FLOAT)
        row = self._node(at, "Sub", [row, self._array(np.array(ZERO, np.float32))])
        scale = self._node(at, "Gather", [codes.scales, index], axis=0)
        scale = self._node(at, "Reshape", [scale, self._ints(-1, padded // codes.block, 1)])
        row = self._node(at, "Mul", [row, scale])
        shape = self._node(at, "Shape", [index])
        shape = self._node(at, "Concat", [shape, self._ints(padded)], axis=0)
        whole = padded == codes.columns
        row = self._node(at, "Reshape", [row, shape], out=at if whole else "")
        if not whole:
            ends = [self._ints(0), self._ints(codes.columns), last]
            self._node(at, "Slice", [row, *ends], out=at)

    # Names

    def _node(self, at: str, op: str, operands: list[str], *, out: str = "", **about: Any) -> str:
        """Append a node; its output is `out`, or a new name beside `at`. Return that."""
        name = out or self._fresh(at, op)
        self.nodes.append(helper.make_node(op, operands, [name], name=name, **about))
        return name

    def _fresh(self, at: str, word: str) -> str:
        name = f"{at}/{word}"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _array(self, values: NDArray[Any]) -> str:
        return self._add(tensor(values))

    def _ints(self, *values: int) -> str:
        return self._array(np.array(values, np.int64))

    def _add(self, constant: TensorProto) -> str:
        self.constants[constant.name] = constant
        return constant.name
