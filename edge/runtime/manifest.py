"""manifest.json of a release: what it is, and the size and SHA-256 of every other file in it.

A release is opened only if every listed file is there and is what the manifest says. Whoever
can replace the manifest can replace everything: compare its own SHA-256 with the one that the
coordinator published.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec

from anabranch.protocols.errors import ReleaseError
from anabranch.protocols.tables import TaskKind

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FP32 = "onnx/model.onnx"
INT8 = "onnx/model-int8.onnx"
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the release."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Digest


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of manifest.json."""

    format: Literal[1] = 1
    name: str  # of the run
    task: TaskKind
    labels: tuple[str, ...]  # order = index of the logit
    inputs: tuple[str, ...]  # of the ONNX graphs
    base: Digest  # of the frozen base weights
    adapter: Digest  # of the adapter's frame (docs/wire-format.md)
    config: Digest  # of the run's configuration
    metrics: dict[str, float]  # on held-out records, keys in server/release.py
    files: dict[str, File]  # path inside the release, with /


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the release in `folder`, or raise ReleaseError."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise ReleaseError(
            f"{path}: cannot be read ({error.strerror}); expected a release's folder"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReleaseError(f"{path}: {error}") from None
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/" or "\\" in name or ":" in name:
            raise ReleaseError(f"{path}: {name!r} does not lie inside the release")
    return manifest


def read_verified(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Return the bytes of one file, the very bytes that were checked against the manifest."""
    expected = manifest.files.get(name)
    if expected is None:
        raise ReleaseError(f"{folder}: this release has no {name}")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise ReleaseError(f"{folder / name}: cannot be read ({error.strerror})") from None
    if len(data) != expected.bytes or hashlib.sha256(data).hexdigest() != expected.sha256:
        raise ReleaseError(
            f"{folder / name}: is not the file that was released (SHA-256 differs from "
            f"{MANIFEST}); fetch the release again"
        )
    return data


def verify(folder: Path, manifest: Manifest) -> None:
    """Raise ReleaseError unless every file of the manifest is there, whole and unchanged."""
    for name in manifest.files:
        read_verified(folder, manifest, name)


def entry(path: Path) -> File:
    """Return the manifest's entry for a file on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(bytes=path.stat().st_size, sha256=digest)
