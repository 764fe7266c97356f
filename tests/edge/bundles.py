"""Small but real signed bundles: exported graphs, shared weights, artifacts, tokenizer.

What takes long to measure is made up: memory, latency, accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.client.tuning.text import TextClassifier
from anabranch.edge.export.artifacts import artifacts
from anabranch.edge.export.joint import infer_graph, step_graph
from anabranch.edge.export.onnx import input_names
from anabranch.edge.export.quantize import quantize_infer, quantize_step
from anabranch.edge.export.tokenizer import tokenizer_data, write_tokenizer
from anabranch.edge.export.weights import externalize
from anabranch.edge.runtime import bundle_manifest as names
from anabranch.edge.runtime.bundle_manifest import (
    Graph,
    Limits,
    Manifest,
    Measured,
    Memory,
    Precision,
    key,
)
from anabranch.edge.runtime.manifest import TOKENIZER, entry
from anabranch.edge.runtime.trust import public_bytes, sign
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRUSTED = (public_bytes(KEY),)
LIMITS = Limits(memory_bytes=500 << 20, max_records=64, max_tokens=24)
MEMORY = Memory(fixed=1 << 20, per_record=1000, per_token=1000, per_pair=1)


def write_bundle(
    folder: Path,
    classifier: Classifier,
    config: RunConfig,
    *,
    precisions: tuple[Precision, ...] = ("fp32", "int8"),
    with_artifacts: bool = True,
    **changes: Any,
) -> Manifest:
    """Write a signed bundle of a classifier to the new folder; `changes` go into its manifest."""
    folder.mkdir(parents=True)
    adapter = read_adapter(classifier)
    models = _models(classifier, adapter, precisions)
    extra: dict[str, onnx.ModelProto] = {}
    if with_artifacts:
        made = artifacts(classifier, adapter)
        extra = {"training_model": made.training, "eval_model": made.eval}
        (folder / names.OPTIMIZER_MODEL).write_bytes(made.optimizer.SerializeToString())
        (folder / names.CHECKPOINT).write_bytes(made.checkpoint)
    graphs = {}
    for precision in precisions:
        data = f"base-{precision}.bin"
        mine = {name: m for name, m in models.items() if name.endswith(precision)}
        # Small as these models are, nearly all of their weights go into the shared file.
        mapped = externalize(mine | (extra if precision == "fp32" else {}), data, folder, 64)
        for name in mine:
            graphs[name] = Graph(
                file=f"{name}.onnx", data=mapped[name], onnxruntime="1.19", memory=MEMORY
            )
    (folder / names.ADAPTER).write_bytes(wire.encode(adapter))
    if isinstance(classifier, TextClassifier):
        tokens = tokenizer_data(classifier.tokenizer, max_tokens=LIMITS.max_tokens)
        (folder / TOKENIZER).write_bytes(write_tokenizer(tokens))
    manifest = _manifest(classifier, config, adapter, graphs, with_artifacts)
    return seal(folder, msgspec.structs.replace(manifest, **changes))


def seal(folder: Path, manifest: Manifest, key: Ed25519PrivateKey = KEY) -> Manifest:
    """List the files that are in the folder, write the manifest and sign it."""
    own = (names.MANIFEST, names.SIGNATURE)
    files = {p.name: entry(p) for p in sorted(folder.iterdir()) if p.name not in own}
    manifest = msgspec.structs.replace(manifest, files=files)
    sign_bytes(folder, msgspec.json.encode(manifest), key)
    return manifest


def sign_bytes(folder: Path, data: bytes, key: Ed25519PrivateKey = KEY) -> None:
    """Write any bytes as a manifest with a right signature."""
    (folder / names.MANIFEST).write_bytes(data)
    (folder / names.SIGNATURE).write_bytes(sign(data, key))


def reseal(folder: Path, change: Callable[[Manifest], Manifest] = lambda m: m) -> Manifest:
    """Sign the folder again after its files changed, or what its manifest says."""
    manifest = msgspec.json.decode((folder / names.MANIFEST).read_bytes(), type=Manifest)
    return seal(folder, change(manifest))


def _models(
    classifier: Classifier, adapter: Adapter, precisions: tuple[Precision, ...]
) -> dict[str, onnx.ModelProto]:
    steps = {
        "train_step": step_graph(classifier),
        "train_step_dp": step_graph(classifier, clipped=True),
    }
    infer = infer_graph(steps["train_step"], adapter)
    models = {}
    for precision in precisions:
        for role, step in steps.items():
            plain = precision == "fp32"
            models[f"{role}.{precision}"] = step if plain else quantize_step(step, precision)
        models[key("infer", precision)] = (
            infer if precision == "fp32" else quantize_infer(infer, precision)
        )
    return models


def _manifest(
    classifier: Classifier,
    config: RunConfig,
    adapter: Adapter,
    graphs: dict[str, Graph],
    with_artifacts: bool,
) -> Manifest:
    texts = isinstance(classifier, TextClassifier)
    kind = config.task.kind.split("-")[0]
    shape = {"image": (1, 12, 12), "tabular": (5,), "text": ()}[kind]
    measured = Measured(records=10, accuracy=0.5, p50_ms=1.0, p95_ms=2.0, bytes=1000)
    found: list[Precision] = [p for p in ("fp32", "int8", "int4") if key("infer", p) in graphs]
    return Manifest(
        name=config.name,
        version=1,
        created="2026-01-01T00:00:00+00:00",
        task=config.task.kind,
        labels=config.task.labels,
        inputs=input_names(classifier),
        shape=shape,
        spec=adapter.spec,
        adapter=wire.digest(wire.encode(adapter)),
        config=config.digest(),
        training=config.training,
        graphs=graphs,
        artifacts=with_artifacts,
        measured=dict.fromkeys(found, measured),
        limits=LIMITS if texts else msgspec.structs.replace(LIMITS, max_tokens=1),
        versions={"numpy": np.__version__},
        files={},
    )
