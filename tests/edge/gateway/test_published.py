from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.edge.gateway.published import Shelf, put_frame, read_bundle
from anabranch.edge.gateway.refusals import Unknown
from anabranch.edge.runtime.bundle_manifest import ADAPTER
from anabranch.edge.runtime.trust import public_bytes
from anabranch.protocols.errors import BundleError, ConfigError
from benchmarks.edge.gateway_load import LABELS, spec_of, write_bundle

KEY = Ed25519PrivateKey.generate()
KEYS = [public_bytes(KEY)]
SPEC = spec_of(64)


def test_the_newest_bundle_that_fits_is_taken(tmp_path: Path) -> None:
    folders = [write_bundle(tmp_path / str(n), SPEC, KEY, version=n) for n in (1, 3, 2)]
    shelf = Shelf(folders, KEYS, tmp_path / "files")
    assert shelf.fitting(SPEC, LABELS).key == "codes/3"
    with pytest.raises(ConfigError, match="codes/1 has another tensors"):
        shelf.fitting(spec_of(128), LABELS)


def test_unsigned_and_damaged_bundles_are_not_published(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", SPEC, KEY)
    with pytest.raises(BundleError):
        read_bundle(folder, [public_bytes(Ed25519PrivateKey.generate())])
    with pytest.raises(BundleError, match="expected a bundle"):
        read_bundle(tmp_path / "none", KEYS)
    data = bytearray((folder / ADAPTER).read_bytes())
    data[100] ^= 1
    (folder / ADAPTER).write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        read_bundle(folder, KEYS)
    (folder / ADAPTER).write_bytes(data[:-1])
    with pytest.raises(BundleError, match="not of"):
        read_bundle(folder, KEYS)


def test_a_file_that_changed_on_the_disk_is_not_served(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", SPEC, KEY)
    shelf = Shelf([folder], KEYS, tmp_path / "files")
    sha = shelf.bundles[0].manifest.files[ADAPTER].sha256
    assert shelf.find(sha).path == folder / ADAPTER
    (folder / ADAPTER).write_bytes(bytes(50))
    with pytest.raises(Unknown, match="changed on the gateway's disk"):
        shelf.find(sha)


def test_frames_are_found_by_content_and_nothing_else_is(tmp_path: Path) -> None:
    shelf = Shelf([], [], tmp_path / "files")
    sha = put_frame(tmp_path / "files", b"frame")
    assert shelf.find(sha).path.read_bytes() == b"frame"
    with pytest.raises(Unknown):
        shelf.find("0" * 64)


def test_a_bundle_is_published_once(tmp_path: Path) -> None:
    folders = [write_bundle(tmp_path / name, SPEC, KEY) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="published twice"):
        Shelf(folders, KEYS, tmp_path / "files")
