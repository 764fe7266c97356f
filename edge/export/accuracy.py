"""What a bundle's precisions give on held-out records, and whether that is enough.

fp32 must be as accurate as torch; int8 and int4 may lose what is allowed against fp32. All of
them run as a device runs them, tokenizer included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.edge.runtime.bundle_manifest import Measured, Precision, key
from anabranch.edge.runtime.measure import unverified
from anabranch.edge.runtime.predict import Predictor
from anabranch.protocols.errors import ReleaseError

FP32_TOLERANCE = 1e-3  # accuracy, or one record if that is more: ties may break differently
LATENCY_RUNS = 40
BATCH = 64  # records of like length that torch classifies at once

Inputs = Sequence[str] | NDArray[np.float32]


def torch_accuracy(classifier: Classifier, inputs: Inputs, labels: NDArray[np.int64]) -> float:
    """Return the share of records that the classifier gets right in torch."""
    encoded = classifier.encode(inputs)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            logits = classifier.logits(*collate([encoded[i] for i in rows]))
            right += int((logits.numpy().argmax(1) == labels[rows]).sum())
    return right / len(labels)


def measured_on(
    folder: Path,
    precisions: Sequence[Precision],
    inputs: Inputs,
    labels: NDArray[np.int64],
    *,
    truth: float,
    allowed: Mapping[Precision, float],
) -> dict[Precision, Measured]:
    """Return accuracy and latency of each precision, fp32 first, of the bundle in `folder`.

    `truth` is torch's accuracy on the same records. Raises ReleaseError if fp32 does not have
    it, or if another precision loses more than `allowed` against fp32.
    """
    bundle = unverified(folder)
    measured: dict[Precision, Measured] = {}
    for precision in precisions:
        predictor = Predictor.open(bundle, precision=precision, threads=1)
        right = predictor.logits(inputs).argmax(1) == labels
        milliseconds = _latencies(predictor, inputs)
        graph = bundle.manifest.graphs[key("infer", precision)]
        measured[precision] = Measured(
            records=len(labels),
            accuracy=float(right.mean()),
            p50_ms=statistics.median(milliseconds),
            p95_ms=float(np.percentile(milliseconds, 95)),
            bytes=sum((folder / name).stat().st_size for name in (graph.file, *graph.data)),
        )
        if precision == "fp32":
            _require_truth(measured["fp32"], truth)
            continue
        loss = measured["fp32"].accuracy - measured[precision].accuracy
        if loss > allowed[precision]:
            raise ReleaseError(
                f"{precision} loses {loss:.4f} of accuracy on {len(labels)} held-out records, "
                f"{allowed[precision]:g} is allowed: choose others with --precision, or "
                "allow more with --tolerance"
            )
    return measured


def _require_truth(fp32: Measured, truth: float) -> None:
    if abs(fp32.accuracy - truth) > max(FP32_TOLERANCE, 1.5 / fp32.records):
        raise ReleaseError(
            f"the fp32 graph has accuracy {fp32.accuracy:.4f} on {fp32.records} held-out records, "
            f"torch {truth:.4f}: the export is wrong, no bundle is made"
        )


def _latencies(predictor: Predictor, inputs: Inputs) -> list[float]:
    """Return milliseconds of single records, tokenization included."""
    result = []
    for i in range(LATENCY_RUNS + 3):
        at = i % len(inputs)
        began = time.perf_counter()
        predictor.logits(inputs[at : at + 1])
        result.append(1000 * (time.perf_counter() - began))
    return result[3:]  # the first runs allocate
