"""One self-contained ONNX file of a personalised model: for apps that know nothing of bundles.

    bundle:  infer.int8.onnx ──maps──► base-int8.bin      adapter tensors: inputs with defaults
    target:  the same nodes, the base's bytes within, the personalised adapter as constants;
             inputs are the model's alone, output is logits

The file is written by copying spans of the graph and of the weights' file, so memory does not
grow with the model, and no onnx package is needed. It is kept only if onnxruntime computes with
it what the bundle's own graph computes with the adapter fed to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime import onnx_schema as schema
from anabranch.edge.runtime.bundle import MAX_GRAPH, Bundle, graph_info, mapped
from anabranch.edge.runtime.bundle_manifest import Precision
from anabranch.edge.runtime.onnx_info import GraphInfo, Tensor
from anabranch.edge.runtime.protobuf import (
    BYTES,
    VARINT,
    Data,
    encode_bytes,
    encode_varint,
    fields,
    tag,
)
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import BundleError, DeviceError
from anabranch.protocols.spec import require_same_spec
from anabranch.storage.files import writing

CHUNK = 1 << 20
MAX_MODEL = (1 << 31) - 1  # bytes: protobuf has no larger messages
RECORDS, TOKENS = 3, 12  # of the comparison
# Largest difference of a logit, relative to the largest logit or 1. The quantized graphs round
# activations, where a last bit can move a value to the next step.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "int8": 2e-2, "int4": 2e-2}


class _Span(NamedTuple):
    """Bytes that are copied from a file."""

    path: Path
    offset: int
    length: int


_Part = bytes | _Span


def export_model(bundle: Bundle, adapter: Adapter, target: Path, precision: Precision) -> Path:
    """Write inference in `precision` with `adapter` inside to the ONNX file `target`; return it.

    The file is there whole or not at all; an older one is replaced.

    Raises:
        IncompatibleAdapter: the adapter is not of the bundle's spec.
        BundleError: the bundle has no such graph, or the file would not compute what it computes.
        DeviceError: the disk is full, or memory ran out while comparing.
    """
    require_same_spec(bundle.manifest.spec, adapter.spec)
    path = bundle.graph_path("infer", precision)
    info = graph_info(bundle, "infer", precision)
    with mapped(path, MAX_GRAPH) as data:
        parts = list(_model(data, path, info, adapter))
    total = _length(parts)
    if total > MAX_MODEL:
        raise BundleError(
            f"{target}: would have {total} bytes, an ONNX file can have {MAX_MODEL}; use the "
            "bundle with its adapter, or a smaller precision"
        )
    try:
        with writing(target) as file:
            for part in parts:
                _write(file, part)
            file.flush()
            _require_same_logits(bundle, adapter, Path(file.name), precision)
    except OSError as error:
        raise DeviceError(f"{target}: cannot be written ({error.strerror})") from None
    return target


def _model(data: Data, path: Path, info: GraphInfo, adapter: Adapter) -> Iterator[_Part]:
    """Yield the new model: everything as it is, but for its graph."""
    graph = list(_graph(data, path, info, adapter))
    for field in fields(data, 0, len(data), "model"):
        if (field.at, field.end) == info.span:
            yield tag(field.number, BYTES) + encode_varint(_length(graph))
            yield from graph
        else:
            yield _Span(path, field.at, field.end - field.at)


def _graph(data: Data, path: Path, info: GraphInfo, adapter: Adapter) -> Iterator[_Part]:
    """Yield the new graph: no adapter inputs, its values as constants, all bytes within."""
    dropped = {value.span for value in info.inputs if value.name in adapter.arrays}
    tensors = {tensor.span: tensor for tensor in info.initializers.values()}
    for field in fields(data, *info.body, "graph"):
        span = (field.at, field.end)
        tensor = tensors.get(span)
        if span in dropped:
            continue
        if tensor is not None and tensor.name in adapter.arrays:
            yield _constant(tensor.name, adapter.arrays[tensor.name])
        elif tensor is not None and tensor.file is not None:
            yield from _embedded(tensor, path.parent / tensor.file)
        else:
            yield _Span(path, field.at, field.end - field.at)


def _constant(name: str, array: NDArray[np.float32]) -> bytes:
    raw = np.ascontiguousarray(array, "<f4").tobytes()
    body = _about(name, schema.FLOAT, array.shape) + encode_bytes(schema.TENSOR_RAW_DATA, raw)
    return encode_bytes(schema.GRAPH_INITIALIZER, body)


def _embedded(tensor: Tensor, file: Path) -> Iterator[_Part]:
    """Yield an initializer whose external bytes become its raw_data."""
    about = _about(tensor.name, tensor.type, tensor.dims)
    about += tag(schema.TENSOR_RAW_DATA, BYTES) + encode_varint(tensor.bytes)
    length = len(about) + tensor.bytes
    yield tag(schema.GRAPH_INITIALIZER, BYTES) + encode_varint(length) + about
    yield _Span(file, tensor.offset, tensor.bytes)


def _about(name: str, kind: int, dims: tuple[int, ...]) -> bytes:
    """Return dims, data type and name of a TensorProto."""
    shape = b"".join(tag(schema.TENSOR_DIMS, VARINT) + encode_varint(size) for size in dims)
    type_ = tag(schema.TENSOR_DATA_TYPE, VARINT) + encode_varint(kind)
    return shape + type_ + encode_bytes(schema.TENSOR_NAME, name.encode())


def _length(parts: list[_Part]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part.length for part in parts)


def _write(out: BinaryIO, part: _Part) -> None:
    if isinstance(part, bytes):
        out.write(part)
        return
    with part.path.open("rb") as file:
        file.seek(part.offset)
        left = part.length
        while left:
            chunk = file.read(min(left, CHUNK))
            if not chunk:
                raise BundleError(f"{part.path}: is shorter than when the bundle was opened")
            out.write(chunk)
            left -= len(chunk)


def _require_same_logits(
    bundle: Bundle, adapter: Adapter, path: Path, precision: Precision
) -> None:
    """Refuse the file unless it computes what the bundle's graph computes with this adapter."""
    feeds = _made_up(bundle)
    got = _logits(path, feeds)
    expected = _logits(bundle.graph_path("infer", precision), feeds | dict(adapter.arrays))
    scale = max(1.0, float(np.abs(expected).max()))
    largest = float(np.abs(got - expected).max()) if got.shape == expected.shape else np.inf
    if not largest <= TOLERANCE[precision] * scale:
        raise BundleError(
            f"{path.name}: logits differ by {largest:.3g} from the bundle's in {precision}, at "
            f"most {TOLERANCE[precision] * scale:.3g} is allowed; nothing was written"
        )


def _logits(path: Path, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Return the logits of one call, with the nodes as they are written in the file."""
    import onnxruntime  # here, because its training build loads torch where torch is installed

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal: an error is raised below
    options.enable_cpu_mem_arena = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        result: NDArray[np.float32] = session.run(["logits"], feeds)[0]
    except Exception as error:
        version = onnxruntime.__version__
        raise BundleError(f"{path.name}: onnxruntime {version} cannot run it: {error}") from error
    return result


def _made_up(bundle: Bundle, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return records to compare on; of texts, the last one is padded."""
    manifest, rng = bundle.manifest, np.random.default_rng(seed)
    if bundle.tokenizer is None:
        values = rng.standard_normal((RECORDS, *manifest.shape)).astype(np.float32)
        return {manifest.inputs[0]: values}
    length = min(TOKENS, manifest.limits.max_tokens)
    ids = rng.integers(0, len(bundle.tokenizer.data.vocabulary), (RECORDS, length))
    mask = np.ones(ids.shape, np.int64)
    mask[-1, 1 + length // 2 :] = 0
    return dict(zip(manifest.inputs, (ids, mask), strict=True))
