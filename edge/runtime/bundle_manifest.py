"""manifest.json of a bundle: all that a device needs to know before it loads a byte.

    bundle/
      manifest.json   manifest.sig          this file; Ed25519 over its very bytes (trust.py)
      base-fp32.bin   base-int8.bin …       frozen weights, mapped by the graphs that name them
      train_step.fp32.onnx …                loss and gradients      (plain ONNX, engine "joint")
      train_step_dp.fp32.onnx …             clipped sums and norms
      infer.fp32.onnx  infer.int8.onnx …    logits
      training_model.onnx  eval_model.onnx  optimizer_model.onnx  checkpoint    "ort-training"
      adapter.bin  adapter.onnx_adapter     the released adapter: one frame; onnxruntime's format
      tokenizer.json                        texts only

All files lie in one folder: ONNX's external data may not leave the folder of its graph.
A file that the manifest does not list does not belong in the folder.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from anabranch.edge.runtime.manifest import Digest, File
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import (
    Column,
    Count,
    Name,
    Positive,
    Privacy,
    Share,
    TaskKind,
    Training,
)

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
ADAPTER = "adapter.bin"
ONNX_ADAPTER = "adapter.onnx_adapter"
TRAINING_MODEL, EVAL_MODEL = "training_model.onnx", "eval_model.onnx"
OPTIMIZER_MODEL, CHECKPOINT = "optimizer_model.onnx", "checkpoint"

Precision = Literal["fp32", "int8", "int4"]
Role = Literal["train_step", "train_step_dp", "infer"]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+\.[0-9]+\Z")]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Peak memory of one call with B records of T tokens, of the whole process, measured:

    fixed + B · (per_record + T · per_token + T² · per_pair)          images and tables: T = 1
    """

    fixed: Size
    per_record: Size = 0
    per_token: Size = 0
    per_pair: Size = 0

    def needed(self, records: int, tokens: int) -> int:
        """Return the bytes that a call needs."""
        each = self.per_record + tokens * self.per_token + tokens * tokens * self.per_pair
        return self.fixed + records * each


class Graph(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ONNX graph of the bundle."""

    file: FileName
    data: tuple[FileName, ...] = ()  # external data it maps
    onnxruntime: Version  # oldest that runs it
    memory: Memory


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What inference with one precision gave on held-out records, where the bundle was made."""

    records: Count
    accuracy: Annotated[float, msgspec.Meta(ge=0, le=1)]
    p50_ms: Positive  # one record, tokenization included, 1 thread
    p95_ms: Positive
    bytes: Size  # graph and weights


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device may use; checked before anything is allocated."""

    memory_bytes: Size  # of the process, in any call
    max_records: Count  # rows of one call; larger batches are cut into micro-batches
    max_tokens: Count  # 1 for images and tables


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a bundle's manifest.json."""

    kind: Literal["bundle"] = "bundle"
    format: Literal[1] = 1
    name: Name  # what it is for; versions of one name replace each other
    version: Count  # a device never goes back
    created: str  # UTC, ISO 8601
    task: TaskKind
    labels: tuple[str, ...]  # order = index of the logit
    columns: dict[str, Column] = {}  # of the run's data contract: how a file of records is read
    inputs: tuple[str, ...]  # model inputs, by name
    shape: tuple[Count, ...] = ()  # of one record: images (C, S, S), tables (F,); texts: ()
    spec: AdapterSpec
    adapter: Digest  # of the frame in adapter.bin
    config: Digest  # of the run's configuration
    training: Training  # how this adapter was trained: the device's defaults
    privacy: Privacy | None = None  # record-level privacy that training on a device must keep
    privacy_steps: Annotated[int, msgspec.Meta(ge=0)] = 0  # of the whole run, with privacy
    validation: Share = 0.2  # share of a device's records that personalisation is judged by
    graphs: dict[str, Graph]  # key(role, precision)
    artifacts: bool  # the onnxruntime-training files are there
    measured: dict[Precision, Measured]
    limits: Limits
    versions: dict[str, str]  # of what made it: anabranch, torch, onnx, onnxruntime
    files: dict[FileName, File]  # every other file, but for the signature

    def graph(self, role: Role, precision: Precision) -> Graph | None:
        """Return a graph, or None if the bundle has none of that precision."""
        return self.graphs.get(key(role, precision))


def key(role: Role, precision: Precision) -> str:
    """Return the key of a graph in the manifest: "train_step.int8"; its file is key + ".onnx"."""
    return f"{role}.{precision}"
