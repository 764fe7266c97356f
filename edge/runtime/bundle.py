"""Open a bundle: nothing of it is used before all of it is what a trusted key signed.

    bundle = open_bundle(folder, trusted=read_trusted(home.trusted), versions=home.versions)
    bundle.graph_path("infer", "int8")

The order is part of the guarantee: what comes later is not looked at while an earlier rule is
broken. Any broken rule is a BundleError that names it.

    signature       of manifest.json by a trusted key, before a byte of it is parsed
    manifest        strict: known fields, types, ranges; agrees with itself (bundle_rules.py)
    set of files    those listed and no other; regular files, in one flat folder, no links
    sizes           of every file, before any is read
    digests         SHA-256 of every file
    graphs          operators, versions, tensors, external data (onnx_file.py); inputs, outputs
    adapter         its frame decodes and is of the manifest's spec
    tokenizer       parses
    version         not below the highest seen, nor the same with other content (trust.py)

Memory does not grow with the weights: files are hashed in pieces and graphs are mapped.
Whoever can write into the folder after this check can change what is used: keep bundles where
only the device's own user writes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from anabranch.edge.runtime import bundle_manifest as names
from anabranch.edge.runtime.bundle_manifest import Manifest, Precision, Role
from anabranch.edge.runtime.bundle_rules import (
    KEYS,
    data_files,
    precisions,
    require_consistent,
    require_signature,
)
from anabranch.edge.runtime.manifest import TOKENIZER
from anabranch.edge.runtime.onnx_file import check_graph
from anabranch.edge.runtime.onnx_info import GraphInfo, GraphLimits
from anabranch.edge.runtime.operators import INFER, STEP, TRAINING
from anabranch.edge.runtime.tokenizer import WordPiece, parse
from anabranch.edge.runtime.trust import (
    MAX_SIGNATURE,
    remember_version,
    require_not_older,
    verify_signature,
)
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import AnabranchError, BundleError
from anabranch.protocols.spec import shown
from anabranch.storage.files import digest_of

MAX_MANIFEST = 4 << 20  # bytes: names and shapes of some 40,000 tensors
MAX_GRAPH = 1 << 31  # bytes of one ONNX model: protobuf has no larger messages
MAX_TOKENIZER = 64 << 20


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle whose signature, files and graphs were checked."""

    folder: Path
    manifest: Manifest
    digest: str  # SHA-256 of manifest.json: the identity of the whole bundle
    adapter: Adapter  # as released
    tokenizer: WordPiece | None  # texts only

    def graph_path(self, role: Role, precision: Precision) -> Path:
        """Return the path of a graph. Raises BundleError if this bundle has none such."""
        graph = self.manifest.graph(role, precision)
        if graph is None:
            have = ", ".join(precisions(self.manifest, role)) or "none"
            raise BundleError(
                f"{self.folder}: no {role} graph in {precision}; this bundle has {have}"
            )
        return self.folder / graph.file

    def path(self, name: str) -> Path:
        """Return the path of a listed file. Raises BundleError if it is not listed."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder}: this bundle has no {shown(name)}")
        return self.folder / name


def open_bundle(folder: Path, *, trusted: Sequence[bytes], versions: Path | None = None) -> Bundle:
    """Return the bundle in `folder`, or raise BundleError naming the rule that it breaks.

    `trusted` are public keys, 32 bytes each; without one no bundle opens. `versions` is the
    device's versions.json: a bundle that opens becomes the oldest that opens from then on.
    """
    data = _read(folder / names.MANIFEST, MAX_MANIFEST)
    signature = _read(folder / names.SIGNATURE, MAX_SIGNATURE)
    manifest = read_manifest(data, signature, trusted)
    with _within(folder):
        require_exact_files(folder, manifest)
        for name in sorted(manifest.files):
            _require_digest(folder / name, manifest.files[name].sha256)
        _check_graphs(folder, manifest)
        adapter = _adapter(folder, manifest)
        tokenizer = _tokenizer(folder, manifest)
        digest = hashlib.sha256(data).hexdigest()
        if versions is not None:
            remember_version(versions, manifest.name, manifest.version, digest)
    return Bundle(folder, manifest, digest, adapter, tokenizer)


def read_manifest(data: bytes, signature: bytes, trusted: Sequence[bytes]) -> Manifest:
    """Return the content of a manifest.json that a trusted key signed, or raise BundleError."""
    verify_signature(data, signature, trusted)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, AnabranchError) as error:
        raise BundleError(
            f"manifest: {error}; the bundle is of a newer format, or was made wrong"
        ) from None
    with _within("manifest"):
        require_consistent(manifest)
    return manifest


def require_current(manifest: Manifest, data: bytes, versions: Path) -> None:
    """Raise BundleError if this manifest (`data` are its bytes) is a step back for the device."""
    digest = hashlib.sha256(data).hexdigest()
    require_not_older(versions, manifest.name, manifest.version, digest)


def require_exact_files(folder: Path, manifest: Manifest) -> None:
    """Refuse missing and extra files, whatever is no regular file, and other sizes."""
    expected = {*manifest.files, names.MANIFEST, names.SIGNATURE}
    found: dict[str, os.stat_result] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            found[entry.name] = entry.stat(follow_symlinks=False)
            if entry.name not in expected:
                raise BundleError(f"files: {shown(entry.name)} is not listed in the manifest")
    for name in sorted(expected):
        if name not in found:
            raise BundleError(f"files: {name} is missing; fetch the bundle again")
        if not stat.S_ISREG(found[name].st_mode):
            raise BundleError(f"files: {name} is no regular file (a link, folder or device)")
    for name, file in sorted(manifest.files.items()):
        if found[name].st_size != file.bytes:
            raise BundleError(
                f"sizes: {name} has {found[name].st_size} bytes, expected {file.bytes}; fetch the "
                "bundle again"
            )


def _require_digest(path: Path, expected: str) -> None:
    if digest_of(path) != expected:
        raise BundleError(
            f"digests: {path.name} is not the file that was signed; fetch the bundle again"
        )


def _check_graphs(folder: Path, manifest: Manifest) -> None:
    """Walk every ONNX model of the bundle, onnxruntime-training's among them."""
    limits = GraphLimits(tensor_bytes=manifest.limits.memory_bytes)
    roles = {graph.file: KEYS[name][0] for name, graph in manifest.graphs.items()}
    for file in sorted(name for name in manifest.files if name.endswith(".onnx")):
        role = roles.get(file)
        allowed = TRAINING if role is None else INFER if role == "infer" else STEP
        with _within(file), mapped(folder / file, MAX_GRAPH) as data:
            info = check_graph(data, data_files(manifest, file), limits, operators=allowed)
            if role is not None:
                require_signature(manifest, role, info)


