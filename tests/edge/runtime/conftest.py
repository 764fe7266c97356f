"""A tiny model written by hand in ONNX, as a bundle: one frozen layer with LoRA, and a head.

x       (B, F): a table's row, or the mean of a text's embeddings over its tokens
z = W x + s B A x,  h = max(z, 0),  logits = head.weight h + head.bias
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anabranch.edge.runtime.bundle_manifest import Graph, Limits, Manifest, Memory, key
from anabranch.edge.runtime.tokenizer import Characters, TokenizerData, WordPiece
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Training
from anabranch.protocols.wire import digest, encode

FEATURES, HIDDEN, RANK, LABELS = 6, 5, 2, ("bone", "heart", "other")
ALPHA = 4.0
A, B = "hidden.0.lora_A.weight", "hidden.0.lora_B.weight"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (*SPECIAL, "acute", "chronic", "fracture", "of", "femur", "heart", "failure", "infarction")
MEMORY = Memory(fixed=1 << 20, per_record=1000, per_token=100, per_pair=1)
LIMITS = Limits(memory_bytes=100 << 20, max_records=8, max_tokens=16)


@dataclass(frozen=True, eq=False)
class TinyBundle:
    """What the runtime uses of an opened bundle."""

    folder: Path
    manifest: Manifest
    digest: str
    adapter: Adapter
    tokenizer: WordPiece | None


def spec() -> AdapterSpec:
    return AdapterSpec(
        base="b" * 64,
        tokenizer="",
        rank=RANK,
        alpha=ALPHA,
        targets=("hidden.0",),
        tensors=(
            ("head.bias", (len(LABELS),)),
            ("head.weight", (len(LABELS), HIDDEN)),
            (A, (RANK, FEATURES)),
            (B, (HIDDEN, RANK)),
        ),
    )


def frozen() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(3)
    return {
        "W": rng.normal(size=(HIDDEN, FEATURES)).astype(np.float32),
        "E": rng.normal(size=(len(WORDS), FEATURES)).astype(np.float32),
        "eye": np.eye(len(LABELS), dtype=np.float32),
        "scale": np.array(ALPHA / RANK, np.float32),
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
        "axis1": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
    }


def tiny_adapter(seed: int = 1) -> Adapter:
    rng = np.random.default_rng(seed)
    arrays = {n: rng.normal(size=s, scale=0.3).astype(np.float32) for n, s in spec().tensors}
    return Adapter(spec(), arrays)


class _Nodes:
    def __init__(self) -> None:
        self.nodes: list[Any] = []

    def __call__(self, op: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def forward(self, kind: str) -> None:
        n = self
        if kind == "text":
            n("Cast", "attention_mask", out="mask", to=TensorProto.FLOAT)
            n("Unsqueeze", "mask", "axis2", out="mask2")
            n("Gather", "E", "input_ids", out="embedded")
            n("Mul", "embedded", "mask2", out="masked")
            n("ReduceSum", "masked", "axis1", out="summed", keepdims=0)
            n("ReduceSum", "mask", "axis1", out="tokens", keepdims=1)
            n("Div", "summed", "tokens", out="x")
        else:
            n("Identity", "features", out="x")
        n("Einsum", "x", A, out="xa", equation="bi,ri->br")
        n("Mul", "xa", "scale", out="sxa")
        n("Einsum", "sxa", B, out="low", equation="br,or->bo")
        n("Einsum", "x", "W", out="full", equation="bi,oi->bo")
        n("Add", "low", "full", out="z")
        n("Relu", "z", out="h")
        n("Einsum", "h", "head.weight", out="hw", equation="bi,oi->bo")
        n("Add", "hw", "head.bias", out="logits")

    def backward(self) -> None:
        """Leave per-record gradients of ℓ in d (logits) and dz, ds (B, rank)."""
        n = self
        n("LogSoftmax", "logits", out="logs", axis=1)
        n("Gather", "eye", "labels", out="hot")
        n("Mul", "logs", "hot", out="picked")
        n("ReduceSum", "picked", "axis1", out="negative", keepdims=0)
        n("Neg", "negative", out="losses")
        n("Exp", "logs", out="p")
        n("Sub", "p", "hot", out="d")
        n("Einsum", "d", "head.weight", out="dh", equation="bo,oi->bi")
        n("Greater", "z", "zero", out="above")
        n("Cast", "above", out="gate", to=TensorProto.FLOAT)
        n("Mul", "dh", "gate", out="dz")
        n("Mul", "dz", "scale", out="sdz")
        n("Einsum", "sdz", B, out="ds", equation="bo,or->br")


PER_RECORD = {  # name -> einsum over (upstream, input) that keeps the record
    "head.bias": ("d", None, "bo->bo"),
    "head.weight": ("d", "h", "bo,bi->boi"),
    A: ("ds", "x", "br,bi->bri"),
    B: ("sdz", "xa", "bo,br->bor"),
}


def _step(kind: str, *, clipped: bool) -> onnx.ModelProto:
    n = _Nodes()
    n.forward(kind)
    n.backward()
    squares = []
    for name, (up, other, equation) in PER_RECORD.items():
        operands = [up] if other is None else [up, other]
        n("Einsum", *operands, out=f"{name}.each", equation=equation)
        letters = equation.split("->")[1]
        each = f"{name}.each"
        n("Einsum", each, each, out=f"{name}.sq", equation=f"{letters},{letters}->b")
        squares.append(f"{name}.sq")
    factor = "weights"
    if clipped:
        n("Sum", *squares, out="squared")
        n("Sqrt", "squared", out="norms")
        n("Div", "clipping_norm", "norms", out="ratio")
        n("Min", "ratio", "one", out="bounded")
        factor = n("Mul", "bounded", "weights", out="factor")
    else:
        n("Mul", "losses", "weights", out="weighted")
        n("ReduceSum", "weighted", out="loss", keepdims=0)
    for name, (_, _, equation) in PER_RECORD.items():
        letters = equation.split("->")[1]
        out = f"{name}.grad"
        n("Einsum", factor, f"{name}.each", out=out, equation=f"b,{letters}->{letters[1:]}")
    inputs: list[Any] = [*_model_inputs(kind), ("labels", TensorProto.INT64, ["batch"])]
    inputs.append(("weights", TensorProto.FLOAT, ["batch"]))
    if clipped:
        inputs.append(("clipping_norm", TensorProto.FLOAT, []))
    inputs += [(name, TensorProto.FLOAT, list(shape)) for name, shape in spec().tensors]
    outputs = ["losses", "logits", "norms"] if clipped else ["loss", "losses", "logits"]
    return _model(n.nodes, inputs, [*outputs, *(f"{name}.grad" for name, _ in spec().tensors)])


def _model_inputs(kind: str) -> list[tuple[str, int, list[Any]]]:
    if kind == "text":
        return [
            (i, TensorProto.INT64, ["batch", "tokens"]) for i in ("input_ids", "attention_mask")
        ]
    return [("features", TensorProto.FLOAT, ["batch", FEATURES])]


def _infer(kind: str) -> onnx.ModelProto:
    n = _Nodes()
    n.forward(kind)
    inputs = _model_inputs(kind)
    inputs += [(name, TensorProto.FLOAT, list(shape)) for name, shape in spec().tensors]
    return _model(n.nodes, inputs, ["logits"], defaults=tiny_adapter().arrays)


def _model(nodes: Any, inputs: Any, outputs: Any, defaults: Any = None) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    constants = {name: a for name, a in frozen().items() if name in used} | dict(defaults or {})
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def tiny_tokenizer() -> WordPiece:
    characters = Characters(
        drop=(), blank=(), apart=(), decompose=False, marks=(), lower={}, split=(), punctuation=()
    )
    return WordPiece(
        TokenizerData(
            vocabulary=WORDS,
            unknown=1,
            first=2,
            last=3,
            padding=0,
            prefix="##",
            max_word=20,
            max_tokens=16,
            special=(),
            characters=characters,
        )
    )


def write_tiny(folder: Path, kind: str, **changes: Any) -> TinyBundle:
    """Write the graphs of one kind, text or table; `changes` go into the manifest."""
    folder.mkdir(parents=True)
    models = {
        "train_step": _step(kind, clipped=False),
        "train_step_dp": _step(kind, clipped=True),
        "infer": _infer(kind),
    }
    graphs = {}
    for role, model in models.items():
        name: Any = role
        for precision in ("fp32", "int8"):  # the same graph: what differs is how it is loaded
            file = f"{key(name, precision)}.onnx"
            onnx.save(
                model,
                folder / file,
                save_as_external_data=True,
                location=f"{file}.bin",
                size_threshold=64,
            )
            graphs[key(name, precision)] = Graph(
                file=file, data=(f"{file}.bin",), onnxruntime="1.19", memory=MEMORY
            )
    adapter = tiny_adapter()
    text = kind == "text"
    fields: dict[str, Any] = {
        "name": f"tiny-{kind}",
        "version": 1,
        "created": "2026-01-01T00:00:00Z",
        "task": f"{'text' if text else 'tabular'}-classification",
        "labels": LABELS,
        "inputs": ("input_ids", "attention_mask") if text else ("features",),
        "shape": () if text else (FEATURES,),
        "spec": spec(),
        "adapter": digest(encode(adapter)),
        "config": "c" * 64,
        "training": Training(learning_rate=0.02, batch_size=8, local_epochs=2),
        "graphs": graphs,
        "artifacts": False,
        "measured": {},
        "limits": LIMITS,
        "versions": {},
        "files": {},
    }
    manifest = Manifest(**(fields | changes))
    mark = digest(msgspec.json.encode(manifest))
    return TinyBundle(folder, manifest, mark, adapter, tiny_tokenizer() if text else None)


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function from a kind, text or table, and changes of the manifest to a bundle."""
    plain: dict[str, TinyBundle] = {}

    def make(kind: str, **changes: Any) -> TinyBundle:
        if kind not in plain:
            plain[kind] = write_tiny(tmp_path_factory.mktemp("tiny") / kind, kind)
        bundle = plain[kind]
        if not changes:
            return bundle
        manifest = msgspec.structs.replace(bundle.manifest, **changes)
        mark = digest(msgspec.json.encode(manifest))
        return TinyBundle(bundle.folder, manifest, mark, bundle.adapter, bundle.tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny_frozen() -> dict[str, NDArray[Any]]:
    """Return the frozen arrays of the tiny model."""
    return frozen()


@pytest.fixture(scope="session")
def make_records() -> Callable[..., Any]:
    """Return a function that makes n learnable records for a tiny bundle."""
    from anabranch.edge.runtime.data import Records

    def make(bundle: TinyBundle, n: int, seed: int = 0) -> Records:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, len(LABELS), n)
        identities = tuple(rng.bytes(32) for _ in range(n))
        names = bundle.manifest.inputs
        if bundle.tokenizer is None:
            centres = np.random.default_rng(9).normal(size=(len(LABELS), FEATURES))
            x = centres[labels] + rng.normal(size=(n, FEATURES), scale=0.5)
            return Records(names, x.astype(np.float32), labels, identities)
        words = [("acute", "fracture", "femur"), ("heart", "failure"), ("chronic", "of")]
        texts = [" ".join(rng.choice(words[y], size=rng.integers(1, 9))) for y in labels]
        ids = [np.array(bundle.tokenizer.encode(text), np.int64) for text in texts]
        return Records(names, ids, labels, identities, 0)

    return make
