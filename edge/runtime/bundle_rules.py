"""What a manifest must say to be the manifest of a bundle, and its graphs to be its graphs.

Everything here is plain consistency: no file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from anabranch.edge.runtime import bundle_manifest as names
from anabranch.edge.runtime.bundle_manifest import Manifest, Precision, Role, key
from anabranch.edge.runtime.manifest import TOKENIZER
from anabranch.edge.runtime.onnx_info import GraphInfo, Value
from anabranch.edge.runtime.onnx_schema import FLOAT, INT64
from anabranch.protocols.errors import BundleError
from anabranch.protocols.spec import Shape, shown

ARTIFACTS = (names.TRAINING_MODEL, names.EVAL_MODEL, names.OPTIMIZER_MODEL, names.CHECKPOINT)
ROLES: tuple[Role, ...] = get_args(Role)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
KEYS = {key(role, precision): (role, precision) for role in ROLES for precision in PRECISIONS}
TEXTS = "text-classification"
AXES = {TEXTS: 0, "image-classification": 3, "tabular-classification": 1}  # of `shape`


def require_consistent(manifest: Manifest) -> None:
    """Raise BundleError, naming the rule, unless the manifest agrees with itself."""
    _require_task(manifest)
    _require_files(manifest)
    _require_graphs(manifest)


def precisions(manifest: Manifest, role: Role) -> tuple[Precision, ...]:
    """Return the precisions in which the bundle has graphs of a role."""
    return tuple(p for p in PRECISIONS if manifest.graph(role, p) is not None)


def data_files(manifest: Manifest, file: str) -> dict[str, int]:
    """Return the files, with their sizes, that an ONNX model of the bundle may map."""
    for graph in manifest.graphs.values():
        if graph.file == file:
            return {name: manifest.files[name].bytes for name in graph.data}
    weights = {name for graph in manifest.graphs.values() for name in graph.data}
    return {name: manifest.files[name].bytes for name in sorted(weights)}


def require_signature(manifest: Manifest, role: Role, info: GraphInfo) -> None:
    """Raise BundleError unless a graph takes and gives what its role says (engine "joint")."""
    adapter = manifest.spec.shapes
    _require_fed(manifest, role, info)
    for name, shape in adapter.items():
        _require_adapter_input(name, shape, {v.name: v for v in info.inputs}, info, role)
    gradients = {f"{name}.grad" for name in adapter}
    expected = {
        "train_step": {"loss", "losses", "logits"} | gradients,
        "train_step_dp": {"losses", "logits", "norms"} | gradients,
        "infer": {"logits"},
    }[role]
    got = {value.name for value in info.outputs}
    if got != expected:
        first = sorted(got ^ expected)[0]
        raise BundleError(f"outputs: {shown(first)} is missing, or not one of a {role} graph")
    (logits,) = (value for value in info.outputs if value.name == "logits")
    wide = (None, len(manifest.labels))
    if (logits.type, logits.dims) != (FLOAT, wide):
        raise BundleError(
            f"output logits: expected float32 {wide}, a logit for each label, got type "
            f"{logits.type} {logits.dims}"
        )


def _require_task(manifest: Manifest) -> None:
    texts = manifest.task == TEXTS
    if len(manifest.labels) < 2 or len(set(manifest.labels)) != len(manifest.labels):
        raise BundleError("labels: expected at least two different ones")
    if len(manifest.shape) != AXES[manifest.task]:
        raise BundleError(f"shape: {manifest.shape} is none of a record for {manifest.task}")
    if len(manifest.inputs) != (2 if texts else 1) or len(set(manifest.inputs)) != (1 + texts):
        raise BundleError(f"inputs: {shown(str(manifest.inputs))} are none for {manifest.task}")
    if bool(manifest.spec.tokenizer) != texts or (TOKENIZER in manifest.files) != texts:
        raise BundleError(f"tokenizer: {'expected' if texts else 'not expected'} for this task")


def _require_files(manifest: Manifest) -> None:
    listed = manifest.files
    for name in (names.MANIFEST, names.SIGNATURE):
        if name in listed:
            raise BundleError(f"files: {name} cannot be listed in itself")
    folded = [name.casefold() for name in (*listed, names.MANIFEST, names.SIGNATURE)]
    if len(set(folded)) != len(folded):
        raise BundleError("files: two names differ by case alone; not every device can hold both")
    if names.ADAPTER not in listed or listed[names.ADAPTER].sha256 != manifest.adapter:
        raise BundleError(f"adapter: {names.ADAPTER} is not listed with the manifest's digest")
    present = [name in listed for name in ARTIFACTS]
    if any(there != manifest.artifacts for there in present):
        how_many = "all" if manifest.artifacts else "none"
        raise BundleError(f"artifacts: expected {how_many} of {', '.join(ARTIFACTS)}")


def _require_graphs(manifest: Manifest) -> None:
    for name, graph in manifest.graphs.items():
        if name not in KEYS or graph.file != f"{name}.onnx":
            raise BundleError(f"graphs: {shown(name)} in {graph.file}: expected <role>.<precision>")
        for file in (graph.file, *graph.data):
            if file not in manifest.files:
                raise BundleError(f"graphs: {name} needs {file}, which is not listed")
        if any(file.endswith(".onnx") or file in _NO_DATA for file in graph.data):
            raise BundleError(f"graphs: {name} maps {graph.data}, expected files of weights")
    for name in manifest.files:
        known = name in ARTIFACTS or any(g.file == name for g in manifest.graphs.values())
        if name.endswith(".onnx") and not known:
            raise BundleError(f"graphs: {name} is listed, but no graph of this bundle")
    steps, infer = precisions(manifest, "train_step"), precisions(manifest, "infer")
    if not steps or not infer:
        raise BundleError("graphs: expected at least one train_step and one infer")
    if manifest.privacy is not None and steps != precisions(manifest, "train_step_dp"):
        raise BundleError("graphs: privacy is promised, but a train_step has no train_step_dp")
    if set(manifest.measured) != set(infer):
        raise BundleError(
            f"measured: {sorted(manifest.measured)}, but infer graphs are {sorted(infer)}"
        )


def _require_fed(manifest: Manifest, role: Role, info: GraphInfo) -> None:
    """Refuse a graph with other inputs than the records, what a step adds, and the adapter."""
    kind = INT64 if manifest.task == TEXTS else FLOAT
    rest = (None, *manifest.shape) if manifest.shape else (None, None)
    expected: dict[str, tuple[int, tuple[int | None, ...]]]
    expected = dict.fromkeys(manifest.inputs, (kind, rest))
    if role != "infer":
        expected |= {"labels": (INT64, (None,)), "weights": (FLOAT, (None,))}
    if role == "train_step_dp":
        expected["clipping_norm"] = (FLOAT, ())
    got = {v.name: (v.type, v.dims) for v in info.inputs if v.name not in manifest.spec.shapes}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise BundleError(
                f"input {shown(name)}: expected type and shape {expected.get(name, 'absent')}, "
                f"got {got.get(name, 'absent')}"
            )


def _require_adapter_input(
    name: str, shape: Shape, inputs: Mapping[str, Value], info: GraphInfo, role: Role
) -> None:
    value, default = inputs.get(name), info.initializers.get(name)
    if value is None or value.type != FLOAT or value.dims != shape:
        raise BundleError(f"input {name}: expected float32 {shape} of the adapter")
    if role == "infer" and (default is None or default.type != FLOAT or default.dims != shape):
        raise BundleError(f"initializer {name}: expected float32 {shape}, the released adapter")
    if role != "infer" and default is not None:
        raise BundleError(f"initializer {name}: a training step has no default for the adapter")


_NO_DATA = frozenset(
    {
        names.MANIFEST,
        names.SIGNATURE,
        names.ADAPTER,
        names.ONNX_ADAPTER,
        names.CHECKPOINT,
        TOKENIZER,
    }
)
