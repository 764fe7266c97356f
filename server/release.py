"""From the best adapter to what people and devices load.

    README.md                the model card (card.py)
    manifest.json            SHA-256 and size of every other file
    labels.json              labels in the order of the logits
    tokenizer.json           texts only: WordPiece as plain data for the device runtime
    adapter/                 PEFT folder
    merged/                  base with the adapter folded in (a Hugging Face folder for texts), head
    onnx/model.onnx          fp32
    onnx/model-int8.onnx     int8: weights per channel, activations per token or record

Every graph is measured on held-out records through the device runtime, tokenizer included,
before anyone can see the release: all is built in a hidden folder beside the target, and
renamed into place at the end.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import load_adapter, merged_weights
from anabranch.client.tuning.metrics import evaluate
from anabranch.client.tuning.peft_folder import write_peft
from anabranch.client.tuning.text import TextClassifier
from anabranch.edge.export.onnx import export_classifier, input_names, quantize_int8
from anabranch.edge.export.tokenizer import tokenizer_data, write_tokenizer
from anabranch.edge.runtime.classify import Model, Precision
from anabranch.edge.runtime.manifest import (
    FP32,
    INT8,
    MANIFEST,
    TOKENIZER,
    File,
    Manifest,
    entry,
    verify,
)
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ReleaseError
from anabranch.server.card import Checks, RunFacts, model_card
from anabranch.server.statement.guarantees import state
from anabranch.storage.files import sync_folder, write_atomic

FP32_TOLERANCE = 1e-3  # accuracy, or one record if that is more: ties may break differently
LATENCY_RUNS = 50
BATCH = 64

Inputs = Sequence[str] | NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Release:
    """A finished release and what was measured on it."""

    folder: Path
    manifest_sha256: str
    fp32_bytes: int
    int8_bytes: int
    checks: Checks


def make_release(
    classifier: Classifier,
    adapter: Adapter,
    config: RunConfig,
    folder: Path,
    *,
    inputs: Inputs,
    labels: Labels,
    facts: RunFacts,
    threads: int = 1,
) -> Release:
    """Build, check and publish the release of `adapter` in `folder`, which must not exist yet.

    `inputs` and `labels` are held-out records of the coordinator. `classifier` is left with
    the adapter loaded.

    Raises:
        ReleaseError: the folder exists, or the fp32 graph is not as accurate as torch: then
            there is no folder. Or the int8 model loses more than config.release.int8_tolerance
            of accuracy: then the release is there, without the int8 model, and says so.
        ModelError: the base cannot be exported, or its tokenizer is not WordPiece.
        PrivacyError: a private run without every number of its privacy statement.
    """
    if folder.exists():
        raise ReleaseError(f"{folder} exists already: move it away, or release elsewhere")
    if len(inputs) == 0 or len(inputs) != len(labels):
        raise ReleaseError(
            f"a release is checked on held-out records: got {len(inputs)} inputs and "
            f"{len(labels)} labels"
        )
    state(config, facts)  # refuse before the work, not after it
    load_adapter(classifier, adapter)
    with _staged(folder) as stage, _on_cpu(classifier):
        graphs = _write_models(stage, classifier, adapter, config, facts)
        logits = _torch_logits(classifier, inputs)
        checks = _check(stage, graphs, config, logits, inputs, labels, threads)
        sizes = {name: (stage / name).stat().st_size for name in (FP32, INT8)}
        if not checks.int8_accepted:
            (stage / INT8).unlink()
        _write_card(stage, graphs, config, facts, adapter, checks)
    if not checks.int8_accepted:
        raise ReleaseError(_int8_refusal(folder, checks))
    return Release(
        folder=folder,
        manifest_sha256=entry(folder / MANIFEST).sha256,
        fp32_bytes=sizes[FP32],
        int8_bytes=sizes[INT8],
        checks=checks,
    )


def _int8_refusal(folder: Path, checks: Checks) -> str:
    return (
        f"int8 model refused: its accuracy is {checks.int8_accuracy:.4f}, fp32 has "
        f"{checks.fp32_accuracy:.4f}, and release.int8_tolerance is {checks.int8_tolerance:g}. "
        f"{folder} holds the release without it; raise the tolerance, or use the fp32 model"
    )


def _write_models(
    stage: Path, classifier: Classifier, adapter: Adapter, config: RunConfig, facts: RunFacts
) -> Manifest:
    """Write everything but card and manifest; return a manifest without files and metrics."""
    names = config.task.labels
    write_peft(
        stage / "adapter",
        adapter,
        base_name=facts.base_name,
        labels=names,
        pooling=config.model.pooling,
    )
    _write_merged(stage / "merged", classifier, config)
    write_atomic(stage / "labels.json", msgspec.json.format(msgspec.json.encode(names)) + b"\n")
    if isinstance(classifier, TextClassifier):
        data = tokenizer_data(classifier.tokenizer, max_tokens=config.model.max_tokens)
        write_atomic(stage / TOKENIZER, write_tokenizer(data))
    export_classifier(classifier, stage / FP32)
    quantize_int8(stage / FP32, stage / INT8)
    return Manifest(
        name=config.name,
        task=config.task.kind,
        labels=names,
        inputs=input_names(classifier),
        base=adapter.spec.base,
        adapter=wire.digest(wire.encode(adapter)),
        config=config.digest(),
        metrics={},
        files={},
    )


def _write_merged(folder: Path, classifier: Classifier, config: RunConfig) -> None:
    """Write base and head as safetensors; for texts with what AutoModel and AutoTokenizer need."""
    folder.mkdir(parents=True)
    weights = {n: t.detach().clone() for n, t in merged_weights(classifier).items()}
    head = {n: weights.pop(n) for n in [n for n in weights if n.startswith("head.")]}
    for name, tensors in (("model", weights), ("head", head)):
        data = safetensors.torch.save(tensors, metadata={"format": "pt"})
        write_atomic(folder / f"{name}.safetensors", data)
    if isinstance(classifier, TextClassifier):
        write_atomic(folder / "config.json", classifier.config.to_json_string().encode())
        classifier.tokenizer.save_pretrained(folder)
    else:
        write_atomic(folder / "config.json", msgspec.json.encode(config.model))


def _torch_logits(classifier: Classifier, inputs: Inputs) -> NDArray[np.float32]:
    """Return what the model in torch says, (n, labels): the truth for the graphs."""
    encoded = classifier.encode(inputs)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    result = np.empty((len(encoded), classifier.num_labels), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            x, mask = collate([encoded[i] for i in rows])
            result[rows] = classifier.logits(x, mask).numpy()
    return result


def _check(
    stage: Path,
    graphs: Manifest,
    config: RunConfig,
    torch_logits: NDArray[np.float32],
    inputs: Inputs,
    labels: Labels,
    threads: int,
) -> Checks:
    """Measure both graphs as a device would run them; raise ReleaseError if fp32 is not torch."""
    _write_manifest(stage, graphs, {})
    truth = evaluate(torch_logits, labels)["accuracy"]
    metrics, latency = {}, {}
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    for precision in precisions:
        model = Model.open(stage, precision=precision, threads=threads)
        metrics[precision] = evaluate(model.logits(inputs), labels)
        latency[precision] = _latency_ms(model, inputs)
    fp32, int8 = metrics["fp32"]["accuracy"], metrics["int8"]["accuracy"]
    if abs(fp32 - truth) > max(FP32_TOLERANCE, 1.5 / len(labels)):
        raise ReleaseError(
            f"the fp32 graph has accuracy {fp32:.4f} on {len(labels)} held-out records, torch "
            f"{truth:.4f}: the export is wrong, nothing is released"
        )
    tolerance = config.release.int8_tolerance
    return Checks(
        num_records=len(labels),
        metrics=metrics["fp32"],
        torch_accuracy=truth,
        fp32_accuracy=fp32,
        int8_accuracy=int8,
        int8_tolerance=tolerance,
        int8_accepted=fp32 - int8 <= tolerance,
        fp32_latency_ms=latency["fp32"],
        int8_latency_ms=latency["int8"],
        threads=threads,
    )


def _latency_ms(model: Model, inputs: Inputs) -> float:
    """Return the median time of classifying one record, tokenization included."""
    seconds = []
    for i in range(LATENCY_RUNS + 3):
        at = i % len(inputs)
        started = time.perf_counter()
        model.classify(inputs[at : at + 1])
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[3:])  # the first runs allocate


def _write_card(
    stage: Path,
    graphs: Manifest,
    config: RunConfig,
    facts: RunFacts,
    adapter: Adapter,
    checks: Checks,
) -> None:
    card = model_card(config, facts, adapter.spec, checks, _entries(stage))
    write_atomic(stage / "README.md", card.encode())
    metrics = {
        **checks.metrics,
        "torch_accuracy": checks.torch_accuracy,
        "fp32_accuracy": checks.fp32_accuracy,
        "int8_accuracy": checks.int8_accuracy,
        "fp32_latency_ms": checks.fp32_latency_ms,
        "int8_latency_ms": checks.int8_latency_ms,
    }
    verify(stage, _write_manifest(stage, graphs, metrics))


def _write_manifest(stage: Path, graphs: Manifest, metrics: dict[str, float]) -> Manifest:
    manifest = msgspec.structs.replace(graphs, metrics=metrics, files=_entries(stage))
    data: Any = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    write_atomic(stage / MANIFEST, data + b"\n")
    return manifest


def _entries(stage: Path) -> dict[str, File]:
    """Return every file below `stage` but the manifest, by path."""
    paths = sorted(path for path in stage.rglob("*") if path.is_file())
    names = [path.relative_to(stage).as_posix() for path in paths]
    return {n: entry(p) for n, p in zip(names, paths, strict=True) if n != MANIFEST}


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give a hidden folder that becomes `folder` when all went well, and vanishes if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield stage
        for path in stage.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        stage.chmod(0o755)
        stage.rename(folder)
    except BaseException:
        shutil.rmtree(stage)
        raise
    sync_folder(folder.parent)


@contextmanager
def _on_cpu(classifier: Classifier) -> Iterator[None]:
    """Releases are checked on the CPU, where devices run them."""
    device = classifier.device
    classifier.to("cpu")
    try:
        yield
    finally:
        classifier.to(device)
