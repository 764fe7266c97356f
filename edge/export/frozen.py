"""Which constants of a graph are weight matrices, and who multiplies by them or looks rows up.

    linear       MatMul(x, W), Gemm(x, W), or the same with Transpose(W) in the place of W
    embedding    Gather(E, i) along the first axis

A matrix counts only if all its uses are of one of the two kinds. A constant that feeds anything
else, that is an output, a default of an input or used inside a sub-graph, is left alone: who
rewrites uses must know all of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anabranch.protocols.errors import BundleError

NARROW = 8  # a matrix with a shorter side is not worth quantizing


@dataclass(frozen=True)
class Use:
    """The `operand`-th input of the `position`-th node."""

    position: int
    node: onnx.NodeProto
    operand: int


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix of the base, and the outputs of the nodes that use it, in the order of the graph.

    A linear layer's use is mapped to whether it multiplies by the transposed matrix.
    """

    name: str
    values: NDArray[np.float32]
    lookups: tuple[str, ...]  # an embedding's uses; empty for a linear layer
    products: dict[str, bool]  # a linear layer's uses
    transpositions: tuple[str, ...]  # outputs of Transpose nodes that only serve these

    @property
    def transposed(self) -> bool:
        """Return how the first use of a linear layer, the forward one, multiplies by it."""
        return next(iter(self.products.values()))


def find_weights(
    graph: onnx.GraphProto, smallest: int, *, one_way: bool, narrowest: int = NARROW
) -> list[Weight]:
    """Return the matrices of at least `smallest` elements that can be quantized, in their order.

    Neither side of one is shorter than `narrowest`.
    With `one_way`, all uses of one must multiply by it the same way round, as in an inference
    graph. Raises BundleError for a weight whose bytes lie in another file or that is not finite.
    """
    uses = _uses(graph)
    inputs = {value.name for value in graph.input}
    found = []
    for constant in graph.initializer:
        if constant.name in inputs or not _is_matrix(constant, smallest, narrowest):
            continue
        mine = uses[constant.name]
        weight = _embedding(constant, mine) or _linear(constant, mine, uses)
        if weight and not (one_way and len(set(weight.products.values())) > 1):
            found.append(weight)
    return found


def _is_matrix(constant: TensorProto, smallest: int, narrowest: int) -> bool:
    shape = constant.dims
    return (
        constant.data_type == TensorProto.FLOAT
        and len(shape) == 2
        and min(shape) >= narrowest
        and shape[0] * shape[1] >= smallest
    )


def _uses(graph: onnx.GraphProto) -> dict[str, list[Use]]:
    """Return who uses each value. Outputs and sub-graphs count as operand -1 of some node."""
    uses: dict[str, list[Use]] = defaultdict(list)
    for position, node in enumerate(graph.node):
        for operand, name in enumerate(node.input):
            uses[name].append(Use(position, node, operand))
        for name in _captured(node):
            uses[name].append(Use(position, node, -1))
    for value in graph.output:
        uses[value.name].append(Use(len(graph.node), onnx.NodeProto(), -1))
    return uses


def _captured(node: onnx.NodeProto) -> set[str]:
    """Return the names that the sub-graphs of a node mention."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            names.update(value.name for value in graph.output)
            for inner in graph.node:
                names |= {*inner.input, *_captured(inner)}
    return names


def _embedding(constant: TensorProto, uses: list[Use]) -> Weight | None:
    lookups = [u.node.output[0] for u in uses if _looks_up(u)]
    if not lookups or len(lookups) < len(uses):
        return None
    return Weight(constant.name, _values(constant), tuple(lookups), {}, ())


def _linear(constant: TensorProto, direct: list[Use], uses: dict[str, list[Use]]) -> Weight | None:
    products: list[tuple[int, str, bool]] = []
    transpositions = []
    for use in direct:
        turns = use.node.op_type == "Transpose"
        if turns:
            if list(attributes(use.node).get("perm", [1, 0])) != [1, 0]:
                return None
            transpositions.append(use.node.output[0])
        for user in uses[use.node.output[0]] if turns else [use]:
            if not _multiplies(user):
                return None
            transposed = turns != bool(attributes(user.node).get("transB", 0))
            products.append((user.position, user.node.output[0], transposed))
    if not products:
        return None
    ordered = {output: transposed for _, output, transposed in sorted(products)}
    return Weight(constant.name, _values(constant), (), ordered, tuple(transpositions))


def _looks_up(use: Use) -> bool:
    plain = use.node.op_type == "Gather" and use.operand == 0
    return plain and attributes(use.node).get("axis", 0) in (0, -2)


def _multiplies(use: Use) -> bool:
    """Return whether a matrix is the right factor of x·W, or of x·W + c."""
    if use.operand != 1 or use.node.op_type not in ("MatMul", "Gemm"):
        return False
    scaled = {"alpha": 1.0, "beta": 1.0, "transA": 0} | attributes(use.node)
    return (scaled["alpha"], scaled["beta"], scaled["transA"]) == (1.0, 1.0, 0)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _values(constant: TensorProto) -> NDArray[np.float32]:
    if constant.data_location != TensorProto.DEFAULT:
        raise BundleError(
            f"the bytes of {constant.name} lie in another file; load the model with its external "
            "data before quantizing it"
        )
    values = numpy_helper.to_array(constant)
    if not np.isfinite(values).all():
        raise BundleError(f"{constant.name}: weights that are not finite cannot be quantized")
    return values
