"""Engine "joint": a bundle's plain ONNX graphs in any onnxruntime; no torch, no training build.

    role            inputs                                      outputs
    train_step      model inputs, labels, weights, adapter      loss, losses, logits, <name>.grad
    train_step_dp   with clipping_norm before the adapter       losses, logits, norms, <name>.grad
    infer           model inputs; the adapter may be fed        logits

Memory is bounded before anything is allocated (memory.py). One session is loaded at a time.
Weights are external data, mapped from their file:

    training, fp32    no prepacking, no ConstantFolding and CommonSubexpressionElimination:
                      weights stay as the file has them, and only touched pages count
    all others        onnxruntime's defaults

The arena stays on: it is a quarter faster than malloc, and smaller. Buffers are not planned ahead
(memory pattern): the plan of a shape would lie beside what its first call took.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime.bundle_manifest import Graph, Manifest, Precision, Role, key
from anabranch.edge.runtime.engine import Batch, Engine, EngineName, Feeds, Floats, Gradients
from anabranch.edge.runtime.memory import cut, micro_batches, narrowed, records_of
from anabranch.protocols.adapter import Adapter, checked
from anabranch.protocols.errors import BundleError, DeviceError
from anabranch.protocols.spec import AdapterSpec, Arrays

if TYPE_CHECKING:
    import onnxruntime

    from anabranch.edge.runtime.bundle import Bundle

FOLDING = "ConstantFolding;CommonSubexpressionElimination"


def open_engine(
    bundle: Bundle,
    *,
    engine: EngineName = "joint",
    precision: Precision = "fp32",
    threads: int = 1,
    memory_bytes: int | None = None,
) -> Engine:
    """Return an engine with the bundle's released adapter in it; nothing large is loaded yet.

    `memory_bytes` narrows the manifest's limit of the process's memory. Raises BundleError if
    the bundle has no graphs for this engine and precision, DeviceError if not even one record
    of one token can fit.
    """
    if engine == "joint":
        return JointEngine(
            bundle.folder,
            bundle.manifest,
            bundle.adapter,
            precision=precision,
            threads=threads,
            memory_bytes=memory_bytes,
        )
    if precision != "fp32":
        raise BundleError(f"engine {engine} trains over fp32 alone, got precision {precision}")
    from anabranch.edge.runtime.ort_training import OrtTrainingEngine

    return OrtTrainingEngine.open(bundle, threads=threads, memory_bytes=memory_bytes)


class JointEngine:
    """The bundle's training step with an adapter in it. Not safe for two threads.

    Raises BundleError if the bundle has no training step of `precision`, DeviceError if a call
    with one record of one token needs more than the limit.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        adapter: Adapter,
        *,
        precision: Precision = "fp32",
        threads: int = 1,
        memory_bytes: int | None = None,
    ) -> None:
        if threads < 1:
            raise ValueError(f"expected threads >= 1, got {threads}")
        self.limits = narrowed(manifest.limits, memory_bytes)
        self._folder, self._manifest = folder, manifest
        self._precision: Precision = precision
        self._threads = threads
        self._params = checked(manifest.spec, adapter.arrays)
        self._loaded: tuple[Role, onnxruntime.InferenceSession] | None = None
        micro_batches([1], self._graph("train_step").memory, self.limits)

    @property
    def spec(self) -> AdapterSpec:
        """Names and shapes of the adapter's tensors."""
        return self._manifest.spec

    def params(self) -> dict[str, Floats]:
        """Return copies of the adapter's tensors."""
        return {name: array.copy() for name, array in self._params.items()}

    def set_params(self, arrays: Arrays) -> None:
        """Replace the adapter. Raises IncompatibleAdapter for other names, shapes or NaN."""
        self._params = {name: a.copy() for name, a in checked(self.spec, arrays).items()}

    def pieces(self, batch: Batch, *, clipped: bool = False) -> list[Batch]:
        """Return the micro-batches that `grads` would run, in the order of the batch.

        Texts lose the columns that only pad other micro-batches. Raises DeviceError, with
        nothing allocated, if one record by itself needs more memory than there is.
        """
        graph = self._graph("train_step_dp" if clipped else "train_step")
        return [
            Batch(feeds, batch.labels[rows], batch.weights[rows])
            for rows, feeds in cut(self._manifest, graph.memory, self.limits, batch.feeds)
        ]

    def grads(self, batch: Batch, *, clipping_norm: float | None = None) -> Gradients:
        """Return the (clipped, if a norm is given) sums for a batch; the adapter stays as it is.

        Micro-batches are added in their order. A batch without records gives zeros.
        """
        if clipping_norm is not None and not 0 < clipping_norm < np.inf:
            raise ValueError(f"expected a clipping norm above 0, got {clipping_norm}")
        pieces = self.pieces(batch, clipped=clipping_norm is not None)
        summed = total(self.spec, (self._one(piece, clipping_norm) for piece in pieces))
        if clipping_norm is not None and not pieces:
            return replace(summed, norms=np.zeros(0, np.float32))
        return summed

    def predict(self, feeds: Feeds) -> Floats:
        """Return the logits (B, labels) under the current adapter.

        The infer graph of this precision computes them or, where the bundle has none, the
        training step. Raises DeviceError as `grads` does.
        """
        role: Role = "train_step" if self._manifest.graph("infer", self._precision) is None else (
            "infer"
        )  # fmt: skip
        memory = self._graph(role).memory
        logits = np.empty((records_of(feeds), len(self._manifest.labels)), np.float32)
        for rows, piece in cut(self._manifest, memory, self.limits, feeds):
            more: dict[str, NDArray[Any]] = {}
            if role == "train_step":
                count = rows.stop - rows.start
                more = {"labels": np.zeros(count, np.int64), "weights": np.zeros(count, np.float32)}
            (logits[rows],) = self._run(role, ["logits"], {**piece, **more, **self._params})
        return logits

    def close(self) -> None:
        """Give back the memory of sessions; the next call loads what it needs again."""
        self._loaded = None

    def _one(self, batch: Batch, clipping_norm: float | None) -> Gradients:
        feeds = {**batch.feeds, "labels": batch.labels, "weights": batch.weights, **self._params}
        names = [name for name, _ in self.spec.tensors]
        gradients = [f"{name}.grad" for name in names]
        if clipping_norm is None:
            loss, *arrays = self._run("train_step", ["loss", *gradients], feeds)
            return Gradients(float(loss), dict(zip(names, arrays, strict=True)))
        feeds["clipping_norm"] = np.array(clipping_norm, np.float32)
        outputs = self._run("train_step_dp", ["losses", "norms", *gradients], feeds)
        losses, norms, *arrays = outputs
        summed = float(np.sum(batch.weights * losses, dtype=np.float64))
        return Gradients(summed, dict(zip(names, arrays, strict=True)), norms)

    def _graph(self, role: Role) -> Graph:
        graph = self._manifest.graph(role, self._precision)
        if graph is None:
            have = ", ".join(sorted(self._manifest.graphs)) or "none"
            raise BundleError(
                f"bundle {self._manifest.name}: has no graph {key(role, self._precision)} "
                f"(it has {have}); choose another precision or engine"
            )
        return graph

    def _run(self, role: Role, outputs: list[str], feeds: Feeds) -> list[NDArray[Any]]:
        graph = self._graph(role)
        if self._loaded is None or self._loaded[0] != role:
            self._loaded = None  # first give back the memory of the other one
            precision = None if role == "infer" else self._precision
            session = load(self._folder, graph, threads=self._threads, training=precision)
            require_inputs(session, graph, feeds)
            self._loaded = role, session
        return run(self._loaded[1], graph, outputs, feeds)


