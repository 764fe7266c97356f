"""The training artifacts of onnxruntime-training 1.19.2 for one classifier and adapter.

    forward graph ─► surgery ─► gradient builder ─┬► training_model   loss, logits, gradients
    (TorchScript)   (artifacts_surgery.py)        ├► eval_model       loss, logits
                                                  ├► optimizer_model  AdamW as torch computes it
                                                  └► checkpoint       the adapter, nothing else

The adapter's tensors are the trainable parameters, under their names in the spec. The base is
frozen: its tensors are initializers of both graphs, named by content and laid out as torch has
them, so that graphs can share one file of external data. The loss is the mean cross-entropy of
a batch; batch and tokens are free. Opset 17 in IR version 8.

The forward graph comes from torch's TorchScript exporter with `training` set on the outermost
module alone: the modules inside compute as in evaluation, and tensors of equal value (every
lora_B starts at zero) stay apart.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import merge, unmerge
from anabranch.client.tuning.text import TextClassifier
from anabranch.edge.export.artifacts_surgery import (
    add_layernorm_statistics,
    name_by_content,
    name_trainable,
    prune_opsets,
    refuse_batchnorm,
    rename,
    share_transposed,
)
from anabranch.edge.export.onnx import _Logits, _probe, _quiet, input_names
from anabranch.edge.runtime.bundle_manifest import (
    CHECKPOINT,
    EVAL_MODEL,
    OPTIMIZER_MODEL,
    TRAINING_MODEL,
)
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ReleaseError
from anabranch.protocols.spec import AdapterSpec, require_same_spec
from anabranch.protocols.tables import Training
from anabranch.storage.files import write_atomic

OPSET, IR = 17, 8  # the first opset with LayerNormalization; onnxruntime 1.19 reads IR 10 and less
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own


@dataclass(frozen=True, eq=False)
class Artifacts:
    """What onnxruntime-training loads. Weights lie inside the graphs, named by content."""

    training: onnx.ModelProto
    eval: onnx.ModelProto
    optimizer: onnx.ModelProto
    checkpoint: bytes


def artifacts(
    classifier: Classifier, adapter: Adapter, *, training: Training | None = None
) -> Artifacts:
    """Return the artifacts; the classifier is left as it was.

    inputs    the model's (onnx.input_names), then labels (batch,) int64
    outputs   loss () = mean of the batch, logits (batch, labels)

    The optimizer is AdamW, whatever `training` takes elsewhere, with its weight decay and largest
    gradient norm; the learning rate is an input of its graph, one for all tensors. None stands
    for no decay and no clipping. The same arguments give the same bytes.

    Raises IncompatibleAdapter for an adapter of another spec, and ReleaseError when a trainable
    tensor is not in the graph or the base has an operator that cannot be written, or not
    differentiated.
    """
    require_same_spec(classifier.spec, adapter.spec)
    model = _forward(classifier)
    name_trainable(model, adapter.spec)
    _load(model, adapter)
    refuse_batchnorm(model)
    add_layernorm_statistics(model)
    step, evaluation, parameters = _gradient(model, adapter.spec)
    share_transposed(step, evaluation)
    for graph in (step, evaluation):
        name_by_content(graph)
        _tidy(graph)
    optimizer = _adamw(parameters, training)
    _tidy(optimizer)
    return Artifacts(step, evaluation, optimizer, _checkpoint(parameters))


def write_artifacts(
    classifier: Classifier, adapter: Adapter, folder: Path, *, training: Training | None = None
) -> None:
    """Write the artifacts with their weights inside, for a use without a bundle.

    Raises what `artifacts` raises; nothing is written then.
    """
    made = artifacts(classifier, adapter, training=training)
    folder.mkdir(parents=True, exist_ok=True)
    models = {TRAINING_MODEL: made.training, EVAL_MODEL: made.eval, OPTIMIZER_MODEL: made.optimizer}
    for name, model in models.items():
        write_atomic(folder / name, model.SerializeToString(deterministic=True))
    write_atomic(folder / CHECKPOINT, made.checkpoint)


def _forward(classifier: Classifier) -> onnx.ModelProto:
    """Return the forward graph, adapter beside the base, no constant folded."""
    names = input_names(classifier)
    axes = {name: {0: "batch"} for name in (*names, "logits")}
    if isinstance(classifier, TextClassifier):
        axes |= {name: {0: "batch", 1: "tokens"} for name in names}
    batch = tuple(x.to(classifier.device) for x in _probe(classifier))
    target = io.BytesIO()
    with _unmerged(classifier), _evaluating(classifier), _quiet(), torch.no_grad():
        traced = _Logits(classifier).eval()
        traced.training = True  # of this module alone: see above
        _export(
            traced,
            batch,
            target,
            input_names=list(names),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamo=False,
        )
    return onnx.load_model_from_string(target.getvalue())


def _export(*args: Any, **options: Any) -> None:
    """Call torch's exporter; raise ReleaseError for an operator that it cannot write."""
    try:
        torch.onnx.export(*args, **options)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ReleaseError(
            f"torch cannot write this base for onnxruntime-training: {str(error)[:300]}"
        ) from error


