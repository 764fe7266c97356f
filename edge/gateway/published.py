"""What devices may fetch: the files of the published bundles, and frames of rounds, by SHA-256.

A bundle is served only if one of the gateway's bundle_keys signed its manifest and every file is
what the manifest says: a device would refuse anything else after the download. A file's digest
is checked once; it is read again only if its size or time of change is another.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from anabranch.edge.gateway.refusals import Unknown
from anabranch.edge.runtime.bundle_manifest import MANIFEST, SIGNATURE, Manifest
from anabranch.edge.runtime.trust import verify_signature
from anabranch.protocols.errors import BundleError, ConfigError
from anabranch.protocols.spec import AdapterSpec
from anabranch.storage.files import digest_of, write_atomic

Stamp = tuple[int, int, int]  # size, time of change, inode


@dataclass(frozen=True)
class Served:
    """One file, by content."""

    name: str
    path: Path
    sha256: str
    size: int


@dataclass(frozen=True)
class Published:
    """One bundle."""

    manifest: Manifest
    files: dict[str, Served] = field(repr=False)  # by SHA-256

    @property
    def key(self) -> str:
        """Return what a round's row says of its bundle: name and version."""
        return f"{self.manifest.name}/{self.manifest.version}"

    def named(self, name: str) -> Served:
        """Return the manifest or its signature."""
        return next(one for one in self.files.values() if one.name == name)


def read_bundle(folder: Path, keys: Sequence[bytes]) -> Published:
    """Return the bundle in a folder; BundleError unless it is signed and whole."""
    try:
        data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder}: {error.strerror or error}; expected a bundle") from None
    verify_signature(data, signature, keys)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder / MANIFEST}: {error}") from None
    files = {}
    for name, content in ((MANIFEST, data), (SIGNATURE, signature)):
        sha = hashlib.sha256(content).hexdigest()
        files[sha] = Served(name, folder / name, sha, len(content))
    for name, file in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.bytes:
            raise BundleError(f"{path}: missing, a link, or not of {file.bytes} bytes")
        if digest_of(path) != file.sha256:
            raise BundleError(f"{path}: SHA-256 differs from {MANIFEST}; export the bundle again")
        files[file.sha256] = Served(name, path, file.sha256, file.bytes)
    return Published(manifest, files)


class Shelf:
    """All that can be fetched."""

    def __init__(self, folders: Sequence[Path], keys: Sequence[bytes], frames: Path) -> None:
        self.frames = frames
        self.bundles = [read_bundle(folder, keys) for folder in folders]
        names = [one.key for one in self.bundles]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"bundles: {min(twice)} is published twice; leave one of them out")
        self._files = {sha: file for one in self.bundles for sha, file in one.files.items()}
        self._stamps = {sha: _stamp(file.path) for sha, file in self._files.items()}
        self._lock = threading.Lock()

    def bundle(self, key: str) -> Published:
        """Return a bundle by its key, or raise Unknown."""
        for one in self.bundles:
            if one.key == key:
                return one
        raise Unknown(f"bundle {key}: not published here any more")

    def fitting(self, spec: AdapterSpec, labels: Sequence[str]) -> Published:
        """Return the newest bundle whose adapter has this spec and these labels.

        Raises ConfigError if none does.
        """
        found = [
            one
            for one in self.bundles
            if one.manifest.spec == spec and one.manifest.labels == tuple(labels)
        ]
        if not found:
            others = [f"{one.key} has another {_other(one, spec, labels)}" for one in self.bundles]
            raise ConfigError(
                "gateway: no published bundle has this run's base, [lora] and labels "
                f"({'; '.join(others[:3]) or 'none is published'}): make one from its run.toml "
                "(`anabranch edge export`) and add it to `bundles`"
            )
        return max(found, key=lambda one: one.manifest.version)

    def find(self, sha256: str) -> Served:
        """Return the file with this content, or raise Unknown."""
        with self._lock:
            file = self._files.get(sha256)
            if file is None:
                path = self.frames / sha256
                if not path.is_file():
                    raise Unknown("file: none with this SHA-256 is published")
                return Served(sha256, path, sha256, path.stat().st_size)
            stamp = _stamp(file.path)
            if stamp != self._stamps[sha256]:
                if digest_of(file.path) != sha256:
                    raise Unknown(f"{file.name}: changed on the gateway's disk; publish it again")
                self._stamps[sha256] = stamp
            return file


def _other(bundle: Published, spec: AdapterSpec, labels: Sequence[str]) -> str:
    """Return in what a bundle is not the run's."""
    found = bundle.manifest.spec
    names = [name for name in spec.__struct_fields__ if getattr(found, name) != getattr(spec, name)]
    return ", ".join([*names, *(["labels"] if bundle.manifest.labels != tuple(labels) else [])])


def put_frame(folder: Path, frame: bytes) -> str:
    """Keep a frame under its SHA-256; return that."""
    sha = hashlib.sha256(frame).hexdigest()
    if not (folder / sha).exists():
        write_atomic(folder / sha, frame, 0o600)
    return sha


def _stamp(path: Path) -> Stamp:
    try:
        about = path.stat()
    except OSError:
        return (-1, -1, -1)
    return (about.st_size, about.st_mtime_ns, about.st_ino)