def total(spec: AdapterSpec, parts: Iterable[Gradients]) -> Gradients:
    """Return the sum of micro-batches, added in their order; zeros without any."""
    loss, norms = 0.0, []
    arrays = {name: np.zeros(shape, np.float32) for name, shape in spec.tensors}
    for one in parts:
        loss += one.loss
        for name, array in arrays.items():
            array += one.arrays[name]
        if one.norms is not None:
            norms.append(one.norms)
    return Gradients(loss, arrays, np.concatenate(norms) if norms else None)


def load(
    folder: Path, graph: Graph, *, threads: int, training: Precision | None = None
) -> onnxruntime.InferenceSession:
    """Return a session on the CPU with weights mapped from their file.

    `training` is the precision of a training step, None for inference. Raises DeviceError if
    this onnxruntime is older than the graph needs, BundleError if it cannot load the graph.
    """
    import onnxruntime  # here, because its training build loads torch where torch is installed

    have, need = onnxruntime.__version__, graph.onnxruntime
    if _version(have) < _version(need):
        raise DeviceError(
            f"{graph.file} needs onnxruntime {need} or newer, this is {have}: update it, or "
            "take another precision"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal: an error is raised below
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if training == "fp32":
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("optimization.disable_specified_optimizers", FOLDING)
    path = str(folder / graph.file)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(f"{path}: onnxruntime {have} cannot load it: {error}") from error


def run(
    session: onnxruntime.InferenceSession, graph: Graph, outputs: list[str], feeds: Feeds
) -> list[NDArray[Any]]:
    """Return outputs, or raise DeviceError, which shows nothing of the inputs."""
    try:
        result: list[NDArray[Any]] = session.run(outputs, dict(feeds))
        return result
    except Exception as error:  # noqa: BLE001 -- onnxruntime's share no base; theirs quote inputs
        raise DeviceError(
            f"{graph.file}: onnxruntime stopped ({type(error).__name__}); the inputs are not "
            "what the graph takes, or memory ran out"
        ) from None


def require_inputs(session: onnxruntime.InferenceSession, graph: Graph, feeds: Feeds) -> None:
    """Raise BundleError unless the graph takes exactly what it will be fed."""
    required = {one.name for one in session.get_inputs()}
    allowed = required | {one.name for one in session.get_overridable_initializers()}
    if not required <= set(feeds) <= allowed:
        wrong = sorted((required - set(feeds)) | (set(feeds) - allowed))
        raise BundleError(f"{graph.file}: inputs {', '.join(wrong)} are not as the format says")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
