"""Engine "ort-training": the bundle's artifacts in onnxruntime-training 1.19.2.

For boards and apps that pin this build. One call of the training graph gives the mean loss of
the batch it is fed and adds its gradient to a buffer, so:

    equal weights w            w · n · (mean over n records)            one call
    several weights            the same for the records of each         one call per weight
    clipped                    Σ w_i · min(1, C / ‖g_i‖₂) · g_i         one call per record

Rows of weight 0 are never computed. The parameters of the checkpoint are in alphabetical order
and those of the graph are not: tensors are only ever read and written by name, and copied,
because what onnxruntime returns changes with the next call.

The bindings are called directly: `import onnxruntime.training` would need onnx, and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime.bundle_manifest import CHECKPOINT, EVAL_MODEL, TRAINING_MODEL
from anabranch.edge.runtime.engine import Batch, Feeds, Floats, Gradients
from anabranch.edge.runtime.memory import cut, micro_batches, narrowed, records_of
from anabranch.protocols.adapter import checked
from anabranch.protocols.errors import BundleError, DataError, DeviceError
from anabranch.protocols.spec import AdapterSpec, Arrays

if TYPE_CHECKING:
    from anabranch.edge.runtime.bundle import Bundle

INSTALL = "pip install onnxruntime-training-cpu==1.19.2 in place of onnxruntime"
LABELS = "labels"
HEAD_BIAS = "head.bias"  # one value per label
FOLDING = "ConstantFolding;CommonSubexpressionElimination"  # would copy the mapped weights

Cut = Callable[[Feeds], Iterable[tuple[slice, Feeds]]]


class OrtTrainingEngine:
    """The artifacts in a folder with an adapter in them. Not safe for two threads.

    Raises DeviceError where onnxruntime is not its training build, BundleError when the artifacts
    cannot be loaded or are of another adapter, and IncompatibleAdapter for `arrays` that are not
    of `spec`. The files must have been verified before: they are given to native code.
    """

    def __init__(
        self,
        folder: Path,
        spec: AdapterSpec,
        arrays: Arrays,
        *,
        threads: int = 1,
        cut: Cut | None = None,
    ) -> None:
        """Load both graphs; `cut` says how a batch is divided (None: not at all)."""
        if threads < 1:
            raise ValueError(f"expected threads >= 1, got {threads}")
        self._spec = spec
        self._cut: Cut = cut or _whole
        self._params = checked(spec, arrays)
        self._state, self._module = _load(folder, threads)
        _require_parameters(self._state, spec, folder)
        self._inputs = _model_inputs(self._module, folder)
        self.set_params(arrays)

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 1, memory_bytes: int | None = None) -> Self:
        """Return an engine with the bundle's adapter, whose calls stay within its limits.

        What a call needs is taken from the plain fp32 graph, whose tensors are much the same.
        Raises BundleError if the bundle has no artifacts, DeviceError as memory.cut does, and
        what the constructor raises.
        """
        manifest = bundle.manifest
        graph = manifest.graph("train_step", "fp32")
        if not manifest.artifacts or graph is None:
            raise BundleError(
                f"bundle {manifest.name}: made without artifacts for onnxruntime-training; "
                'take engine "joint", or export it with them'
            )
        limits = narrowed(manifest.limits, memory_bytes)
        micro_batches([1], graph.memory, limits)
        divide = partial(cut, manifest, graph.memory, limits)
        arrays = bundle.adapter.arrays
        return cls(bundle.folder, manifest.spec, arrays, threads=threads, cut=divide)

    @property
    def spec(self) -> AdapterSpec:
        """Names and shapes of the adapter's tensors."""
        return self._spec

    def params(self) -> dict[str, Floats]:
        """Return copies of the adapter's tensors, read back from onnxruntime."""
        state = self._opened()[0]
        return {name: _copy(state.get_parameter(name).data) for name in self._spec.shapes}

    def set_params(self, arrays: Arrays) -> None:
        """Replace the adapter. Raises IncompatibleAdapter for other names, shapes or NaN.

        The adapter is then as it was.
        """
        import onnxruntime

        state = self._opened()[0]
        for name, array in checked(self._spec, arrays).items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            state.copy_parameter_from(name, value._ortvalue)

    def pieces(self, batch: Batch, *, clipped: bool = False) -> list[Batch]:
        """Return the micro-batches that `grads` runs, clipped or not, in the batch's order."""
        return [
            Batch(feeds, batch.labels[rows], batch.weights[rows])
            for rows, feeds in self._cut(batch.feeds)
        ]

    def grads(self, batch: Batch, *, clipping_norm: float | None = None) -> Gradients:
        """Return the (clipped, if a norm is given) sums for a batch; the adapter stays as it is.

        Without records of weight other than 0 the sums are zeros. Norms of records of weight 0
        are 0. Raises DataError for labels that the head does not have, and DeviceError when
        onnxruntime stops.
        """
        if clipping_norm is not None and not 0 < clipping_norm < np.inf:
            raise ValueError(f"expected a clipping norm above 0, got {clipping_norm}")
        self._require_labels(batch.labels)
        loss, norms = 0.0, np.zeros(0, np.float32)
        sums = {name: np.zeros(shape, np.float32) for name, shape in self._spec.tensors}
        for piece in self.pieces(batch):
            if clipping_norm is None:
                loss += self._add_mean(piece, sums)
                continue
            part, its_norms = self._add_clipped(piece, clipping_norm, sums)
            loss, norms = loss + part, np.concatenate([norms, its_norms])
        return Gradients(loss, sums, None if clipping_norm is None else norms)

    def predict(self, feeds: Feeds) -> Floats:
        """Return the logits (B, labels) under the current adapter, by the evaluation graph."""
        module = self._opened()[1]
        num_labels = self._num_labels()
        logits = np.empty((records_of(feeds), num_labels), np.float32)
        for rows, piece in self._cut(feeds):
            inputs = self._ordered(piece, np.zeros(rows.stop - rows.start, np.int64))
            logits[rows] = _run(module.eval_step, inputs)[1]
        return logits

    def close(self) -> None:
        """Give back the memory of both sessions; every later call raises ValueError."""
        self._module = None  # first: it points into the state
        self._state = None

    def _add_mean(self, batch: Batch, sums: dict[str, Floats]) -> float:
        """Add the batch's gradient to `sums`; return its loss. One call per distinct weight."""
        loss = 0.0
        for weight in np.unique(batch.weights[batch.weights != 0]):
            rows = np.flatnonzero(batch.weights == weight)
            factor = float(weight) * len(rows)
            loss += factor * self._step(batch, rows)
            for name, gradient in self._gradients().items():
                sums[name] += np.float32(factor) * gradient
        return loss

    def _add_clipped(
        self, batch: Batch, bound: float, sums: dict[str, Floats]
    ) -> tuple[float, Floats]:
        """Add the batch's clipped gradients to `sums`; return its loss and norms."""
        loss, norms = 0.0, np.zeros(len(batch), np.float32)
        for i in np.flatnonzero(batch.weights != 0):
            weight = float(batch.weights[i])
            loss += weight * self._step(batch, np.array([i]))
            gradients = self._gradients()
            squares = (np.sum(np.square(g, dtype=np.float64)) for g in gradients.values())
            norm = float(np.sqrt(sum(squares)))
            norms[i] = norm
            factor = weight * (bound / norm if norm > bound else 1.0)
            for name, gradient in gradients.items():
                sums[name] += np.float32(factor) * gradient
        return loss, norms

    def _step(self, batch: Batch, rows: NDArray[np.int64]) -> float:
        """Compute the gradient of the mean over `rows`; return that mean."""
        module = self._opened()[1]
        feeds = {name: array[rows] for name, array in batch.feeds.items()}
        inputs = self._ordered(feeds, batch.labels[rows])
        module.lazy_reset_grad()
        return float(_run(module.train_step, inputs)[0])

    def _gradients(self) -> dict[str, Floats]:
        """Return onnxruntime's own buffers by name: valid until the next step, not copied."""
        state = self._opened()[0]
        return {name: state.get_parameter(name).grad.numpy() for name in self._spec.shapes}

    def _ordered(self, feeds: Feeds, labels: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Return the inputs in the order of the graph."""
        if set(feeds) != set(self._inputs):
            expected, got = ", ".join(self._inputs), ", ".join(feeds)
            raise ValueError(f"expected the model's inputs {expected}, got {got}")
        inputs = [*(feeds[name] for name in self._inputs), labels.astype(np.int64, copy=False)]
        return [np.ascontiguousarray(one) for one in inputs]

    def _num_labels(self) -> int:
        return self._spec.shapes[HEAD_BIAS][0]

    def _require_labels(self, labels: NDArray[np.int64]) -> None:
        """Refuse labels that would be read beside the logits."""
        count = self._num_labels()
        wrong = labels[(labels < 0) | (labels >= count)]
        if len(wrong):
            raise DataError(f"label {wrong[0]}: expected 0 to {count - 1}, the index of a label")

    def _opened(self) -> tuple[Any, Any]:
        if self._module is None:
            raise ValueError("the engine is closed; open it again")
        return self._state, self._module


def bindings() -> Any:
    """Return onnxruntime's native module, or raise DeviceError if it cannot train."""
    try:
        import onnxruntime  # here, because the training build loads torch where it is installed
        from onnxruntime.capi import _pybind_state as native
    except ImportError as error:
        raise DeviceError(f"onnxruntime is not installed ({error}): {INSTALL}") from error
    if not hasattr(native, "load_checkpoint") or not hasattr(native, "Module"):
        raise DeviceError(
            f"onnxruntime {onnxruntime.__version__} is installed, which cannot train by itself: "
            f'{INSTALL} (x86-64 and macOS), or take engine "joint", which runs anywhere'
        )
    return native


def _load(folder: Path, threads: int) -> tuple[Any, Any]:
    """Return the checkpoint's state and the module around it, weights mapped from their file."""
    native = bindings()
    options = native.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal: an error is raised below
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("optimization.disable_specified_optimizers", FOLDING)
    device = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)
    training, evaluation = str(folder / TRAINING_MODEL), str(folder / EVAL_MODEL)
    try:
        state = native.load_checkpoint(str(folder / CHECKPOINT))
        return state, native.Module(training, state, evaluation, device, options)
    except Exception as error:
        raise BundleError(f"{folder}: onnxruntime cannot load the artifacts: {error}") from error


