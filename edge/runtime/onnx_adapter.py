"""An adapter in onnxruntime's own file format, .onnx_adapter: one base, many adapters.

onnxruntime >= 1.20 writes it and hands it to a session call:

    adapter = onnxruntime.LoraAdapter(); adapter.Load(path)
    options = onnxruntime.RunOptions(); options.add_active_adapter(adapter)
    session.run(["logits"], feeds, options)         in place of the infer graph's defaults

The values are those of the frame in adapter.bin; anabranch's own runtime feeds them as inputs and
does not need this file. https://onnxruntime.ai/docs/genai/tutorials/finetune.html
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import AnabranchError, BundleError, DeviceError
from anabranch.protocols.spec import AdapterSpec
from anabranch.storage.files import write_atomic

VERSION = 1  # of adapter and model, as stored in the file


def supported() -> bool:
    """Return whether the installed onnxruntime has the format."""
    import onnxruntime  # here, because its training build loads torch where torch is installed

    return hasattr(onnxruntime, "AdapterFormat")


def write_onnx_adapter(path: Path, adapter: Adapter) -> None:
    """Write `adapter` in onnxruntime's format; the file is there whole or not at all.

    Raises DeviceError if onnxruntime is older than 1.20.
    """
    onnxruntime = _onnxruntime()
    format_ = onnxruntime.AdapterFormat()
    format_.set_adapter_version(VERSION)
    format_.set_model_version(VERSION)
    values = onnxruntime.OrtValue.ortvalue_from_numpy
    # OrtValues point into the arrays: they must live until the file is written.
    arrays = {name: np.ascontiguousarray(array) for name, array in adapter.arrays.items()}
    format_.set_parameters({name: values(array) for name, array in arrays.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / "adapter"
        format_.export_adapter(str(temporary))
        write_atomic(path, temporary.read_bytes())


def read_onnx_adapter(path: Path, spec: AdapterSpec) -> Adapter:
    """Return the adapter in a file that `write_onnx_adapter` wrote; only for trusted files.

    Raises DeviceError if onnxruntime is older than 1.20, BundleError if the file is not in the
    format or is not of `spec`.
    """
    onnxruntime = _onnxruntime()
    try:
        read = onnxruntime.AdapterFormat.read_adapter(str(path))
        arrays = {name: value.numpy().copy() for name, value in read.get_parameters().items()}
    except (RuntimeError, ValueError, OSError) as error:
        raise BundleError(f"{path}: onnxruntime cannot read this adapter: {error}") from None
    try:
        return Adapter(spec, arrays)
    except AnabranchError as error:
        raise BundleError(f"{path}: {error}") from None


def _onnxruntime() -> Any:
    import onnxruntime

    if not supported():
        raise DeviceError(
            f"onnxruntime {onnxruntime.__version__} has no .onnx_adapter format: it needs 1.20 or "
            "newer; use adapter.bin"
        )
    return onnxruntime
