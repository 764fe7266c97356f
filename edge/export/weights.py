"""Frozen weights in one file that several graphs map: a base's bytes are stored once.

    base-int8.bin     tensors of 4096 bytes and more, each at a multiple of 4096: a page
                      then smaller ones, each at a multiple of 64
    <key>.onnx        nodes, small constants and the adapter's defaults

A tensor is known by its bytes alone, so graphs also share what they read as other types: a
4-bit weight is uint4 (rows, columns) to DequantizeLinear and uint8 to MatMulNBits. The same
graphs give the same files, whatever order they come in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from anabranch.protocols.errors import BundleError
from anabranch.storage.files import write_atomic, writing

PAGE, ALIGNMENT = 4096, 64
INLINE = TensorProto.DEFAULT


def content_name(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    """Return "w_" and 24 hex digits of the SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{dtype}\0{shape}\0".encode() + data).hexdigest()
    return f"w_{digest[:24]}"


def tensor(array: NDArray[Any]) -> TensorProto:
    """Return an array as an initializer named by its content."""
    name = content_name(str(array.dtype), array.shape, array.tobytes())
    return numpy_helper.from_array(array, name)


def packed_tensor(codes: NDArray[np.uint8], shape: tuple[int, ...]) -> TensorProto:
    """Return packed 4-bit codes as a uint4 initializer of `shape`, named by its content."""
    raw = codes.tobytes()
    name = content_name("uint4", shape, raw)
    return TensorProto(name=name, data_type=TensorProto.UINT4, dims=shape, raw_data=raw)


def externalize(
    models: Mapping[str, onnx.ModelProto], data_file: str, folder: Path, threshold: int = 1024
) -> dict[str, tuple[str, ...]]:
    """Write every model as `folder`/<key>.onnx and their large constants, once, to `data_file`.

    Returns the data files that each graph maps: (data_file,), or () for a graph without a
    constant of `threshold` bytes; if there is none at all, no data file is written. Constants
    that are also inputs (the adapter's defaults) stay in the graph. The models stay as they
    are. Every file is there whole or not at all, the data before the graphs; a caller that
    replaces an older set of files writes to a fresh folder and renames that.

    Raises BundleError for a model whose weights are not inline.
    """
    if Path(data_file).name != data_file or not data_file:
        raise ValueError(f"expected the name of a file, got {data_file!r}")
    copies = {name: _inline_copy(name, models[name]) for name in sorted(models)}
    moving = {name: _large(model, threshold) for name, model in copies.items()}
    chunks = {t.raw_data: None for tensors in moving.values() for t in tensors}
    offsets = _write_data(folder / data_file, list(chunks)) if chunks else {}
    for name, model in copies.items():
        for large in moving[name]:
            _point(large, data_file, offsets[large.raw_data])
        write_atomic(folder / f"{name}.onnx", model.SerializeToString(deterministic=True))
    return {name: (data_file,) if moving[name] else () for name in models}


def _inline_copy(name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every constant has its bytes in `raw_data`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for constant in copy.graph.initializer:
        if constant.data_location != INLINE or constant.external_data:
            raise BundleError(
                f"{name}: the bytes of {constant.name} lie in another file; load the model "
                "with its external data before sharing its weights"
            )
        if not constant.HasField("raw_data"):
            label = constant.name
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant), label))
    return copy


def _large(model: onnx.ModelProto, threshold: int) -> list[TensorProto]:
    inputs = {value.name for value in model.graph.input}
    constants = [t for t in model.graph.initializer if t.name not in inputs]
    return [t for t in constants if len(t.raw_data) >= threshold]


def _write_data(path: Path, chunks: list[bytes]) -> dict[bytes, int]:
    """Write distinct chunks, pages first; return where each begins."""
    offsets: dict[bytes, int] = {}
    at = 0
    with writing(path) as file:
        for chunk in sorted(chunks, key=lambda c: len(c) < PAGE):
            align = PAGE if len(chunk) >= PAGE else ALIGNMENT
            file.write(b"\0" * (-at % align))
            at += -at % align
            offsets[chunk] = at
            file.write(chunk)
            at += len(chunk)
    return offsets


def _point(constant: TensorProto, file: str, offset: int) -> None:
    """Replace a constant's bytes by where they lie."""
    length = len(constant.raw_data)
    constant.ClearField("raw_data")
    constant.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(length))):
        constant.external_data.add(key=key, value=value)
