"""The whole training step of a classifier as one plain ONNX graph: records and adapter in,
loss, logits and the adapter's gradients out.

    ℓ_i     cross-entropy of record i      w_i   its weight; 0 for a row that only pads
    plain:    loss = Σ_i w_i ℓ_i           <name>.grad = ∂loss/∂<name>
    clipped:  g_i = ∂ℓ_i over the adapter  <name>.grad = Σ_i w_i · min(1, C / ‖g_i‖₂) · g_i

    form     inputs, in order                                          outputs, in order
    plain    model inputs, labels, weights, adapter tensors            loss, losses, logits, …
    clipped  the same with clipping_norm () before the adapter         losses, logits, norms, …

and then "<name>.grad" for every adapter tensor, in the spec's order, as the inputs are.
Model inputs are those of the inference graph (onnx.py). Batch and tokens are free. Only
operators of ai.onnx, opset 18, IR 10: run by stock onnxruntime, 1.19 and later.
Frozen weights are named by content, so graphs over one base can share them in one file.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import numpy_helper
from torch import Tensor

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.export import joint_math, joint_matrices, joint_shapes
from anabranch.edge.export.joint_check import check_against_torch
from anabranch.edge.export.joint_graph import Graph
from anabranch.edge.export.joint_lowering import Lowering, numpy_dtype, sizes_of
from anabranch.edge.export.joint_trace import LABELS, Step, trace_step
from anabranch.protocols.adapter import Adapter

__all__ = ["check_against_torch", "infer_graph", "lower", "step_graph"]

LOGITS = "logits"
RULES = joint_shapes.RULES | joint_math.RULES | joint_matrices.RULES


def step_graph(classifier: Classifier, *, clipped: bool = False) -> onnx.ModelProto:
    """Return the training step; with `clipped`, the form that clips each record's gradient.

    The classifier is left as it was. Raises ModelError when an operator of the base has no form
    in ONNX here, when the base works for one batch or text length only, or, clipped, when a
    trained module is none whose gradients per record are known.
    """
    return lower(trace_step(classifier, clipped=clipped))


def lower(step: Step) -> onnx.ModelProto:
    """Return a traced step as an ONNX model."""
    graph = Graph()
    low = Lowering(graph, step.graph, RULES)
    names = iter(step.inputs)
    results: list[str] = []
    for node in step.graph.graph.nodes:
        if node.op == "placeholder":
            value: Tensor = node.meta["val"]
            low.values[node] = graph.input(next(names), sizes_of(node), numpy_dtype(value.dtype))
        elif node.op == "output":
            results = [low.value(a) for a in node.args[0]]
        else:
            low.run(node)
    return graph.model(dict(zip(step.outputs, results, strict=True)), step.sizes)


def infer_graph(step: onnx.ModelProto, adapter: Adapter) -> onnx.ModelProto:
    """Return the part of a plain step that computes logits, with `adapter` as default.

    The adapter's tensors stay inputs and are initializers of the same names: what a caller
    feeds replaces them. Raises ValueError for a clipped step or another adapter.
    """
    inputs = {i.name: i for i in step.graph.input}
    shapes = {
        n: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for n, i in inputs.items()
    }
    if step.graph.output[0].name != "loss":
        raise ValueError("expected a plain step, whose first output is loss; got a clipped one")
    for name, shape in adapter.spec.tensors:
        if shapes.get(name) != shape:
            raise ValueError(f"{name}: the step takes {shapes.get(name)}, the adapter has {shape}")
    names = list(inputs)
    model_inputs = names[: names.index(LABELS)]
    nodes = _needed(step.graph.node, LOGITS)
    used = {i for node in nodes for i in node.input}
    for node in nodes:
        if node.op_type == "LayerNormalization":
            del node.output[1:]  # what only gradients need
    defaults = [numpy_helper.from_array(adapter.arrays[n], n) for n, _ in adapter.spec.tensors]
    graph = onnx.helper.make_graph(
        nodes,
        "infer",
        [inputs[n] for n in (*model_inputs, *adapter.spec.shapes)],
        [o for o in step.graph.output if o.name == LOGITS],
        [*(i for i in step.graph.initializer if i.name in used), *defaults],
    )
    return onnx.helper.make_model(
        graph,
        opset_imports=list(step.opset_import),
        ir_version=step.ir_version,
        producer_name=step.producer_name,
    )


def _needed(nodes: Sequence[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """Return copies of the nodes that `output` depends on, in order."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            kept.append(copy)
    return kept[::-1]
