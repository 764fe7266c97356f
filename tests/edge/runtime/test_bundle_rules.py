"""What was signed by the right key, but is wrong all the same: refused, with the rule named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from onnx import helper

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.bundle_manifest import Graph, Manifest, Memory
from anabranch.edge.runtime.manifest import File
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import BundleError
from anabranch.protocols.tables import Privacy
from tests.edge.bundles import TRUSTED, reseal, sign_bytes, write_bundle

replace = msgspec.structs.replace
Change = Callable[[Manifest], Manifest]


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tabular"
    write_bundle(folder, make_classifier("tabular"), make_config("tabular"))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"kind":"bundle"}'])
def test_a_manifest_is_strict_however_well_signed(folder: Path, data: bytes) -> None:
    sign_bytes(folder, data)
    with pytest.raises(BundleError, match=r"^manifest: "):
        open_bundle(folder, trusted=TRUSTED)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\\\b", ".x", "", "a\\n", "x" * 129])
def test_names_of_files_are_plain(folder: Path, name: str) -> None:
    data = (folder / "manifest.json").read_bytes()
    sign_bytes(folder, data.replace(b'"checkpoint":{', b'"%s":{' % name.encode()))
    with pytest.raises(BundleError, match=r"^manifest: "):
        open_bundle(folder, trusted=TRUSTED)


@pytest.mark.parametrize("more", [b'"more":1,', b'"format":2,', b'"kind":"release",'])
def test_unknown_fields_and_formats_are_refused(folder: Path, more: bytes) -> None:
    data = (folder / "manifest.json").read_bytes()
    sign_bytes(folder, data[:-1] + b"," + more[:-1] + b"}")
    with pytest.raises(BundleError, match=r"^manifest: "):
        open_bundle(folder, trusted=TRUSTED)


def graphs(**changes: Any) -> Change:
    return lambda m: replace(m, graphs={**m.graphs, **changes})


def without(*names: str) -> Change:
    def change(m: Manifest) -> Manifest:
        return replace(m, graphs={k: g for k, g in m.graphs.items() if k not in names})

    return change


def only_case(m: Manifest) -> Manifest:
    file = m.files["checkpoint"]
    return replace(m, files=m.files | {"Checkpoint": file})


def listed(name: str, file: File | None = None) -> Change:
    return lambda m: replace(m, files=m.files | {name: file or File(bytes=1, sha256="0" * 64)})


GRAPH = Graph(file="infer.int4.onnx", onnxruntime="1.19", memory=Memory(fixed=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, labels=("a",)), "labels: "),
        (lambda m: replace(m, labels=("a", "a")), "labels: "),
        (lambda m: replace(m, shape=()), "shape: "),
        (lambda m: replace(m, inputs=("a", "b")), "inputs: "),
        (lambda m: replace(m, task="text-classification", shape=()), "inputs: "),
        (lambda m: replace(m, artifacts=False), "artifacts: expected none"),
        (lambda m: replace(m, adapter="0" * 64), "adapter: "),
        (lambda m: replace(m, measured={}), "measured: "),
        (lambda m: replace(m, privacy=Privacy(epsilon=1.0)), None),
        (graphs(**{"infer.int4": GRAPH}), r"needs infer\.int4\.onnx, which is not listed"),
        (graphs(**{"infer.int2": GRAPH}), r"expected <role>\.<precision>"),
        (graphs(**{"train_step.int4": GRAPH}), r"expected <role>\.<precision>"),
        (without("infer.fp32", "infer.int8"), r"infer\.fp32\.onnx is listed, but no graph"),
        (listed("manifest.json"), "cannot be listed in itself"),
        (listed("stray.onnx"), r"stray\.onnx is listed, but no graph"),
        (listed("stray.bin"), r"stray\.bin is missing"),
        (only_case, "differ by case alone"),
    ],
)
def test_a_manifest_agrees_with_itself(folder: Path, change: Change, message: str | None) -> None:
    data = (folder / "manifest.json").read_bytes()
    manifest = change(msgspec.json.decode(data, type=Manifest))
    sign_bytes(folder, msgspec.json.encode(manifest))
    if message is None:
        open_bundle(folder, trusted=TRUSTED)
        return
    with pytest.raises(BundleError, match=message):
        open_bundle(folder, trusted=TRUSTED)


def test_promised_privacy_needs_its_graph(folder: Path) -> None:
    for precision in ("fp32", "int8"):
        (folder / f"train_step_dp.{precision}.onnx").unlink()

    def change(m: Manifest) -> Manifest:
        kept = without("train_step_dp.fp32", "train_step_dp.int8")(m)
        return replace(kept, privacy=Privacy(epsilon=1.0))

    reseal(folder, change)
    with pytest.raises(BundleError, match="privacy is promised"):
        open_bundle(folder, trusted=TRUSTED)


def edit(folder: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(str(folder / name), load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    reseal(folder)


def location(where: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = where

    return change


def custom(model: onnx.ModelProto) -> None:
    source = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Evil", [source], ["x"], domain="my.domain"))


def more_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("secret", 1, [1]))


def other_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "other"


@pytest.mark.parametrize("name", ["train_step.fp32.onnx", "infer.int8.onnx", "training_model.onnx"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (custom, "operator 'Evil' of domain"),
        (location("/etc/passwd"), "no plain name"),
        (location("adapter.bin"), r"does not name adapter\.bin"),
    ],
)
def test_every_graph_is_checked(
    folder: Path, name: str, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    edit(folder, name, change)
    with pytest.raises(BundleError, match=f"{name}: .*{message}"):
        open_bundle(folder, trusted=TRUSTED)


@pytest.mark.parametrize("name", ["train_step.fp32.onnx", "train_step_dp.int8.onnx"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (more_input, "input 'secret'"),
        (other_output, "outputs: "),
        (lambda m: m.graph.input.pop(0), "input 'features'"),
        (lambda m: m.graph.input.pop(), "of the adapter"),
    ],
)
def test_a_graph_takes_and_gives_what_its_role_says(
    folder: Path, name: str, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    edit(folder, name, change)
    with pytest.raises(BundleError, match=f"{name}: .*{message}"):
        open_bundle(folder, trusted=TRUSTED)


def test_inference_has_the_released_adapter_as_its_default(folder: Path) -> None:
    def drop(model: onnx.ModelProto) -> None:
        names = [t.name for t in model.graph.initializer]
        del model.graph.initializer[names.index("head.bias")]

    edit(folder, "infer.fp32.onnx", drop)
    with pytest.raises(BundleError, match=r"initializer head\.bias"):
        open_bundle(folder, trusted=TRUSTED)


def test_a_tensor_larger_than_the_memory_limit_is_refused(folder: Path) -> None:
    reseal(folder, lambda m: replace(m, limits=replace(m.limits, memory_bytes=50)))
    with pytest.raises(BundleError, match="at most 50 are allowed"):
        open_bundle(folder, trusted=TRUSTED)


def test_an_adapter_of_another_spec_is_refused(folder: Path) -> None:
    adapter = wire.decode_adapter((folder / "adapter.bin").read_bytes())
    other = replace(adapter.spec, base="f" * 64)
    frame = wire.encode(Adapter(other, adapter.arrays))
    for data, message in ((frame, "adapter is for base model"), (b"ABA1", "adapter: ")):
        (folder / "adapter.bin").write_bytes(data)
        digest = wire.digest(data)
        reseal(folder, lambda m, digest=digest: replace(m, adapter=digest))  # type: ignore[misc]
        with pytest.raises(BundleError, match=message):
            open_bundle(folder, trusted=TRUSTED)
