"""A bundle opens only if every rule holds; each broken one is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.runtime.bundle import graph_info, open_bundle, read_manifest
from anabranch.edge.runtime.bundle_manifest import Graph, Manifest, Memory
from anabranch.edge.runtime.manifest import File
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import BundleError
from anabranch.protocols.tables import Privacy
from tests.edge.bundles import KEY, TRUSTED, reseal, sign_bytes, write_bundle

REUSED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_a_signed_bundle_opens(folder: Path, make_classifier: Callable[..., Classifier]) -> None:
    from anabranch.client.tuning.lora import read_adapter

    bundle = open_bundle(folder, trusted=TRUSTED)
    released = read_adapter(make_classifier("tabular"))
    assert bundle.adapter.spec == released.spec
    assert wire.encode(bundle.adapter) == wire.encode(released)
    assert bundle.tokenizer is None
    assert bundle.digest == wire.digest((folder / "manifest.json").read_bytes())
    assert bundle.graph_path("infer", "int8") == folder / "infer.int8.onnx"
    assert bundle.path("checkpoint") == folder / "checkpoint"
    assert set(bundle.adapter.arrays) <= set(graph_info(bundle, "infer", "fp32").initializers)
    with pytest.raises(BundleError, match="no infer graph in int4; this bundle has fp32, int8"):
        bundle.graph_path("infer", "int4")
    with pytest.raises(BundleError, match="has no 'other'"):
        bundle.path("other")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image"])
def test_every_kind_of_task_opens(
    tmp_path: Path,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
    kind: str,
) -> None:
    write_bundle(
        tmp_path / "b", make_classifier(kind), make_config(kind), precisions=("fp32", "int4")
    )
    bundle = open_bundle(tmp_path / "b", trusted=TRUSTED)
    assert (bundle.tokenizer is not None) == (kind == "text")
    if kind == "text":
        (tmp_path / "b" / "tokenizer.json").write_bytes(b"{}")
        reseal(tmp_path / "b")
        with pytest.raises(BundleError, match="tokenizer: "):
            open_bundle(tmp_path / "b", trusted=TRUSTED)


def test_a_device_opens_it_without_torch_and_onnx(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from anabranch.edge.runtime.bundle import open_bundle\n"
        "open_bundle(Path(sys.argv[1]), trusted=[bytes.fromhex(sys.argv[2])])\n"
        "loaded = {'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), TRUSTED[0].hex()], check=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux")
def test_memory_does_not_grow_with_the_weights(folder: Path, tmp_path: Path) -> None:
    """Opening, packing, unpacking: 200 MB more of weights, not 20 MB more of RAM."""
    code = (
        "import sys; from pathlib import Path\n"
        "from anabranch.edge.runtime.archive import pack, unpack\n"
        "from anabranch.edge.runtime.bundle import open_bundle\n"
        "folder, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "trusted = [bytes.fromhex(sys.argv[3])]\n"
        "open_bundle(folder, trusted=trusted)\n"
        "pack(folder, out / 'a.tar')\n"
        "unpack(out / 'a.tar', out / 'b', trusted=trusted)\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )
    peaks = []
    for size in (1 << 20, 200 << 20):
        os.truncate(folder / "base-fp32.bin", size)
        reseal(folder)
        out = tmp_path / str(size)
        out.mkdir()
        command = [sys.executable, "-c", code, str(folder), str(out), TRUSTED[0].hex()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
        shutil.rmtree(out)
    assert peaks[1] - peaks[0] < 20_000  # KiB


# --- what lies in the folder ---------------------------------------------------------------------


def test_every_flipped_byte_of_manifest_and_signature_is_refused(folder: Path) -> None:
    both = {name: (folder / name).read_bytes() for name in ("manifest.json", "manifest.sig")}
    for name, good in both.items():
        for at in range(len(good)):
            bad = good[:at] + bytes([good[at] ^ (1 + at % 255)]) + good[at + 1 :]
            spoilt = both | {name: bad}
            with pytest.raises(BundleError, match=r"^signature: "):
                read_manifest(spoilt["manifest.json"], spoilt["manifest.sig"], TRUSTED)
            if at % 97 == 0:
                (folder / name).write_bytes(bad)
                with pytest.raises(BundleError, match=r"^signature: "):
                    open_bundle(folder, trusted=TRUSTED)
        (folder / name).write_bytes(good)
    open_bundle(folder, trusted=TRUSTED)


@REUSED
@given(data=st.data())
def test_every_flipped_byte_of_a_file_is_refused(original: Path, data: st.DataObject) -> None:
    path = a_file(original, data)
    good = path.read_bytes()
    at, mask = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 255))
    spoiled(original, path, good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :], "digests: ")


@REUSED
@given(data=st.data())
def test_every_truncation_of_a_file_is_refused(original: Path, data: st.DataObject) -> None:
    path = a_file(original, data)
    good = path.read_bytes()
    spoiled(original, path, good[: data.draw(st.integers(0, len(good) - 1))], "sizes: ")
    spoiled(original, path, good + b"\0", "sizes: ")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_a_truncated_manifest_or_signature_is_refused(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        (folder / name).write_bytes(data[:length])
        with pytest.raises(BundleError, match="signature: "):
            open_bundle(folder, trusted=TRUSTED)


def test_every_missing_file_is_refused(original: Path) -> None:
    for path in sorted(original.iterdir()):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(BundleError, match=rf"files: .*{path.name}"):
            open_bundle(original, trusted=TRUSTED)
        path.write_bytes(data)
    open_bundle(original, trusted=TRUSTED)


def rename(folder: Path) -> None:
    (folder / "base-fp32.bin").rename(folder / "base-FP32.bin")


def swap(folder: Path) -> None:
    one, two = folder / "infer.fp32.onnx", folder / "infer.int8.onnx"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def link(folder: Path) -> None:
    (folder / "base-fp32.bin").rename(folder.parent / "elsewhere")
    (folder / "base-fp32.bin").symlink_to(folder.parent / "elsewhere")


def dangling(folder: Path) -> None:
    (folder / "base-fp32.bin").unlink()
    (folder / "base-fp32.bin").symlink_to(folder / "nowhere")


def link_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "elsewhere")
    (folder / "manifest.json").symlink_to(folder.parent / "elsewhere")


def link_folder(folder: Path) -> None:
    (folder / "checkpoint").unlink()
    (folder / "checkpoint").symlink_to(folder.parent)


def sub_folder(folder: Path) -> None:
    (folder / "checkpoint").unlink()
    (folder / "checkpoint").mkdir()


def pipe(folder: Path) -> None:
    (folder / "checkpoint").unlink()
    os.mkfifo(folder / "checkpoint")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "extra.bin").write_bytes(b""), r"files: 'extra\.bin' is not listed"),
        (lambda f: (f / ".hidden").write_bytes(b""), r"files: '\.hidden' is not listed"),
        (lambda f: (f / "sub").mkdir(), "files: 'sub' is not listed"),
        (lambda f: (f / "out").symlink_to("/etc"), "files: 'out' is not listed"),
        (rename, r"files: 'base-FP32\.bin' is not listed"),
        (swap, "(sizes|digests): infer"),
        (link, r"base-fp32\.bin is no regular file"),
        (dangling, r"base-fp32\.bin is no regular file"),
        (link_manifest, r"manifest\.json is no regular file"),
        (link_folder, "checkpoint is no regular file"),
        (sub_folder, "checkpoint is no regular file"),
        (pipe, "checkpoint is no regular file"),
    ],
)
def test_the_folder_holds_just_what_was_signed(
    folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder, trusted=TRUSTED)


# --- who signed ----------------------------------------------------------------------------------


def test_a_key_that_is_not_trusted_opens_nothing(folder: Path) -> None:
    other = Ed25519PrivateKey.generate()
    sign_bytes(folder, (folder / "manifest.json").read_bytes(), other)
    with pytest.raises(BundleError, match="does not trust"):
        open_bundle(folder, trusted=TRUSTED)
    with pytest.raises(BundleError, match="trusts no key"):
        open_bundle(folder, trusted=[])


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match="expected a bundle's folder"):
            open_bundle(place, trusted=TRUSTED)


def test_an_older_version_is_refused_after_a_newer_one(folder: Path, tmp_path: Path) -> None:
    versions = tmp_path / "versions.json"
    open_bundle(folder, trusted=TRUSTED, versions=versions)
    newer = Path(shutil.copytree(folder, tmp_path / "newer"))
    reseal(newer, lambda m: replace(m, version=2))
    open_bundle(newer, trusted=TRUSTED, versions=versions)
    before = versions.read_bytes()
    with pytest.raises(BundleError, match="version: tiny-tabular 1 is older than 2"):
        open_bundle(folder, trusted=TRUSTED, versions=versions)
    reseal(newer, lambda m: replace(m, created="2027-01-01T00:00:00+00:00"))
    with pytest.raises(BundleError, match="one version has one content"):
        open_bundle(newer, trusted=TRUSTED, versions=versions)
    assert versions.read_bytes() == before


def test_a_bundle_that_does_not_open_moves_no_floor(folder: Path, tmp_path: Path) -> None:
    (folder / "checkpoint").write_bytes(b"")
    with pytest.raises(BundleError, match="sizes: "):
        open_bundle(folder, trusted=TRUSTED, versions=tmp_path / "versions.json")
    assert not (tmp_path / "versions.json").exists()


# --- what was signed, but is wrong ---------------------------------------------------------------


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


def a_file(folder: Path, data: st.DataObject) -> Path:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("manifest"))
    return folder / data.draw(st.sampled_from(names))


def spoiled(folder: Path, path: Path, data: bytes, message: str) -> None:
    """The bundle is refused while the file has other content."""
    good = path.read_bytes()
    path.write_bytes(data)
    try:
        with pytest.raises(BundleError, match=f"{message}{path.name}"):
            open_bundle(folder, trusted=TRUSTED)
    finally:
        path.write_bytes(good)


def test_the_helper_signs_with_the_key_that_is_trusted() -> None:
    assert KEY.public_key().public_bytes_raw() in TRUSTED
