"""Open a release and classify: numpy and onnxruntime, no torch.

    model = Model.open(Path("runs/x/release"))
    model.classify(["Acute myocardial infarction"])   ->   [("Circulatory", 0.97)]

Memory is bounded whatever the number of inputs: a window of them is sorted by length and cut
into batches of at most BATCH_TOKENS padded tokens (or BATCH_VALUES pixels or features).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime.manifest import (
    FP32,
    INT8,
    TOKENIZER,
    Manifest,
    read_manifest,
    read_verified,
    verify,
)
from anabranch.edge.runtime.tokenizer import WordPiece, parse
from anabranch.protocols.errors import DataError, ReleaseError

if TYPE_CHECKING:
    import onnxruntime

WINDOW = 1024  # inputs sorted together
BATCH_TOKENS = 2048  # attention of 12 heads at 512 tokens: 50 MB
BATCH_VALUES = 1 << 18  # 1 MB of float32 per batch
Precision = Literal["int8", "fp32"]
FILES: dict[Precision, str] = {"int8": INT8, "fp32": FP32}
Floats = NDArray[np.float32]
Inputs = Sequence[str] | Floats


@dataclass(frozen=True, eq=False)
class Model:
    """An opened release."""

    manifest: Manifest
    session: onnxruntime.InferenceSession
    tokenizer: WordPiece | None  # texts only

    @classmethod
    def open(cls, folder: Path, *, precision: Precision = "int8", threads: int = 1) -> Model:
        """Verify the release in `folder` and load its model.

        Raises ReleaseError when a file is missing or changed, when the release has no model of
        this precision, or when onnxruntime cannot load it.
        """
        if threads < 1:
            raise ValueError(f"expected threads >= 1, got {threads}")
        if precision not in FILES:
            raise ReleaseError(f"precision {precision!r}: expected int8 or fp32")
        manifest = read_manifest(folder)
        verify(folder, manifest)
        name = FILES[precision]
        if name not in manifest.files:
            raise ReleaseError(
                f"{folder}: this release has no {precision} model: it was refused when the "
                "release was made, see README.md; take the other precision"
            )
        session = load_session(read_verified(folder, manifest, name), threads=threads)
        tokenizer = None
        if manifest.task == "text-classification":
            tokenizer = WordPiece(parse(read_verified(folder, manifest, TOKENIZER)))
        return cls(manifest, session, tokenizer)

    def classify(self, inputs: Inputs) -> list[tuple[str, float]]:
        """Return (most probable label, its probability) for every input."""
        return [best for (best,) in self.ranked(inputs, top=1)]

    def ranked(self, inputs: Inputs, *, top: int | None = None) -> list[list[tuple[str, float]]]:
        """Return the `top` labels (all, if None) of every input, the most probable first."""
        return rank(self.logits(inputs), self.manifest.labels, top)

    def logits(self, inputs: Inputs) -> Floats:
        """Return logits (n, labels) for texts, images (n, C, S, S) or table rows (n, F).

        Raises DataError when the inputs are not what this model takes.
        """
        result = np.empty((len(inputs), len(self.manifest.labels)), np.float32)
        shape = tuple(self.session.get_inputs()[0].shape[1:])
        for rows, feeds in batches(inputs, self.manifest.inputs, shape, self.tokenizer):
            (result[rows],) = self.session.run(["logits"], feeds)
        return result


def rank(
    logits: Floats, labels: Sequence[str], top: int | None = None
) -> list[list[tuple[str, float]]]:
    """Return the `top` (label, probability) of every row of logits (n, k), best first."""
    z = logits.astype(np.float64)
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return [
        [(labels[k], float(p[k])) for k in best]
        for best, p in zip(order, probabilities, strict=True)
    ]


def batches(
    inputs: Inputs, names: Sequence[str], shape: tuple[int, ...], tokenizer: WordPiece | None
) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
    """Yield (rows, model inputs) of bounded batches of texts, or of arrays (n, *shape).

    Raises DataError when the inputs are not what the model takes.
    """
    if tokenizer is None:
        yield from _array_batches(inputs, names[0], shape)
        return
    if isinstance(inputs, str | np.ndarray) or not all(isinstance(t, str) for t in inputs):
        raise DataError("this model classifies texts: expected a list of str")
    ids, mask = names
    for start in range(0, len(inputs), WINDOW):
        encoded = [tokenizer.encode(text) for text in inputs[start : start + WINDOW]]
        for rows in by_length([len(one) for one in encoded]):
            batch = tokenizer.batch([encoded[i] for i in rows])
            yield rows + start, {ids: batch[0], mask: batch[1]}


def _array_batches(
    inputs: Inputs, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
    array = np.asarray(inputs)
    if array.shape[1:] != shape or array.dtype.kind != "f" or array.ndim != len(shape) + 1:
        raise DataError(
            f"this model takes float32 inputs of shape (n, {', '.join(map(str, shape))}), got "
            f"{array.dtype} of shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise DataError("inputs hold NaN or infinite values")
    size = max(1, BATCH_VALUES // max(1, int(np.prod(shape))))
    for start in range(0, len(array), size):
        rows = np.arange(start, min(start + size, len(array)))
        yield rows, {name: array[rows].astype(np.float32, copy=False)}


def load_session(model: bytes, *, threads: int) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session on the CPU, or raise ReleaseError."""
    import onnxruntime  # here, because its training build loads torch where torch is installed

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ReleaseError(
            f"onnxruntime {onnxruntime.__version__} cannot load the model: {error}"
        ) from error


def by_length(lengths: Sequence[int]) -> Iterator[NDArray[np.int64]]:
    """Yield rows of batches of at most BATCH_TOKENS padded tokens, shortest first."""
    order = np.argsort(lengths, kind="stable").astype(np.int64)
    start = 0
    for end in range(1, len(order) + 1):
        full = end == len(order) or (end + 1 - start) * lengths[order[end]] > BATCH_TOKENS
        if full:
            yield order[start:end]
            start = end