def _require_parameters(state: Any, spec: AdapterSpec, folder: Path) -> None:
    """Raise BundleError unless the checkpoint holds the adapter's tensors and nothing else."""
    found = {n: tuple(state.get_parameter(n).data.shape()) for n in state.parameter_names()}
    for name in sorted(found.keys() | spec.shapes.keys()):
        have, want = found.get(name, "absent"), spec.shapes.get(name, "absent")
        if have != want:
            raise BundleError(
                f"{folder / CHECKPOINT}: {name} has shape {have}, the bundle's adapter has {want}: "
                "the artifacts are of another adapter; export the bundle again"
            )


def _model_inputs(module: Any, folder: Path) -> tuple[str, ...]:
    """Return the names of the model's inputs in the order of both graphs, without the labels."""
    names, evaluated = (tuple(module.input_names(training)) for training in (True, False))
    if names != evaluated or names[-1:] != (LABELS,) or len(names) < 2:
        raise BundleError(
            f"{folder / TRAINING_MODEL}: inputs {', '.join(names)} (evaluation: "
            f"{', '.join(evaluated)}); expected the model's inputs and then {LABELS} in both"
        )
    return names[:-1]


def _run(step: Callable[..., None], inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return [loss, logits], or raise DeviceError, which shows nothing of the inputs."""
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

    outputs = OrtValueVector()
    try:
        step(inputs, outputs)
    except Exception as error:  # noqa: BLE001 -- onnxruntime's share no base; theirs quote inputs
        raise DeviceError(
            f"onnxruntime-training stopped ({type(error).__name__}); the inputs are not what the "
            "graph takes, or memory ran out"
        ) from None
    return [outputs[i].numpy() for i in range(2)]


def _copy(value: Any) -> Floats:
    return np.array(value.numpy(), np.float32)


def _whole(feeds: Feeds) -> Iterable[tuple[slice, Feeds]]:
    """Return the batch in one piece; a batch without records in none."""
    count = records_of(feeds)
    return [(slice(0, count), feeds)] if count else []
