"""Every way of training in a bundle computes the same gradient, or there is no bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from anabranch.edge.export.agreement import require_agreement
from anabranch.edge.runtime.bundle_manifest import Precision
from anabranch.protocols.errors import ReleaseError

ALL: tuple[Precision, ...] = ("fp32", "int8", "int4")


@pytest.fixture
def copy(made: Callable[[str], Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("text").folder, tmp_path / "bundle"))


def test_a_bundle_that_was_made_agrees(made: Callable[[str], Any]) -> None:
    require_agreement(made("text").folder, ALL, artifacts=True)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_of_another_model_are_refused(copy: Path, precision: Precision) -> None:
    data = copy / f"base-{precision}.bin"
    raw = np.frombuffer(data.read_bytes(), np.uint8).copy()
    np.random.default_rng(0).shuffle(raw[: 3 * len(raw) // 4])  # codes lie before the scales
    data.write_bytes(raw.tobytes())

    with pytest.raises(ReleaseError, match=f"over {precision} weights points elsewhere"):
        require_agreement(copy, ("fp32", precision), artifacts=False)


def test_artifacts_that_compute_something_else_are_refused(copy: Path) -> None:
    path = copy / "training_model.onnx"
    model = onnx.load(path, load_external_data=False)
    scalars = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    scalars = [t for t in scalars if t.data_location == onnx.TensorProto.DEFAULT and not t.dims]
    for tensor in scalars:
        value = numpy_helper.to_array(tensor)
        if 1e-3 < abs(float(value)) < 1e3 and float(value) != 1:
            tensor.CopyFrom(numpy_helper.from_array(value * np.float32(1.1), tensor.name))
    assert scalars
    onnx.save(model, path)

    with pytest.raises(ReleaseError, match="artifacts and the plain graph differ by"):
        require_agreement(copy, ("fp32",), artifacts=True)
