"""A classifier as an ONNX graph: the frozen base with its adapter merged in, and the head.

    task     inputs                                                        output
    text     input_ids (batch, tokens) int64, attention_mask same          logits (batch, labels)
    image    pixels (batch, channels, size, size) float32                  logits
    table    features (batch, columns) float32                             logits

Batch and tokens are free. Opset 17 in IR version 8, which onnxruntime 1.19 reads; written by
torch's TorchScript exporter, because graphs of the newer one came out with weights renamed
or folded away. The graph is accepted only after onnxruntime has computed what torch computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import merge, unmerge
from anabranch.client.tuning.tables import TableClassifier
from anabranch.client.tuning.text import TextClassifier
from anabranch.client.tuning.vision import ImageClassifier
from anabranch.edge.export.quantize import quantize_infer
from anabranch.protocols.errors import ModelError, ReleaseError
from anabranch.storage.files import write_atomic

OPSET = 17
TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest logit or 1
TEXTS = ("ICD", "Acute myocardial infarction, unspecified", "Fracture of the left femur " * 9)

Feeds = dict[str, NDArray[np.int64] | NDArray[np.float32]]


def export_classifier(classifier: Classifier, path: Path) -> float:
    """Write the merged classifier as an fp32 graph; return its largest difference from torch.

    The classifier is left as it was. Raises ReleaseError, and leaves no file, when
    onnxruntime computes other logits than torch.
    """
    batch = tuple(x.to(classifier.device) for x in _probe(classifier))
    names = input_names(classifier)
    axes = {name: {0: "batch"} for name in (*names, "logits")}
    if isinstance(classifier, TextClassifier):
        axes |= {name: {0: "batch", 1: "tokens"} for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _merged(classifier), _quiet(), torch.no_grad():
        torch.onnx.export(
            _Logits(classifier).eval(),
            batch,
            str(path),
            input_names=list(names),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=OPSET,
            do_constant_folding=True,
            dynamo=False,
        )
    try:
        return _compare(classifier, path)
    except ReleaseError:
        path.unlink()
        raise


def quantize_int8(source: Path, target: Path) -> None:
    """Write `source` with int8 weights (per channel) of linear layers and embeddings.

    Activations are quantized while the model runs ("dynamic"), so no records are needed here:
    every row, which is a token or a record, from its own range. One range for a whole batch,
    which outliers of a single token stretch for all, doubles the error of MiniLM's encoder.
    Weights take as much of 8 bits as cannot overflow (`codes.quantize_pairs`): x86 without VNNI
    adds pairs of uint8 x int8 products in 16 bits, and a device whose sums are cut off there
    would not have the accuracy that was measured here (onnxruntime's guide to quantization).
    """
    model = quantize_infer(onnx.load(source), "int8", smallest=1, narrowest=1, per_row=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, model.SerializeToString(deterministic=True))


def input_names(classifier: Classifier) -> tuple[str, ...]:
    """Return the names of the graph's inputs for a classifier."""
    if isinstance(classifier, TextClassifier):
        return ("input_ids", "attention_mask")
    return ("pixels",) if isinstance(classifier, ImageClassifier) else ("features",)


class _Logits(nn.Module):
    """What is traced: int64 mask in, logits out."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.classifier.logits(x, None if mask is None else mask.bool())


def _probe(classifier: Classifier, rows: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    """Return a batch of `rows` made-up records, as the graph takes them."""
    rng = torch.Generator().manual_seed(seed)
    if isinstance(classifier, TextClassifier):
        texts = [TEXTS[i % len(TEXTS)] for i in range(rows)]
        ids, mask = collate(classifier.encode(texts))
        assert mask is not None  # token ids are a sequence
        return ids, mask.long()
    if isinstance(classifier, ImageClassifier):
        return (torch.rand(rows, *classifier.image_shape, generator=rng),)
    if isinstance(classifier, TableClassifier):
        return (torch.randn(rows, classifier.num_features, generator=rng),)
    raise ModelError(f"{type(classifier).__name__} cannot be exported to ONNX")


@torch.no_grad()
def _compare(classifier: Classifier, path: Path) -> float:
    """Return the largest difference over batches of other sizes than the traced one."""
    session = onnxruntime.InferenceSession(path, _options(), providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in (1, 5):
        batch = _probe(classifier, rows, seed=rows)
        feeds = dict(zip(input_names(classifier), (x.numpy() for x in batch), strict=True))
        (got,) = session.run(["logits"], feeds)
        x, mask = batch[0].to(classifier.device), batch[1].bool() if len(batch) > 1 else None
        expected = classifier.logits(x, None if mask is None else mask.to(x.device)).cpu().numpy()
        scale = max(1.0, float(np.abs(expected).max()))
        worst = max(worst, float(np.abs(got - expected).max()) / scale)
    if not worst <= TOLERANCE:
        raise ReleaseError(
            f"{path.name}: onnxruntime and torch differ by {worst:.2g} of the largest logit, at "
            f"most {TOLERANCE:g} is allowed; this base cannot be released as ONNX"
        )
    return worst


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return options


@contextmanager
def _merged(classifier: Classifier) -> Iterator[None]:
    """Fold the adapter into the base for the export, unless that is done already."""
    if classifier.merged:
        yield
        return
    merge(classifier)
    try:
        yield
    finally:
        unmerge(classifier)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says to developers: tracing hints and the choice of exporter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.onnx")
        yield
