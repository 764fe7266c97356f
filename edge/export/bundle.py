"""From a released adapter to a signed bundle: what a device needs, in one flat folder.

    classifier ─► step graphs ─┬► fp32 ─► base-fp32.bin ◄─ onnxruntime-training's models
      (joint.py)               ├► int8 ─► base-int8.bin      (artifacts.py)
                               └► int4 ─► base-int4.bin
                    (quantize.py)   (weights.py: equal bytes are stored once)

    then: compared with torch, measured through the device runtime, listed, signed, renamed

Nothing is seen before all of it is right. A precision that loses more accuracy than allowed is
refused, not shipped.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import load_adapter
from anabranch.client.tuning.tables import TableClassifier
from anabranch.client.tuning.text import TextClassifier
from anabranch.client.tuning.vision import ImageClassifier
from anabranch.edge.export.accuracy import Inputs, measured_on, torch_accuracy
from anabranch.edge.export.agreement import require_agreement
from anabranch.edge.export.artifacts import artifacts
from anabranch.edge.export.joint import infer_graph, step_graph
from anabranch.edge.export.joint_check import check_against_torch
from anabranch.edge.export.onnx import input_names
from anabranch.edge.export.quantize import oldest_onnxruntime, quantize_infer, quantize_step
from anabranch.edge.export.tokenizer import tokenizer_data, write_tokenizer
from anabranch.edge.export.weights import externalize
from anabranch.edge.runtime import bundle_manifest as names
from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.bundle_manifest import (
    Graph,
    Limits,
    Manifest,
    Memory,
    Precision,
    Role,
    key,
)
from anabranch.edge.runtime.manifest import TOKENIZER, entry
from anabranch.edge.runtime.measure import Job, measure, memory_model
from anabranch.edge.runtime.memory import micro_batches
from anabranch.edge.runtime.onnx_adapter import supported, write_onnx_adapter
from anabranch.edge.runtime.trust import public_bytes, sign
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, ReleaseError
from anabranch.protocols.tables import Name
from anabranch.storage.files import staged, write_atomic

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
ROLES: tuple[Role, ...] = ("train_step", "train_step_dp", "infer")
MICRO_BATCH = 4  # records of full length that the default memory limit has room for
MAX_RECORDS = 256
INT4_TOLERANCE = 0.015
PACKAGES = ("anabranch", "torch", "onnx", "onnxruntime", "onnxruntime-training-cpu", "numpy")

Models = dict[str, onnx.ModelProto]
OnStage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to put into a bundle, and under which name."""

    name: str
    version: int
    precisions: tuple[Precision, ...] = PRECISIONS
    artifacts: bool = True  # also the onnxruntime-training files
    memory_bytes: int | None = None  # limit on a device; None: room for MICRO_BATCH records
    tolerance: dict[Precision, float] = field(default_factory=dict)  # accuracy that may be lost

    def __post_init__(self) -> None:
        if "fp32" not in self.precisions:
            raise ConfigError(
                "precisions: fp32 is the measure of the others and cannot be left out"
            )


def make_bundle(
    classifier: Classifier,
    adapter: Adapter,
    config: RunConfig,
    folder: Path,
    *,
    request: Request,
    inputs: Inputs,
    labels: NDArray[np.int64],
    signing_key: Ed25519PrivateKey,
    on_stage: OnStage = lambda _: None,
) -> Manifest:
    """Build, check, measure and sign a bundle in `folder`, which must not exist yet.

    `inputs` and `labels` are held-out records; `classifier` is left with the adapter loaded.

    Raises:
        ReleaseError: the folder exists, a graph does not compute what torch computes, the fp32
            graph is not as accurate as torch, or a precision loses more accuracy than
            `request.tolerance` (int8: the run's release.int8_tolerance; int4: INT4_TOLERANCE).
        ModelError: the base cannot be exported, or its tokenizer is not WordPiece.
        IncompatibleAdapter: the adapter is for another base.
        DeviceError: `request.memory_bytes` has no room for one record.
        ConfigError: the name is none that a manifest takes.
    There is no folder then.
    """
    _require_name(request.name)
    if folder.exists():
        raise ReleaseError(f"{folder} exists already: move it away, or write elsewhere")
    if len(inputs) == 0 or len(inputs) != len(labels):
        raise ReleaseError(
            f"a bundle is measured on held-out records: got {len(inputs)} inputs and "
            f"{len(labels)} labels"
        )
    load_adapter(classifier, adapter)
    with staged(folder) as stage:
        on_stage("exporting")
        models = _graphs(classifier, adapter, request)
        graphs = _write(stage, models, classifier, adapter, config, request, on_stage)
        _write_rest(stage, classifier, adapter, config)
        manifest = _draft(classifier, adapter, config, request, graphs)
        _list(stage, manifest)
        on_stage("comparing engines")
        require_agreement(stage, request.precisions, artifacts=request.artifacts)
        on_stage("measuring accuracy")
        allowed: dict[Precision, float] = {
            "int8": config.release.int8_tolerance,
            "int4": INT4_TOLERANCE,
            **request.tolerance,
        }
        precisions = [p for p in PRECISIONS if p in request.precisions]
        truth = torch_accuracy(classifier, inputs, labels)
        measured = measured_on(stage, precisions, inputs, labels, truth=truth, allowed=allowed)
        manifest = msgspec.structs.replace(manifest, measured=measured)
        on_stage("measuring memory")
        manifest = _with_memory(stage, manifest, request)
        _list(stage, manifest)
        data = (stage / names.MANIFEST).read_bytes()
        write_atomic(stage / names.SIGNATURE, sign(data, signing_key))
        manifest = open_bundle(stage, trusted=[public_bytes(signing_key)]).manifest
    return manifest


