"""Downloads by SHA-256: ranged, resumed where they stopped, bounded by what was announced.

    cache/<sha256>         a whole file whose digest was checked
    cache/<sha256>.part    the first bytes of one; the next call asks for the rest

A gateway is not trusted with anything: a chunk must begin where the last one ended and match its
crc32, a file may not have a byte more than announced, and at the end its SHA-256 must be the one
asked for. Space on the disk is checked first. A bundle's manifest and signature come before any
other byte, and only files that are not in the cache follow: another adapter for the same base
costs the adapter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from anabranch.edge.generated import edge_pb2
from anabranch.edge.runtime import trust
from anabranch.edge.runtime.bundle_manifest import MANIFEST, SIGNATURE, Manifest
from anabranch.edge.runtime.home import Home
from anabranch.edge.runtime.transport import Gateway, GatewayUnavailable
from anabranch.protocols.errors import BundleError, DeviceError, ProtocolError
from anabranch.protocols.wire import MAX_FRAME
from anabranch.storage.files import digest_of, staged, sweep, sync_folder

if TYPE_CHECKING:
    from anabranch.edge.runtime.bundle import Bundle

MAX_MANIFEST = 4 << 20  # bytes
MAX_BUNDLE = 4 << 30  # bytes of all files together, unless the caller allows more
RESERVE = 64 << 20  # bytes of disk that a download leaves free
PART = ".part"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One file: its SHA-256 in hex and its size in bytes, as somebody trusted announced them."""

    name: str  # for messages
    sha256: str
    size: int


def wanted(ref: edge_pb2.FileRef, *, limit: int) -> Wanted:
    """Return what a task refers to; raise ProtocolError if it cannot be, or is above `limit`."""
    if len(ref.sha256) != hashlib.sha256().digest_size:
        raise ProtocolError(f"{ref.name[:80]!r}: expected a SHA-256, got {len(ref.sha256)} bytes")
    if not ref.name.isprintable():
        raise ProtocolError(f"{ref.name[:80]!r}: no name of a file")
    if ref.size > limit:
        raise ProtocolError(f"{ref.name[:80]!r}: {ref.size} bytes, at most {limit} are taken")
    return Wanted(name=ref.name[:80], sha256=ref.sha256.hex(), size=ref.size)


def fetch(gateway: Gateway, file: Wanted, cache: Path) -> Path:
    """Return the file in the cache, downloaded as far as it is not there.

    Guarantees: the returned file has the size and the SHA-256 that were asked for; no byte that
    is there is asked for again, also after a kill; at most `file.size` bytes are stored, whatever
    the gateway sends.

    Raises GatewayUnavailable if it does not come further (what has come stays), ProtocolError if
    the gateway sends something else, DeviceError for want of disk space.
    """
    whole, part = cache / file.sha256, cache / (file.sha256 + PART)
    if _is(whole, file):
        return whole
    whole.unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    _require_space(cache, file.size - _size(part), file.name)
    resumed = _size(part) > 0
    if not _complete(gateway, file, part):
        part.unlink(missing_ok=True)
        # What lay there may have been damaged before this call, by a power cut: once more.
        if not resumed or not _complete(gateway, file, part):
            part.unlink(missing_ok=True)
            raise ProtocolError(
                f"{file.name}: the gateway sent another file than {file.sha256[:16]}…; it was "
                "thrown away"
            )
    part.replace(whole)
    sync_folder(cache)
    return whole


def fetch_bundle(
    gateway: Gateway, task: edge_pb2.Task, home: Home, *, limit: int = MAX_BUNDLE
) -> Path:
    """Return the folder of the task's bundle, verified; download what is missing.

    Guarantees: not a byte but manifest and signature is asked for before a trusted key's
    signature on the manifest is checked; files in the cache are not asked for; the folder is
    there whole or not at all, and has passed every check of `bundle.open_bundle`.

    Raises BundleError for a bundle that is refused, and as `fetch`.
    """
    manifest, signature = _signed(gateway, task, home)
    about = _require_task(task, manifest, home)
    target = home.bundle(about.name, about.version)
    if _holds(target, manifest):
        return target
    sizes = {name: file.bytes for name, file in about.files.items()}
    if sum(sizes.values()) > limit:
        raise DeviceError(
            f"{about.name} {about.version}: {sum(sizes.values())} bytes, at most {limit} are taken"
        )
    _require_room(home, about)
    cached = {
        name: fetch(gateway, Wanted(name=name, sha256=file.sha256, size=file.bytes), home.cache)
        for name, file in sorted(about.files.items())
    }
    sweep(target.parent)
    with staged(target) as folder:
        for name, path in cached.items():
            _place(path, folder / name)
        (folder / MANIFEST).write_bytes(manifest)
        (folder / SIGNATURE).write_bytes(signature)
        open_installed(folder, home)
    return target


def installed(task: edge_pb2.Task, home: Home) -> bool:
    """Return whether the task's bundle and adapter are on the disk, by name and size."""
    manifest = home.bundle(task.bundle, task.bundle_version) / MANIFEST
    if not manifest.is_file() or digest_of(manifest) != task.manifest.sha256.hex():
        return False
    frame = home.cache / task.adapter.sha256.hex()
    return frame.is_file() and frame.stat().st_size == task.adapter.size