def graph_info(bundle: Bundle, role: Role, precision: Precision) -> GraphInfo:
    """Return what is in a graph of an opened bundle."""
    path = bundle.graph_path(role, precision)
    limits = GraphLimits(tensor_bytes=bundle.manifest.limits.memory_bytes)
    operators = INFER if role == "infer" else STEP
    with _within(path.name), mapped(path, MAX_GRAPH) as data:
        return check_graph(
            data, data_files(bundle.manifest, path.name), limits, operators=operators
        )


@contextmanager
def mapped(path: Path, limit: int) -> Iterator[bytes | mmap.mmap]:
    """Yield the content of a file, mapped; an empty one as b"". Raises BundleError if larger."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise BundleError(f"{path.name}: {size} bytes, at most {limit} are read")
        if size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _adapter(folder: Path, manifest: Manifest) -> Adapter:
    data = _read(folder / names.ADAPTER, wire.MAX_FRAME)
    try:
        adapter = wire.decode_adapter(data, manifest.spec)
    except AnabranchError as error:
        raise BundleError(f"adapter: {error}") from None
    if wire.digest(data) != manifest.adapter:
        raise BundleError(f"adapter: {names.ADAPTER} is not the frame that the manifest names")
    return adapter


def _tokenizer(folder: Path, manifest: Manifest) -> WordPiece | None:
    if TOKENIZER not in manifest.files:
        return None
    data = _read(folder / TOKENIZER, MAX_TOKENIZER)
    if hashlib.sha256(data).hexdigest() != manifest.files[TOKENIZER].sha256:
        raise BundleError(f"digests: {TOKENIZER} changed while the bundle was opened")
    try:
        parsed = parse(data)
    except (AnabranchError, RecursionError) as error:
        raise BundleError(f"tokenizer: {error}") from None
    if parsed.max_tokens > manifest.limits.max_tokens:
        raise BundleError(
            f"tokenizer: gives up to {parsed.max_tokens} tokens, but the manifest's limit is "
            f"{manifest.limits.max_tokens}"
        )
    return WordPiece(parsed)


def _read(path: Path, limit: int) -> bytes:
    """Return a regular file's bytes, or raise BundleError; a larger one is not read."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"files: {path} is no regular file (a link, folder or device)")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleError(
            f"files: {path} cannot be read ({error.strerror}); expected a bundle's folder"
        ) from None
    if len(data) > limit:
        raise BundleError(f"sizes: {path} has more than {limit} bytes")
    return data


@contextmanager
def _within(place: Path | str) -> Iterator[None]:
    """Name the place in a refusal; what cannot be read is refused too."""
    try:
        yield
    except BundleError as error:
        raise BundleError(f"{place}: {error}") from None
    except OSError as error:
        raise BundleError(f"{place}: {error.filename} cannot be read ({error.strerror})") from None
