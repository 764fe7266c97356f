"""Changes to ONNX graphs that onnxruntime-training 1.19.2 needs, in place.

Only the outermost graph is changed; a graph with branches or loops inside is refused, because
names could be bound in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from anabranch.edge.export.joint_graph import content_name
from anabranch.protocols.errors import ReleaseError
from anabranch.protocols.spec import AdapterSpec

STATISTICS = ("mean", "inv_std")  # the outputs of LayerNormalization after the first
MICROSOFT = "com.microsoft"


def rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Replace names of values (old → new) wherever the graph uses them.

    Raises ReleaseError for a new name that is taken, and for a graph within a node.
    """
    graph = model.graph
    _require_flat(graph)
    everything = {v for node in graph.node for v in (*node.input, *node.output)}
    everything |= {value.name for value in (*graph.input, *graph.initializer)}
    for old, new in names.items():
        if old != new and new in everything and new not in names:
            raise ReleaseError(f"{old} cannot be called {new}: the graph has another value {new}")
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)


def name_trainable(model: onnx.ModelProto, spec: AdapterSpec) -> None:
    """Give the adapter's tensors their names in the spec; raise ReleaseError if one is missing."""
    inside = {
        name: name.removeprefix("classifier.").removeprefix("base.")
        for name in (tensor.name for tensor in model.graph.initializer)
    }
    rename(model, {old: new for old, new in inside.items() if new in spec.shapes})
    found = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for name, shape in spec.tensors:
        if found.get(name) != shape:
            raise ReleaseError(
                f"{name}: expected an initializer of shape {shape} in the exported graph, found "
                f"{found.get(name, 'none')}: the exporter renamed or folded it; this base cannot "
                "be trained by onnxruntime-training"
            )


def add_layernorm_statistics(model: onnx.ModelProto) -> None:
    """Give every LayerNormalization its outputs mean and inv_std: its gradient reads them."""
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            missing = STATISTICS[len(node.output) - 1 :]
            node.output.extend(f"{node.output[0]}__{which}" for which in missing)


def refuse_batchnorm(model: onnx.ModelProto) -> None:
    """Raise ReleaseError if the graph normalises by batch.

    The gradient builder would silently replace the frozen statistics by those of the batch.
    """
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            raise ReleaseError(
                f"{node.name or node.output[0]}: onnxruntime-training computes BatchNormalization "
                "with the batch's own statistics; fold it into the layer before it, or export "
                "without these artifacts"
            )


def share_transposed(training: onnx.ModelProto, evaluation: onnx.ModelProto) -> None:
    """Make the training graph read W where it holds a folded Wᵀ of the evaluation graph's W.

        MatMul(x, Wᵀ) → FusedMatMul(x, W, transB=1)     FusedMatMul(g, Wᵀ, transB=1) → MatMul(g, W)

    and a Transpose for every other use. The bytes of a weight are then the same in both graphs,
    whatever the builder's constant folding did.
    """
    kept = {content_name(_array(t)) for t in evaluation.graph.initializer}
    matrices = {
        content_name(_array(t).T): t for t in evaluation.graph.initializer if len(t.dims) == 2
    }
    folded: dict[str, str] = {}  # name of Wᵀ → name of W
    for tensor in list(training.graph.initializer):
        content = content_name(_array(tensor))
        if len(tensor.dims) == 2 and content not in kept and content in matrices:
            folded[tensor.name] = matrices[content].name
            training.graph.initializer.remove(tensor)
    present = {tensor.name for tensor in training.graph.initializer}
    for name, tensor in ((t.name, t) for t in matrices.values()):
        if name in folded.values() and name not in present:
            training.graph.initializer.append(tensor)
    _read_untransposed(training.graph, folded)


def name_by_content(model: onnx.ModelProto) -> None:
    """Name every initializer by its content (joint_graph.content_name), and merge equal ones."""
    graph, names = model.graph, {}
    unique: dict[str, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        array = _array(tensor)
        new = content_name(array)
        names[tensor.name] = new
        unique[new] = numpy_helper.from_array(array, new)
    rename(model, names)
    del graph.initializer[:]
    graph.initializer.extend(unique[name] for name in sorted(unique))
    infos = {info.name: info for info in graph.value_info if info.name not in unique}
    del graph.value_info[:]
    graph.value_info.extend(infos.values())


def prune_opsets(model: onnx.ModelProto) -> None:
    """Keep the opset imports that a node uses, and the standard one."""
    used = {"" if node.domain == "ai.onnx" else node.domain for node in model.graph.node} | {""}
    imports = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(sorted(imports, key=lambda opset: opset.domain))


def _read_untransposed(graph: onnx.GraphProto, folded: Mapping[str, str]) -> None:
    """Replace uses of Wᵀ by uses of W."""
    for node in graph.node:
        if len(node.input) != 2 or node.input[1] not in folded or node.input[0] in folded:
            continue
        if node.op_type == "MatMul":
            fused = {"alpha": 1.0, "transA": 0, "transB": 1}
            _become(node, "FusedMatMul", MICROSOFT, folded[node.input[1]], fused)
        elif node.op_type == "FusedMatMul" and _attributes(node) == {"transB": 1}:
            _become(node, "MatMul", "", folded[node.input[1]], {})
    used = {name for node in graph.node for name in node.input}
    for transposed, name in folded.items():
        if transposed in used:
            node = helper.make_node("Transpose", [name], [transposed], perm=[1, 0])
            graph.node.insert(0, node)


def _become(
    node: onnx.NodeProto, operator: str, domain: str, weight: str, attributes: Mapping[str, Any]
) -> None:
    new = helper.make_node(
        operator,
        [node.input[0], weight],
        list(node.output),
        name=node.name,
        domain=domain or None,
        **attributes,
    )
    node.CopyFrom(new)


def _attributes(node: onnx.NodeProto) -> dict[str, float]:
    """Return FusedMatMul's attributes that are not at their defaults."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: v for name, v in values.items() if v != (1.0 if name == "alpha" else 0)}


def _require_flat(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ReleaseError(
                f"{node.name or node.op_type}: the base's graph has a {node.op_type} with a graph "
                "inside; onnxruntime-training cannot be given such a base"
            )


def _array(tensor: onnx.TensorProto) -> NDArray[Any]:
    array: NDArray[Any] = numpy_helper.to_array(tensor)
    return array