def prune(home: Home, keep: Sequence[str] = ()) -> int:
    """Remove cached files, whole or half, that no installed bundle has, but for `keep`.

    For after a download: until then a half of a file is what the next task goes on with. Returns
    the bytes freed.
    """
    used = set(keep)
    for path in home.folder.glob("bundles/*/*/" + MANIFEST):
        used.add(digest_of(path))
        used.update(one.sha256 for one in _decoded(path.read_bytes()).files.values())
    freed = 0
    for path in sorted(home.cache.glob("*")) if home.cache.is_dir() else []:
        if path.name.removesuffix(PART) not in used:
            freed += path.stat().st_size
            path.unlink()
    return freed


def _signed(gateway: Gateway, task: edge_pb2.Task, home: Home) -> tuple[bytes, bytes]:
    """Return manifest and signature, of which a trusted key made the second for the first."""
    manifest = fetch(gateway, wanted(task.manifest, limit=MAX_MANIFEST), home.cache)
    signature = fetch(gateway, wanted(task.signature, limit=trust.MAX_SIGNATURE), home.cache)
    data, signed = manifest.read_bytes(), signature.read_bytes()
    try:
        trust.verify_signature(data, signed, trust.read_trusted(home.trusted))
    except BundleError:
        manifest.unlink()
        signature.unlink()
        raise
    return data, signed


def _require_task(task: edge_pb2.Task, manifest: bytes, home: Home) -> Manifest:
    about = _decoded(manifest)
    if (about.name, about.version) != (task.bundle, task.bundle_version):
        raise BundleError(
            f"manifest: the task is for {task.bundle[:80]!r} {task.bundle_version}, the manifest "
            f"is of {about.name!r} {about.version}"
        )
    digest = hashlib.sha256(manifest).hexdigest()
    trust.require_not_older(home.versions, about.name, about.version, digest)
    return about


def _decoded(manifest: bytes) -> Manifest:
    try:
        return msgspec.json.decode(manifest, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{MANIFEST}: {error}") from None


def open_installed(folder: Path, home: Home) -> Bundle:
    """Return a downloaded bundle after every check of `bundle.open_bundle`."""
    from anabranch.edge.runtime.bundle import open_bundle

    return open_bundle(folder, trusted=trust.read_trusted(home.trusted), versions=home.versions)


def _holds(folder: Path, manifest: bytes) -> bool:
    try:
        return (folder / MANIFEST).read_bytes() == manifest
    except OSError:
        return False


def _place(path: Path, target: Path) -> None:
    """Make a cached file appear in a bundle: by a hard link, or as a copy where there are none."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _complete(gateway: Gateway, file: Wanted, part: Path) -> bool:
    """Append to `part` until it has the announced size; return whether the digest is right."""
    failures = 0
    with part.open("ab+") as target:
        state = _hash_of(target)
        if target.tell() > file.size:
            return False
        while target.tell() < file.size:
            before = target.tell()
            try:
                _append(gateway, file, target, state)
            except GatewayUnavailable:
                failures = 0 if target.tell() > before else failures + 1
                if failures >= gateway.patience.attempts:
                    raise
                gateway.wait(failures)
            finally:
                target.flush()
                os.fsync(target.fileno())
    return state.hexdigest() == file.sha256


def _append(gateway: Gateway, file: Wanted, target: BinaryIO, state: hashlib._Hash) -> None:
    """Append what one call brings. Raises GatewayUnavailable if it ends early."""
    at = target.tell()
    request = edge_pb2.FetchRequest(sha256=bytes.fromhex(file.sha256), offset=at)
    chunks = gateway.fetch(request)
    try:
        for chunk in chunks:
            data = chunk.data
            if chunk.offset != at or not data or at + len(data) > file.size:
                raise ProtocolError(
                    f"{file.name}: a chunk of {len(data)} bytes at {chunk.offset}, expected some "
                    f"at {at} of {file.size}"
                )
            if zlib.crc32(data) != chunk.crc32:
                raise GatewayUnavailable(f"{file.name}: a chunk at {at} was damaged on its way")
            target.write(data)
            state.update(data)
            at += len(data)
    finally:
        chunks.close()  # type: ignore[attr-defined]  # a generator: ends the call
    if at < file.size:
        raise GatewayUnavailable(f"{file.name}: the gateway ended after {at} of {file.size} bytes")


def _hash_of(file: BinaryIO) -> hashlib._Hash:
    """Return the state of SHA-256 over a file, and leave its position at the end."""
    file.seek(0)
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state


def _is(path: Path, file: Wanted) -> bool:
    return _size(path) == file.size and path.is_file() and digest_of(path) == file.sha256


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _require_room(home: Home, manifest: Manifest) -> None:
    """Raise DeviceError unless all files that are not in the cache fit onto the disk together."""
    missing = {
        file.sha256: file.bytes - _size(home.cache / (file.sha256 + PART))
        for file in manifest.files.values()
        if _size(home.cache / file.sha256) != file.bytes
    }
    _require_space(home.cache, sum(missing.values()), f"{manifest.name} {manifest.version}")


def _require_space(folder: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed + RESERVE > free:
        raise DeviceError(
            f"{name}: {needed} bytes more, and {RESERVE} that stay free, but {folder} has {free}; "
            "free some space"
        )


def fetch_frame(gateway: Gateway, ref: edge_pb2.FileRef, home: Home) -> bytes:
    """Return the bytes of an adapter's frame, from the cache or the gateway."""
    return fetch(gateway, wanted(ref, limit=MAX_FRAME), home.cache).read_bytes()
