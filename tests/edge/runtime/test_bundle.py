"""A bundle opens only if every rule holds; each broken one is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.client.tuning.classifier import Classifier
from anabranch.edge.runtime.bundle import graph_info, open_bundle, read_manifest
from anabranch.protocols import wire
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import BundleError
from tests.edge.bundles import KEY, TRUSTED, reseal, sign_bytes, write_bundle

REUSED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
replace = msgspec.structs.replace


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


@pytest.mark.parametrize("labels", [("bone", "heart"), ("bone", "heart", "other", "more")])
def test_graphs_of_another_number_of_labels_are_refused(
    folder: Path, labels: tuple[str, ...]
) -> None:
    reseal(folder, lambda m: replace(m, labels=labels))
    with pytest.raises(BundleError, match=r"output logits: expected .* a logit for each"):
        open_bundle(folder, trusted=TRUSTED)


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
