"""A personalised model as one ONNX file that needs nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.runtime import personalised
from anabranch.edge.runtime.bundle import Bundle, open_bundle
from anabranch.edge.runtime.bundle_manifest import Precision
from anabranch.edge.runtime.personalised import export_model
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import BundleError, IncompatibleAdapter
from tests.edge.bundles import TRUSTED, write_bundle

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "tabular"
    write_bundle(folder, make_classifier("tabular"), make_config("tabular"), with_artifacts=False)
    return open_bundle(folder, trusted=TRUSTED)


def moved(adapter: Adapter) -> Adapter:
    """Return another adapter of the same spec."""
    rng = np.random.default_rng(7)
    arrays = {n: a + rng.normal(size=a.shape).astype("f4") for n, a in adapter.arrays.items()}
    return Adapter(adapter.spec, arrays)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_it_computes_what_the_bundle_computes(
    bundle: Bundle, tmp_path: Path, precision: Precision
) -> None:
    adapter = moved(bundle.adapter)
    path = export_model(bundle, adapter, tmp_path / "mine.onnx", precision)
    check_alone(path, bundle, adapter, precision, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image"])
def test_every_kind_of_model_in_every_precision(
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    kind: str,
) -> None:
    folder = tmp_path / "bundle"
    write_bundle(
        folder,
        make_classifier(kind),
        make_config(kind),
        precisions=PRECISIONS,
        with_artifacts=False,
    )
    bundle = open_bundle(folder, trusted=TRUSTED)
    adapter = moved(bundle.adapter)
    for precision in PRECISIONS:
        path = export_model(bundle, adapter, tmp_path / f"{precision}.onnx", precision)
        check_alone(path, bundle, adapter, precision, tmp_path)


def test_the_same_adapter_gives_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    one = export_model(bundle, bundle.adapter, tmp_path / "one.onnx", "fp32")
    two = export_model(bundle, bundle.adapter, tmp_path / "two.onnx", "fp32")
    assert one.read_bytes() == two.read_bytes()


def test_an_adapter_of_another_spec_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(bundle.adapter.spec, base="f" * 64)
    with pytest.raises(IncompatibleAdapter, match="adapter is for base model"):
        export_model(bundle, Adapter(spec, bundle.adapter.arrays), tmp_path / "m.onnx", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_the_bundle_lacks_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no infer graph in int4"):
        export_model(bundle, bundle.adapter, tmp_path / "m.onnx", "int4")


def test_a_file_with_other_logits_is_not_kept(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the file that was there before stays."""
    (tmp_path / "m.onnx").write_bytes(b"before")
    real = personalised._constant
    monkeypatch.setattr(personalised, "_constant", lambda name, array: real(name, array + 1))
    with pytest.raises(BundleError, match="logits differ by"):
        export_model(bundle, bundle.adapter, tmp_path / "m.onnx", "fp32")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_weights_that_vanished_leave_no_file(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    opened = open_bundle(folder, trusted=TRUSTED)
    (folder / "base-fp32.bin").write_bytes(b"")
    with pytest.raises(BundleError, match="is shorter than when the bundle was opened"):
        export_model(opened, opened.adapter, tmp_path / "m.onnx", "fp32")
    assert list(tmp_path.iterdir()) == [folder]


def check_alone(
    path: Path, bundle: Bundle, adapter: Adapter, precision: Precision, folder: Path
) -> None:
    """The file is a valid model with its bytes within, and needs no other file."""
    alone = folder / "alone"
    alone.mkdir(exist_ok=True)
    moved_away = Path(shutil.copy(path, alone / path.name))
    model = onnx.load(str(moved_away))
    assert not any(t.external_data for t in model.graph.initializer)
    assert [i.name for i in model.graph.input] == list(bundle.manifest.inputs)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, array in adapter.arrays.items():
        assert np.array_equal(held[name], array)
    feeds = personalised._made_up(bundle, seed=3)
    got = onnxruntime.InferenceSession(str(moved_away)).run(["logits"], feeds)[0]
    source = bundle.graph_path("infer", precision)
    session = onnxruntime.InferenceSession(str(source))
    expected = session.run(["logits"], feeds | dict(adapter.arrays))[0]
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
    released = session.run(["logits"], feeds)[0]
    assert np.abs(got - released).max() > 0.05