def _require_name(name: str) -> None:
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        raise ConfigError(
            f"name {name!r}: expected 1 to 64 of a-z, 0-9, '.', '_' and '-', the first a letter "
            "or digit"
        ) from None


def _graphs(classifier: Classifier, adapter: Adapter, request: Request) -> Models:
    """Return every plain graph by key; fp32 ones are compared with torch."""
    models: Models = {}
    for role, clipped in (("train_step", False), ("train_step_dp", True)):
        step = step_graph(classifier, clipped=clipped)
        check_against_torch(step, classifier, clipped=clipped)
        models[f"{role}.fp32"] = step
    models["infer.fp32"] = infer_graph(models["train_step.fp32"], adapter)
    for precision in request.precisions:
        if precision == "fp32":
            continue
        for role in ("train_step", "train_step_dp"):
            models[f"{role}.{precision}"] = quantize_step(models[f"{role}.fp32"], precision)
        models[f"infer.{precision}"] = quantize_infer(models["infer.fp32"], precision)
    return models


def _write(
    stage: Path,
    models: Models,
    classifier: Classifier,
    adapter: Adapter,
    config: RunConfig,
    request: Request,
    on_stage: OnStage,
) -> dict[str, Graph]:
    """Write graphs and weights, one data file per precision; return the manifest's entries."""
    graphs = {}
    extra: Models = {}
    if request.artifacts:
        on_stage("onnxruntime-training artifacts")
        made = artifacts(classifier, adapter, training=config.training)
        extra = {"training_model": made.training, "eval_model": made.eval}
        write_atomic(stage / names.OPTIMIZER_MODEL, made.optimizer.SerializeToString())
        write_atomic(stage / names.CHECKPOINT, made.checkpoint)
    for precision in request.precisions:
        data_file = f"base-{precision}.bin"
        mine = {key(role, precision): models[key(role, precision)] for role in ROLES}
        externalize(mine | (extra if precision == "fp32" else {}), data_file, stage)
        for name, model in mine.items():
            data = (data_file,) if (stage / data_file).exists() else ()
            graphs[name] = Graph(
                file=f"{name}.onnx",
                data=data,
                onnxruntime=oldest_onnxruntime(model),
                memory=Memory(fixed=0),
            )
    return graphs


def _write_rest(stage: Path, classifier: Classifier, adapter: Adapter, config: RunConfig) -> None:
    write_atomic(stage / names.ADAPTER, wire.encode(adapter))
    if supported():
        write_onnx_adapter(stage / names.ONNX_ADAPTER, adapter)
    if isinstance(classifier, TextClassifier):
        data = tokenizer_data(classifier.tokenizer, max_tokens=config.model.max_tokens)
        write_atomic(stage / TOKENIZER, write_tokenizer(data))


def _draft(
    classifier: Classifier,
    adapter: Adapter,
    config: RunConfig,
    request: Request,
    graphs: dict[str, Graph],
) -> Manifest:
    """Return the manifest before anything is measured: no limits that bind, no files."""
    steps = config.training.local_steps or 0
    return Manifest(
        name=request.name,
        version=request.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=config.task.kind,
        labels=config.task.labels,
        columns=config.data.columns,
        inputs=input_names(classifier),
        shape=_shape(classifier),
        spec=adapter.spec,
        adapter=wire.digest(wire.encode(adapter)),
        config=config.digest(),
        training=config.training,
        privacy=config.privacy,
        privacy_steps=config.federation.rounds * steps if config.privacy else 0,
        graphs=graphs,
        artifacts=request.artifacts,
        measured={},
        limits=Limits(
            memory_bytes=1 << 50, max_records=MAX_RECORDS, max_tokens=_tokens(classifier)
        ),
        versions=_versions(),
        files={},
    )


def _shape(classifier: Classifier) -> tuple[int, ...]:
    if isinstance(classifier, ImageClassifier):
        return classifier.image_shape
    return (classifier.num_features,) if isinstance(classifier, TableClassifier) else ()


def _tokens(classifier: Classifier) -> int:
    return classifier.max_tokens if isinstance(classifier, TextClassifier) else 1


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # one of two onnxruntimes is installed
    return found


def _with_memory(stage: Path, manifest: Manifest, request: Request) -> Manifest:
    """Return the manifest with a memory model of each graph, and the limit."""
    longest = manifest.limits.max_tokens
    points = tuple(
        sorted({(b, max(1, longest // cut)) for b in (1, MICRO_BATCH) for cut in (4, 1)})
    )
    graphs = {}
    for precision in request.precisions:
        for role in ROLES:
            job = Job(folder=str(stage), role=role, precision=precision, points=points, repeats=2)
            graph = manifest.graphs[key(role, precision)]
            memory = memory_model(measure(job))
            graphs[key(role, precision)] = msgspec.structs.replace(graph, memory=memory)
    room = max(graph.memory.needed(MICRO_BATCH, longest) for graph in graphs.values())
    limits = Limits(
        memory_bytes=request.memory_bytes or room, max_records=MAX_RECORDS, max_tokens=longest
    )
    for graph in graphs.values():
        micro_batches([longest], graph.memory, limits)  # DeviceError: not even one record fits
    return msgspec.structs.replace(manifest, graphs=graphs, limits=limits)


def _list(stage: Path, manifest: Manifest) -> None:
    """Write manifest.json with size and SHA-256 of every other file."""
    paths = sorted(p for p in stage.iterdir() if p.name not in (names.MANIFEST, names.SIGNATURE))
    listed = msgspec.structs.replace(manifest, files={path.name: entry(path) for path in paths})
    data = msgspec.json.format(msgspec.json.encode(listed), indent=2)
    write_atomic(stage / names.MANIFEST, data + b"\n")