def _load(model: onnx.ModelProto, adapter: Adapter) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in adapter.arrays:
            tensor.CopyFrom(numpy_helper.from_array(adapter.arrays[tensor.name], tensor.name))


Parameters = tuple[list[onnx.TensorProto], list[onnx.TensorProto]]  # trainable, frozen: none


def _gradient(
    model: onnx.ModelProto, spec: AdapterSpec
) -> tuple[onnx.ModelProto, onnx.ModelProto, Parameters]:
    """Return training graph, evaluation graph, and the parameters that the checkpoint holds."""
    from onnxruntime.training import onnxblock

    class Step(onnxblock.TrainingBlock):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.loss = onnxblock.loss.CrossEntropyLoss()

        def build(self, logits: str) -> tuple[str, str]:
            return self.loss(logits), logits

    step = Step()
    for name, _ in spec.tensors:
        step.requires_grad(name)
    try:
        with onnxblock.base(model), _silent():
            step("logits")
    except RuntimeError as error:
        raise ReleaseError(
            f"onnxruntime-training cannot differentiate this base: {str(error)[-300:]}"
        ) from error
    training, evaluation = step.to_model_proto()
    parameters: Parameters = step.parameters()
    return training, evaluation, parameters


def _adamw(parameters: Parameters, training: Training | None) -> onnx.ModelProto:
    """Return the optimizer's graph: torch.optim.AdamW (Loshchilov and Hutter 2019, Alg. 2).

    adam_mode 0 adds epsilon after the bias correction, as torch does; the builder writes 1.
    """
    from onnxruntime.training import onnxblock

    decay = 0.0 if training is None else training.weight_decay
    bound = None if training is None else training.max_grad_norm
    clip = None if bound is None else onnxblock.optim.ClipGradNorm(bound)
    with onnxblock.empty_base(opset_version=OPSET):
        block = onnxblock.optim.AdamW(betas=BETAS, eps=EPSILON, weight_decay=decay, clip_grad=clip)
        block(parameters)
        model: onnx.ModelProto = block.to_model_proto()
    for attribute in model.graph.node[-1].attribute:
        if attribute.name == "adam_mode":
            attribute.i = 0
    return model


def _checkpoint(parameters: Parameters) -> bytes:
    """Return the checkpoint's bytes; onnxruntime writes it to a file only."""
    from onnxruntime.training import onnxblock

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CHECKPOINT
        onnxblock.save_checkpoint(parameters, path)
        return path.read_bytes()


def _tidy(model: onnx.ModelProto) -> None:
    """Pin the IR version, drop unused opsets, and number the builder's names from zero."""
    model.ir_version = IR
    prune_opsets(model)
    outputs = [output.name for output in model.graph.output]
    found = (n for node in model.graph.node for n in (*node.input, *node.output))
    made = dict.fromkeys(n for n in found if n.startswith("onnx::"))
    names = {old: f"made_{i}" for i, old in enumerate(made)}
    if outputs[0] in names and "logits" in outputs:
        names[outputs[0]] = "loss"
    rename(model, names)
    for i, node in enumerate(model.graph.node):
        node.name = f"node_{i}"


@contextmanager
def _unmerged(classifier: Classifier) -> Iterator[None]:
    """Take the adapter out of the base for the export, where it is merged."""
    if not classifier.merged:
        yield
        return
    unmerge(classifier)
    try:
        yield
    finally:
        merge(classifier)


@contextmanager
def _evaluating(classifier: Classifier) -> Iterator[None]:
    """Put the classifier into evaluation mode, and back."""
    training = classifier.training
    classifier.eval()
    try:
        yield
    finally:
        classifier.train(training)


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what is written to file descriptor 2.

    The gradient builder logs every pass over the graph there, at a level that nobody can set.
    """
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
